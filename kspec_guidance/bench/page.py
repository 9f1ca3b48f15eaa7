"""bench.html, results.json and the tables of a comparison as files."""

import base64
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kspec_guidance.bench.preferences import preference_table
from kspec_guidance.bench.store import PLAIN, Run
from kspec_guidance.bench.tables import latex, markdown, tables
from kspec_guidance.bench.targets import compare_with
from kspec_guidance.evaluation.image_sets import thumbnail
from kspec_guidance.evaluation.page import page_environment, svg_plot
from kspec_guidance.kernels.distances import evenly_spaced
from kspec_guidance.utils.atomic_io import replacing

__all__ = ["TEMPLATES", "draw_front", "write"]

TEMPLATES = Path(__file__).parent / "templates"
COLOURS = ("#2f6fb3", "#c4572e", "#3d8b5f", "#8a5fb0", "#b8912b", "#4aa0a8", "#a8506f", "#6b7686")
PROMPTS_SHOWN, IMAGES_SHOWN, SIDE = 6, 8, 128  # of the grids: prompts, images of a prompt, pixels
PLOTS = 4


def write(results: Mapping[str, Any], run: Run, out: str | Path) -> list[Path]:
    """Write ``bench.html``, ``results.json``, and the tables as ``tables.md`` and ``tables.tex``.

    Args:
        results: of :func:`~kspec_guidance.bench.judge.judge`. With ``compare_with``, names of tables of papers, our figures
            are printed beside theirs; with ``preferences``, of :func:`~kspec_guidance.bench.preferences.analyse`, also what
            people prefer; with ``failed``, methods that could not go on, with the reason.
        run: the comparison, for its images.
        out: folder; created if it does not exist.

    Returns:
        The paths of the files.
    """
    from kspec_guidance import __version__

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    found = tables(results)
    if "preferences" in results:
        found.append(preference_table(results["preferences"]))
    for name in results.get("compare_with", ()):
        found += compare_with(results, name)
    page = page_environment(TEMPLATES).get_template("bench.html").render(
        title=f"Methods of diversity on {results['model']}", results=results, tables=found, plots=_plots(results),
        grids=_grids(results, run), skipped=_by_reason(results["skipped"]), version=__version__,
    )  # fmt: skip
    files = {
        "bench.html": page,
        "results.json": json.dumps(results, indent=1, allow_nan=False) + "\n",
        "tables.md": "\n".join(map(markdown, found)),
        "tables.tex": "\n".join(map(latex, found)),
    }
    for name, text in files.items():
        with replacing(out / name) as fresh:
            fresh.write_text(text, encoding="utf-8")
    return [out / name for name in files]


def _by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """Scores that were left out, by the reason."""
    found: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        found.setdefault(reason, []).append(name)
    return found


def _plots(results: Mapping[str, Any]) -> list[Any]:
    """Fronts: the first score of diversity against each score of quality that decides, then against others."""
    metrics = results["metrics"]
    diversity = next((n for n, m in metrics.items() if m["aspect"] == "diversity" and m["higher"]), None)
    quality = [n for n, m in metrics.items() if m["aspect"] != "diversity"]
    quality.sort(key=lambda n: n not in results["quality"])
    if diversity is None:
        return []
    y = metrics[diversity]["title"]
    plots = []
    for name in quality[:PLOTS]:
        x = metrics[name]["title"]
        label = x if metrics[name]["higher"] else f"{x}, lower is better"
        plots.append(svg_plot(partial(draw_front, results=results, x=name, y=diversity), f"{y} and {x}", label, y))
    return plots


def draw_front(axes: Any, results: Mapping[str, Any], x: str, y: str) -> None:
    """Draw each method's strengths as a line from plain sampling; quality grows to the right.

    Args:
        axes: of matplotlib.
        results: of :func:`~kspec_guidance.bench.judge.judge`.
        x: score of quality.
        y: score of diversity.
    """
    methods: dict[str, list[tuple[float, float]]] = {}
    for s in results["settings"]:
        found = results["methods"][s["label"]]
        methods.setdefault(s["method"], []).append((found[x]["value"], found[y]["value"]))
    start = methods.pop(PLAIN, [])
    if start:
        tolerance = results["quality"].get(x)
        if tolerance is not None:
            worse = tolerance["tolerance"] * (start[0][0] if tolerance["relative"] else 1)
            edge = start[0][0] - worse * (1 if results["metrics"][x]["higher"] else -1)
            axes.axvline(edge, color="#98a2b3", linestyle=":", linewidth=1)
        axes.plot(*start[0], "k*", markersize=9, label=PLAIN, zorder=3)
    for k, (method, points) in enumerate(methods.items()):
        xs, ys = zip(*start, *points, strict=True)
        style, colour = "o-" if k < len(COLOURS) else "s--", COLOURS[k % len(COLOURS)]
        axes.plot(xs, ys, style, color=colour, markersize=3.5, linewidth=1.3, label=method.replace("$", r"\$"))
    if not results["metrics"][x]["higher"]:
        axes.invert_xaxis()


def _grids(results: Mapping[str, Any], run: Run) -> list[tuple[str, list[tuple[str, list[str | None]]]]]:
    """For some prompts a row of images of each method, at its chosen strength: the same seeds in the same places."""
    groups, texts = run.groups(), {p["index"]: p["text"] for p in run.settings["prompts"]}
    chosen = [s for s in results["settings"] if s["label"] == s["method"]]
    shared = sorted(set.intersection(*(set(groups[s["method"], s["strength"]]) for s in chosen)))
    out = []
    for k in evenly_spaced(len(shared), PROMPTS_SHOWN).tolist():
        rows = []
        for s in chosen:
            images = groups[s["method"], s["strength"]][shared[k]]
            rows.append((s["method"], [_data_uri(images, i) for i in range(min(IMAGES_SHOWN, len(images)))]))
        out.append((texts[shared[k]], rows))
    return out


def _data_uri(images: Sequence[Any], i: int) -> str | None:
    """An image for its ``src``; None if its file is damaged, which the scores have told."""
    try:
        return "data:image/jpeg;base64," + base64.b64encode(thumbnail(images[i], SIDE)).decode()
    except OSError:
        return None
