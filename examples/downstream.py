"""Does diversity help? Train a classifier on plain and on guided synthetic images, and test it on the original drawings.

    python examples/downstream.py --out outputs/downstream

The classes are emoji. The test images are all of their drawings in two npm packages (fetched on the first run), in both
styles and every skin tone. Prompts, seeds, number of images and training are the same; only the guide differs. Reports the
mean accuracy over the classes, as mean and standard deviation over several trainings. A stopped run resumes.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "train_emoji"))
import data

from kspec_guidance import SPARKE, VendiGuidance, load_demo_pipeline
from kspec_guidance.synthesis import synthesize

CLASSES = [
    "runner", "man", "woman", "heart", "cat face", "health worker", "firefighter", "swimmer", "police officer", "teacher",
    "farmer", "cook", "student", "surfer", "waving hand sign", "book",
]  # fmt: skip


def load_synthetic(folder: Path) -> tuple[Tensor, Tensor]:
    """Load generated images ``[n, 3, 64, 64]`` in 0..1 and their classes ``[n]``."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    images = [np.asarray(Image.open(folder / r["file_name"]).convert("RGB")) for r in rows]
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return x, torch.tensor([CLASSES.index(r["prompt"]) for r in rows])


def load_drawings(folder: Path) -> tuple[Tensor, Tensor]:
    """Load the original drawings ``[n, 3, 64, 64]`` in 0..1 that belong to exactly one class, and their classes ``[n]``."""
    data.download(folder)
    images, entries = data.load(folder)
    classes = [[c for c, name in enumerate(CLASSES) if entry.answers(name)] for entry in entries]
    indices = [i for i, matches in enumerate(classes) if len(matches) == 1]
    return images[indices].float() / 255, torch.tensor([classes[i][0] for i in indices])


def build_classifier(channels: int, classes: int) -> nn.Module:
    def block(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))

    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, classes)
    return nn.Sequential(block(channels, 32), block(32, 64), block(64, 128), block(128, 128), *head)


def accuracy(x: Tensor, y: Tensor, test: tuple[Tensor, Tensor], seed: int, steps: int, flips: bool = True) -> float:
    """Train a classifier with shifts, flips and colour changes, and return its mean accuracy over the test classes."""
    torch.manual_seed(seed)
    net = build_classifier(x.shape[1], int(test[1].max()) + 1).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        indices = torch.randint(len(x), (64,))
        batch = x[indices]
        batch = torch.roll(batch, tuple(torch.randint(-4, 5, (2,)).tolist()), (2, 3))
        if flips:
            batch = torch.where(torch.rand(64, 1, 1, 1) < 0.5, batch.flip(3), batch)
        batch = 1 - (1 - batch) * (0.8 + 0.4 * torch.rand(64, x.shape[1], 1, 1))
        loss = nn.functional.cross_entropy(net(batch), y[indices], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        correct = (torch.cat([net(part).argmax(1) for part in test[0].split(256)]) == test[1]).double()
    return float(torch.stack([correct[test[1] == c].mean() for c in test[1].unique()]).mean())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images-per-class", "--images", type=int, default=64)
    parser.add_argument("--batch-size", "--batch", type=int, default=8)
    parser.add_argument("--inference-steps", type=int, default=10)
    parser.add_argument("--trainings", type=int, default=5)
    parser.add_argument("--training-steps", type=int, default=400)
    parser.add_argument("--art", type=Path, default=Path(".cache_data"), help="where to keep the drawings")
    parser.add_argument("--out", type=Path, default=Path("outputs/downstream"))
    args = parser.parse_args(argv)

    test = load_drawings(args.art)
    pipe: Any = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": args.inference_steps, "guidance_scale": 5.0}
    guides = {"plain": SPARKE(0.0), "SPARKE": SPARKE(1.0), "SPARKE, order 0.5": VendiGuidance(1.5, order=0.5)}
    results: dict[str, list[float]] = {}
    for k, (name, guide) in enumerate(guides.items()):
        folder = args.out / f"set-{k}"
        synthesize(CLASSES, folder, pipe, guide, args.images_per_class, args.batch_size, call=call, report=False)
        x, y = load_synthetic(folder)
        scores = [accuracy(x, y, test, seed, args.training_steps) for seed in range(args.trainings)]
        results[name] = scores
        mean, std = np.mean(scores), np.std(scores, ddof=1) if len(scores) > 1 else float("nan")
        print(f"{name:20} {mean:.3f} +- {std:.3f} accuracy on {len(test[0])} drawings of {len(CLASSES)} classes")
    (args.out / "downstream.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
