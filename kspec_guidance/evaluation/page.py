"""HTML pages of `evaluate` and `compare`: self-contained, with images and plots, without scripts or network access."""

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kspec_guidance.evaluation.image_sets import ImageSet
from kspec_guidance.evaluation.sets import ComparisonReport, Evaluation
from kspec_guidance.statistics import Curve

__all__ = ["write_page"]

COLOURS = ("#2f6fb3", "#c4572e", "#3d8b5f")


def _number(value: float) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0 or abs(value) >= 0.1:
        return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.3g}"


def _short(kernel: str) -> str:
    """The kernel with four significant digits; the JSON file has all digits."""
    return re.sub(r"\d+\.\d{4,}", lambda m: f"{float(m[0]):.4g}", kernel)


def _svg(draw: Any, title: str, xlabel: str, ylabel: str, log: bool = False) -> Any:
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "kspec", "font.size": 9}):
        figure = Figure(figsize=(3.6, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        draw(axes)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = re.sub(r"^.*?(?=<svg)", "", out.getvalue(), flags=re.DOTALL)
    label = f'<svg role="img" aria-label="{title}"'
    return Markup(text.replace("<svg", label, 1))  # safe: generated here, without text of users


def _curve(axes: Any, curve: Curve) -> None:
    for colour, (name, values) in zip(COLOURS, curve.mean.items(), strict=False):
        axes.plot(curve.x, values, "o-", color=colour, label=name, markersize=3, linewidth=1.3)
        low = [v - s for v, s in zip(values, curve.spread[name], strict=True)]
        high = [v + s for v, s in zip(values, curve.spread[name], strict=True)]
        axes.fill_between(curve.x, low, high, color=colour, alpha=0.15, linewidth=0)


def _plots(e: Evaluation) -> list[Any]:
    def spectrum(axes: Any) -> None:
        shares = [100 * v for v in e.spectrum[:40]]
        axes.bar(range(1, len(shares) + 1), shares, color=COLOURS[0])

    def bandwidths(axes: Any) -> None:
        _curve(axes, e.bandwidths)
        used = e.bandwidths.x[len(e.bandwidths.x) // 2]
        axes.axvline(used, color="#98a2b3", linestyle="--", linewidth=1)

    return [
        _svg(spectrum, "Modes by size", "mode", "share of the set in %"),
        _svg(lambda axes: _curve(axes, e.convergence), "Score against sample size", "images", "score", log=True),
        _svg(bandwidths, "Score against bandwidth", "Gaussian bandwidth", "score", log=True),
    ]


def _data_uri(images: ImageSet, i: int) -> str:
    """The thumbnail of an image, for its ``src``."""
    return "data:image/jpeg;base64," + base64.b64encode(images.thumbnails[i]).decode()


def _part(name: str, e: Evaluation) -> dict[str, Any]:
    return {"name": name, "evaluation": e, "plots": _plots(e)}


def _names(a: Path, b: Path) -> tuple[str, str]:
    """The shortest suffixes of two paths that differ."""
    for k in range(1, 1 + max(len(a.parts), len(b.parts))):
        names = "/".join(a.parts[-k:]), "/".join(b.parts[-k:])
        if names[0] != names[1]:
            return names
    return f"{names[0]} (first)", f"{names[1]} (second)"


def write_page(result: Evaluation | ComparisonReport, path: str | Path, notes: Sequence[str] = ()) -> None:
    """Write the page, and a JSON file with the same numbers.

    Args:
        result: result of :func:`evaluate_set` or :func:`compare_sets`.
        path: path of the page; the JSON file has the same name with another suffix.
        notes: lines below the title.
    """
    from jinja2 import Environment, FileSystemLoader

    from kspec_guidance import __version__

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
    environment.filters |= {"number": _number, "short": _short, "data_uri": _data_uri}
    if isinstance(result, Evaluation):
        comparison, parts = None, [_part(result.images.path.name, result)]
        title = f"How varied is {result.images.path.resolve().name}?"
        about = result.embedder
    else:
        names = _names(result.a.images.path, result.b.images.path)
        comparison, parts = result, [_part(names[0], result.a), _part(names[1], result.b)]
        title, about = f"{names[0]} beside {names[1]}", result.a.embedder
    subtitle = f"Kernel-spectral diversity of image features by {about['name']}"
    page = environment.get_template("report.html").render(
        title=title, subtitle=subtitle, parts=parts, comparison=comparison, version=__version__, notes=notes
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    path.with_suffix(".json").write_text(json.dumps(result.as_dict(), indent=1, default=list) + "\n", encoding="utf-8")
