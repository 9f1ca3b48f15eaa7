"""``kspec-guidance demo | generate | evaluate``"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Varied images from any diffusers pipeline without retraining, and scores of how varied a set is.",
)
console = Console()
IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def _fail(message: str) -> typer.Exit:
    Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
    return typer.Exit(2)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def _generators(seed: int, n: int) -> list:
    import torch

    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures and numbers.")] = Path("outputs/demo"),
    images: Annotated[int, typer.Option(min=2, max=64, help="Images for each prompt.")] = 8,
    scale: Annotated[float, typer.Option(min=0, help="Strength of SPARKE.")] = 0.3,
    style_scale: Annotated[float, typer.Option(min=0, help="Strength of MMD guidance toward the Twemoji style.")] = 0.3,
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

        result = run_demo(out, images, scale, style_scale, steps, seed, tick)
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
    scale: Annotated[float, typer.Option(min=0, help="Strength of SPARKE; 0 is plain sampling.")] = 0.3,
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


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Folder of images, with metadata.jsonl if prompts are known.")],
    clip: Annotated[
        str | None, typer.Option(help="open_clip model and weights as NAME:FILE, for semantic features.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """How varied is a folder of images? Vendi and RKE, and for each prompt apart when metadata.jsonl is there."""
    import torch

    from kspec_guidance import functional as F

    if not folder.is_dir():
        raise _fail(f"{folder} is no folder")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_TYPES)
    pictures, names = _read_images(paths)
    if not pictures:
        raise _fail(f"{folder} holds no readable image ({', '.join(sorted(IMAGE_TYPES))})")
    embed = _embedder(clip)
    x = embed(pictures)
    prompts = _prompts(folder, names)
    groups = {p: torch.tensor([i for i, q in enumerate(prompts) if q == p]) for p in dict.fromkeys(prompts)}
    rows = {"all images": x} | ({p: x[i] for p, i in groups.items()} if len(groups) > 1 else {})
    scores = {
        name: {"images": len(z), "vendi": float(F.vendi_score(z)), "rke": float(F.rke_score(z))} for name, z in rows.items()
    }
    if len(groups) > 1:
        t = torch.eye(len(groups))[[list(groups).index(p) for p in prompts]]
        scores["all images"]["conditional_vendi"] = float(F.conditional_vendi_score(x, t))
    if as_json:
        typer.echo(json.dumps(scores, indent=1))
        return
    table = Table(
        title=f"{folder}: effective number of different images", caption="features: " + (clip or "demo autoencoder")
    )
    for column in ("set", "images", "Vendi", "RKE", "Conditional-Vendi"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for name, s in scores.items():
        conditional = f"{s['conditional_vendi']:.2f}" if "conditional_vendi" in s else ""
        table.add_row(name, str(s["images"]), f"{s['vendi']:.2f}", f"{s['rke']:.2f}", conditional)
    console.print(table)


def _read_images(paths: list[Path]) -> tuple[list, list[str]]:
    from PIL import Image

    pictures, names, bad = [], [], []
    for path in paths:
        try:
            with Image.open(path) as file:
                pictures.append(file.convert("RGBA"))
            names.append(path.name)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            bad.append(path.name)
    if bad:
        Console(stderr=True).print(f"[yellow]skipped {len(bad)} unreadable: {', '.join(bad[:5])}[/]", highlight=False)
    return pictures, names


def _prompts(folder: Path, names: list[str]) -> list[str]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        return [""] * len(names)
    said = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            said[row["file_name"]] = str(row.get("prompt", ""))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise _fail(f"{path} line {number} is no JSON object with file_name and prompt ({error})") from error
    return [said.get(name, "") for name in names]


def _embedder(clip: str | None) -> Callable:
    from kspec_guidance.embedders import open_clip_embedder, pipeline_embedder

    if clip is None:
        from kspec_guidance import load_demo_pipeline

        return pipeline_embedder(load_demo_pipeline())
    name, _, weights = clip.partition(":")
    if not Path(weights).is_file():
        raise _fail(f"--clip wants NAME:FILE with an existing weights file, got {clip!r}")
    return open_clip_embedder(name, weights)


if __name__ == "__main__":
    app()
