"""report.html at the end of a run: the page of `evaluate`, with what was dropped and why prompts ended."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.synthesis.arms import arm_lines

__all__ = ["write_report"]

MAX_IMAGES = 2000  # that are scored: minutes on a CPU


def write_report(out: Path, rows: list[dict[str, Any]], summary: dict[str, Any], embedder: ImageEmbedder | None) -> Path:
    """Score the set, or 2,000 evenly spaced images of it, and write the page.

    Args:
        out: the folder of the run.
        rows: metadata of all images.
        summary: what ``summary.json`` holds.
        embedder: features of the images; by default those of ``auto``, see ``image_embedder``.

    Returns:
        The path of the page.
    """
    from kspec_guidance.evaluation import evaluate_set
    from kspec_guidance.evaluation.embedders import image_embedder
    from kspec_guidance.evaluation.image_sets import load_images
    from kspec_guidance.evaluation.page import TILES, svg_plot, write_page

    names = [row["file_name"] for row in rows]
    sample = names if len(names) <= MAX_IMAGES else names[:: -(-len(names) // MAX_IMAGES)]
    only = set(sample) | {name.rpartition("/")[2] for name in sample}
    embed = embedder or image_embedder("auto")
    images = load_images(out, embed, only=only)
    total = summary["images"]
    notes = [f"{total} images"] if len(sample) == len(names) else [f"{len(sample)} of {total} images scored"]
    for name, label in (("rejected", "dropped"), ("stopped", "prompts ended"), ("attributes", "attributes")):
        if summary[name]:
            notes.append(f"{label}: " + ", ".join(f"{k} {v}" for k, v in sorted(summary[name].items())))
    arms = summary.get("arms", {})
    notes += arm_lines(arms, summary.get("arm_differences", []))
    plots = []
    if arms:
        draw = partial(_draw_shares, arms=arms)
        plots.append(svg_plot(draw, "Shares of the arms", "part of the run in %", "images in %"))
    path = out / "report.html"
    evaluation = evaluate_set(images, embed)
    strips = _strips(rows, arms, evaluation.images.names, TILES)
    write_page(evaluation, path, notes, plots, strips)
    return path


def _strips(
    rows: list[dict[str, Any]], arms: Mapping[str, Mapping[str, Any]], names: Sequence[str], tiles: int
) -> list[tuple[str, str, list[int]]]:
    """For each arm some of its images, as far as possible of the same prompts as those of the other arms."""
    index = {name.rpartition("/")[2]: i for i, name in enumerate(names)}
    found: dict[str, dict[str, list[int]]] = {name: {} for name in arms}  # images of each prompt
    for row in rows:
        i = index.get(row["file_name"].rpartition("/")[2])
        if i is not None and row.get("arm") in found:
            found[row["arm"]].setdefault(row["prompt"], []).append(i)
    made_by = Counter(prompt for own in found.values() for prompt in own)
    strips = []
    for name, about in arms.items():
        turns = [(k, -made_by[prompt], i) for prompt, own in found[name].items() for k, i in enumerate(own)]
        strips.append((name, f"{about['images']} images", [i for _, _, i in sorted(turns)[:tiles]]))
    return strips


def _draw_shares(axes: Any, arms: Mapping[str, Mapping[str, Any]]) -> None:
    for name, about in arms.items():
        parts = len(about["history"])
        middles = [100 * (k + 0.5) / parts for k in range(parts)]
        label = name.replace("$", r"\$")  # no formula
        axes.plot(middles, [100 * share for share in about["history"]], marker="o", markersize=3, label=label)
    axes.set_ylim(-2, 102)
