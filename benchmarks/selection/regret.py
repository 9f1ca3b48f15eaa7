"""Regret of every method of kspec_guidance.selection where the truth is known: table and figures of docs/selection.md.

    python -m benchmarks.selection.regret --seeds 20 --results benchmarks/results/selection.json --page docs/selection.md

About a quarter of an hour on one core. Without ``--results`` it prints the table.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.selection import experiments as e

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
    "5 bad start": ("the best arm's first reward is 0: regret after 300 pulls", e.bad_start),
    "6 diverse": ("share of the diverse arm", e.diverse),
    "6 experts": ("share of a diverse arm that is off the prompt", e.experts),
    "6 complementary": ("RKE of what two collapsed arms make together (larger is better)", e.complementary),
    "7 PromptWise": ("regret, cost and successes of 500 prompts, five tries each", e.prompt_wise),
    "8 batches": ("regret on the circle, batches of 1, 8, 32, 96", e.batches),
    "8 processes": ("excess of the weights after 300 pulls", e.processes),
    "9 change": ("excess of 1/RKE two half-lives after an arm collapsed", e.change),
    "10 new arm": ("first pulls and later share (the best is 0.5) of an arm that is added", e.new_arm),
    "FD": ("Frechet distance of the pulled arm less the smallest, mean of 300 pulls", e.frechet),
}


def flat(found: dict[Any, Any]) -> dict[str, float]:
    """Figures by name; of nested figures the names are joined."""
    out = {}
    for key, value in found.items():
        if isinstance(value, dict):
            out.update({f"{key}, {name}": v for name, v in flat(value).items()})
        else:
            out[str(key)] = float(value)
    return out


def measure(seeds: int) -> dict[str, dict[str, list[float]]]:
    """Figures of each experiment, one for each seed."""
    results: dict[str, dict[str, list[float]]] = {}
    for name, (_, run) in EXPERIMENTS.items():
        for seed in range(seeds):
            for key, value in flat(run(seed)).items():
                results.setdefault(name, {}).setdefault(key, []).append(round(value, 7))
        print(name, {k: round(sum(v) / len(v), 5) for k, v in results[name].items()}, flush=True)
    same = [e.same_choices(seed) for seed in range(min(seeds, 5))]
    results["5 RFF"] = {"same choices as PAK-UCB at 500 features": same}
    return results


def mean_and_half(values: list[float]) -> tuple[float, float]:
    """Mean over the seeds and half the width of its 95% interval."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), 1.96 * float(x.std()) / len(x) ** 0.5 if len(x) > 1 else 0.0


def table(results: dict[str, dict[str, list[float]]]) -> str:
    """Means and half widths of their 95% intervals."""
    lines = ["| experiment | figure | seeds | method: mean, with its 95% interval |", "|---|---|---|---|"]
    for name, (what, _) in EXPERIMENTS.items():
        if name not in results:
            continue
        cells = []
        for key, values in results[name].items():
            mean, half = mean_and_half(values)
            cells.append(f"{key} {mean:.3g}" + (f" ± {half:.1g}" if half > 0 else ""))
        seeds = len(next(iter(results[name].values())))
        lines.append(f"| {name} | {what} | {seeds} | {'; '.join(cells)} |")
    return "\n".join(lines)


def figures(results: dict[str, dict[str, list[float]]], path: Path) -> None:
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


def replace_between(text: str, name: str, block: str) -> str:
    """``text`` with what lies between the markers of ``name`` replaced."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = text.partition(start)
    return f"{head}{start}\n{block}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    """Measure, or take the figures of a file, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--results", type=Path, help="file of the figures; read if it exists, else written")
    parser.add_argument("--page", type=Path, help="page whose table and picture are replaced")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.results is not None and arguments.results.exists():
        results = json.loads(arguments.results.read_text())
    else:
        results = measure(arguments.seeds)
        if arguments.results is not None:
            arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    if arguments.page is None:
        print(table(results))
        return
    figures(results, arguments.page.with_suffix(".png"))
    arguments.page.write_text(replace_between(arguments.page.read_text(), "regret", table(results)))


if __name__ == "__main__":
    main()
