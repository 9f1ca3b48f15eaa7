"""``kspec-guidance demo | generate | tune | evaluate | compare``"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kspec_guidance.evaluation.embedders.names import IMAGE_NAMES, TEXT_NAMES

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


@contextmanager
def _ticking(what: str) -> Iterator[Any]:
    """A bar that is told what is done and how much there is: ``tick(done, total)``."""
    with _progress() as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and numbers.")] = Path("outputs/demo"),
    images: Annotated[int, typer.Option(min=2, max=64, help="Images for each prompt.")] = 8,
    scale: Annotated[float, typer.Option(min=0, help="Strength of SPARKE.")] = 1.0,
    mmd_scale: Annotated[float, typer.Option(min=0, help="Strength of MMD guidance toward skin tones.")] = 0.7,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    seed: Annotated[int, typer.Option(help="First seed; image k of every prompt uses seed + k.")] = 0,
) -> None:
    """The embedded emoji pipeline, plain and guided, same prompts and seeds, side by side with the scores."""
    from kspec_guidance.cli.showcase import run_demo

    with _ticking("generating") as tick:
        result = run_demo(out, images, scale, mmd_scale, steps, seed, tick)
    for table in result.tables():
        console.print(table)
    for path in result.files:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


@app.command()
def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="File of prompts (txt, csv, tsv, jsonl, json, parquet), or a dataset's folder or hub name."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for images and metadata; a run that ended goes on.")] = Path(
        "outputs/images"
    ),
    model: Annotated[str, typer.Option(help="'demo' for the embedded pipeline, or a diffusers folder or hub id.")] = "demo",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; by default this process's own GPU.")] = None,
    images: Annotated[int, typer.Option(min=1, help="Images for each prompt.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Images made at once; they repel each other directly.")] = 8,
    scale: Annotated[float, typer.Option(min=0, help="Strength of SPARKE; 0 is plain sampling.")] = 1.0,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 5.0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    option: Annotated[
        list[str] | None, typer.Option(help="Further arguments of the pipeline's call, as name=value (height=512).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the run; each image's own follows from it.")] = 0,
    quota: Annotated[
        list[str] | None, typer.Option(help="group=number: images of a group of prompts, instead of --images each.")
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(help="name=folder:share: keep images in shares that are near sets of reference images; two or more."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Stop a prompt early, for instance at 'vendi>=12'.")] = None,
    filter: Annotated[
        str | None, typer.Option(help="module:function, called with image and row; True keeps, False or a reason drops.")
    ] = None,
    duplicates: Annotated[float | None, typer.Option(help="Drop images with this cosine to a kept one, e.g. 0.98.")] = None,
    memory: Annotated[
        Path | None, typer.Option(help="Memory file: read if it exists, and written at the end with the new images.")
    ] = None,
    keep: Annotated[str, typer.Option(help="Kind of memory: auto, exact or centroids.")] = "auto",
    by: Annotated[str, typer.Option(help="One memory for 'all' prompts, or one for each 'group'.")] = "all",
    exchange: Annotated[int, typer.Option(min=1, help="Batches between two exchanges of the processes' memories.")] = 8,
    format: Annotated[str, typer.Option(help="imagefolder, webdataset or parquet.")] = "imagefolder",
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a shard of webdataset or parquet.")] = 1000,
    report: Annotated[bool, typer.Option(help="Write report.html at the end.")] = True,
    dry_run: Annotated[bool, typer.Option(help="Say what would be done, how long, with how much memory and disk.")] = False,
    force: Annotated[bool, typer.Option(help="Go on with changed settings or past damage; finished images count.")] = False,
) -> None:
    """Generate a set of images that differ from each other and from what the memory holds, as far as prompts are alike.

    Killed or stopped, it goes on when it is run again. Several processes: accelerate launch -m kspec_guidance generate ...
    """
    from kspec_guidance import SPARKE, MemoryBank, MemoryFileError
    from kspec_guidance.synthesis import SynthesisError, estimate, synthesize
    from kspec_guidance.synthesis.filters import load_filter
    from kspec_guidance.synthesis.quotas import read_attribute

    try:
        source: Any = prompts if prompts is not None else list(prompt or [])
        if prompts is not None and prompt:
            raise SynthesisError("give prompts either on the line or by --prompts, not both")
        if not source:
            raise SynthesisError("no prompts: give some in quotes, or a file by --prompts")
        bank = MemoryBank.load(memory) if memory is not None and memory.exists() else MemoryBank()
        pipe = _pipeline(model, dtype, device)
        call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, **_options(option)}
        guide = SPARKE(scale, memory=bank)
        quotas: dict[str, Any] = {name: int(number) for name, number in _pairs(quota, "--quota").items()}
        for name, references in _pairs(attribute, "--attribute").items():
            height = call.get("height")
            quotas[name] = read_attribute(pipe, references, (height, call.get("width", height)) if height else None)
        if dry_run:
            said = estimate(source, out, pipe, guide, images, batch, call=call, quotas=quotas, memory=keep)
            console.print(str(said), highlight=False, markup=False)
            return
        with _bar() as tick:
            result = synthesize(
                source, out, pipe, guide, images, batch, call=call, seed=seed, quotas=quotas, target=target,
                filter=None if filter is None else load_filter(filter), duplicates=duplicates, memory=keep, memory_by=by,
                exchange=exchange, format=format, shard_size=shard_size, report=report, force=force, tick=tick,
                memory_file=memory,
            )  # fmt: skip
    except (SynthesisError, MemoryFileError, ValueError, OSError) as error:
        raise _fail(str(error)) from error
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; run the same command again to go on", highlight=False)
        raise typer.Exit(130) from None
    if result.first:
        console.print(str(result), highlight=False, soft_wrap=True, markup=False)
        if result.report is not None:
            console.print(f"wrote {result.report}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def tune(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes; six or more tell most.")] = None,
    prompts: Annotated[str | None, typer.Option(help="File of prompts (txt, csv, tsv, jsonl, json, parquet).")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the plot, pictures, numbers and the chosen guide.")] = Path(
        "outputs/tune"
    ),
    model: Annotated[str, typer.Option(help="'demo' for the embedded pipeline, or a diffusers folder or hub id.")] = "demo",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.")] = None,
    preset: Annotated[str, typer.Option(help="default, safe, vivid, few-step or published.")] = "default",
    scale: Annotated[list[float] | None, typer.Option(min=0, help="Strengths to try; may be given again.")] = None,
    images: Annotated[int, typer.Option(min=2, help="Images of a batch.")] = 8,
    batches: Annotated[int, typer.Option(min=1, help="Batches for each prompt and strength.")] = 2,
    loss: Annotated[float, typer.Option(min=0, help="Fidelity that may be lost, in 0..1.")] = 0.05,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 5.0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    option: Annotated[list[str] | None, typer.Option(help="Further arguments of the pipeline's call, name=value.")] = None,
    embedder: Annotated[
        str, typer.Option(help=f"Image features: own (the pipeline's autoencoder), {IMAGE_NAMES}.")
    ] = "own",
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
) -> None:
    """Find a strength for your pipeline by short runs, diversity against fidelity; or hear that guidance does not help."""
    from kspec_guidance import SPARKE
    from kspec_guidance.evaluation.embedders import image_embedder
    from kspec_guidance.plotting import side_by_side
    from kspec_guidance.synthesis.errors import SynthesisError
    from kspec_guidance.synthesis.prompts import read_prompts
    from kspec_guidance.tuning import SCALES
    from kspec_guidance.tuning import tune as find

    try:
        if (prompts is None) == (not prompt):
            raise ValueError("give prompts either in quotes or by --prompts")
        texts = list(prompt or []) if prompts is None else [p.text for p in read_prompts(prompts)]
        pipe = _pipeline(model, dtype, device)
        SPARKE.preset(preset, scale=0.1)  # refuse an unknown name before anything is generated
        call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, **_options(option)}
        with _ticking("batches") as tick:
            embed = None if embedder == "own" else image_embedder(embedder)
            result = find(
                pipe, texts, lambda s: SPARKE.preset(preset, scale=s), scale or SCALES, images, batches, embed=embed, call=call,
                loss=loss, seed=seed, tick=tick,
            )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        (out / "tune.json").write_text(json.dumps(result.as_dict(), indent=1) + "\n")
        result.plot(out / "tune.png")
        chosen = (
            [p.scale for p in result.points].index(result.scale) + 1 if result.scale is not None else len(result.points)
        )
        shown = {"plain": result.images[0], f"strength {result.points[chosen - 1].scale:g}": result.images[chosen]}
        names = texts[:6]
        panels = {name: [by[t][:6] for t in names] for name, by in shown.items()}
        side_by_side(panels, names, "The same prompts and seeds").save(out / "pictures.png")
        if result.scale is not None:
            SPARKE.preset(preset, scale=result.scale).save_config(out / "guide")
    except (SynthesisError, ValueError, OSError) as error:
        raise _fail(str(error)) from error
    table = Table(title="strength against plain sampling", caption="diversity: Vendi of a batch; fidelity: precision")
    for column in ("strength", "diversity", "p", "fidelity"):
        table.add_column(column, justify="right")
    table.add_row("plain", f"{result.plain_diversity:.2f}", "", f"{result.plain_fidelity:.2f}")
    for p in result.points:
        style = "bold" if p.scale == result.scale else ""
        table.add_row(f"{p.scale:g}", f"{p.diversity:.2f}", f"{p.test.p_value:.3f}", f"{p.fidelity:.2f}", style=style)
    console.print(table)
    console.print(result.reason, highlight=False, markup=False)
    written = ["tune.png", "pictures.png", "tune.json"] + (["guide"] if result.scale is not None else [])
    for name in written:
        console.print(f"wrote {out / name}", highlight=False, soft_wrap=True, markup=False)


def _pipeline(model: str, dtype: str, device: str | None) -> Any:
    import os

    import torch

    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise ValueError(f"dtype must be one of {', '.join(kinds)}, got {dtype!r}")
    if model == "demo":
        from kspec_guidance import load_demo_pipeline

        pipe: Any = load_demo_pipeline(kinds[dtype])
    else:
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True, torch_dtype=kinds[dtype])
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot load {model!r}: {error}") from error
    if device is None and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    try:
        if device not in (None, "cpu"):
            pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pairs(values: list[str] | None, name: str) -> dict[str, str]:
    found = {}
    for value in values or []:
        key, equals, text = value.partition("=")
        if not (key and equals and text):
            raise ValueError(f"{name} is given as name=value, got {value!r}")
        found[key] = text
    return found


def _options(values: list[str] | None) -> dict[str, Any]:
    """Values are read as JSON where they are JSON: numbers, true, null, lists."""
    found: dict[str, Any] = {}
    for key, text in _pairs(values, "--option").items():
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


@contextmanager
def _bar() -> Iterator[Any]:
    """Images made, rate, time left and diversity; a line every half minute where nobody watches."""
    columns = (
        TextColumn("images"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]:.1f}/s"),
        TextColumn("{task.fields[left]} left"), TextColumn("{task.fields[more]}"),
    )  # fmt: skip
    errors = Console(stderr=True)
    progress = Progress(*columns, console=errors, disable=not errors.is_terminal)
    task = progress.add_task("images", total=None, rate=0.0, left="?", more="")
    told = time.monotonic()

    def tick(now: Any) -> None:
        nonlocal told
        left = "?" if now.remaining == float("inf") else str(timedelta(seconds=round(now.remaining)))
        more = "" if now.diversity is None else f"Vendi {now.diversity:.0%} of images"
        more += f", {now.rejected} dropped" if now.rejected else ""
        progress.update(task, completed=now.done, total=now.total, rate=now.rate, left=left, more=more)
        if not errors.is_terminal and time.monotonic() - told > 30:
            told = time.monotonic()
            errors.print(f"{now.done} of {now.total} images, {now.rate:.1f}/s, {left} left {more}", highlight=False)

    with progress:
        yield tick


EMBEDDER_HELP = f"Image features: {IMAGE_NAMES}."
TEXT_HELP = f"Prompt features: {TEXT_NAMES}; with none, prompts are the same or not."


def _load(folder: Path, embedder: Any, prompts: Path | None, cache: Path | None) -> Any:
    """An image set, with a progress bar; unreadable files are named on the error stream."""
    from kspec_guidance.evaluation.image_sets import load_images

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
    from kspec_guidance.evaluation import evaluate_set
    from kspec_guidance.evaluation.embedders import image_embedder
    from kspec_guidance.evaluation.embedders import text_embedder as named_text_embedder
    from kspec_guidance.evaluation.page import write_page

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
    from kspec_guidance.evaluation import compare_sets
    from kspec_guidance.evaluation.embedders import image_embedder
    from kspec_guidance.evaluation.embedders import text_embedder as named_text_embedder
    from kspec_guidance.evaluation.page import write_page

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
