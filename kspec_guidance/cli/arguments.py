"""Options of the command line: loading of pipelines, and parsing of name=value."""

import json
import os
from typing import Any

__all__ = ["DEVICE_HELP", "DTYPE_HELP", "MODEL_HELP", "OPTION_HELP", "load_pipeline", "read_options", "read_pairs"]

MODEL_HELP = "'demo' for the embedded pipeline, or a diffusers folder or hub id."
DTYPE_HELP = "float32, float16 or bfloat16."
DEVICE_HELP = "cpu, cuda, cuda:1, mps; by default the GPU of this process."
OPTION_HELP = "Further arguments of the pipeline's call, as name=value (negative_prompt=blurry)."


def load_pipeline(model: str, dtype: str, device: str | None) -> Any:
    """The pipeline of ``--model``, on its device, without progress bars.

    Raises:
        ValueError: for a model that cannot be loaded, an unknown dtype, or a device that cannot be used.
    """
    import torch

    dtypes = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise ValueError(f"dtype must be one of {', '.join(dtypes)}, got {dtype!r}")
    if model == "demo":
        from kspec_guidance import load_demo_pipeline

        pipe: Any = load_demo_pipeline(dtypes[dtype])
    else:
        from diffusers import DiffusionPipeline

        try:
            pipe = DiffusionPipeline.from_pretrained(model, use_safetensors=True, torch_dtype=dtypes[dtype])
        except Exception as error:  # of the hub, the files, or a package that the pipeline needs
            raise ValueError(f"cannot load {model!r}: {type(error).__name__}: {error}") from error
    if device is None and torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    try:
        if device not in (None, "cpu"):
            pipe.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def read_pairs(values: list[str] | None, option: str) -> dict[str, str]:
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


def read_options(values: list[str] | None) -> dict[str, Any]:
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
