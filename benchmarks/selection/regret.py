"""Regret of every method of kspec_guidance.selection where the truth is known: table and figures of docs/selection.md.

    python -m benchmarks.selection.regret --seeds 20 --results benchmarks/results/selection.json --page docs/selection.md

Figures that the file of results lacks are measured and added to it, so that a run that was stopped goes on. About an hour
on one core for 20 seeds. Without ``--page`` it prints the table.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import pages
from benchmarks.selection import experiments as e
from kspec_guidance.statistics import jackknife_interval

EXPERIMENTS: dict[str, tuple[str, Callable[[int], Any]]] = {
    "1 RKE": ("disjoint modes 2, 3, 5: excess of 1/RKE after 1,000 pulls", partial(e.mixture, e.DISJOINT)),
    "1 Vendi": (
        "the same, excess of -log Vendi after 300 pulls",
        partial(e.mixture, e.DISJOINT, rounds=300, objective="vendi"),
    ),
    "1 curve": ("excess of Mixture-Greedy's weights", e.learning_curve),
    "2 overlap": ("four arms over twelve modes: excess of 1/RKE after 1,000 pulls", partial(e.mixture, e.overlapping())),
    "2 redundant": ("share of the arm with nothing of its own", e.redundant_weight),
    "3 KID": ("largest error of the weights toward a known mixture, 1,500 pulls", partial(e.target, "kid")),
    "3 FID": ("the same with the Frechet distance, 600 pulls", partial(e.target, "fid", rounds=600)),
    "4 linear": ("reward alone, 0.5 or 0.6: regret after 400 pulls", e.linear),
    "5 circle": ("three arms, each best on a third of a circle: regret after 384 pulls", e.circle),
    "5 RFF": (
        "rounds in which RFF-UCB with 500 features and PAK-UCB, told the same, choose the same arm",
        lambda seed: {"share": e.same_choices(seed)},
    ),
    "5 bad start": ("the best arm's first reward is 0: regret after 300 pulls", e.bad_start),
    "6 diverse": ("share of the diverse arm", e.diverse),
    "6 experts": ("share of a diverse arm that is off the prompt", e.experts),
    "6 complementary": ("RKE of what two collapsed arms make together (larger is better)", e.complementary),
    "7 PromptWise": ("500 prompts, five tries each", e.prompt_wise),
    "8 batches": ("regret on the circle, pending pulls in the deviations or not", e.batches),
    "8 processes": ("excess of the weights after 300 pulls", e.processes),
    "9 change": ("excess of 1/RKE two half-lives after an arm collapsed", e.change),
    "10 new arm": ("first pulls and later share (the best is 0.5) of an arm that is added", e.new_arm),
    "FD": ("Frechet distance of the pulled arm less the smallest, mean of 300 pulls", e.frechet),
}


Results = dict[str, dict[str, list[float]]]  # figures of each seed, by name, of each experiment


def flat(found: dict[Any, Any]) -> dict[str, float]:
    """Figures by name; of nested figures the names are joined."""
    out = {}
    for key, value in found.items():
        if isinstance(value, dict):
            out.update({f"{key}, {name}": v for name, v in flat(value).items()})
        else:
            out[str(key)] = float(value)
    return out


def measure(seeds: int, results: Results, save: Callable[[Results], None]) -> None:
    """Add the figures of the seeds that ``results`` lacks, one for each seed."""
    for seed in range(seeds):
        for name, (_, run) in EXPERIMENTS.items():
            found = results.setdefault(name, {})
            if len(next(iter(found.values()), [])) > seed:
                continue
            for key, value in flat(run(seed)).items():
                found.setdefault(key, []).append(round(value, 7))
            save(results)
            print(f"seed {seed}: {name}", flush=True)


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """Mean over the seeds and half the width of its 95% interval (Student)."""
    x = torch.tensor(values, dtype=torch.float64)
    if len(x) < 2:
        return float(x.mean()), 0.0
    interval = jackknife_interval(x.mean(), (x.sum() - x) / (len(x) - 1))  # of a mean: its standard error
    return interval.value, interval.high - interval.value


def rounded(value: float, digits: int) -> str:
    """A number with so many significant digits, without an exponent above 0."""
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e+" in text else text


def parts(found: dict[str, list[float]]) -> dict[str, dict[str, list[float]]]:
    """Figures of several kinds for each method by their kind; figures of one kind under an empty name."""
    split = {key: key.rpartition(", ") for key in found}
    kinds = {kind for _, _, kind in split.values()}
    if not all(method for method, _, _ in split.values()) or len({m for m, _, _ in split.values()}) * len(kinds) != len(
        found
    ):
        return {"": found}
    out: dict[str, dict[str, list[float]]] = {}
    for key, (method, _, kind) in split.items():
        out.setdefault(kind, {})[method] = found[key]
    return out


def table(results: Results) -> str:
    """Means and half widths of their 95% intervals."""
    rows = []
    for name, (what, _) in EXPERIMENTS.items():
        for kind, found in parts(results[name]).items():
            cells = []
            for key, values in found.items():
                mean, half = mean_and_half(values)
                cells.append(f"{key} {rounded(mean, 3)}" + (f" ± {rounded(half, 1)}" if half > 1e-9 else ""))
            seeds = str(len(next(iter(found.values()))))
            rows.append([name, what + (f": {kind}" if kind else ""), seeds, "; ".join(cells)])
    return pages.table(["experiment", "figure", "seeds", "method: mean, with its 95% interval"], rows)


def figures(results: Results, path: Path) -> None:
    """Bars of six experiments."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = ["1 RKE", "1 Vendi", "4 linear", "5 circle", "5 bad start", "7 PromptWise"]
    fig, axes = plt.subplots(2, 3, figsize=(11, 6), constrained_layout=True)
    for axis, name in zip(axes.flat, names, strict=True):
        found = {k: v for k, v in results[name].items() if name != "7 PromptWise" or k.endswith(", regret")}
        labels = [k.removesuffix(", regret") for k in found]
        means, halves = zip(*map(mean_and_half, found.values()), strict=True)
        axis.barh(labels, means, xerr=halves, color="#4477aa")
        axis.invert_yaxis()
        axis.set_title(EXPERIMENTS[name][0].replace(": ", ":\n"), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("regret" if name[0] in "457" else "excess", fontsize=8)
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)


def main() -> None:
    """Measure, or take the figures of a file, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--results", type=Path, help="file of the figures, to which missing ones are added")
    parser.add_argument("--page", type=Path, help="page whose table and picture are replaced")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file: Path | None = arguments.results

    def save(results: Results) -> None:
        if file is not None:
            file.write_text(json.dumps(results) + "\n")

    results = json.loads(file.read_text()) if file is not None and file.exists() else {}
    measure(arguments.seeds, results, save)
    if arguments.page is None:
        print(table(results))
        return
    figures(results, arguments.page.with_suffix(".png"))
    pages.fill(arguments.page, {"regret": table(results)})


if __name__ == "__main__":
    main()
