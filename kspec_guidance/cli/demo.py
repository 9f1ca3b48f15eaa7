"""The command ``kspec-guidance demo``."""

from pathlib import Path
from typing import Annotated

import typer

from kspec_guidance.cli.arguments import (
    GUIDANCE,
    IMAGES,
    Json,
    Quiet,
    Scale,
    Seed,
    Steps,
    Variety,
    Version,
    check_strength,
    finite,
    folder_option,
)
from kspec_guidance.cli.console import command_output

__all__ = ["demo"]


def demo(
    images_per_prompt: Annotated[
        int,
        typer.Option("--images-per-prompt", "--images", min=2, max=64, help="Images per prompt.", rich_help_panel=IMAGES),
    ] = 8,
    seed: Seed = 0,
    steps: Steps = 20,
    variety: Variety = None,
    scale: Scale = None,
    mmd_scale: Annotated[
        float,
        typer.Option(min=0, help="Scale of MMD guidance toward skin tones.", rich_help_panel=GUIDANCE, callback=finite),
    ] = 1.0,
    out: Annotated[Path, folder_option("Folder for images and scores.")] = Path("outputs/demo"),
    as_json: Json = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Compare plain and guided images of the embedded emoji pipeline, for the same prompts and seeds, with scores."""
    check_strength(variety, scale)
    with command_output(as_json, quiet) as output:
        output.note("loading the embedded model ...")
        from kspec_guidance import SPARKE
        from kspec_guidance.cli.showcase import run_demo

        with output.counter("generating") as progress_callback:
            guide = SPARKE(scale, variety=variety)
            result = run_demo(out, images_per_prompt, guide, mmd_scale, steps, seed, progress_callback)
        output.wrote(*result.files)
        output.result(result.as_dict(), *result.tables())
