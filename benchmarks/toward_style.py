"""MMD guidance toward a style at one prompt a batch, with and without a baseline of the model's own samples.

    python benchmarks/toward_style.py --plot docs/baseline.png
    python benchmarks/toward_style.py --diversity --seeds 1
    python benchmarks/toward_style.py --transformers --seeds 3    # then python -m benchmarks.arena.page
    python benchmarks/toward_style.py --pictures docs               # of the transformers, to look at
    python benchmarks/toward_style.py --tones --seeds 1
    python benchmarks/toward_style.py --mixed --styles noto --seeds 1   # 7 prompts in each batch
    python benchmarks/toward_style.py --memory --styles noto --seeds 1  # 4 calls of a prompt
    python benchmarks/toward_style.py --captions --seeds 2                # of the references, on the distilled transformer
    python benchmarks/toward_style.py --captions --mixed --scales 1 --seeds 2
    python benchmarks/toward_style.py --page docs/toward-style.md       # the tables of these four

The embedded model, 8 steps, 8 images of each of 7 prompts that are not among those of the baseline. *Other style* is the
emoji classifier's mean probability of the other art style; *valid* its probability of the likeliest emoji that the prompt
may describe; *different* the number of different emoji and skin tones, whatever their style, among the images of a prompt
that show what it describes; *wanted tone* the mean probability of a skin tone. Rows that are in the file of results are not
measured again; more seeds are added to them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arena.beds.base import Case
from benchmarks.arena.beds.emoji import Emoji
from benchmarks.arena.beds.transformer import DistilledEmojiTransformer, EmojiTransformer
from benchmarks.arena.matching import Attraction, MeanShift
from benchmarks.pages import fill, table
from kspec_guidance import (
    SPARKE,
    MMDGuidance,
    NoveltyGuidance,
    encode_reference,
    load_demo_pipeline,
    load_demo_reference,
    make_baseline,
    toward_reference,
)
from kspec_guidance.demo.judge import DemoJudge
from kspec_guidance.demo.pipeline import ASSETS, DEMO_PROMPTS
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.objectives.witness import BANDWIDTH
from kspec_guidance.plotting import side_by_side

PROMPTS = ("firefighter", "health worker", "astronaut", "detective", "artist", "mechanic", "dancer")
CALL = {"num_inference_steps": 8, "guidance_scale": 5.0}
REFERENCES, BASELINES = (16, 32, 96), (50, 100, 200)
TONES = ("dark skin tone", "light skin tone")
SCALES = (1.0, 2.0)  # with a baseline; other numbers of baseline samples at the second
EARLY_SCALES = ((3.0, 6.0), (2.0, 3.0, 6.0))  # of moves at the start, in 8 steps and in 4
CALLS = 4  # of a prompt, with a memory
FEATURES = 4096  # random ones, in place of rows
ONE_PROMPT, ALL_PROMPTS = "one prompt a batch", "all prompts in each batch"
VIVID = 0.75  # scale of the guide of diversity beside the second
RESULTS = Path(__file__).parent / "results" / "toward_style.json"


def measure(bed: Emoji, guide: Any, seed: int, style: str, words: str = "") -> dict[str, float]:
    """Figures of one seed: means over 7 prompts, one prompt a batch."""
    clear(guide)
    cases = [Case(prompt + words, 100 * seed + k) for k, prompt in enumerate(PROMPTS)]
    return figures(bed, style, (samples(bed, guide, case, 8) for case in cases))


def mixed(bed: Emoji, guide: Any, seed: int, style: str, words: str = "") -> dict[str, float]:
    """The same with all 7 prompts in each of 8 batches."""
    clear(guide)
    batches = []
    for k in range(8):
        noises = [torch.Generator().manual_seed(1000 * seed + 10 * k + i) for i in range(len(PROMPTS))]
        prompts = [prompt + words for prompt in PROMPTS]
        with nullcontext() if guide is None else guide.attach(bed.pipe):
            batches.append(bed.pipe(prompts, generator=noises, output_type="latent", **call_of(bed)).images)
    return figures(bed, style, torch.stack(batches, 1))


def several(bed: Emoji, guide: Any, seed: int, style: str, words: str = "") -> dict[str, float]:
    """Figures of 32 images of each of three prompts, one batch after the other, with a memory for each prompt."""

    def of_prompt(k: int, prompt: str) -> torch.Tensor:
        clear(guide)
        cases = [Case(prompt + words, 100 * seed + 10 * k + i) for i in range(CALLS)]
        return torch.cat([samples(bed, guide, case, 8) for case in cases])

    return figures(bed, style, (of_prompt(k, prompt) for k, prompt in enumerate(PROMPTS[:3])))


def clear(guide: Any) -> None:
    if hasattr(guide, "memory"):
        guide.memory.clear()


def figures(
    bed: Emoji, style: str, of_prompts: Iterable[torch.Tensor], prompts: Sequence[str] = PROMPTS
) -> dict[str, float]:
    """Means over the prompts of the figures of each one's samples. A style may also be a skin tone."""
    head = "tone" if style in TONES else "style"
    index = bed.judge_.classes[head].index(style)
    found: dict[str, list[float]] = {"other": [], "valid": [], "different": []}
    for prompt, made in zip(prompts, of_prompts, strict=False):
        rows = bed.rows(made)
        found["other"].append(1 - float(bed.judge_.network.heads[head](rows).softmax(1)[:, index].mean()))
        found["valid"].append(bed.figures(rows, Case(prompt, 0))["valid"])
        found["different"].append(different(bed.judge_, rows, prompt))
    return {name: mean(values) for name, values in found.items()}


def samples(bed: Emoji, guide: Any, case: Case, n: int) -> torch.Tensor:
    """Samples of a prompt, guided unless ``guide`` is None."""
    with nullcontext() if guide is None else guide.attach(bed.pipe):
        return bed.run(case, n)


def with_seed(row: dict[str, Any], found: dict[str, float]) -> dict[str, Any]:
    """A row's means and standard errors over seeds, with one seed more (Welford's update)."""
    before = row.get("seeds", 0)
    n = before + 1
    out: dict[str, Any] = {"seeds": n}
    for name, value in found.items():
        m, se = row.get(name, 0.0), row.get(f"{name}_se", 0.0)
        out[name] = m + (value - m) / n
        squares = before * (before - 1) * se**2 + (value - m) * (value - out[name])
        out[f"{name}_se"] = (squares / (n * before)) ** 0.5 if before else 0.0
    return row | out


def different(judge: DemoJudge, rows: torch.Tensor, prompt: str) -> int:
    """Number of different emoji and skin tones, whatever their style, among images that show what the prompt describes."""
    p, described = judge.probabilities(rows), judge.described(prompt)
    kinds = [(m["code"], m["tone"]) for m in judge.emoji]
    places: dict[tuple[str, str], int] = {}
    first = torch.tensor([places.setdefault(kind, k) for k, kind in enumerate(kinds)])  # one place for both styles
    by_kind = torch.zeros_like(p).index_add_(1, first, torch.where(described, p, 0))
    return len(set(by_kind.argmax(1)[described[p.argmax(1)]].tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--styles", nargs="+", default=["noto", "twemoji"])
    parser.add_argument("--bandwidths", action="store_true", help="of the kernel, in median distances; nothing else")
    parser.add_argument("--diversity", action="store_true", help="rows with a guide of diversity beside; nothing else")
    parser.add_argument("--tones", action="store_true", help="toward skin tones; nothing else")
    parser.add_argument("--mixed", action="store_true", help="all prompts in each batch; nothing else")
    parser.add_argument("--memory", action="store_true", help="several calls of a prompt; nothing else")
    parser.add_argument("--scales", nargs="+", type=float, default=list(SCALES), help="with --captions")
    parser.add_argument("--captions", action="store_true", help="captions of the references; nothing else")
    parser.add_argument("--transformers", action="store_true", help="the arena's transformers; nothing else")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="grids of the transformers; nothing else")
    parser.add_argument("--page", type=Path, help="write the tables of tones, mixed batches, memory and captions here")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    bed: Emoji
    part: str | None = None  # of the page, if not the first
    figures_of = measure
    rows: list[dict[str, Any]] = json.loads(options.json.read_text())["rows"] if options.json.exists() else []

    def add(name: str, guide: Any, style: str, words: str = "", **about: Any) -> None:
        about = {"name": name, "style": style, "part": part, **about}
        place = next((i for i, row in enumerate(rows) if about == {k: row.get(k) for k in about}), len(rows))
        if place == len(rows):
            rows.append({k: v for k, v in about.items() if v is not None})
        for seed in range(rows[place].get("seeds", 0), options.seeds):
            rows[place] = with_seed(rows[place], figures_of(bed, guide, seed, style, words))
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[place].items()}, flush=True)
            options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")

    if options.page:
        named = parts(rows)
        text = options.page.read_text()
        tables_of = ("style_tones", "style_mixed", "style_memory", "style_captions")
        own = [name for name in tables_of if f"<!-- {name} -->" in text]
        fill(options.page, {name: named[name] for name in own})
        return
    styles = [f"{name} style" for name in options.styles]
    if options.transformers or options.pictures:
        for bed in (EmojiTransformer(), DistilledEmojiTransformer()):
            if options.pictures:
                pictures(bed, styles, options.pictures)
                continue
            part = bed.name
            of_transformer(bed, styles, add)
        return
    if options.captions:
        bed = DistilledEmojiTransformer()
        part, figures_of = (f"captions, {ALL_PROMPTS}", mixed) if options.mixed else (f"captions, {ONE_PROMPT}", measure)
        with_captions(bed, styles, options.scales, add)
        return
    bed = Emoji(pipe=load_demo_pipeline())
    everything = make_baseline(bed.pipe, n=max(BASELINES), batch_size=8, call=CALL)
    about: dict[str, Any]
    for style in TONES if options.tones else styles:
        latents = references(bed, style)
        most, baseline = len(latents), everything[:100]
        if options.bandwidths:
            median = float(GaussianKernel().fit(latents.flatten(1)).bandwidth or 0)
            for factor in (1, 2, 4):
                guide = MMDGuidance(latents, kernel=GaussianKernel(factor * median), baseline=baseline)
                add("bandwidth", guide, style, factor=factor)
            continue
        if options.tones:
            part = "tones"
            for scale in SCALES:
                guide = MMDGuidance(latents, scale, baseline=baseline)
                add("baseline", guide, style, references=most, baseline=100, scale=scale)
            guide = MMDGuidance(latents, 3.0, baseline=baseline, stop=0.2)
            add("early", guide, style, references=most, baseline=100, scale=3.0)
            add("plain", None, style)
            add("asked in words", None, style, f", {style}")
            add("MMD, batch and memory", MMDGuidance(latents), style, references=most)
            continue
        if options.mixed or options.memory:
            part, figures_of = ("mixed", mixed) if options.mixed else ("memory", several)
            for scale in SCALES[:1] if options.memory else SCALES:
                about = {"references": most, "baseline": 100, "scale": scale}
                add("baseline", MMDGuidance(latents, scale, baseline=baseline), style, **about)
                if options.memory:
                    add("counted", MMDGuidance(latents, scale, baseline=baseline, count_memory=True), style, **about)
            if options.mixed:
                add("MMD, batch and memory", MMDGuidance(latents), style, references=most)
            add("plain", None, style)
            continue
        if options.diversity:
            part = "diversity"
            for m in (REFERENCES[0], most):
                about = {"references": m, "baseline": 100, "scale": SCALES[-1]}
                guide = MMDGuidance(latents[:m], SCALES[-1], baseline=baseline)
                add("baseline, diversity", guide + SPARKE.preset("vivid", scale=VIVID), style, **about)
                add("baseline", guide, style, **about)
            add("asked in words", None, style, f", {style}")
            add("plain", None, style)
            continue
        add("plain", None, style)
        for m in REFERENCES:
            for scale in SCALES:
                guide = MMDGuidance(latents[:m], scale, baseline=baseline)
                add("baseline", guide, style, references=m, baseline=100, scale=scale)
        add("asked in words", None, style, f", {style}")
        add("features", random_features(latents, baseline), style, references=most, baseline=100, scale=SCALES[0])
        for weight in (0.7, 1.5):
            add("attraction", Attraction(reference=latents, weight=weight), style, references=most, weight=weight)
        for weight in (0.5, 1.0):
            add("mean shift", MeanShift(reference=latents, weight=weight), style, references=most, weight=weight)
        add("MMD, batch and memory", MMDGuidance(latents), style, references=most)
        for b in BASELINES:
            if b != 100:  # is there already
                guide = MMDGuidance(latents, SCALES[-1], baseline=everything[:b])
                add("baseline", guide, style, references=most, baseline=b, scale=SCALES[-1])
        add("novelty", NoveltyGuidance(latents), style, references=most)
        add("novelty, baseline", NoveltyGuidance(latents, baseline=baseline), style, references=most, baseline=100)
    if options.plot:
        plot(rows, options.plot)


def references(bed: Emoji, style: str) -> torch.Tensor:
    """Latents of a style's references, in a fixed random order."""
    name = style.replace(" ", "-") if style in TONES else style.split()[0]
    latents = encode_reference(bed.pipe, load_demo_reference(name))
    return latents[torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))]


def random_features(reference: torch.Tensor, baseline: torch.Tensor) -> MMDGuidance:
    """The default with a baseline, and random Fourier features in place of the rows of both sets."""
    rows = reference.flatten(1)
    kernel = GaussianKernel(BANDWIDTH * float(GaussianKernel().fit(rows).bandwidth or 0))
    features = RandomFourierFeatures(kernel, rows.shape[1], FEATURES)
    return MMDGuidance(reference, SCALES[0], baseline=baseline, feature_map=features)


def call_of(bed: Emoji) -> dict[str, Any]:
    """Arguments of a bed's pipeline."""
    if not isinstance(bed, EmojiTransformer):
        return CALL
    return {
        "num_inference_steps": bed.steps, "sigmas": [1 - k / bed.steps for k in range(bed.steps)],
        "guidance_scale": bed.guidance_scale, "max_sequence_length": 0,
    }  # fmt: skip


def baseline_of(bed: Emoji) -> torch.Tensor:
    """A model's own samples."""
    return make_baseline(bed.pipe, DEMO_PROMPTS, 100, batch_size=8, call=call_of(bed))


def with_captions(bed: Emoji, styles: list[str], scales: list[float], add: Callable[..., None]) -> None:
    """Guides toward a style with captions of the references: none, of their subjects, and also of their style."""
    for style in styles:
        name = style.split()[0]
        images, listed = load_demo_reference(name), json.loads((ASSETS / "references" / "references.json").read_text())
        named = listed[name]["captions"]
        subjects = [caption.removesuffix(f", {style}") for caption in named]
        for scale in scales:
            for what, captions in (("baseline", None), ("captions", subjects), ("captions, style", named)):
                guide = toward_reference(
                    bed.pipe, images, scale, captions=captions, prompts=DEMO_PROMPTS, n=100, batch_size=8, call=call_of(bed)
                )
                add(what, guide, style, scale=scale, references=len(images), baseline=100)
        add("plain", None, style)


def pictures(bed: EmojiTransformer, styles: list[str], folder: Path) -> None:
    """A grid for each style: four images of four prompts, plain and toward the style, from the same noises."""
    baseline = baseline_of(bed)
    for style in styles:
        latents, name = references(bed, style), style.split()[0]
        guides = {"plain": None, "named in the prompt": None} | {
            f"scale {scale:g}, {m} references": MMDGuidance(latents[:m], scale, baseline=baseline)
            for scale in SCALES for m in (REFERENCES[0], len(latents))
        }  # fmt: skip
        panels = {}
        for what, guide in guides.items():
            words = f", {style}" if what == "named in the prompt" else ""
            made = [bed.decode(samples(bed, guide, Case(prompt + words, k), 4)) for k, prompt in enumerate(PROMPTS[:4])]
            panels[what] = [bed.pipe.image_processor.postprocess(x) for x in made]
        folder.mkdir(parents=True, exist_ok=True)
        title = f"{bed.name}, toward {name.capitalize()}"
        grid, file = side_by_side(panels, PROMPTS[:4], title), f"toward-{bed.name.replace(', ', '-')}-{name}.png"
        grid.quantize(128).save(folder / file, optimize=True)


def of_transformer(bed: EmojiTransformer, styles: list[str], add: Callable[..., None]) -> None:
    """The main rows on a transformer."""
    baseline = baseline_of(bed)
    for style in styles:
        latents = references(bed, style)
        for scale in SCALES:
            for m in (REFERENCES[0], len(latents)):
                guide = MMDGuidance(latents[:m], scale, baseline=baseline)
                add("baseline", guide, style, scale=scale, references=m, baseline=100)
        for early in EARLY_SCALES[1 if bed.steps < 8 else 0]:
            for m in (REFERENCES[0], len(latents)):
                guide = MMDGuidance(latents[:m], early, baseline=baseline, stop=0.2)
                add("early", guide, style, scale=early, references=m, baseline=100)
        add("plain", None, style)
        add("asked in words", None, style, f", {style}")


LABELS = {  # in the order of the table
    "plain": "plain",
    "asked in words": "the style named in the prompt",
    "MMD, batch and memory": "`MMDGuidance(reference)`",
    "baseline": "with a baseline",
    "early": "with a baseline, `stop=0.2`",
    "features": f"with a baseline, {FEATURES:,} random features",
    "counted": "the same, `count_memory=True`",
    "captions": "the same, captions of the subjects",
    "captions, style": "the same, captions that also name the style",
    "baseline, diversity": "with a baseline, and order 0.5 beside it",
    "attraction": "attraction to the nearest reference",
    "mean shift": "shift to the mean of the references",
    "novelty": "`NoveltyGuidance(reference)`",
    "novelty, baseline": "the same with a baseline",
}


def parts(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The tables of the page, by their names there: of the embedded model, of diversity beside, of the transformers."""
    found: dict[str | None, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.get("part"), []).append(row)
    beds = [bed.name for bed in (EmojiTransformer, DistilledEmojiTransformer)]
    return {
        "style": tables(found.get(None, [])),
        "style_tones": tables(found.get("tones", []), different=True),
        "style_mixed": tables(found.get("mixed", []), different=True),
        "style_memory": tables(found.get("memory", []), different=True),
        "style_captions": "\n\n".join(
            f"*{name}*:\n\n{tables(found.get(f'captions, {name}', []), different=True)}"
            for name in (ONE_PROMPT, ALL_PROMPTS)
        ),
        "style_diversity": tables(found.get("diversity", []), different=True),
        "style_transformers": "\n\n".join(f"*{bed}*:\n\n{tables(found.get(bed, []), different=True)}" for bed in beds),
    }


def tables(rows: list[dict[str, Any]], different: bool = False) -> str:
    """A line for each setting, with a column for each style."""
    styles = list(dict.fromkeys(row["style"] for row in rows))
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        key = (row["name"], *(row.get(k) for k in ("scale", "weight", "references", "baseline")))
        error = f" ± {row['other_se']:.2f}" if row["other_se"] else ""
        share = 1 - row["other"] if row["style"] in TONES else row["other"]
        cell = f"{share:.2f}{error}, {row['valid']:.2f}"
        found.setdefault(key, {})[row["style"]] = cell + (f", {row['different']:.1f}" if different else "")
    order = list(LABELS)
    lines = []
    for key, cells in sorted(found.items(), key=lambda item: (order.index(item[0][0]), *(v or 0 for v in item[0][1:]))):
        name, scale, weight, references, baseline = key
        numbers = ("-" if v is None else f"{v:g}" for v in (scale or weight, references, baseline))
        label = LABELS[name].replace("the style", "the tone") if set(styles) <= set(TONES) else LABELS[name]
        lines.append([label, *numbers, *(cells.get(style, "-") for style in styles)])
    figures = ", valid" + (", different" if different else "")
    heads = [
        f"toward a {style}: wanted tone{figures}"
        if style in TONES
        else f"toward {style.split()[0].capitalize()}: other style{figures}"
        for style in styles
    ]
    return table(["", "scale", "references", "baseline", *heads], lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Other style against the number of references, and of baseline samples."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for style, colour in (("noto style", "#2f6fb3"), ("twemoji style", "#c4572e")):
        own = [r for r in rows if r["style"] == style and r.get("part") is None]
        plain = next(r["other"] for r in own if r["name"] == "plain")
        most = max(r.get("references", 0) for r in own)
        for ax, key, fixed in ((axes[0], "references", ("baseline", 100)), (axes[1], "baseline", ("references", most))):
            line = sorted(
                {
                    r[key]: r
                    for r in own
                    if r["name"] == "baseline" and r["scale"] == SCALES[-1] and r[fixed[0]] == fixed[1]
                }.items()
            )
            ax.errorbar([x for x, _ in line], [r["other"] for _, r in line], [r["other_se"] for _, r in line],
                        fmt="o-", color=colour, label=style.split()[0], capsize=2)  # fmt: skip
            ax.axhline(plain, color=colour, linestyle="--", linewidth=1)
            ax.set_xscale("log", base=2)
            ax.set_xticks([x for x, _ in line], [str(x) for x, _ in line])
    axes[0].set(xlabel="references (100 baseline samples)", ylabel="probability of the other style", ylim=(0, None))
    axes[1].set(xlabel="baseline samples (all references)")
    axes[0].legend(frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
