"""HTML pages of `evaluate` and `compare`: self-contained, with images and plots, without scripts or network access."""

import base64
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kspec_guidance.comparison import DiversityGap
from kspec_guidance.evaluation.embeddings import EmbeddingReport
from kspec_guidance.evaluation.image_sets import ImageSet
from kspec_guidance.evaluation.scores import AGREEMENT
from kspec_guidance.evaluation.set_pairs import ComparisonReport
from kspec_guidance.evaluation.sets import Evaluation
from kspec_guidance.evaluation.verdicts import count, set_names
from kspec_guidance.statistics import Curve

__all__ = ["TILES", "number", "page_environment", "svg_plot", "write_page"]

COLOURS = ("#2f6fb3", "#c4572e", "#3d8b5f")
LEGEND_INSIDE = 5  # names at most in the legend of a plot; more stand beside it
KINDS_SHOWN, TILES, GROUP_TILES = 12, 11, 22


def number(value: float | None) -> str:
    """A figure with as many digits as a table needs; a dash for None and values that are not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    if value == 0 or abs(value) >= 0.1:
        return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.3g}"


def _short(kernel: str) -> str:
    """The kernel by its name and bandwidth, with four significant digits; the JSON file has all digits."""
    kernel = re.sub(r"Kernel\((?:bandwidth=)?([^()]*)\)", lambda m: f" {m[1]}".rstrip(), "" if kernel == "-" else kernel)
    return re.sub(r"\d+\.\d{4,}", lambda m: f"{float(m[0]):.4g}", kernel)


def svg_plot(draw: Any, title: str, xlabel: str, ylabel: str, log: bool = False) -> Any:
    """A plot as SVG for the page.

    Args:
        draw: called with the axes of matplotlib; their labels make the legend.
        title: of the plot, without text of users.
        xlabel: of the axis.
        ylabel: of the axis.
        log: binary logarithmic x axis.
    """
    from markupsafe import Markup
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "kspec", "font.size": 9}):
        figure = Figure(figsize=(3.6, 2.7), layout="constrained", facecolor="none")  # of the page, light or dark
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.set_facecolor("none")
        draw(axes)
        axes.set_title(title, fontsize=10)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if log:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.3g}"))
        axes.spines[["top", "right"]].set_visible(False)
        names = axes.get_legend_handles_labels()[1]
        if len(names) > LEGEND_INSIDE:
            figure.set_figwidth(4.8)
            figure.legend(frameon=False, fontsize=8, loc="outside right upper")
        elif names:
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
    def sizes(axes: Any) -> None:
        shares = [100 * m.share for m in e.modes[:40]]
        axes.bar(range(1, len(shares) + 1), shares, color=COLOURS[0])

    def distances(axes: Any) -> None:
        _curve(axes, e.distances)
        axes.axvline(e.embedder["same_distance"], color="#98a2b3", linestyle="--", linewidth=1)

    return [
        svg_plot(sizes, "Kinds by size", "kind", "share of the set in %"),
        svg_plot(lambda axes: _curve(axes, e.convergence), "Score against sample size", "images", "score", log=True),
        svg_plot(distances, "Different images against distance", "distance within a kind", "different images"),
    ]


def _gap_plot(gaps: dict[str, DiversityGap], names: Sequence[str]) -> Any:
    """Vendi score against the number of images, of both sets and of the held-out images."""

    def draw(axes: Any) -> None:
        curves = [(name, gap.generated_curve) for name, gap in zip(names, gaps.values(), strict=True)]
        curves.append(("held out", next(iter(gaps.values())).held_out_curve))
        for colour, (name, curve) in zip(COLOURS, curves, strict=True):
            axes.plot(curve.x, curve.mean["Vendi"], "o-", color=colour, label=name, markersize=3, linewidth=1.3)

    return svg_plot(draw, "Vendi score against number of images", "images", "score", log=True)


def _data_uri(images: ImageSet, i: int) -> str:
    """The thumbnail of an image, for its ``src``."""
    return "data:image/jpeg;base64," + base64.b64encode(images.thumbnails[i]).decode()


def _kind_rows(e: Evaluation) -> list[dict[str, Any]]:
    """Rows of the page whose shares add up to 1: the largest kinds, all other ones, and images that are alone."""
    several = [m for m in e.modes if len(m.samples) > 1]
    rows = [
        {"share": m.share, "text": f"{len(m.samples)} images", "samples": m.samples[:TILES]} for m in several[:KINDS_SHOWN]
    ]
    others, single = several[KINDS_SHOWN:], [m for m in e.modes if len(m.samples) == 1]
    for group, text in (
        (others, f"{len(others)} other kinds, one image of each"),
        (single, f"{len(single)} single image{'s' if len(single) > 1 else ''}, each of its own kind"),
    ):
        if group:
            samples = [m.samples[0] for m in group[:GROUP_TILES]]
            rows.append({"share": sum(m.share for m in group), "text": text, "samples": samples})
    return rows


def _third_figure(e: Evaluation) -> tuple[str, str]:
    """Agreement with the prompts where there is a judge of it, else the number of near-duplicates."""
    for score in e.scores:
        if score.score == AGREEMENT and e.images.judge is not None:
            return number(score.value), e.images.judge.meaning
    return str(len(e.redundant)), "images that nearly repeat another"


def _extremes(e: Evaluation) -> list[tuple[str, list[int]]]:
    """Images that are least and most bound to their prompts, and that agree with them least and most."""
    rows = []
    if e.bound:
        order = list(e.bound)
        rows += [("least bound to their prompt", order[:TILES]), ("most bound to their prompt", order[::-1][:TILES])]
    if e.images.agreement is not None:
        values = e.images.agreement.tolist()
        known = sorted((i for i, v in enumerate(values) if math.isfinite(v)), key=values.__getitem__)
        if known:
            rows += [("show their prompt least", known[:TILES]), ("show their prompt most", known[::-1][:TILES])]
    return rows


def _part(name: str, e: Evaluation) -> dict[str, Any]:
    return {
        "name": name,
        "evaluation": e,
        "different": count(e.headline.different),
        "third": _third_figure(e),
        "extremes": _extremes(e),
        "kinds": _kind_rows(e),
        "plots": _plots(e),
    }


def page_environment(*folders: Path) -> Any:
    """Templates of the pages, and those of other folders, which may extend ``base.html`` and use ``macros.html``."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader([*folders, Path(__file__).parent / "templates"]), autoescape=True)
    environment.filters |= {"number": number, "short": _short, "data_uri": _data_uri}
    return environment


def write_page(
    result: Evaluation | ComparisonReport | EmbeddingReport,
    path: str | Path,
    notes: Sequence[str] = (),
    plots: Sequence[Any] = (),
    strips: Sequence[tuple[str, str, Sequence[int]]] = (),
) -> list[Path]:
    """Write the page, and a JSON file with the same numbers; for near-duplicates of one set, also the list of their names.

    Args:
        result: result of :func:`evaluate_set`, :func:`compare_sets` or ``compare_embeddings``.
        path: path of the page; the JSON file has the same name with another suffix, the list the ending
            ``-duplicates.txt``.
        notes: lines below the warnings.
        plots: results of :func:`svg_plot`, below the notes.
        strips: of images of the arms of a run, below the plots: a name, words about it, and indices of its images.

    Returns:
        The paths of the files.
    """
    from kspec_guidance import __version__

    path = Path(path)
    files = [path, path.with_suffix(".json")]
    environment = page_environment()
    if isinstance(result, EmbeddingReport):
        title = f"What two embedders see in {result.images.path.resolve().name}"
        page = environment.get_template("embeddings.html").render(
            title=title, result=result, images=result.images, version=__version__
        )
        return _write(page, result, files)
    if isinstance(result, Evaluation):
        gap_plot = None
        comparison, parts, doubts = None, [_part(result.images.path.name, result)], result.warnings
        title = f"How varied is {result.images.path.resolve().name}?"
        about, main_test = result.embedder, None
        if result.redundant:
            files.append(path.with_name(f"{path.stem}-duplicates.txt"))
    else:
        names = set_names(result.a.images.path, result.b.images.path)
        comparison, parts = result, [_part(names[0], result.a), _part(names[1], result.b)]
        title, about, main_test = f"{names[0]} beside {names[1]}", result.a.embedder, result.main_test
        gap_plot = _gap_plot(result.gaps, names) if result.gaps else None
        own = [f"{n}: {w}" for n, e in zip(names, (result.a, result.b), strict=True) for w in e.warnings]
        doubts = [*result.warnings, *(result.a.warnings if result.a.warnings == result.b.warnings else own)]
    page = environment.get_template("report.html").render(
        title=title, about=about, parts=parts, comparison=comparison, version=__version__, notes=notes, plots=plots,
        strips=strips, doubts=doubts, main_test=main_test, gap_plot=gap_plot,
        duplicates_file=files[2].name if len(files) > 2 else None,
    )  # fmt: skip
    _write(page, result, files)
    if isinstance(result, Evaluation) and result.redundant:
        files[2].write_text("".join(f"{result.images.names[i]}\n" for i in result.redundant), encoding="utf-8")
    return files


def _write(page: str, result: Evaluation | ComparisonReport | EmbeddingReport, files: list[Path]) -> list[Path]:
    """Write the page and its JSON file, which are the first two of the files."""
    files[0].parent.mkdir(parents=True, exist_ok=True)
    files[0].write_text(page, encoding="utf-8")
    files[1].write_text(json.dumps(result.as_dict(), indent=1, default=list) + "\n", encoding="utf-8")
    return files
