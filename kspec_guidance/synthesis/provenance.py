"""Provenance: where an image comes from, for its row, its marks and the card of the set."""

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from kspec_guidance.demo.pipeline import is_demo
from kspec_guidance.guidance.calibration import call_settings
from kspec_guidance.loop.components import denoiser_of, find_scheduler
from kspec_guidance.synthesis.errors import SynthesisError

__all__ = ["Provenance", "check_licence", "model_of", "package_versions", "place_of"]

PACKAGES = ("kspec-guidance", "torch", "diffusers", "transformers")
SNAPSHOT = re.compile(r"[\\/]snapshots[\\/]([0-9a-f]{40})(?=[\\/]|$)")  # of the hub's cache
KNOWN = "for instance CC0-1.0, CC-BY-4.0, MIT, Apache-2.0, or LicenseRef-NAME for a licence of your own"


def check_licence(text: str | None) -> str | None:
    """An SPDX licence expression in its canonical spelling: ``cc-by-4.0`` becomes ``CC-BY-4.0``; None stays None.

    Raises:
        SynthesisError: for a text that is no expression of the licence identifiers at https://spdx.org/licenses.
    """
    if text is None:
        return None
    try:
        return str(canonicalize_license_expression(text))
    except (InvalidLicenseExpression, AttributeError, TypeError) as error:
        raise SynthesisError(
            f"licence must be an SPDX identifier (https://spdx.org/licenses), {KNOWN}; got {text!r} ({error})"
        ) from error


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what an image looks like."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # an own build, or a checkout on the path
            module = __import__(name.replace("-", "_"))
            found[name] = str(getattr(module, "__version__", "unknown"))
    return found | {"python": platform.python_version()}


def model_of(pipe: Any) -> tuple[str | None, str | None]:
    """The name of a pipeline's model, and its revision: ``demo``, the id on the hub, or the last part of a folder's path.

    The revision is the commit of a model from the hub, as its cache states it.
    """
    if is_demo(pipe):
        return "demo", None
    places = [_place(part) for part in (pipe, denoiser_of(pipe), *getattr(pipe, "components", {}).values())]
    commit = next((found for place in places[1:] + places[:1] if (found := SNAPSHOT.search(place))), None)
    return _public_name(places[0]) or None, None if commit is None else commit[1]


def place_of(pipe: Any) -> str:
    """Where a pipeline was loaded from: ``demo``, an id on the hub, or a folder of this machine; empty if unknown."""
    return "demo" if is_demo(pipe) else _place(pipe)


def _place(part: Any) -> str:
    """Where a pipeline or one of its parts was loaded from, as its configuration states it."""
    config = getattr(part, "config", None)
    return str((config.get("_name_or_path") if isinstance(config, Mapping) else None) or "")


def _public_name(place: str) -> str:
    """An id of the hub as it is; of a path on this machine, the last part alone."""
    cached = re.search(r"models--([^\\/]+?)--([^\\/]+)", place)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    is_path = place.count("/") != 1 or "\\" in place or place.startswith((".", "~", "/")) or Path(place).exists()
    return re.split(r"[\\/]", place.rstrip("\\/"))[-1] if is_path else place


@dataclass(frozen=True)
class Provenance:
    """What the rows of a run say of their origin, besides prompt and seed.

    Args:
        licence: SPDX expression, or None.
        guide_digest: of the guide's settings.
        marks: kinds of marks in the images, such as ``iptc``; None for none.
        versions: of the packages, one text.
    """

    licence: str | None
    guide_digest: str
    marks: str | None
    versions: str

    def columns(self, pipe: Any, call: Mapping[str, Any], model: str | None = None) -> dict[str, Any]:
        """The columns of a row, for a pipeline as it is now.

        Args:
            pipe: the pipeline, with the scheduler of this call.
            call: arguments of the call.
            model: of the denoiser, if it is not the pipeline's own.
        """
        name, revision = model_of(pipe)
        steps, guidance_scale = call_settings(pipe, dict(call))
        try:
            scheduler = type(find_scheduler(pipe)).__name__
        except (AttributeError, ValueError):
            scheduler = None
        return {
            "model": name if model is None else _public_name(model),
            "revision": revision,
            "pipeline": type(pipe).__name__,
            "scheduler": scheduler,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "guide_digest": self.guide_digest,
            "licence": self.licence,
            "versions": self.versions,
            "marks": self.marks,
        }
