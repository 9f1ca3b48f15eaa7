"""Options that several commands have, their checks, and the loading of pipelines."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kspec_guidance.utils.arguments import choices, nearest_name
from kspec_guidance.utils.standard_input import STANDARD_INPUT

__all__ = [
    "BatchSize",
    "Cache",
    "Device",
    "Dtype",
    "Embedder",
    "GuidanceScale",
    "ImagesPerPrompt",
    "Json",
    "Model",
    "Option",
    "PromptTexts",
    "Prompts",
    "Quiet",
    "Scale",
    "Seed",
    "Steps",
    "TextEmbedder",
    "Variety",
    "Version",
    "check_prompt_source",
    "check_strength",
    "existing_file",
    "finite",
    "file_option",
    "folder_option",
    "load_pipeline",
    "named",
    "page_option",
    "read_options",
    "read_pairs",
    "usable_device",
]

# Names to choose from, here because the library's own modules import torch, which --help must not wait for.
DTYPES = ("float32", "float16", "bfloat16")
PRESETS = ("default", "safe", "vivid", "explore", "faithful", "few-step", "published")
FORMATS = ("imagefolder", "webdataset", "parquet")
ENGINES = ("processes", "ray")
SELECT = ("mixture-greedy", "mixture-ucb", "greedy", "uniform", "pak-ucb", "rff-ucb", "dak-ucb", "promptwise")
MEMORY_KINDS = ("auto", "exact", "centroids", "guide")
IMAGE_EMBEDDERS = (
    "auto", "efficientnet-lite0", "demo", "open_clip:NAME:FILE_OR_TAG", "transformers:FOLDER", "torchvision:NAME:FILE",
)  # fmt: skip
TEXT_EMBEDDERS = ("none", "minilm", "open_clip:NAME:FILE_OR_TAG", "sentence:FOLDER", "transformers:FOLDER")
JUDGES = ("auto", "none", "demo", "open_clip:NAME:FILE_OR_TAG", "transformers:FOLDER")


# -- checks before anything is loaded ----------------------------------------------------------------------------------


def named(*known: str) -> Callable[[str | None], str | None]:
    """A callback of an option that takes one of these names; ``NAME:FILE`` stands for any name and file."""

    def check(value: str | None) -> str | None:
        if value is None or value in known:
            return value
        parts = value.split(":")
        forms = [k.split(":") for k in known if ":" in k]
        if not any(parts[0] == form[0] and len(parts) >= len(form) and all(parts) for form in forms):
            raise typer.BadParameter(f"{value!r} is unknown; {choices(value, known)}")
        return value

    return check


def finite(value: Any) -> Any:
    """A callback of an option that takes a number, or several: refuse those that are not finite."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is not a finite number")
    return value


def existing_file(value: Path | None) -> Path | None:
    """A callback of an option that takes a file, or ``-`` for standard input."""
    if value is not None and str(value) != STANDARD_INPUT and not value.is_file():
        raise typer.BadParameter(f"file '{value}' does not exist")
    return value


def _print_version(value: bool) -> None:
    if value:
        from kspec_guidance import __version__

        typer.echo(f"kspec-guidance {__version__}")
        raise typer.Exit()


# -- options, one definition for all commands --------------------------------------------------------------------------

PROMPTS, PIPELINE, IMAGES, GUIDANCE, FEATURES, OUTPUT = "Prompts", "Pipeline", "Images", "Guidance", "Features", "Output"

PromptTexts = Annotated[list[str] | None, typer.Argument(help="Prompts, each in quotes.")]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="File of prompts (txt, csv, tsv, jsonl, json, parquet; - for standard input), or a dataset's folder or name.",
        rich_help_panel=PROMPTS,
    ),
]

Model = Annotated[
    str, typer.Option(help="'demo' for the embedded pipeline, or a diffusers folder or hub id.", rich_help_panel=PIPELINE)
]
Dtype = Annotated[
    str, typer.Option(help="float32, float16 or bfloat16.", rich_help_panel=PIPELINE, callback=named(*DTYPES))
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps; by default the GPU of this process.", rich_help_panel=PIPELINE),
]
GuidanceScale = Annotated[float, typer.Option(help="Classifier-free guidance.", rich_help_panel=PIPELINE, callback=finite)]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.", rich_help_panel=PIPELINE)]
Option = Annotated[
    list[str] | None,
    typer.Option(
        help="Further arguments of the pipeline's call, as name=value (negative_prompt=blurry).", rich_help_panel=PIPELINE
    ),
]
ImagesPerPrompt = Annotated[
    int,
    typer.Option("--images-per-prompt", "--images", metavar="N", min=1, help="Images per prompt.", rich_help_panel=IMAGES),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size",
        "--batch",
        metavar="N",
        min=1,
        help="Images per batch; they repel each other directly.",
        rich_help_panel=IMAGES,
    ),
]
Variety = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=100,
        help="Strength of SPARKE: 0 is plain sampling, 50 by default clearly more varied at little or no loss.",
        rich_help_panel=GUIDANCE,
        callback=finite,
    ),
]
Scale = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="A fixed strength instead of --variety, relative to the norm of the samples.",
        rich_help_panel=GUIDANCE,
        callback=finite,
    ),
]
Seed = Annotated[int, typer.Option(help="First seed.", rich_help_panel=IMAGES)]
Embedder = Annotated[
    str,
    typer.Option(
        help=f"Image features: {', '.join(IMAGE_EMBEDDERS)}.", rich_help_panel=FEATURES, callback=named(*IMAGE_EMBEDDERS)
    ),
]
TextEmbedder = Annotated[
    str,
    typer.Option(
        help=f"Prompt features: {', '.join(TEXT_EMBEDDERS)}; with none, prompts are either equal or unrelated.",
        rich_help_panel=FEATURES,
        callback=named(*TEXT_EMBEDDERS),
    ),
]
Cache = Annotated[Path | None, typer.Option(help="Folder of cached features.", rich_help_panel=FEATURES, file_okay=False)]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON document on standard output.", rich_help_panel=OUTPUT),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print no notes and no progress: the result, warnings and errors only.",
                 rich_help_panel=OUTPUT),
]  # fmt: skip
Version = Annotated[
    bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
]


def file_option(what: str, panel: str) -> Any:
    """An option that is a file which is there."""
    return typer.Option(help=what, rich_help_panel=panel, dir_okay=False, exists=True)


def folder_option(what: str) -> Any:
    """The option ``--out`` of a command that writes a folder."""
    return typer.Option(help=what, rich_help_panel=OUTPUT, file_okay=False)


def page_option(default: str) -> Any:
    """The option ``--out`` of a command that writes a page."""
    return typer.Option(
        help=f"Page to write, with a JSON file of the same name: {default} by default, and none with --json.",
        rich_help_panel=OUTPUT,
        dir_okay=False,
    )


def check_strength(variety: float | None, scale: float | None, target: str | None = None) -> None:
    """Check that at most one of ``--variety``, ``--scale`` and a ``--target`` that sets the strength is given.

    Raises:
        ValueError: if several are.
    """
    given = {"--variety": variety, "--scale": scale, "--target": target}
    listed = [
        f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in given.items() if value is not None
    ]
    if len(listed) > 1:
        raise ValueError(
            f"{' and '.join(listed)} all set the strength; give one of them"
            if len(listed) > 2
            else f"{listed[0]} and {listed[1]} both set the strength; give one of them"
        )


# -- values ------------------------------------------------------------------------------------------------------------


def usable_device(device: str | None) -> str:
    """The device of ``--device``: by default the GPU of this process, or the CPU where there is none.

    Raises:
        ValueError: for a device that cannot be used.
    """
    import torch

    if device is None and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    try:
        torch.empty(1, device=device or "cpu")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from error
    return device or "cpu"


def load_pipeline(model: str, dtype: str, device: str | None, revision: str | None = None) -> Any:
    """The pipeline of ``--model``, on its device, without progress bars; of the hub, this revision of it.

    Raises:
        ValueError: for a model that cannot be loaded, or a device that cannot be used.
    """
    import torch

    device = usable_device(device)  # before a large model is read
    if model == "demo":
        from kspec_guidance import load_demo_pipeline

        pipe: Any = load_demo_pipeline(getattr(torch, dtype))
    else:
        from kspec_guidance.loop.components import load_pipeline

        try:
            pipe = load_pipeline(model, getattr(torch, dtype), revision)
        except Exception as error:  # of the hub, the files, or a package that the pipeline needs
            hint = "" if nearest_name(model, ["demo"]) is None else "; did you mean 'demo'?"
            raise ValueError(f"cannot load {model!r}{hint}: {type(error).__name__}: {_one_line(error)}") from error
    if device != "cpu":
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def read_pairs(values: Sequence[str] | None, option: str) -> dict[str, str]:
    """``name=value`` texts as a dictionary.

    Raises:
        ValueError: for a text of another form, or a name that is given twice.
    """
    found: dict[str, str] = {}
    for value in values or []:
        key, equals, text = value.partition("=")
        if not (key and equals and text):
            raise ValueError(f"{option} must have the form name=value, got {value!r}")
        if key in found:
            raise ValueError(f"{option} {key} is given twice: {found[key]!r} and {text!r}")
        found[key] = text
    return found


def read_options(values: Sequence[str] | None) -> dict[str, Any]:
    """Arguments of a pipeline's call; values are parsed as JSON if possible: numbers, true, null, lists.

    Raises:
        ValueError: for a text that does not have the form name=value.
    """
    found: dict[str, Any] = {}
    for key, text in read_pairs(values, "--option").items():
        try:
            found[key] = json.loads(text)
        except json.JSONDecodeError:
            found[key] = text
    return found


def check_prompt_source(prompt: Sequence[str] | None, prompts: str | None) -> None:
    """Check that prompts are given in one way: as arguments, or with ``--prompts``.

    Raises:
        ValueError: for none, or both, or a file as an argument.
    """
    if (prompts is None) == (not prompt):
        got = "neither" if prompts is None else "both"
        raise ValueError(
            f"give prompts either as arguments, each in quotes, or with --prompts FILE (- for standard input); got {got}"
        )
    if prompt and STANDARD_INPUT in prompt:
        raise ValueError("'-' is no prompt; for standard input give --prompts -")
    for text in prompt or ():
        if Path(text).suffix and Path(text).is_file():
            raise ValueError(f"{text} is a file, and would be used as the text of a prompt; pass it with --prompts")
