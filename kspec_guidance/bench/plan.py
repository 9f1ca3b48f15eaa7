"""What is compared: methods with their strengths, and suites of settings."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kspec_guidance.bench.methods import CODES, Method
from kspec_guidance.bench.methods.guides import Guided
from kspec_guidance.bench.models import Recipe
from kspec_guidance.utils.arguments import choices

__all__ = ["SUITES", "Choice", "choose_methods", "unfit"]

SWEPT = 3  # strengths of a method that names none itself
SUITES: dict[str, dict[str, Any]] = {  # settings in place of the defaults, where none are given
    "quick": {
        "methods": "plain,lower-cfg,interval-cfg,cads,particle,sparke,vivid", "prompts": "bundled:24", "images": 4,
        "sweep": False,
    },
    "paper": {
        "methods": "plain,lower-cfg,interval-cfg,cads,particle,spell,cno,group-inference,oscar,dave,contextual,"
        "block-self-guidance,sparke,vivid",
        "prompts": "coco:1000", "images": 4, "sweep": True,
    },
}  # fmt: skip
HAS = {
    "features": "features of a UNet's middle block",
    "guidance": "classifier-free guidance",
    "prompts": "prompts among the arguments of the one call that its denoiser has in a step",
    "images": "latents with two axes of pixels",
    "blocks": "transformer blocks that diffusers registers, called once in a step",
    "reference": "reference images: --like FOLDER",
}


@dataclass(frozen=True)
class Choice:
    """A method with the strengths that are run.

    Attributes:
        code: its name in commands.
        method: its class.
        values: of its strength; None for methods without one.
        chosen: the one that stands for the method in tables.
    """

    code: str
    method: type[Method]
    values: tuple[float | None, ...]
    chosen: float | None

    def make(self, value: float | None) -> Method:
        """The method at one of its strengths."""
        return made(self.method, value)

    def describe(self) -> dict[str, Any]:
        """What the settings of a run say of it."""
        left_out = ("generator", "radius_unit", "reference", "baseline", self.method.strength)
        default = self.method()
        fixed = {f.name: getattr(default, f.name) for f in dataclasses.fields(default) if f.name not in left_out}
        return {
            "name": self.code, "title": self.method.name, "paper": self.method.paper,
            "strength": self.method.strength or None, "strengths": [text(value) for value in self.values],
            "chosen": text(self.chosen), "parameters": fixed,
        }  # fmt: skip


def made(method: type[Method], value: float | None) -> Method:
    """A method at one of its strengths.

    Raises:
        ValueError: for a strength that the method does not take.
    """
    if value is None:
        return method()
    whole = isinstance(getattr(method(), method.strength), int)
    if not 0 <= value < float("inf") or (whole and value != int(value)):
        raise ValueError(f"expected a {'whole' if whole else 'finite'} number of at least 0, got {value:g}")
    settings: dict[str, Any] = {method.strength: int(value) if whole else value}
    found = method(**settings)
    if isinstance(found, Guided) and "reference" not in found.needs:
        found.guide(None)  # checks its range
    return found


def text(value: float | None) -> str | None:
    """A strength as records have it."""
    return None if value is None else f"{value:g}"


def unfit(method: type[Method], recipe: Recipe, reference: bool = False) -> str | None:
    """Why a method cannot run on a model; None if it can."""
    has = recipe.has | ({"reference"} if reference else set())
    missing = [HAS[need] for need in sorted(method.needs - has)]
    if method.again and not recipe.one_call:
        missing.append("a denoiser that makes all predictions of a step in one call")
    return f"needs {' and '.join(missing)}" if missing else None


def choose_methods(names: str, recipe: Recipe, sweep: bool = False, reference: bool = False) -> list[Choice]:
    """The methods of a comma-separated list, each with its default strength, those after its name, or a sweep.

    Args:
        names: such as ``plain,sparke@25/50,cads``.
        recipe: of the model.
        sweep: whether methods without strengths after their name run at several.
        reference: whether there are reference images.

    Raises:
        ValueError: for unknown or repeated names, strengths that are no numbers or none of the method's, and methods that
            the model cannot run.
    """
    chosen: dict[str, Choice] = {}
    for name in (part.strip() for part in names.split(",")):
        code, at, listed = name.partition("@")
        if code not in CODES:
            raise ValueError(f"unknown method {code!r}; {choices(code, CODES)}")
        if code in chosen:
            raise ValueError(f"method {code} is given twice; for several strengths: {code}@A/B/C")
        method = CODES[code]
        if (reason := unfit(method, recipe, reference)) is not None:
            raise ValueError(f"method {code} {reason}, which {recipe.model} ({recipe.pipeline}) has not; leave it out")
        chosen[code] = Choice(code, method, *_values(code, method, listed if at else None, sweep))
    return list(chosen.values())


def _values(
    code: str, method: type[Method], listed: str | None, sweep: bool
) -> tuple[tuple[float | None, ...], float | None]:
    """The strengths of a method, and the one that stands for it."""
    if not method.strength:
        if listed is not None:
            raise ValueError(f"method {code} has no strength, got @{listed}")
        return (None,), None
    default = float(getattr(method(), method.strength))
    values: Sequence[float] = [default]
    if listed is not None:
        try:
            values = [float(part) for part in listed.split("/")]
        except ValueError as error:
            raise ValueError(f"strengths of {code} must be numbers, as in {code}@{default:g}; got @{listed}") from error
    elif sweep:
        values = sorted({*method.sweep(default, SWEPT), default})
    if len({text(v) for v in values}) < len(values):
        raise ValueError(f"strengths of {code} are given twice: @{listed}")
    for value in values:
        try:
            made(method, value)
        except ValueError as error:
            raise ValueError(f"{code}@{value:g}: {error}") from error
    middle = values[(len(values) - 1) // 2]
    return tuple(values), default if default in values else middle
