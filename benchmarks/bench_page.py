"""The examples of comparisons in docs/bench.md: 24 prompts that the model knows, methods that fit, at several strengths.

python -m benchmarks.bench_page --out outputs/paper                        # the embedded model; a quarter of an hour
python -m benchmarks.bench_page --transformer --out outputs/transformer    # the transformer of the arena; as long

A run that was stopped goes on.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.pages import fill, table
from kspec_guidance.bench.page import draw_front

ROOT = Path(__file__).parents[1]
SHOWN = ("vendi", "attribute_coverage", "conditional_rke")  # scores of diversity in the table


def gains(results: dict[str, Any]) -> str:
    """Gains at equal quality of each method, the largest in the first score first."""
    fronts = {name: results["fronts"][name]["methods"] for name in SHOWN}

    def percent(score: str, method: str) -> str:
        value, low, high = (f"{100 * fronts[score][method][k]:+.0f}%" for k in ("gain", "gain_low", "gain_high"))
        return f"{value} [{low}, {high}]"

    rows = []
    for method, found in sorted(fronts[SHOWN[0]].items(), key=lambda item: -item[1]["gain"]):
        volume = f"{found['volume']:.2f} [{found['volume_low']:.2f}, {found['volume_high']:.2f}]"
        rows.append([method, *(percent(score, method) for score in SHOWN), volume])
    titles = [results["metrics"][score]["title"] for score in SHOWN]
    return table(["method", *titles, f"hypervolume, {titles[0]}"], rows)


def figure(results: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    qualities = list(results["quality"])
    fig, axes = plt.subplots(1, len(qualities), figsize=(9.5, 3.4), sharey=True, layout="constrained")
    for ax, quality in zip(axes, qualities, strict=True):
        draw_front(ax, results, quality, SHOWN[0])
        ax.set(xlabel=results["metrics"][quality]["title"])
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel(results["metrics"][SHOWN[0]]["title"])
    fig.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    fig.savefig(path, dpi=120)
    plt.close(fig)


def save_transformer(folder: Path) -> Path:
    """The arena's transformer as the folder of a pipeline."""
    from benchmarks.arena.beds.transformer import EmojiTransformer

    if not (folder / "model_index.json").exists():
        EmojiTransformer().pipe.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/paper"), help="folder of the comparison")
    parser.add_argument("--transformer", action="store_true", help="of the arena's transformer, not the embedded model")
    args = parser.parse_args()
    model, section, picture = ["--model", "demo"], "example", "bench.png"
    if args.transformer:
        folder = save_transformer(args.out.with_name(args.out.name + "-pipeline"))
        model = ["--model", str(folder), "--judge", "demo", "--steps", "8", "--guidance-scale", "4"]
        model += ["--option", "max_sequence_length=0"]
        section, picture = "transformer", "bench-transformer.png"
    command = [sys.executable, "-m", "kspec_guidance", "bench", *model, "--suite", "paper", "--prompts", "bundled:24"]
    subprocess.run([*command, "--out", str(args.out)], check=True)
    results = json.loads((args.out / "results.json").read_text())
    fill(ROOT / "docs" / "bench.md", {section: gains(results)})
    figure(results, ROOT / "docs" / picture)
    for name in ("plain", *results["fronts"][SHOWN[0]]["methods"]):
        print(name, {k: round(results["methods"][name][k]["value"], 3) for k in (*SHOWN, *results["quality"])})
    print("p of differences in", SHOWN[0], "to", results["fronts"][SHOWN[0]]["reference"], ":",
          {m: f["p"] for m, f in results["fronts"][SHOWN[0]]["methods"].items()})  # fmt: skip


if __name__ == "__main__":
    main()
