"""What methods that choose the start noise share: first predictions of noises, without the rest of the run."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.bench.methods.base import Method, Moment

__all__ = ["Start"]


class Enough(Exception):
    """Stops a run once the predictions are known."""


@dataclass
class Start(Method):
    """Base class of methods that only choose the start noise ``[n, ...]``, in :meth:`choose`."""

    def choose(self, bed: Any, case: Any) -> Tensor:
        """The start noises ``[n, ...]`` of the images of a case."""
        raise NotImplementedError

    def sample(self, bed: Any, case: Any) -> Tensor:
        return bed.run(case, bed.images, self.choose(bed, case))

    def predictions(self, bed: Any, case: Any, start: Tensor, look: int = 1) -> Tensor:
        """Clean predictions ``[n, ...]`` at the step ``look`` (1 is the first) of runs from these noises."""
        found = []
        for part in start.split(getattr(bed, "batch_size", len(start))):
            self._look, self._found = look, part
            with suppress(Enough), self.attach(bed.pipe):
                bed.run(case, len(part), part)
            found.append(self._found)
        return torch.cat(found)

    def move(self, m: Moment) -> Tensor | None:
        self._found = m.x0
        if m.step + 1 >= self._look:
            raise Enough
        return None
