"""The arena's figures: fronts, gains of all methods, and ablations of guidance."""

import json
from pathlib import Path
from typing import Any

from kspec_guidance.bench.fronts import DEPTH
from kspec_guidance.bench.methods import METHODS

from .fronts import points, summaries
from .harness import FIDELITY_LOSS, mean

OURS, DEFAULT = "SPARKE, ours, order 0.5", "SPARKE, ours"
LOG_DET, APART = "SPARKE, ours, log det", "SPARKE, ours, until apart"
COLOURS = {
    DEFAULT: "#6fa3dc", OURS: "#1f5fa8", f"{OURS}, lower CFG": "#0b2e59", f"{LOG_DET}, lower CFG": "#5b3fa8",
    f"{OURS}, interval CFG": "#12706b", f"{LOG_DET}, interval CFG": "#8a5fd0", f"{DEFAULT}, interval CFG": "#5fb3ad",
    APART: "#2f8f4e",
}  # fmt: skip
OWN = tuple(COLOURS)


def fronts(data: list[dict[str, Any]], path: Path) -> None:
    """Fronts of every bed: up is more modes, right is more fidelity."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 3 if len(data) > 2 else max(1, len(data))
    lines = -(-len(data) // columns)
    fig = Figure(figsize=(4.6 * columns, 3.9 * lines), layout="constrained")
    FigureCanvasAgg(fig)
    panels = fig.subplots(lines, columns, squeeze=False).flatten()
    for axes, d in zip(panels, data, strict=False):
        s = d["settings"]
        base = d["methods"]["plain"][f"report {s['seeds']}"]
        m0, v0 = mean(base["modes"]), mean(base["valid"])
        best = [x.method for x in summaries(d, OURS)][:6]
        palette = iter(["#c4572e", "#3f8f5b", "#8a5fb0", "#b8912b", "#4aa0a8", "#a8506f"])
        for method in [m for m in d["methods"] if "front" in d["methods"][m]]:
            front = [{"m": mean(p["cases"]["modes"]), "v": mean(p["cases"]["valid"])} for p in points(d, method)]
            x, y = [v0, *(p["v"] for p in front)], [m0, *(p["m"] for p in front)]
            ours, named = method.startswith("SPARKE, ours"), method in best
            colour = COLOURS.get(method) or (next(palette, "#888888") if named else "#c9ced6")
            axes.plot(x, y, "o--" if ours and "CFG" in method else "o-", ms=3.5 if ours else 2.5, color=colour,
                      lw=2.2 if ours else 1.2 if named else 0.7, zorder=3 if ours else 2 if named else 1,
                      label=method if ours or named else None)  # fmt: skip
        axes.plot([v0], [m0], "k*", ms=11, zorder=4, label="plain sampling")
        axes.axvline(v0 - FIDELITY_LOSS, color="#999999", lw=0.8, ls=":")
        tops = [mean(p["cases"]["modes"]) for m in d["methods"].values() for p in m.get("front", [])]
        top = max([*tops, m0 * 1.2]) * 1.04
        axes.set(xlim=(v0 - 1.6 * DEPTH, v0 + 0.06), ylim=(m0 - 0.6 * (top - m0), top))  # the legend is below the fronts
        axes.locator_params(axis="x", nbins=6)
        axes.set_title(d["bed"], fontsize=10)
        axes.set(xlabel="fidelity", ylabel="modes found")
        axes.legend(fontsize=7, frameon=False, loc="lower left")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(data):]:  # fmt: skip
        axes.set_visible(False)
    fig.savefig(path, dpi=110)


def overview(data: list[dict[str, Any]], path: Path) -> None:
    """One row for each method: its gain on each bed, and the mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = {d["bed"]: {s.method: s.gain for s in summaries(d, OURS)} for d in data}
    names = [m for m in METHODS if sum(m in by for by in found.values()) > len(found) / 2]
    most = max(map(len, found.values()))
    full = [by for by in found.values() if len(by) >= 0.75 * most]  # beds with most of the methods that were measured
    means = {m: mean([by[m] for by in full if m in by] or [0.0]) for m in names}
    names.sort(key=lambda m: means[m])
    fig = Figure(figsize=(10.4, 0.33 * len(names) + 1.5), layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots()
    colours = ["#1f5fa8" if m.startswith("SPARKE, ours") else "#c3cad4" for m in names]
    about = f"mean of {len(full)} beds, where measured"
    axes.barh(range(len(names)), [means[m] for m in names], color=colours, height=0.66, label=about)
    marks = ["o", "s", "^", "v", "D", "P", "X", "*", "h", "<", ">", "d"]
    for mark, (bed, by) in zip(marks, found.items(), strict=False):
        y = [k for k, m in enumerate(names) if m in by]
        label = bed if by in full else f"{bed} (not in the mean)"
        axes.plot([by[names[k]] for k in y], y, mark, ms=4.5, mfc="none", mew=0.9, color="#333333", ls="", label=label)
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:+.0%}")
    axes.set_xlabel("more modes than plain sampling, at validity within 0.02 of it")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(1.0, 0.0))
    fig.savefig(path, dpi=110)


def ablation_panels(folder: Path, path: Path) -> None:
    """A panel for each part of guidance: gains of its variants on the beds, and of the reference as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    source = folder / "ablations.json"
    if not source.exists():
        return
    found = json.loads(source.read_text())
    reference = next(iter(found["groups"]["reference"].values()))
    groups = {name: by for name, by in found["groups"].items() if name != "reference"}
    groups = dict(sorted(groups.items(), key=lambda item: -len(item[1])))  # panels of similar height side by side
    colours = dict(zip(found["beds"], ["#1f5fa8", "#c4572e", "#3f8f5b", "#8a5fb0", "#b8912b", "#4aa0a8"], strict=False))
    columns, heights = 2, [len(by) for by in groups.values()]
    lines = -(-len(groups) // columns)
    tall = [max(heights[k * columns : (k + 1) * columns]) for k in range(lines)]
    fig = Figure(figsize=(13, 0.42 * sum(tall) + 0.75 * lines + 0.6), layout="constrained")
    FigureCanvasAgg(fig)
    panels = fig.subplots(lines, columns, squeeze=False, sharex=True, gridspec_kw={"height_ratios": tall}).flatten()
    for axes, (group, by) in zip(panels, groups.items(), strict=False):
        names = list(by)[::-1]
        for k, (bed, colour) in enumerate(colours.items()):
            shift = 0.62 * (0.5 - (k + 0.5) / len(colours))
            rows = [(y + shift, by[name][bed]) for y, name in enumerate(names) if bed in by[name]]
            if not rows:
                continue
            x = [r["gain"] for _, r in rows]
            spread = [[r["gain"] - r["low"] for _, r in rows], [r["high"] - r["gain"] for _, r in rows]]
            axes.errorbar(x, [y for y, _ in rows], xerr=[[max(0.0, v) for v in side] for side in spread], fmt="o", ms=4,
                          lw=0.8, color=colour, label=bed)  # fmt: skip
            if bed in reference:
                axes.axvline(reference[bed]["gain"], color=colour, lw=0.8, ls=":")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_title(group, fontsize=10, loc="left")
        axes.xaxis.set_major_formatter(lambda v, _: f"{v:+.0%}")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(groups) :]:
        axes.set_visible(False)
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    beds = [bed for bed in colours if bed in handles]
    fig.legend([handles[b] for b in beds], beds, loc="outside upper center", ncols=len(beds), frameon=False, fontsize=9)
    fig.supxlabel("more modes than plain sampling, at validity within 0.02 of it (95%); dotted: the reference", fontsize=9)
    fig.savefig(path, dpi=100)
