"""The command ``kspec-guidance demo``."""

from pathlib import Path
from typing import Annotated

import typer

from kspec_guidance.cli.console import console, counter

__all__ = ["demo"]


def demo(
    out: Annotated[Path, typer.Option(help="Output folder for images and scores.")] = Path("outputs/demo"),
    images_per_prompt: Annotated[
        int, typer.Option("--images-per-prompt", "--images", min=2, max=64, help="Images per prompt.")
    ] = 8,
    scale: Annotated[float, typer.Option(min=0, help="Scale of SPARKE.")] = 1.0,
    mmd_scale: Annotated[float, typer.Option(min=0, help="Scale of MMD guidance toward skin tones.")] = 0.7,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    seed: Annotated[int, typer.Option(help="First seed; image k of every prompt uses seed + k.")] = 0,
) -> None:
    """Compare plain and guided images of the embedded emoji pipeline, for the same prompts and seeds, with scores."""
    from kspec_guidance.cli.showcase import run_demo

    with counter("generating") as progress_callback:
        result = run_demo(out, images_per_prompt, scale, mmd_scale, steps, seed, progress_callback)
    for table in result.tables():
        console.print(table)
    for path in result.files:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
