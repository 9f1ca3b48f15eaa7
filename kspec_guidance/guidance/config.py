"""Settings of guides as JSON, with reference tensors as safetensors; loading never executes code.

The memory is saved separately, by ``guide.memory.save(path)``: settings are small and shared, memories are large and grow.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kspec_guidance import objectives
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.guidance.spaces import SPACES, FeatureSpace
from kspec_guidance.guidance.targets import VarietyTarget
from kspec_guidance.guidance.term import Term, usual_transforms
from kspec_guidance.kernels import Kernel
from kspec_guidance.kernels.settings import KERNELS
from kspec_guidance.objectives import Objective
from kspec_guidance.utils.atomic_io import replacing

__all__ = [
    "CONFIG_NAME",
    "TENSORS_NAME",
    "decode",
    "decode_terms",
    "encode",
    "load_tensors",
    "read_config",
    "save_tensors",
    "write_config",
]

CONFIG_NAME, TENSORS_NAME = "kspec_guidance.json", "kspec_guidance.safetensors"
SETTINGS_FORMAT = "kspec-guidance settings 2"
FORMAT_1 = "kspec-guidance settings 1"
RENAMED = {"features": "feature_map", "prompt_features": "prompt_feature_map", "unit": "normalize"}  # since format 1
OBJECTIVES = {
    name: found
    for name in objectives.__all__
    if isinstance(found := getattr(objectives, name), type) and issubclass(found, Objective) and found is not Objective
}


def _fields(value: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {f.name: encode(getattr(value, f.name), tensors) for f in dataclasses.fields(value) if f.init}


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Encode a kernel, objective, space, feature map or plain value for JSON; tensors are added to ``tensors``.

    Raises:
        TypeError: for a value without settings that can be saved, such as a user-defined kernel.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [encode(v, tensors) for v in value]
    if isinstance(value, Tensor):
        given = value.detach().cpu().contiguous()
        for name, known in tensors.items():  # one of several terms, for instance; a file holds it once
            if known.data_ptr() == given.data_ptr() and known.shape == given.shape and known.dtype == given.dtype:
                return {"tensor": name}
        name = f"tensor{len(tensors)}"
        tensors[name] = given
        return {"tensor": name}
    if isinstance(value, Kernel) and type(value).__name__ in KERNELS:
        return {"kernel": type(value).__name__} | _fields(value, tensors)
    if isinstance(value, Objective) and type(value).__name__ in OBJECTIVES:
        return {"objective": type(value).__name__} | _fields(value, tensors)
    if isinstance(value, dict):
        return {k: encode(v, tensors) for k, v in value.items()}
    if isinstance(value, VarietyTarget):
        if callable(value.fidelity):
            raise TypeError("a target with a fidelity= function cannot be saved as settings; build the guide in code")
        return {"target": str(value), "fidelity": value.fidelity, "prompts": encode(value.state(), tensors)}
    if isinstance(value, FeatureSpace):
        return {"space": value.describe()}
    if isinstance(value, RandomFourierFeatures):
        settings = {k: getattr(value, k) for k in ("input_dim", "num_features", "orthogonal", "seed")}
        return {"random_features": settings | {"kernel": encode(value.kernel, tensors)}}
    raise TypeError(
        f"{type(value).__name__} cannot be saved as settings: only this package's kernels, objectives, spaces and random "
        "features can; build the guide in code instead"
    )


def decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of :func:`encode`.

    Raises:
        ValueError: for an unknown name, or a missing tensor.
    """
    if isinstance(value, list):
        return tuple(decode(v, tensors) for v in value)
    if not isinstance(value, dict):
        return value
    if set(value) == {"tensor"}:
        if value["tensor"] not in tensors:
            raise ValueError(f"the settings refer to tensor {value['tensor']!r}, which is not in {TENSORS_NAME}")
        return tensors[value["tensor"]]
    for kind, known in (("kernel", KERNELS), ("objective", OBJECTIVES)):
        if isinstance(value.get(kind), str):
            if value[kind] not in known:
                raise ValueError(f"unknown {kind} {value[kind]!r} in the settings; known are {', '.join(sorted(known))}")
            arguments = {k: decode(v, tensors) for k, v in value.items() if k != kind}
            return known[value[kind]](**arguments)
    if isinstance(value.get("target"), str):
        target = VarietyTarget.parse(value["target"], value["fidelity"])
        target.load(decode(value["prompts"], tensors))
        return target
    if "space" in value:
        settings = dict(value["space"])
        name = settings.pop("name", None)
        if name not in SPACES:
            raise ValueError(f"unknown space {name!r} in the settings; known are {', '.join(SPACES)}")
        return SPACES[name](**settings)
    if "random_features" in value:
        settings = {k: decode(v, tensors) for k, v in value["random_features"].items()}
        return RandomFourierFeatures(**settings)
    return {k: decode(v, tensors) for k, v in value.items()}


def decode_terms(listed: list[dict[str, Any]], tensors: dict[str, Tensor]) -> list[Term]:
    """Decode the terms of a guide.

    Raises:
        ValueError: for an unknown name, or a missing tensor.
        TypeError, KeyError, AttributeError: for damaged settings.
    """
    terms = []
    for term in listed:
        settings = {k: decode(v, tensors) for k, v in term.items() if k not in ("space", "own_transforms")}
        if settings.get("transforms") == usual_transforms(settings.get("apart")) and not term.get("own_transforms"):
            settings["transforms"] = None
        terms.append(Term(space=decode({"space": term["space"]}, tensors), **settings))
    return terms


def _from_format_1(config: dict[str, Any]) -> dict[str, Any]:
    """Settings of version 1.0.0rc1 with the current names."""

    def renamed(value: Any) -> Any:
        if isinstance(value, list):
            return [renamed(v) for v in value]
        if not isinstance(value, dict):
            return value
        if set(value) == {"features"}:
            return {"random_features": renamed(value["features"])}
        names = RENAMED if isinstance(value.get("objective"), str) else {}
        return {names.get(k, k): renamed(v) for k, v in value.items()}

    terms, guide = config.get("terms"), config.get("guide")
    if isinstance(terms, list) and all(isinstance(term, dict) for term in terms):
        terms = [{("transforms" if k == "chain" else k): renamed(v) for k, v in term.items()} for term in terms]
        kinds = [term["objective"].get("objective") for term in terms if isinstance(term.get("objective"), dict)]
        if guide == "SPARKE" and kinds == ["Vendi"]:  # SPARKE(order=...) is a separate class now
            guide = "VendiGuidance"
    return {**config, "format": SETTINGS_FORMAT, "guide": guide, "terms": terms}


def write_config(folder: str | os.PathLike, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write both files into ``folder``, the settings last, so that they never refer to missing tensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tensors:
        save_tensors(folder, tensors)
    with replacing(folder / CONFIG_NAME) as fresh:
        fresh.write_text(json.dumps({"format": SETTINGS_FORMAT, **config}, indent=2) + "\n", encoding="utf-8")
    if not tensors:
        save_tensors(folder, tensors)
    return folder / CONFIG_NAME


def save_tensors(folder: str | os.PathLike, tensors: dict[str, Tensor]) -> None:
    """Write the tensors of settings into ``folder``, or remove those of earlier settings if there are none."""
    path = Path(folder, TENSORS_NAME)
    if not tensors:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as fresh:  # parts of one tensor, which a file cannot hold as such, are copied
        save_file({k: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for k, t in tensors.items()}, fresh)


def load_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read the tensors of settings.

    Raises:
        ValueError: if they are damaged, or not finite.
    """
    try:
        tensors = load_file(path) if Path(path).is_file() else {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a valid safetensors file ({error}); restore it from a copy") from error
    if any(not torch.isfinite(t).all() for t in tensors.values()):
        raise ValueError(f"{TENSORS_NAME} contains NaN or infinite values; restore it from a copy")
    return tensors


def read_config(source: str | os.PathLike | dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read settings and tensors from a folder, a JSON file, or a dictionary.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the content is not the settings of a guide.
    """
    if isinstance(source, dict):
        config, tensors = source, {}
    else:
        path = Path(source)
        path = path / CONFIG_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"no guide settings at {path}; write them with guide.save_config(folder)")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}); restore it from a copy") from error
        tensors = load_tensors(path.parent / TENSORS_NAME)
    if isinstance(config, dict) and config.get("format") == FORMAT_1:
        config = _from_format_1(config)
    if not isinstance(config, dict) or config.get("format") != SETTINGS_FORMAT:
        found = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"not the settings of a guide: format {found!r}, expected {SETTINGS_FORMAT!r}")
    return config, tensors
