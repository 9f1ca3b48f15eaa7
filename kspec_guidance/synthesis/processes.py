"""The processes of a run: what accelerate or torchrun started, and tensors of different lengths gathered from all.

Everything that crosses from one process to another goes through here, as tensors: nothing is pickled.
"""

import atexit
import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

__all__ = ["Processes"]


def _leave() -> None:
    """Close the group before the interpreter goes: its threads, ended by force, would end the process with an abort."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Processes:
    """The rank of this process, the number of all, and gathering in the order of ranks.

    Outside of ``accelerate launch`` and ``torchrun`` there is one process, and nothing is started.
    """

    def __init__(self, patience: timedelta = timedelta(hours=6)):
        self.rank, self.world, self.sent = 0, 1, 0
        self.device = torch.device("cpu")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state: Any = PartialState(cpu=not torch.cuda.is_available(), timeout=patience)
            self.rank, self.world, self.device = state.process_index, state.num_processes, state.device
            atexit.unregister(_leave)
            atexit.register(_leave)

    def gather(self, x: Tensor) -> list[Tensor]:
        """Every process's tensor, by rank; they may differ in their first length only. All processes must call it."""
        if self.world == 1:
            return [x]
        from accelerate.utils import gather, pad_across_processes

        x = x.contiguous()
        lengths = gather(torch.tensor([len(x)], device=self.device)).cpu().tolist()
        self.sent += x.numel() * x.element_size()
        if not max(lengths):
            return [x] * self.world
        padded = pad_across_processes(x.to(self.device), dim=0)
        every = gather(padded).cpu().unflatten(0, (self.world, -1))
        return [part[:n] for part, n in zip(every, lengths, strict=True)]

    def numbers(self, *values: int) -> list[list[int]]:
        """A few whole numbers of every process."""
        return torch.stack(self.gather(torch.tensor([values], dtype=torch.int64))).squeeze(1).tolist()

    def wait(self) -> None:
        """Until all have come here."""
        self.numbers(0)

    def text(self, value: str) -> str:
        """The text of process 0, in all."""
        data = torch.tensor(list(value.encode() if self.rank == 0 else b""), dtype=torch.uint8)
        return bytes(self.gather(data)[0].tolist()).decode()
