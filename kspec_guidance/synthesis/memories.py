"""Memories of one process: which one guides a batch, what is added to it, and what is sent to other processes."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.memory import CentroidMemory, Memory, MemoryBank, PromptWeights, RandomFeatureMemory, choose_memory
from kspec_guidance.objectives import TOLERANCE
from kspec_guidance.synthesis.distributed import add_message, encode_message
from kspec_guidance.synthesis.settings import Settings
from kspec_guidance.synthesis.sharding import relevant

__all__ = ["RunMemories"]


class RunMemories:
    """One memory for all prompts, or one for each group, created when the first images come.

    Args:
        guide: whose terms use the memories.
        settings: of the run.
        rank: of this process.
        prompt_features: of the prompts of each process ``[n, p]``, by rank; None if nothing is exchanged.

    Attributes:
        banks: the memories, by group; the key None is for all prompts.
        shape: of one sample; None before the first.
        prompt_dim: width of the prompt features; None without any.
        unsent: samples and prompt features that were added since the last exchange.
    """

    def __init__(self, guide: KernelGuidance, settings: Settings, rank: int, prompt_features: list[Tensor] | None):
        self.guide, self.settings, self.rank, self.prompt_features = guide, settings, rank, prompt_features
        self.guide_memory = guide.memory
        self.terms = [term for term in guide.terms if term.memory is self.guide_memory]
        self.banks: dict[str | None, Memory] = {}
        self.shape: tuple[int, ...] | None = None
        self.prompt_dim: int | None = None
        self.unsent: list[tuple[Tensor, Tensor | None]] = []

    def key(self, group: str | None) -> str | None:
        """The key in ``banks`` for prompts of a group."""
        return group if self.settings.memory_by == "group" else None

    def use(self, key: str | None) -> None:
        """Let the guide work with the memory of ``key``."""
        bank = self.banks.get(key)
        if bank is None and key is not None:
            bank = self._create(self.shape or ())  # no images of this group yet
        for term in self.terms:
            if bank is not None:
                term.memory = bank

    def add(
        self,
        x: Tensor,
        prompt_features: Tensor | None,
        groups: Sequence[str | None],
        device: torch.device,
        earlier: bool = False,
    ) -> None:
        """Add samples.

        Args:
            x: samples ``[k, ...]``.
            prompt_features: ``[k, p]``.
            groups: of their prompts.
            device: of the memory.
            earlier: whether they are of an earlier epoch. Each process reads all of those, so that none are sent, and adds
                those that are relevant to its own prompts.
        """
        t, keys = prompt_features, [self.key(group) for group in groups]
        weights = self._prompt_weights()
        if earlier and t is not None and self.prompt_features is not None and weights is not None:
            keep = relevant(t, self.prompt_features[self.rank], weights, TOLERANCE)
            x, t, keys = x[keep], t[keep], [key for key, k in zip(keys, keep.tolist(), strict=True) if k]
        self.shape, self.prompt_dim = tuple(x.shape[1:]), None if t is None else t.shape[1]
        for key in dict.fromkeys(keys):
            rows = [k for k, other in enumerate(keys) if other == key]
            self._bank(key, self.shape).add(x[rows].to(device), None if t is None else t[rows].to(device))
        if len(x) and not earlier and self.prompt_features is not None:
            self.unsent.append((x, t))

    def _bank(self, key: str | None, shape: tuple[int, ...]) -> Memory:
        bank = self.banks.get(key)
        if bank is None:
            keep = self.settings.memory == "guide" or len(self.guide_memory) or not self._is_default
            bank = self.guide_memory if key is None and keep else self._create(shape)
            self.banks[key] = bank
        return bank

    @property
    def _is_default(self) -> bool:
        """Whether the guide's memory has default settings, so that another kind may replace it."""
        return type(self.guide_memory) is MemoryBank and self.guide_memory.default_settings

    def _create(self, shape: tuple[int, ...]) -> Memory:
        kind = self.settings.memory
        if kind == "guide" or not self._is_default:
            return self.guide_memory.empty_copy()
        if kind == "auto":
            bank: Memory = choose_memory(self.settings.expected_images, shape)
        else:
            bank = CentroidMemory() if kind == "centroids" else MemoryBank()
        bank.space, bank.prompt_encoder = self.guide_memory.space, self.guide_memory.prompt_encoder
        return bank

    def _prompt_weights(self) -> PromptWeights | None:
        objective = self.guide.terms[0].objective
        kernel = getattr(objective, "prompt_kernel", None)
        return PromptWeights(kernel) if kernel is not None and objective.conditional else None

    # -- messages ------------------------------------------------------------------------------------------------------

    @property
    def message_dtype(self) -> torch.dtype:
        """The dtype of all messages of this run."""
        return torch.int64 if isinstance(self.guide_memory, RandomFeatureMemory) else torch.float32

    def message(self, rank: int, samples: list[tuple[Tensor, Tensor | None]]) -> Tensor | None:
        """What process ``rank`` sends of samples and prompt features that it added: those relevant to other processes."""
        if self.prompt_features is None or not samples:
            return None
        x = torch.cat([part for part, _ in samples])
        t = None if samples[0][1] is None else torch.cat([part for _, part in samples if part is not None])
        weights = self._prompt_weights()
        if t is not None and weights is not None:
            others = torch.cat([features for r, features in enumerate(self.prompt_features) if r != rank])
            keep = relevant(t.float(), others, weights, TOLERANCE)
            x, t = x[keep], t[keep]
        return encode_message(self._bank(None, tuple(x.shape[1:])), x, t)

    def receive(self, messages: list[Tensor]) -> None:
        """Add the messages of the other processes, by rank; of exact rows those relevant to the prompts of this one."""
        if self.prompt_features is None or self.shape is None:
            return
        for rank, rows in enumerate(messages):
            if rank != self.rank:
                self.absorb(rows)

    def absorb(self, rows: Tensor) -> None:
        """Add one message; of exact rows those relevant to the prompts of this process. Needs ``shape``.

        Raises:
            ValueError: for exact rows of another width.
        """
        if self.prompt_features is None or self.shape is None or not len(rows):
            return
        weights = self._prompt_weights()
        bank = self._bank(None, self.shape)
        width = math.prod(self.shape)
        if isinstance(bank, MemoryBank) and rows.shape[1] != width + (self.prompt_dim or 0):
            raise ValueError(f"rows of {rows.shape[1]} numbers for samples of {width} and prompts of {self.prompt_dim}")
        if isinstance(bank, MemoryBank) and self.prompt_dim and weights is not None:
            rows = rows[relevant(rows[:, -self.prompt_dim :], self.prompt_features[self.rank], weights, TOLERANCE)]
        add_message(bank, rows, self.shape, self.prompt_dim)

    def neighbours(self) -> list[int]:
        """The other processes with prompts that have a weight for a prompt of this one; all others without weights."""
        if self.prompt_features is None:
            return []
        weights, own = self._prompt_weights(), self.prompt_features[self.rank]
        others = [rank for rank in range(len(self.prompt_features)) if rank != self.rank]
        if weights is None or not own.shape[1]:
            return others
        sizes = [len(features) for features in self.prompt_features]
        near = relevant(torch.cat(self.prompt_features), own, weights, TOLERANCE).split(sizes)
        return [rank for rank in others if bool(near[rank].any())]
