"""The common part of all trainings: options, learning rate, averaged weights, checkpoints that a run resumes from."""

import argparse
import copy
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from batches import Batch, Batches
from safetensors.torch import load_file, save_file
from torch import nn


def training_parser(description: str | None, run: str, steps: int, batch: int, rate: float) -> argparse.ArgumentParser:
    """Return a parser of the options of every training, with these defaults."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".cache_data"))
    parser.add_argument("--run", type=Path, default=Path(run))
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rate", type=float, default=rate)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def rate(step: int, steps: int, peak: float, falling: float, warmup: int = 200) -> float:
    """Return the learning rate: linear warm-up, then ``peak``, then half a cosine to 0.

    The decay takes the last ``falling`` (a fraction) of the steps. Before it begins, ``steps`` may still be changed.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    flat = max(warmup, steps * (1 - falling))
    return peak if step < flat else peak * 0.5 * (1 + math.cos(math.pi * (step - flat) / max(1, steps - flat)))


def averaged(folder: Path) -> dict[str, torch.Tensor]:
    """Return the averaged weights of a run's checkpoint."""
    saved = load_file(folder / "checkpoint.safetensors")
    return {k.removeprefix("ema."): v for k, v in saved.items() if k.startswith("ema.")}


class Run:
    """Model, optimizer (AdamW by default), exponential moving average of the weights, and their checkpoint.

    Batches are drawn from ``generator(step)``, so a resumed run is the same as an uninterrupted one.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        steps: int,
        peak: float,
        decay: float,
        seed: int,
        falling: float = 1.0,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.model, self.folder, self.steps, self.peak, self.decay, self.seed = model, folder, steps, peak, decay, seed
        self.falling = falling
        self.ema = copy.deepcopy(model).requires_grad_(False)
        self.optimizer = optimizer or torch.optim.AdamW(
            model.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.step = 0
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self.resume()

    def generator(self, step: int) -> torch.Generator:
        """Return the random numbers of a step."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step)

    def update(self, loss: torch.Tensor) -> float:
        """Take an optimizer step, update the average, and return the norm of the gradient."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.step, self.steps, self.peak, self.falling)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            averages, weights = list(self.ema.parameters()), list(self.model.parameters())
            torch._foreach_lerp_(averages, weights, 1 - decay)
        return float(norm)

    def train(self, loss: Callable[[Batch], torch.Tensor], batches: Batches, save_every: int = 250) -> None:
        """Take the steps that are left; print every 100 steps, save every ``save_every`` and at the end."""
        total, taken = 0.0, 0
        while self.step < self.steps:
            start = time.perf_counter()
            value = loss(batches(self.step, self.generator(self.step)))
            norm = self.update(value)
            total, taken = total + value.item(), taken + 1
            self.seconds += time.perf_counter() - start
            if self.step % 100 == 0:
                print(f"step {self.step} loss {total / taken:.4f} norm {norm:.2f} "
                      f"{batches.size * self.step / self.seconds:.0f}/s", flush=True)  # fmt: skip
                total, taken = 0.0, 0
            if not math.isfinite(norm):
                raise SystemExit(f"gradient not finite at step {self.step}; resume with a lower --rate")
            if self.step % save_every == 0 or self.step == self.steps:
                self.save()

    def save(self) -> None:
        """Write a new checkpoint beside the old one, then replace it atomically."""
        tensors = {f"model.{k}": v.contiguous() for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v.contiguous() for k, v in self.ema.state_dict().items()}
        for i, p in enumerate(self.model.parameters()):
            for key, value in self.optimizer.state[p].items():
                tensors[f"adam.{i}.{key}"] = value.detach().contiguous()
        new_path = self.folder / "checkpoint.new"
        save_file(tensors, new_path, metadata={"step": str(self.step), "seconds": f"{self.seconds:.1f}"})
        os.replace(new_path, self.folder / "checkpoint.safetensors")

    def resume(self) -> None:
        """Load the checkpoint, if there is one."""
        path = self.folder / "checkpoint.safetensors"
        if not path.exists():
            return
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        select = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
        self.model.load_state_dict(select("model."))
        self.ema.load_state_dict(select("ema."))
        for i, p in enumerate(self.model.parameters()):
            state = select(f"adam.{i}.")
            if state:
                self.optimizer.state[p] = state
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        print(f"resumed at step {self.step}", flush=True)
