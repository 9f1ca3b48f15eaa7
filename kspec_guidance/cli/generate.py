"""The command ``kspec-guidance generate``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kspec_guidance.cli.arguments import (
    DEVICE_HELP,
    DTYPE_HELP,
    MODEL_HELP,
    OPTION_HELP,
    load_pipeline,
    read_options,
    read_pairs,
)
from kspec_guidance.cli.console import console, errors, fail, plain_warnings, synthesis_progress

__all__ = ["generate"]

PROMPTS_HELP = "File of prompts (txt, csv, tsv, jsonl, json, parquet), or a dataset's folder or hub name."


def generate(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.")] = None,
    prompts: Annotated[str | None, typer.Option(help=PROMPTS_HELP)] = None,
    out: Annotated[Path, typer.Option(help="Output folder for images and metadata; an interrupted run is resumed.")] = Path(
        "outputs/images"
    ),
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "float32",
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    images_per_prompt: Annotated[
        int, typer.Option("--images-per-prompt", "--images", min=1, help="Images per prompt.")
    ] = 8,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", min=1, help="Images per batch; they repel each other directly.")
    ] = 8,
    scale: Annotated[float, typer.Option(min=0, help="Scale of SPARKE; 0 is plain sampling.")] = 1.0,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 5.0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the run, from which the seeds of images are derived.")] = 0,
    quota: Annotated[
        list[str] | None,
        typer.Option(help="group=number: images of a group of prompts, instead of --images-per-prompt."),
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(help="name=folder:share: share of images to keep near a reference set; two or more sets."),
    ] = None,
    target: Annotated[str | None, typer.Option(help="Stop a prompt early, e.g. at 'vendi>=12'.")] = None,
    filter: Annotated[
        str | None, typer.Option(help="module:function, called with image and row; True keeps, False or a reason drops.")
    ] = None,
    duplicates: Annotated[
        float | None, typer.Option(help="Drop images with at least this cosine to a kept one, e.g. 0.98.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Kind of memory: auto, exact or centroids.")] = "auto",
    memory_by: Annotated[str, typer.Option(help="One memory for 'all' prompts, or one per 'group'.")] = "all",
    memory_file: Annotated[
        Path | None, typer.Option(help="Memory file: read if it exists, and written at the end with the new images.")
    ] = None,
    exchange: Annotated[int, typer.Option(min=1, help="Batches between two exchanges of the processes' memories.")] = 8,
    format: Annotated[str, typer.Option(help="imagefolder, webdataset or parquet.")] = "imagefolder",
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a shard of webdataset or parquet.")] = 1000,
    report: Annotated[bool, typer.Option(help="Write report.html at the end.")] = True,
    dry_run: Annotated[bool, typer.Option(help="Print estimates of images, time, memory and disk; write nothing.")] = False,
    force: Annotated[bool, typer.Option(help="Continue despite changed settings or damage; keep finished images.")] = False,
) -> None:
    """Generate images that differ from each other, and from those in memory, if their prompts are similar.

    The same command resumes an interrupted run. Several processes: accelerate launch -m kspec_guidance generate ...
    """
    from kspec_guidance import SPARKE, MemoryBank
    from kspec_guidance.memory import MemoryFileError
    from kspec_guidance.synthesis import SynthesisError, estimate, synthesize
    from kspec_guidance.synthesis.filters import load_filter
    from kspec_guidance.synthesis.quotas import read_attribute

    try:
        source: Any = prompts if prompts is not None else list(prompt or [])
        if prompts is not None and prompt:
            raise SynthesisError("give prompts either as arguments or with --prompts, not both")
        if not source:
            raise SynthesisError("no prompts; give them as arguments, each in quotes, or as a file with --prompts")
        bank = MemoryBank.load(memory_file) if memory_file is not None and memory_file.exists() else MemoryBank()
        pipe = load_pipeline(model, dtype, device)
        call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, **read_options(option)}
        guide = SPARKE(scale, memory=bank)
        quotas: dict[str, Any] = {}
        for name, number in read_pairs(quota, "--quota").items():
            if not number.isdecimal():
                raise SynthesisError(f"--quota {name} is a number of images, got {number!r}")
            quotas[name] = int(number)
        for name, references in read_pairs(attribute, "--attribute").items():
            if name in quotas:
                raise SynthesisError(f"{name!r} is both a --quota and an --attribute; give them different names")
            height = call.get("height")
            quotas[name] = read_attribute(pipe, references, (height, call.get("width", height)) if height else None)
        if dry_run:
            plan = estimate(
                source, out, pipe, guide, images_per_prompt, batch_size, call=call, quotas=quotas, memory=memory
            )
            console.print(str(plan), highlight=False, markup=False)
            return
        with plain_warnings(), synthesis_progress() as progress_callback:
            result = synthesize(
                source, out, pipe, guide, images_per_prompt, batch_size, call=call, seed=seed, quotas=quotas, target=target,
                filter=None if filter is None else load_filter(filter), duplicates=duplicates, memory=memory,
                memory_by=memory_by, exchange=exchange, format=format, shard_size=shard_size, report=report, force=force,
                progress_callback=progress_callback, memory_file=memory_file,
            )  # fmt: skip
    except (SynthesisError, MemoryFileError, ValueError, OSError) as error:
        raise fail(str(error)) from error
    except KeyboardInterrupt:
        errors().print("stopped; run the same command again to resume", highlight=False)
        raise typer.Exit(130) from None
    if result.first:
        console.print(str(result), highlight=False, soft_wrap=True, markup=False)
        if result.report is not None:
            console.print(f"wrote {result.report}", highlight=False, soft_wrap=True, markup=False)
