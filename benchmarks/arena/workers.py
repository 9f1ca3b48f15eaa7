"""Cases of a bed on several processes, each with the bed in its own memory and one thread."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.bench.methods import Method

from .beds import BEDS, Bed, Case

__all__ = ["Workers"]

_bed: Bed


def _begin(name: str, images: int, calls: int, swapped: bool) -> None:
    global _bed
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    _bed = BEDS[name]()
    _bed.images, _bed.calls, _bed.swapped = images, calls, swapped


def _measured(measure: Callable[..., Any], make: Callable[[], Method], case: Case) -> tuple[Any, dict[str, float]]:
    rows, figures = measure(_bed, make, case)
    return rows.numpy(), figures  # as a tensor it would hold a file open until the parent has read it


class Workers:
    """Processes that measure cases for any number of threads; the figures are those of one process, but for seconds.

    Args:
        bed: its name on the command line.
        images: of a run.
        calls: for a case.
        number: of processes.
        swapped: whether the halves of the prompts are swapped.
    """

    def __init__(self, bed: str, images: int, calls: int, number: int, swapped: bool = False):
        # not forked: a fork of a process with threads may never end
        context = multiprocessing.get_context("spawn")
        given = (bed, images, calls, swapped)
        self.pool = ProcessPoolExecutor(number, mp_context=context, initializer=_begin, initargs=given)

    def measure(
        self, measure: Callable[..., Any], make: Callable[[], Method], cases: Sequence[Case]
    ) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """``measure(bed, make, case)`` of each case, in order."""
        waiting = [self.pool.submit(_measured, measure, make, case) for case in cases]
        for future in waiting:
            rows, figures = future.result()
            yield torch.from_numpy(rows), figures

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
