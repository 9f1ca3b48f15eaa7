"""The arithmetic of a guided step without a pipeline, and what waits for a CUDA device: for tests and benchmarks/gpu.py."""

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kspec_guidance
from kspec_guidance.guidance.run import Run
from kspec_guidance.loop.context import CallContext, StepContext
from kspec_guidance.loop.layouts import Layout
from kspec_guidance.loop.prediction import Prediction

PACKAGE = os.path.dirname(kspec_guidance.__file__)


class Step:
    """The first guided step of a guide at samples ``x``: a call queues its arithmetic, and returns the move,
    or the moved samples if the guide moves noisy ones.

    Args:
        guide: the guide; its memory is as it was at the step.
        x: samples, the clean predictions of the step.
        prompts: prompt features, a row per sample.
        reading: whether the step also reads whether its values are finite, and so waits for the device.
    """

    def __init__(self, guide: Any, x: Tensor, prompts: Tensor | None, reading: bool = False):
        self.run = Run(guide)
        call = CallContext(prompts=prompts, encoder="e")
        self.context = StepContext(call, None, None, Layout.of(x), x.shape, 4, prompts)
        self.prediction = Prediction(x, x, 0.5, 0.5, -0.5)  # of a flow, halfway
        self.run.begin(self.context, x)
        if not reading:
            self.run._read = lambda context, gradients=(): [False] * len(gradients)  # type: ignore[method-assign]

    def __call__(self) -> Tensor:
        self.run.report.moves.clear()
        self.run._unchecked.clear()
        given = self.prediction.x0, self.prediction, self.context
        for move in (lambda x, *rest: self.run.step(*rest), self.run.before_step, self.run.after_step):
            moved = move(*given)
            if moved is not None:
                return moved
        raise ValueError("the guide moves nothing at its first step")


def captured(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of a step, and the tensor that has the result after a replay."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):  # what is computed once per run, and the workspaces of libraries
            step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.no_grad(), torch.cuda.graph(graph):
        result = step()
    return graph, result


def waits(call: Callable[[], Any]) -> Counter[str]:
    """How often a call waits for the device, by line of the package, as CUDA itself reports it."""
    found: Counter[str] = Counter()

    def note(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if "called a synchroniz" not in str(message):
            return
        frame: Any = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        if frame is not None:
            filename, lineno = frame.f_code.co_filename, frame.f_lineno
        found[f"{Path(filename).name}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found
