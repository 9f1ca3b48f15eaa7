"""The processes of a run, and what they send each other: tensors only, nothing is pickled."""

import atexit
import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.memory import CentroidMemory, Memory, MemoryBank, RandomFeatureMemory

__all__ = ["OneProcess", "Processes", "add_message", "encode_message"]

MAX_MEANS = 64  # in a message, if the memory itself holds means


def _destroy_process_group() -> None:
    """Close the process group before the interpreter exits, which would abort while the group's threads run."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Processes:
    """The processes that ``accelerate launch`` or ``torchrun`` started; otherwise this one, and no process group.

    Args:
        timeout: of a collective operation.

    Attributes:
        rank: of this process.
        world_size: number of processes.
        device: that collective operations run on.
        bytes_sent: by this process so far.
    """

    def __init__(self, timeout: timedelta = timedelta(hours=6)):
        self.rank, self.world_size, self.bytes_sent = 0, 1, 0
        self.device = torch.device("cpu")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state: Any = PartialState(cpu=not torch.cuda.is_available(), timeout=timeout)
            self.rank, self.world_size, self.device = state.process_index, state.num_processes, state.device
            atexit.unregister(_destroy_process_group)
            atexit.register(_destroy_process_group)

    def gather(self, x: Tensor) -> list[Tensor]:
        """The tensors ``[n, ...]`` of all processes, by rank; n may differ. All processes must call it.

        An empty tensor of one or two dimensions may have any width: it is sent with that of the others.
        """
        if self.world_size == 1:
            return [x]
        from accelerate.utils import gather, pad_across_processes

        x = x.contiguous()
        sizes = gather(torch.tensor([[len(x), x.shape[-1]]], device=self.device)).cpu().tolist()
        lengths = [n for n, _ in sizes]
        self.bytes_sent += x.numel() * x.element_size()
        if not max(lengths):
            return [x] * self.world_size
        if x.ndim == 2 and not len(x):
            x = x.new_zeros(0, next(width for n, width in sizes if n))
        padded = pad_across_processes(x.to(self.device), dim=0)
        gathered = gather(padded).cpu().unflatten(0, (self.world_size, -1))
        return [part[:n] for part, n in zip(gathered, lengths, strict=True)]

    def gather_integers(self, *values: int) -> list[list[int]]:
        """The integers of all processes, by rank."""
        return torch.stack(self.gather(torch.tensor([values], dtype=torch.int64))).squeeze(1).tolist()

    def wait_for_all(self) -> None:
        """Block until all processes have called this."""
        self.gather_integers(0)

    def broadcast_text(self, text: str) -> str:
        """The text of process 0, in all processes."""
        data = torch.tensor(list(text.encode() if self.rank == 0 else b""), dtype=torch.uint8)
        return bytes(self.gather(data)[0].tolist()).decode()


class OneProcess(Processes):
    """One process by itself, which writes the records of a rank.

    Args:
        rank: of its records.
    """

    def __init__(self, rank: int = 0):
        self.rank, self.world_size, self.bytes_sent = rank, 1, 0
        self.device = torch.device("cpu")


def encode_message(memory: Memory, x: Tensor, prompt_features: Tensor | None) -> Tensor:
    """Samples in the form in which the memories of other processes add them.

    Args:
        memory: decides the form: rows ``[k, d + p]`` for a :class:`MemoryBank`, at most 64 means ``[c, d + p + 2]`` for a
            :class:`CentroidMemory`, and one row of integers, whose sums are exact, for a :class:`RandomFeatureMemory`.
            The last two do not grow with k.
        x: samples ``[k, ...]``.
        prompt_features: ``[k, p]``.
    """
    rows = x.flatten(1).float().cpu()
    text = rows[:, :0] if prompt_features is None else prompt_features.float().cpu()
    if isinstance(memory, MemoryBank):
        return torch.cat([rows, text], 1)
    if isinstance(memory, CentroidMemory):
        means = CentroidMemory(
            max(2, min(MAX_MEANS, memory.capacity)), memory.spread, memory.prompt_spread, memory.normalize
        )
        if not len(rows):
            return rows.new_zeros(0, rows.shape[1] + text.shape[1] + 2)
        means.add(rows, None if prompt_features is None else text)
        text = rows[:0, :0].expand(len(means.x), 0) if means.prompts is None else means.prompts
        return torch.cat([means.x, text, means._squares[: len(means.x), None], means.weights[:, None]], 1)
    assert isinstance(memory, RandomFeatureMemory)
    sums = memory.empty_copy()
    if len(rows):
        sums.add(rows, None if prompt_features is None else text)
    return torch.cat([sums.total.flatten(), torch.tensor([len(sums)])])[None]


def add_message(memory: Memory, message: Tensor, shape: tuple[int, ...], prompt_dim: int | None) -> None:
    """Add the samples of a message to a memory.

    Args:
        memory: of the same kind as the sender's.
        message: what :func:`encode_message` returned.
        shape: of one sample.
        prompt_dim: width p of the prompt features; None without any.
    """
    width, p = int(torch.Size(shape).numel()), prompt_dim or 0
    if not len(message):
        return
    if isinstance(memory, RandomFeatureMemory):
        memory.add_total(message[0, :-1].view_as(memory.total), int(message[0, -1]))
        return
    text = message[:, width : width + p] if p else None
    if isinstance(memory, MemoryBank):
        memory.add(message[:, :width].reshape(-1, *shape), text)
    elif isinstance(memory, CentroidMemory):
        memory.shape, memory.prompt_dim = shape, prompt_dim
        memory.absorb(message[:, :width], text, message[:, -2], message[:, -1])
