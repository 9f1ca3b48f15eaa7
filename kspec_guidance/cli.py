"""``kspec-guidance demo | generate | evaluate | compare``"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kspec_guidance.embedders.names import IMAGE_NAMES, TEXT_NAMES

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Varied images from any diffusers pipeline without retraining, and scores of how varied a set is.",
)
console = Console()


def _fail(message: str) -> typer.Exit:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


def _progress() -> Progress:
    """Bars on the error stream, so that what is printed can be piped; none when nobody is there to see them."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    errors = Console(stderr=True)
    return Progress(*columns, console=errors, disable=not errors.is_terminal)


def _generators(seed: int, n: int) -> list:
    import torch

    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and numbers.")] = Path("outputs/demo"),
    images: Annotated[int, typer.Option(min=2, max=64, help="Images for each prompt.")] = 8,
    scale: Annotated[float, typer.Option(min=0, help="Strength of SPARKE.")] = 0.6,
    mmd_scale: Annotated[float, typer.Option(min=0, help="Strength of MMD guidance toward skin tones.")] = 0.7,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    seed: Annotated[int, typer.Option(help="First seed; image k of every prompt uses seed + k.")] = 0,
) -> None:
    """The embedded emoji pipeline, plain and guided, same prompts and seeds, side by side with the scores."""
    from kspec_guidance.showcase import run_demo

    with _progress() as progress:
        task: Any = None

        def tick(done: int, total: int) -> None:
            nonlocal task
            task = progress.add_task("generating", total=total) if task is None else task
            progress.update(task, completed=done)

        result = run_demo(out, images, scale, mmd_scale, steps, seed, tick)
    for table in result.tables():
        console.print(table)
    for path in result.files:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


@app.command()
def generate(
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts, each in quotes.")],
    out: Annotated[Path, typer.Option(help="Folder for the images and metadata.jsonl.")] = Path("outputs/images"),
    model: Annotated[str, typer.Option(help="'demo' for the embedded pipeline, or a diffusers folder or hub id.")] = "demo",
    images: Annotated[int, typer.Option(min=1, help="Images for each prompt.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Images made at once; they repel each other directly.")] = 8,
    scale: Annotated[float, typer.Option(min=0, help="Strength of SPARKE; 0 is plain sampling.")] = 0.6,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 5.0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    memory: Annotated[Path | None, typer.Option(help="Memory file, read if it exists and written at the end.")] = None,
) -> None:
    """Generate images that differ from each other and from what the memory holds. File names are numbers."""
    from kspec_guidance import SPARKE, MemoryBank, MemoryFileError, load_demo_pipeline

    try:
        bank = MemoryBank.load(memory) if memory is not None and memory.exists() else MemoryBank()
    except (MemoryFileError, OSError) as error:
        raise _fail(str(error)) from error
    if model == "demo":
        pipe: Any = load_demo_pipeline()
    else:
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise _fail(f"cannot load {model!r}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    guide = SPARKE(scale, memory=bank)
    try:
        out.mkdir(parents=True, exist_ok=True)
        count = len(list(out.glob("[0-9]*.png")))
        with _progress() as progress, guide.attach(pipe), (out / "metadata.jsonl").open("a") as metadata:
            task = progress.add_task("images", total=images * len(prompt))
            for p in prompt:
                for start in range(0, images, batch):
                    n = min(batch, images - start)
                    result = pipe(
                        p, num_images_per_prompt=n, num_inference_steps=steps, guidance_scale=guidance_scale,
                        generator=_generators(seed + start, n),
                    )  # fmt: skip
                    for k, image in enumerate(result.images):
                        name = f"{count:06d}.png"
                        image.save(out / name)
                        row = {"file_name": name, "prompt": p, "seed": seed + start + k, "scale": scale}
                        metadata.write(json.dumps(row) + "\n")
                        count += 1
                    progress.advance(task, n)
        if memory is not None:
            memory.parent.mkdir(parents=True, exist_ok=True)
            bank.save(memory)
    except (ValueError, OSError) as error:
        raise _fail(str(error)) from error
    console.print(str(guide.report()), highlight=False)
    console.print(f"wrote {images * len(prompt)} images to {out}", highlight=False, soft_wrap=True)


EMBEDDER_HELP = f"Image features: {IMAGE_NAMES}."
TEXT_HELP = f"Prompt features: {TEXT_NAMES}; with none, prompts are the same or not."


def _load(folder: Path, embedder: Any, prompts: Path | None, cache: Path | None) -> Any:
    """An image set, with a progress bar; unreadable files are named on the error stream."""
    from kspec_guidance.sources import load_images

    with _progress() as progress:
        task = progress.add_task(f"reading {folder.name or folder}", total=None)
        found = load_images(folder, embedder, prompts, cache, lambda n: progress.advance(task, n))
        progress.update(task, total=len(found))
    if found.skipped:
        names = ", ".join(found.skipped[:5]) + (" ..." if len(found.skipped) > 5 else "")
        Console(stderr=True).print(
            f"[yellow]skipped {len(found.skipped)} unreadable: {escape(names)}[/]", highlight=False, soft_wrap=True
        )
    return found


def _scores(records: list, title: str, embedder: str) -> Table:
    table = Table(title=escape(title), caption=f"features: {escape(embedder)}; intervals 95%, jackknife")
    for column in ("score", "value", "interval", "kernel"):
        table.add_column(column, justify="right" if column in ("value", "interval") else "left")
    for r in records:
        bounds = f"{r.interval[0]:.3g} to {r.interval[1]:.3g}" if r.interval else ""
        kernels = [k.partition("Kernel")[0] for k in r.kernel.split(" x ")]
        table.add_row(r.score, f"{r.value:.3f}", bounds, " x ".join(dict.fromkeys(kernels)))
    return table


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of images, .tar shards (WebDataset) or .parquet files.")],
    reference: Annotated[Path | None, typer.Option(help="A second set, for fidelity and novelty.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="metadata.jsonl or captions.csv; the folder's own is found by itself.")
    ] = None,
    embedder: Annotated[str, typer.Option(help=EMBEDDER_HELP)] = "demo",
    text_embedder: Annotated[str, typer.Option(help=TEXT_HELP)] = "none",
    out: Annotated[Path, typer.Option(help="The page to write; the numbers go beside it as JSON.")] = Path("report.html"),
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps features between runs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table, and write no page.")] = False,
) -> None:
    """How varied is a set of images, and given its prompts? A table, and a page with pictures."""
    from kspec_guidance.embedders import image_embedder
    from kspec_guidance.embedders import text_embedder as named_text_embedder
    from kspec_guidance.evaluation import evaluate_set
    from kspec_guidance.report_page import write_page

    try:
        embed, embed_text = image_embedder(embedder), named_text_embedder(text_embedder)
        images = _load(folder, embed, prompts, cache)
        other = None if reference is None else _load(reference, embed, None, cache)
        result = evaluate_set(images, embed, embed_text, other)
        if as_json:
            typer.echo(json.dumps(result.as_dict(), indent=1, default=list))
            return
        write_page(result, out)
    except (ValueError, OSError, ImportError) as error:
        raise _fail(str(error)) from error
    console.print(_scores(result.scores, f"{folder}: {len(images)} images", embed.name))
    console.print(f"wrote {out} and {out.with_suffix('.json')}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of images, .tar shards or .parquet files.")],
    second: Annotated[Path, typer.Argument(help="The other one.")],
    embedder: Annotated[str, typer.Option(help=EMBEDDER_HELP)] = "demo",
    text_embedder: Annotated[str, typer.Option(help=TEXT_HELP)] = "none",
    out: Annotated[Path, typer.Option(help="The page to write; the numbers go beside it as JSON.")] = Path("compare.html"),
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps features between runs.")] = None,
) -> None:
    """Do two sets differ in variety, and what does each have that the other lacks?"""
    from kspec_guidance.embedders import image_embedder
    from kspec_guidance.embedders import text_embedder as named_text_embedder
    from kspec_guidance.evaluation import compare_sets
    from kspec_guidance.report_page import write_page

    try:
        embed, embed_text = image_embedder(embedder), named_text_embedder(text_embedder)
        a, b = _load(first, embed, None, cache), _load(second, embed, None, cache)
        result = compare_sets(a, b, embed, embed_text)
        write_page(result, out)
    except (ValueError, OSError, ImportError) as error:
        raise _fail(str(error)) from error
    table = Table(title="permutation tests on equally many images", caption=f"features: {escape(embed.name)}")
    for column in ("score", "first", "second", "difference", "p"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for name, test in result.tests.items():
        table.add_row(name, f"{test.a:.3f}", f"{test.b:.3f}", f"{test.difference:+.3f}", f"{test.p_value:.3f}")
    console.print(table)
    console.print(_scores(result.scores, f"{first} with {second} as reference", embed.name))
    console.print(f"wrote {out} and {out.with_suffix('.json')}", highlight=False, soft_wrap=True, markup=False)


if __name__ == "__main__":
    app()
