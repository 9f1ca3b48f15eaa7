"""Does diversity help? A classifier is trained on plain and on guided synthetic images, and tested on the true art.

    python examples/downstream.py --out outputs/downstream

The classes are emoji; the test pictures are all of their true drawings, in both styles and every skin tone, that the npm
packages hold (fetched on the first run). Everything is equal but the guide: prompts, seeds, number of images, training. An
honest number either way: the mean accuracy over classes and several trainings, with their spread. It stops and goes on.
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

from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance.synthesis import synthesize

CLASSES = [
    "runner", "man", "woman", "heart", "cat face", "health worker", "firefighter", "swimmer", "police officer", "teacher",
    "farmer", "cook", "student", "surfer", "waving hand sign", "book",
]  # fmt: skip


def synthetic(folder: Path) -> tuple[Tensor, Tensor]:
    """Images ``[n, 3, 64, 64]`` in 0..1 and their classes."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = [np.asarray(Image.open(folder / r["file_name"]).convert("RGB")) for r in rows]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return x, torch.tensor([CLASSES.index(r["prompt"]) for r in rows])


def truth(folder: Path) -> tuple[Tensor, Tensor]:
    """The true drawings that answer to each class."""
    data.download(folder)
    images, entries = data.load(folder)
    found = [(i, c) for i, e in enumerate(entries) for c, name in enumerate(CLASSES) if e.answers(name)]
    one = {i: [c for j, c in found if j == i] for i, _ in found}
    kept = [i for i, classes in one.items() if len(classes) == 1]  # a drawing that answers to two names tests nothing
    return images[kept].float() / 255, torch.tensor([one[i][0] for i in kept])


def network() -> nn.Module:
    def block(a: int, b: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))

    tail = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, len(CLASSES))
    return nn.Sequential(block(3, 32), block(32, 64), block(64, 128), block(128, 128), *tail)


def accuracy(x: Tensor, y: Tensor, test: tuple[Tensor, Tensor], seed: int, steps: int) -> float:
    """Mean accuracy over classes of one training, with shifts, mirroring and changes of colour."""
    torch.manual_seed(seed)
    net = network().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    for _ in range(steps):
        pick = torch.randint(len(x), (64,))
        batch = x[pick]
        batch = torch.roll(batch, tuple(torch.randint(-4, 5, (2,)).tolist()), (2, 3))
        batch = torch.where(torch.rand(64, 1, 1, 1) < 0.5, batch.flip(3), batch)
        batch = 1 - (1 - batch) * (0.8 + 0.4 * torch.rand(64, 3, 1, 1))
        loss = nn.functional.cross_entropy(net(batch), y[pick], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    net.eval()
    with torch.no_grad():
        right = (torch.cat([net(part).argmax(1) for part in test[0].split(256)]) == test[1]).double()
    return float(torch.stack([right[test[1] == c].mean() for c in test[1].unique()]).mean())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="of each class")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--inference-steps", type=int, default=10)
    parser.add_argument("--trainings", type=int, default=5)
    parser.add_argument("--training-steps", type=int, default=400)
    parser.add_argument("--art", type=Path, default=Path(".cache_data"))
    parser.add_argument("--out", type=Path, default=Path("outputs/downstream"))
    args = parser.parse_args(argv)

    test = truth(args.art)
    pipe: Any = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": args.inference_steps, "guidance_scale": 5.0}
    guides = {"plain": SPARKE(0.0), "SPARKE": SPARKE(), "SPARKE, order 0.5": SPARKE(1.5, order=0.5)}
    results: dict[str, list[float]] = {}
    for k, (name, guide) in enumerate(guides.items()):
        folder = args.out / f"set-{k}"
        synthesize(CLASSES, folder, pipe, guide, args.images, args.batch, call=call, report=False)
        x, y = synthetic(folder)
        found = [accuracy(x, y, test, seed, args.training_steps) for seed in range(args.trainings)]
        results[name] = found
        mean, spread = np.mean(found), np.std(found, ddof=1) if len(found) > 1 else float("nan")
        print(f"{name:20} {mean:.3f} +- {spread:.3f} accuracy on {len(test[0])} true drawings of {len(CLASSES)} classes")
    (args.out / "downstream.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
