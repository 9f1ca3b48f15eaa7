"""The command ``kspec-guidance calibrate``."""

from dataclasses import asdict
from typing import Annotated

import typer

from kspec_guidance.cli.arguments import (
    IMAGES,
    Device,
    Dtype,
    GuidanceScale,
    Json,
    Model,
    Option,
    Prompts,
    PromptTexts,
    Quiet,
    Seed,
    Steps,
    Version,
    check_prompt_source,
    load_pipeline,
    read_options,
)
from kspec_guidance.cli.console import command_output

__all__ = ["calibrate"]


def calibrate(
    prompt: PromptTexts = None,
    prompts: Prompts = None,
    model: Model = "demo",
    dtype: Dtype = "float32",
    device: Device = None,
    guidance_scale: GuidanceScale = 5.0,
    steps: Steps = 20,
    option: Option = None,
    images_per_prompt: Annotated[
        int, typer.Option("--images-per-prompt", "--images", min=2, help="Images per prompt.", rich_help_panel=IMAGES)
    ] = 4,
    seed: Seed = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Measure what --variety does on a pipeline by a few short runs, so that one value has like effects on all.

    The result is kept in your cache, and used by later calls of the pipeline with similar --steps and --guidance-scale.
    """
    check_prompt_source(prompt, prompts)
    call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, **read_options(option)}
    with command_output(as_json, quiet) as output:
        output.note(f"loading model {model} ...")
        from kspec_guidance.calibration import calibrate as measure
        from kspec_guidance.guidance.calibration import calibration_file
        from kspec_guidance.synthesis import read_prompts

        texts = [p.text for p in read_prompts(list(prompt or []) if prompts is None else prompts)]
        pipe = load_pipeline(model, dtype, device)
        output.kept = "nothing was kept; the same command starts anew"
        with output.counter("runs") as show:
            found = measure(pipe, texts, images_per_prompt, call=call, seed=seed, progress_callback=show)
        output.wrote(calibration_file())
        output.result(
            asdict(found) | {"file": calibration_file()},
            f"factor {found.factor:.2f} for {found.steps} steps, guidance scale {found.guidance_scale}: at --variety 50, "
            f"two images of a prompt are {found.alike_guided / found.alike:.0%} as alike as plain ones",
        )
