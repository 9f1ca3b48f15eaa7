"""Pictures of results: image grids side by side, and score plots. matplotlib is imported where it is used."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

__all__ = ["image_grid", "plot_scores", "side_by_side"]

INK, PAPER, MUTED = (30, 30, 30), (255, 255, 255), (110, 110, 110)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def image_grid(rows: Sequence[Sequence[Image.Image]], tile: int = 64, gap: int = 4) -> Image.Image:
    """Pictures in rows, each resized to ``tile`` pixels; rows may have different lengths.

    Raises:
        ValueError: without any picture.
    """
    if not rows or not any(rows):
        raise ValueError("a grid needs at least one picture")
    width = max(len(row) for row in rows) * (tile + gap) - gap
    sheet = Image.new("RGB", (width, len(rows) * (tile + gap) - gap), PAPER)
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            resized = picture.convert("RGB").resize((tile, tile), Image.Resampling.LANCZOS)
            sheet.paste(resized, (c * (tile + gap), r * (tile + gap)))
    return sheet


def side_by_side(
    panels: Mapping[str, Sequence[Sequence[Image.Image]]],
    labels: Sequence[str],
    title: str,
    notes: Mapping[str, str] | None = None,
    tile: int = 64,
) -> Image.Image:
    """Grids of the same prompts beside each other, with a heading each, prompts at the left and a note below."""
    grids = {name: image_grid(rows, tile) for name, rows in panels.items()}
    font, small, big = _font(17), _font(14), _font(22)
    margin, gap, top = 16, 28, 84
    left = margin + max((int(font.getlength(label)) for label in labels), default=0) + 14
    height = max(g.height for g in grids.values())
    width = left + sum(g.width for g in grids.values()) + gap * (len(grids) - 1) + margin
    sheet = Image.new("RGB", (width, top + height + 40), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, 12), title, INK, big)
    x = left
    for name, grid in grids.items():
        draw.text((x, 52), name, INK, font)
        sheet.paste(grid, (x, top))
        draw.text((x, top + height + 12), (notes or {}).get(name, ""), MUTED, small)
        x += grid.width + gap
    for r, label in enumerate(labels):
        y = top + r * (tile + 4) + tile // 2
        draw.text((left - 14, y), label, INK, font, anchor="rm")
    return sheet


def plot_scores(scores: Mapping[str, Mapping[str, float]], path: str | Path, title: str, ylabel: str) -> None:
    """Bars: ``scores[group][series]``, e.g. prompt by prompt, plain beside guided."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no pyplot state
    from matplotlib.figure import Figure

    groups, series = list(scores), list(next(iter(scores.values())))
    figure = Figure(figsize=(1.6 + 1.15 * len(groups), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes, width = figure.subplots(), 0.8 / len(series)
    for i, name in enumerate(series):
        places = [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))]
        bars = axes.bar(places, [scores[g][name] for g in groups], width * 0.94, label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=1)
    axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
    axes.set(title=title, ylabel=ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
