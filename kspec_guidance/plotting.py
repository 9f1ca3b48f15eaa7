"""Image grids and score plots. matplotlib is imported on first use."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

__all__ = ["image_grid", "plot_scores", "plot_tuning", "side_by_side"]

INK, PAPER, MUTED = (30, 30, 30), (255, 255, 255), (110, 110, 110)
LABEL_WIDTH = 260  # pixels


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _shortened(text: str, font: Any, width: float) -> str:
    """The text on one line, cut to a width in pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def image_grid(rows: Sequence[Sequence[Image.Image]], tile: int = 64, gap: int = 4) -> Image.Image:
    """Images in rows, each resized to fit into ``tile`` pixels; rows may have different lengths.

    Args:
        rows: rows of images.
        tile: side of a cell in pixels.
        gap: space between cells in pixels.

    Raises:
        ValueError: if there are no images.
    """
    if not rows or not any(rows):
        raise ValueError("a grid needs at least one image")
    width = max(len(row) for row in rows) * (tile + gap) - gap
    sheet = Image.new("RGB", (width, len(rows) * (tile + gap) - gap), PAPER)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            resized = ImageOps.pad(image.convert("RGB"), (tile, tile), Image.Resampling.LANCZOS, PAPER)
            sheet.paste(resized, (c * (tile + gap), r * (tile + gap)))
    return sheet


def side_by_side(
    panels: Mapping[str, Sequence[Sequence[Image.Image]]],
    labels: Sequence[str],
    title: str,
    notes: Mapping[str, str] | None = None,
    tile: int = 64,
) -> Image.Image:
    """Grids of the same prompts, side by side. Texts that are too long end with dots.

    Args:
        panels: rows of each grid, by its heading.
        labels: labels of the rows, at the left.
        title: title at the top.
        notes: notes below the grids, by heading.
        tile: side of a cell in pixels.
    """
    grids = {name: image_grid(rows, tile) for name, rows in panels.items()}
    font, small, big = _font(17), _font(14), _font(22)
    margin, gap, top = 16, 28, 84
    labels, notes = [_shortened(label, font, LABEL_WIDTH) for label in labels], notes or {}
    left = margin + (max(int(font.getlength(label)) for label in labels) + 14 if any(labels) else 0)
    height = max(g.height for g in grids.values())
    widths = {
        name: max(grid.width, math.ceil(font.getlength(name)), math.ceil(small.getlength(notes.get(name, ""))))
        for name, grid in grids.items()
    }
    width = left + sum(widths.values()) + gap * (len(grids) - 1) + margin
    sheet = Image.new("RGB", (width, top + height + 40), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 12), _shortened(title, big, width - 2 * margin), INK, big)
    x = left
    for name, grid in grids.items():
        draw.text((x, 52), name, INK, font)
        sheet.paste(grid, (x, top))
        draw.text((x, top + height + 12), notes.get(name, ""), MUTED, small)
        x += widths[name] + gap
    for r, label in enumerate(labels):
        y = top + r * (tile + 4) + tile // 2
        draw.text((left - 14, y), label, INK, font, anchor="rm")
    return sheet


def plot_scores(scores: Mapping[str, Mapping[str, float]], path: str | Path, title: str, ylabel: str) -> None:
    """Plot grouped bars.

    Args:
        scores: ``scores[group][series]``, such as the score of each prompt without and with guidance.
        path: path of the image file.
        title: title of the plot.
        ylabel: label of the y axis.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no pyplot state
    from matplotlib.figure import Figure

    groups, series = list(scores), list(next(iter(scores.values())))
    figure = Figure(figsize=(1.6 + 1.15 * len(groups), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes, width = figure.subplots(), 0.8 / len(series)
    for i, name in enumerate(series):
        positions = [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))]
        bars = axes.bar(positions, [scores[g][name] for g in groups], width * 0.94, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    axes.set(title=title, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def plot_tuning(tuning: Any, path: str | Path) -> None:
    """Plot diversity against fidelity, one point per scale.

    Args:
        tuning: a :class:`~kspec_guidance.tuning.Tuning`.
        path: path of the image file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    x = [tuning.plain_fidelity, *(p.fidelity for p in tuning.points)]
    y = [tuning.plain_diversity, *(p.diversity for p in tuning.points)]
    axes.plot(x, y, "-", color="#9db7d5", lw=1)
    axes.plot(x[0], y[0], "k*", ms=13, label="plain sampling")
    for p in tuning.points:
        chosen = p.scale == tuning.scale
        axes.plot(p.fidelity, p.diversity, "o", ms=11 if chosen else 6, color="#c4572e" if chosen else "#2f6fb3")
        axes.annotate(f"{p.scale:g}", (p.fidelity, p.diversity), (7, 5), textcoords="offset points", fontsize=9)
    title = f"guidance: {tuning.verdict}" if tuning.scale is None else f"chosen scale: {tuning.scale:g}"
    axes.set_title(title, fontsize=11)
    axes.set(xlabel="fidelity (precision against plain images)", ylabel="different images per batch (Vendi score)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    figure.savefig(path, dpi=120)
