"""The command ``kspec-guidance tune``."""

import json
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any

import typer
from rich.table import Table

from kspec_guidance.cli.arguments import (
    FEATURES,
    GUIDANCE,
    IMAGE_EMBEDDERS,
    IMAGES,
    PRESETS,
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
    finite,
    folder_option,
    load_pipeline,
    named,
    read_options,
)
from kspec_guidance.cli.console import command_output, plain_values

__all__ = ["tune"]

SHOWN_PROMPTS, SHOWN_IMAGES = 3, 6  # in the picture, at most
MAX_TILE = 160  # pixels of an image in it
OWN_EMBEDDERS = ("own", *IMAGE_EMBEDDERS)


def tune(
    prompt: PromptTexts = None,
    prompts: Prompts = None,
    model: Model = "demo",
    dtype: Dtype = "float32",
    device: Device = None,
    guidance_scale: GuidanceScale = 5.0,
    steps: Steps = 20,
    option: Option = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch", min=2, help="Images per batch.", rich_help_panel=IMAGES)
    ] = 8,
    batches: Annotated[int, typer.Option(min=1, help="Batches per prompt and scale.", rich_help_panel=IMAGES)] = 2,
    seed: Seed = 0,
    preset: Annotated[
        str, typer.Option(help=f"{', '.join(PRESETS)}.", rich_help_panel=GUIDANCE, callback=named(*PRESETS))
    ] = "default",
    scale: Annotated[
        list[float] | None,
        typer.Option(min=0, help="Scales to try; may be repeated.", rich_help_panel=GUIDANCE, callback=finite),
    ] = None,
    max_fidelity_loss: Annotated[
        float,
        typer.Option(
            "--max-fidelity-loss",
            "--loss",
            min=0,
            max=1,
            help="Largest accepted loss of fidelity.",
            rich_help_panel=GUIDANCE,
            callback=finite,
        ),
    ] = 0.05,
    min_gain: Annotated[
        float,
        typer.Option(
            min=0, help="Smallest gain in diversity that matters: 0.1 is 10%.", rich_help_panel=GUIDANCE, callback=finite
        ),
    ] = 0.1,
    embedder: Annotated[
        str | None,
        typer.Option(
            help=f"Image features: own (the pipeline's autoencoder; the default for demo), {', '.join(IMAGE_EMBEDDERS)}; "
            "auto is the default for other models.",
            rich_help_panel=FEATURES,
            callback=named(*OWN_EMBEDDERS),
        ),
    ] = None,
    out: Annotated[Path, folder_option("Folder for plot, images, scores and guide.")] = Path("outputs/tune"),
    as_json: Json = False,
    quiet: Quiet = False,
    version: Version = False,
) -> None:
    """Find a scale for a pipeline by diversity and fidelity of short runs.

    Or report that guidance does not help, or that there are too few images to tell, and how many are needed.
    """
    check_prompt_source(prompt, prompts)
    call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, **read_options(option)}
    with command_output(as_json, quiet) as output:
        output.note(f"loading model {model} ...")
        from kspec_guidance import SPARKE
        from kspec_guidance.evaluation.embedders import image_embedder
        from kspec_guidance.plotting import plot_tuning
        from kspec_guidance.synthesis import read_prompts
        from kspec_guidance.tuning import DEFAULT_SCALES
        from kspec_guidance.tuning import tune as find

        texts = [p.text for p in read_prompts(list(prompt or []) if prompts is None else prompts)]
        pipe = load_pipeline(model, dtype, device)
        chosen = embedder or ("own" if model == "demo" else "auto")
        embed = None if chosen == "own" else image_embedder(chosen)
        features = "own (the pipeline's autoencoder)" if embed is None else embed.name
        with output.counter("batches") as show:

            def progress_callback(done: int, total: int) -> None:
                show(done, total)
                output.kept = (
                    f"{done} of {total} batches were made and nothing was written; the same command starts anew, and fewer "
                    "prompts, --scale, --batches or --steps take less time"
                )

            result = find(
                pipe,
                texts,
                lambda s: SPARKE.preset(preset, scale=s),
                scale or DEFAULT_SCALES,
                batch_size,
                batches,
                embed=embed,
                call=call,
                max_fidelity_loss=max_fidelity_loss,
                min_gain=min_gain,
                seed=seed,
                progress_callback=progress_callback,
            )
        files = [out / name for name in ("tune.png", "images.png", "tune.json")]
        out.mkdir(parents=True, exist_ok=True)
        plot_tuning(result, files[0])
        _strengths(result, texts[:SHOWN_PROMPTS]).save(files[1])
        record = {"embedder": {"name": features}, **result.as_dict()}
        files[2].write_text(json.dumps(plain_values(record), indent=1) + "\n")
        if result.scale is not None:
            files.append(out / "guide")
            SPARKE.preset(preset, scale=result.scale).save_config(files[-1])
        output.wrote(*files)
        output.result({**record, "files": files}, f"Image features: {features}.", _table(result), result.reason)


def _strengths(result: Any, prompts: list[str]) -> Any:
    """Images of the same seeds, one row for each scale from plain sampling on, beside each other for each prompt."""
    from kspec_guidance.plotting import side_by_side

    scales = [point.scale for point in result.points]
    labels = ["plain", *(f"scale {s:g}" + (" (chosen)" if s == result.scale else "") for s in scales)]
    panels = {shorten(p, 40): [by_prompt[p][:SHOWN_IMAGES] for by_prompt in result.images] for p in prompts}
    tile = min(MAX_TILE, next(iter(panels.values()))[0][0].width)
    return side_by_side(panels, labels, "The same seeds at each scale", tile=tile)


def _table(result: Any) -> Table:
    table = Table(
        title="scales against plain sampling",
        caption="diversity: Vendi of a batch; gain with its 95% interval; fidelity: precision",
    )
    for column in ("scale", "diversity", "gain", "fidelity"):
        table.add_column(column, justify="right")
    table.add_row("plain", f"{result.plain_diversity:.2f}", "", f"{result.plain_fidelity:.2f}")
    for p in result.points:
        style = "bold" if p.scale == result.scale else ""
        gain = p.gain.relative(result.plain_diversity)
        table.add_row(f"{p.scale:g}", f"{p.diversity:.2f}", gain, f"{p.fidelity:.2f}", style=style)
    return table
