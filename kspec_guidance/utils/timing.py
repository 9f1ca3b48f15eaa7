"""Time spent in parts of a program that runs on a CPU or an accelerator."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up the time of all blocks ``with stopwatch.measure(device)``.

    On CUDA the time is that of the device, between events, since the host only queues the work: what was queued before a
    block is not counted, and nothing waits until :attr:`seconds` is read. Elsewhere it is the time of the host.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Add the time of the block; nothing if it raises."""
        if device.type != "cuda":
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        stream = torch.cuda.current_stream(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        yield
        end.record(stream)
        self._events.append((start, end))

    @property
    def seconds(self) -> float:
        """The sum; waits for the device."""
        while self._events:
            start, end = self._events.pop()
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1e3
        return self._seconds
