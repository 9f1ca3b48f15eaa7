"""Tables of papers as data, to print our figures beside theirs.

Each is a file of ``assets/targets``: where it is from, what was read of it, the setting, and the figures. A figure that was
found in notes of others is there with that caveat; a paper of which no table was read is there without figures.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kspec_guidance.bench.metrics import METRICS
from kspec_guidance.bench.tables import Cell, Table
from kspec_guidance.evaluation.page import number
from kspec_guidance.utils.arguments import choices

__all__ = ["TARGETS", "compare_with", "figures", "target"]

FOLDER = Path(__file__).parent / "assets" / "targets"
TARGETS = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def target(name: str) -> dict[str, Any]:
    """A table of a paper by name, with its title, source, setting and caveat.

    ``models`` has its rows. ``methods`` maps names of the paper to ours, ``metrics`` its columns to our scores and the
    factor to the paper's unit.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in TARGETS:
        raise ValueError(f"no table of a paper is named {name!r}; {choices(name, TARGETS)}")
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def figures(name: str) -> dict[str, Any]:
    """A table of a paper, as :func:`target`, that has figures.

    Raises:
        ValueError: for an unknown name, or a paper of which no figures are known here.
    """
    found = target(name)
    if not found["models"]:
        raise ValueError(f"no figures of {found['title']} ({found['source']}) are known here. {found['caveat']}")
    return found


def compare_with(results: Mapping[str, Any], name: str) -> list[Table]:
    """The table of a paper with our figures beside it: a table for each of its models.

    Args:
        results: of :func:`~kspec_guidance.bench.judge.judge`.
        name: one of ``TARGETS``.

    Raises:
        ValueError: for an unknown name, or a paper of which no figures are known here.
    """
    found = figures(name)
    images = results["prompts"] * results["images"]
    about = (
        f"{found['source']}; read: {found['read']}. Theirs: {found['setting']}. Ours: {results['model']}, "
        f"{results['prompts']} prompts, {images} images, {results['steps']} steps. {found['caveat']}"
    )
    missing = [f"{column}: {m['about']}" for column, m in found["metrics"].items() if "about" in m]
    if missing:
        about += f" Without ours: {'; '.join(missing)}."
    fewer = {c: METRICS[m["ours"]].most for c, m in found["metrics"].items() if m["ours"] in METRICS}
    limited = {column: most for column, most in fewer.items() if 0 < most < images}
    if limited:
        about += f" Ours of {' and '.join(limited)} take {max(limited.values())} of the images."
    tables = []
    for model in found["models"]:
        columns = [c for c in found["metrics"] if any(c in row for row in model["rows"].values())]
        head = ["method", *(f"{c}, {whose}" for c in columns for whose in ("theirs", "ours"))]
        rows = []
        for method, theirs in model["rows"].items():
            labels = [label for label in found["methods"].get(method, []) if label in results["methods"]]
            for label in labels or [None]:
                cells = []
                for column in columns:
                    cells.append(Cell(f"{theirs[column]:g}" if column in theirs else "-"))
                    cells.append(_ours(results, label, found["metrics"][column]))
                rows.append((method if label is None else f"{method} ({label})", cells))
        tables.append(Table(f"{found['title']}, {model['model']}", about, head, rows))
    return tables


def _ours(results: Mapping[str, Any], label: str | None, metric: Mapping[str, Any]) -> Cell:
    """Our figure in the unit of the paper, a dash if it was not measured."""
    scale = metric.get("scale", 1)
    if label is None or metric["ours"] is None:
        return Cell("-")
    cost = results["cost"].get(label, {}).get(metric["ours"])
    if cost is not None:
        return Cell(number(scale * cost))
    v = results["methods"][label].get(metric["ours"])
    if v is None:
        return Cell("-")
    interval = "" if v["low"] is None else f"{number(scale * v['low'])}, {number(scale * v['high'])}"
    return Cell(number(scale * v["value"]), interval)
