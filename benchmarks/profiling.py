"""Where a guided call and a synthesis of the embedded pipeline spend their time, part by part.

    OMP_NUM_THREADS=1 python -m benchmarks.profiling      # a minute on one core; writes results/profile.json

Processor time on one thread. A part does not include the parts that it calls: the guide's is without the scheduler's own
step. (The file is not called profile.py: beside scripts, that name hides the module of Python.)
"""

import functools
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.interleaved import machine
from benchmarks.speed_page import shares
from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance.loop.scheduler_hook import SchedulerHook
from kspec_guidance.objectives import ConditionalRKE
from kspec_guidance.synthesis import conclusion, report, synthesize
from kspec_guidance.synthesis.generator import PipelineCaller
from kspec_guidance.synthesis.store import Store
from kspec_guidance.synthesis.worker import Worker

RESULTS = Path(__file__).parent / "results" / "profile.json"
CALL = {"num_inference_steps": 20, "guidance_scale": 5.0}
PROMPTS = ["heart", "runner", "cat face", "tree"]


class Parts:
    """Processor time of parts of a program, without that of the parts within them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = time.process_time()

    def _turn(self) -> None:
        now = time.process_time()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def watch(self, patch: pytest.MonkeyPatch, owner: Any, method: str, name: str) -> None:
        real = getattr(owner, method)

        @functools.wraps(real)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return real(*args, **kwargs)

        patch.setattr(owner, method, call)


@contextmanager
def watched(pipe: Any) -> Iterator[Parts]:
    parts = Parts()
    with pytest.MonkeyPatch.context() as patch:
        for owner, method, name in (
            (pipe.unet, "forward", "denoiser"),
            (pipe.text_encoder, "forward", "text encoder"),
            (pipe.vae, "decode", "decoding of latents"),
            (type(pipe.scheduler), "step", "scheduler"),
            (SchedulerHook, "_step", "guide: prediction, move, checks"),
            (ConditionalRKE, "gradient", "guide: gradient"),
            (PipelineCaller, "images", "pipeline's own code, images"),
            (Worker, "_add_scores", "scores"),
            (Worker, "apply", "memory and counting"),
            (Store, "commit", "files of images and records"),
            (conclusion, "write_publication", "card, checksums"),
            (report, "write_report", "report: embeddings, scores, page"),
        ):
            parts.watch(patch, owner, method, name)
        yield parts


def main() -> None:
    torch.set_num_threads(1)
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe("heart", num_inference_steps=2)
    found: dict[str, dict[str, float]] = {}
    with watched(pipe) as parts, SPARKE().attach(pipe):
        pipe("heart", num_images_per_prompt=8, **CALL)  # the first call prepares what later ones reuse
        parts.seconds.clear()
        with parts.part("pipeline's own code, images"):
            for _ in range(3):
                pipe("heart", num_images_per_prompt=8, **CALL)
    found["three guided calls of 8 images"] = parts.seconds
    with tempfile.TemporaryDirectory() as folder, watched(pipe) as parts:
        synthesize(PROMPTS[:1], Path(folder, "small"), pipe, images_per_prompt=4, call=CALL)  # imports what a run needs
        parts.seconds.clear()
        with parts.part("planning, metadata, the rest"):
            synthesize(PROMPTS, Path(folder, "set"), pipe, images_per_prompt=16, batch_size=8, call=CALL)
    found["a synthesis of 64 images with its report"] = parts.seconds
    data = {"machine": machine(), "threads": 1, "steps": 20, "parts": found}
    RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    print(shares(data))


if __name__ == "__main__":
    main()
