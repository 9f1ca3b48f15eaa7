"""What the folder of a run of ``generate`` tells about its images: who made them, and from which seeds."""

import json
from pathlib import Path
from typing import Any

from kspec_guidance.demo.pipeline import is_demo_denoiser

__all__ = ["made_by_demo", "seeds_of"]


def made_by_demo(path: Path) -> bool:
    """Whether the settings of the run say that the embedded model made all images of this folder."""
    settings = [_json(p.read_text(encoding="utf-8", errors="replace")) for p in path.glob(".kspec/epoch-*/settings.json")]
    denoisers = [str(s.get("pipeline", {}).get("denoiser")) for s in settings]
    return bool(denoisers) and all(is_demo_denoiser(d) for d in denoisers)


def seeds_of(path: Path) -> set[tuple[str, int]]:
    """Prompt and seed of each image, from the folder's ``metadata.jsonl``; empty if it does not have them."""
    file = path / "metadata.jsonl"
    if not file.is_file():
        return set()
    rows = [_json(line) for line in file.read_text(encoding="utf-8", errors="replace").split("\n")]
    return {(str(r["prompt"]), r["seed"]) for r in rows if "prompt" in r and isinstance(r.get("seed"), int)}


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
