"""The command ``kspec-guidance tune``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from kspec_guidance.cli.arguments import (
    DEVICE_HELP,
    DTYPE_HELP,
    MODEL_HELP,
    OPTION_HELP,
    load_pipeline,
    read_options,
)
from kspec_guidance.cli.console import console, counter, fail
from kspec_guidance.evaluation.embedders.names import IMAGE_NAMES

__all__ = ["tune"]

SHOWN = 6  # maximum number of prompts, and of images per prompt, in the grid


def tune(
    prompt: Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes; at least six recommended.")] = None,
    prompts: Annotated[str | None, typer.Option(help="File of prompts (txt, csv, tsv, jsonl, json, parquet).")] = None,
    out: Annotated[Path, typer.Option(help="Output folder for plot, images, scores and guide.")] = Path("outputs/tune"),
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "float32",
    device: Annotated[str | None, typer.Option(help=DEVICE_HELP)] = None,
    preset: Annotated[str, typer.Option(help="default, safe, vivid, few-step or published.")] = "default",
    scale: Annotated[list[float] | None, typer.Option(min=0, help="Scales to try; may be repeated.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "--images", min=2, help="Images per batch.")] = 8,
    batches: Annotated[int, typer.Option(min=1, help="Batches per prompt and scale.")] = 2,
    max_fidelity_loss: Annotated[
        float, typer.Option("--max-fidelity-loss", "--loss", min=0, help="Largest accepted loss of fidelity, in 0..1.")
    ] = 0.05,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.")] = 5.0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    option: Annotated[list[str] | None, typer.Option(help=OPTION_HELP)] = None,
    embedder: Annotated[
        str, typer.Option(help=f"Image features: own (the pipeline's autoencoder), {IMAGE_NAMES}.")
    ] = "own",
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
) -> None:
    """Find a scale for a pipeline by diversity and fidelity of short runs, or report that guidance does not help."""
    from kspec_guidance import SPARKE
    from kspec_guidance.evaluation.embedders import image_embedder
    from kspec_guidance.plotting import plot_tuning
    from kspec_guidance.synthesis import SynthesisError, read_prompts
    from kspec_guidance.tuning import DEFAULT_SCALES
    from kspec_guidance.tuning import tune as find

    try:
        if (prompts is None) == (not prompt):
            raise ValueError("give prompts either as arguments, each in quotes, or with --prompts")
        texts = list(prompt or []) if prompts is None else [p.text for p in read_prompts(prompts)]
        pipe = load_pipeline(model, dtype, device)
        SPARKE.preset(preset, scale=0.1)  # raise for an unknown name before anything is generated
        call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, **read_options(option)}
        with counter("batches") as progress_callback:
            result = find(
                pipe,
                texts,
                lambda s: SPARKE.preset(preset, scale=s),
                scale or DEFAULT_SCALES,
                batch_size,
                batches,
                embed=None if embedder == "own" else image_embedder(embedder),
                call=call,
                max_fidelity_loss=max_fidelity_loss,
                seed=seed,
                progress_callback=progress_callback,
            )
        out.mkdir(parents=True, exist_ok=True)
        (out / "tune.json").write_text(json.dumps(result.as_dict(), indent=1) + "\n")
        plot_tuning(result, out / "tune.png")
        _grid(result, texts[:SHOWN]).save(out / "images.png")
        if result.scale is not None:
            SPARKE.preset(preset, scale=result.scale).save_config(out / "guide")
    except (SynthesisError, ValueError, OSError) as error:
        raise fail(str(error)) from error
    console.print(_table(result))
    console.print(result.reason, highlight=False, markup=False)
    for name in ["tune.png", "images.png", "tune.json"] + (["guide"] if result.scale is not None else []):
        console.print(f"wrote {out / name}", highlight=False, soft_wrap=True, markup=False)


def _grid(result: Any, prompts: list[str]) -> Any:
    """Plain images beside those of the chosen scale, or of the largest one if none was chosen."""
    from kspec_guidance.plotting import side_by_side

    scales = [point.scale for point in result.points]
    chosen = scales[-1] if result.scale is None else result.scale
    shown = {"plain": result.images[0], f"scale {chosen:g}": result.images[scales.index(chosen) + 1]}
    panels = {name: [by_prompt[p][:SHOWN] for p in prompts] for name, by_prompt in shown.items()}
    return side_by_side(panels, prompts, "The same prompts and seeds")


def _table(result: Any) -> Table:
    table = Table(title="scale against plain sampling", caption="diversity: Vendi of a batch; fidelity: precision")
    for column in ("scale", "diversity", "p", "fidelity"):
        table.add_column(column, justify="right")
    table.add_row("plain", f"{result.plain_diversity:.2f}", "", f"{result.plain_fidelity:.2f}")
    for p in result.points:
        style = "bold" if p.scale == result.scale else ""
        table.add_row(f"{p.scale:g}", f"{p.diversity:.2f}", f"{p.test.p_value:.3f}", f"{p.fidelity:.2f}", style=style)
    return table
