"""Time spent in parts of a program that runs on a CPU or an accelerator."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up spans of time: ``spans`` is a list of pairs of what :attr:`now` returned at their start and end.

    On CUDA the time is that of the device, between events, since the host only queues the work: what was queued before a
    span is not counted, and nothing waits until :attr:`seconds` is read. Elsewhere it is the time of the host.

    Args:
        device: device that does the work; by default the CPU.

    >>> watch = Stopwatch()
    >>> watch.spans.append((1.0, 1.5))
    >>> watch.seconds
    0.5
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.now: Callable[[], Any] = time.perf_counter
        if device is not None and device.type == "cuda":
            self.now = functools.partial(_recorded_event, device)
        self.spans: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """The sum of all spans; waits for the device."""
        while self.spans:
            start, end = self.spans.pop()
            if isinstance(start, float):
                self._seconds += end - start
            else:
                end.synchronize()
                self._seconds += start.elapsed_time(end) / 1e3
        return self._seconds


def _recorded_event(device: torch.device) -> Any:
    """An event of CUDA in the current stream of the device, recorded now."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
