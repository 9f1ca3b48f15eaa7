"""Arms that are chosen by prompt: each image has its own choice, and images with one arm are made together."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from kspec_guidance.kernels import l2_normalize
from kspec_guidance.selection import PromptWise
from kspec_guidance.synthesis.arms import Arm, ArmChoice
from kspec_guidance.synthesis.records import Record
from kspec_guidance.synthesis.schedule import NO_TRY_PAYS, Job, Sample

__all__ = ["PromptArms"]


class PromptArms(ArmChoice):
    """Arms of one process by a selector with contexts, which are the embeddings of the prompts.

    The arms of the next images are chosen one after another, until one arm has a full batch. The others wait; they are
    pending pulls of the selector. With several models the arms of ``BLOCK`` batches are chosen ahead, and batches of the
    model that is loaded come first.

    Args:
        arms, selector, guide, generator, models: see :class:`ArmChoice`.
        contexts: embedding ``[p]`` of each prompt of the run, also of those of other processes; scaled to norm 1.
    """

    def __init__(self, *args: Any, contexts: Mapping[str, Tensor]):
        super().__init__(*args)
        self.contexts = {text: l2_normalize(row.double()[None])[0] for text, row in contexts.items()}
        self.waiting: list[tuple[Sample, int]] = []  # images and their arms, in the order of the choices
        self.next_arm = 0

    def next_batch(
        self, jobs: Iterable[Job], batch_size: int, seed: int, key: Callable[[Job], object], candidates: int = 1
    ) -> list[Sample]:
        """Up to ``batch_size`` samples of one arm; see :func:`~kspec_guidance.synthesis.schedule.next_batch`."""
        full = batch_size - batch_size % candidates
        ahead = self.block * full if self.block > 1 else 0
        if self._most() < full:
            for job in jobs:
                if job.finished:
                    continue
                if self.waiting and key(job) != key(self.waiting[0][0].job):
                    break
                while not (self._most() >= full and len(self.waiting) >= ahead):
                    if not self._draw(job, seed, candidates):
                        break
        if not self.waiting:
            return []
        counts = Counter(arm for _, arm in self.waiting)  # in the order of the first choice
        ready = [arm for arm in counts if counts[arm] >= full] or list(counts)
        self.next_arm = min(ready, key=lambda arm: self.order.index(self.arms[arm].model))
        batch = [sample for sample, arm in self.waiting if arm == self.next_arm][:full]
        made = set(map(id, batch))
        self.waiting = [(sample, arm) for sample, arm in self.waiting if id(sample) not in made]
        return batch

    def _most(self) -> int:
        """The number of images that wait for the arm which most of them have."""
        return max(Counter(arm for _, arm in self.waiting).values(), default=0)

    def _draw(self, job: Job, seed: int, candidates: int) -> bool:
        """Choose the arm of the next image of a prompt; False if it needs none, or if no further try pays."""
        own = [sample for sample, _ in self.waiting if sample.job is job]
        if job.kept + len(own) // candidates >= job.goal:
            return False
        context = self.contexts[job.prompt.text]
        if isinstance(self.selector, PromptWise):
            left = max(0, self.selector.budget - job.failures // candidates)
            arm = self.selector.choose(contexts=context, left=left)
        else:
            arm = self.selector.choose(contexts=context)
        if arm is None:
            if not own:
                job.stop_reason = NO_TRY_PAYS
            return False
        first = max([job.attempts, *(sample.attempt + 1 for sample in own)])
        for attempt in range(first, first + candidates):
            self.waiting.append((job.sample(attempt, seed), arm))
        return True

    def choose(self) -> Arm:
        """The arm of the batch that :meth:`next_batch` returned."""
        return self._turn(self.next_arm)

    def _settle(self, record: Record) -> None:
        """Give up what waits for finished prompts, or was made, and tell the selector what is still pending."""
        made = {(row["prompt"], row["attempt"]) for row in (*record.rows, *record.rejected)}
        self.waiting = [
            (sample, arm)
            for sample, arm in self.waiting
            if not sample.job.finished and (sample.job.prompt.text, sample.attempt) not in made
        ]
        self.selector.set_pending(
            [arm for _, arm in self.waiting], [self.contexts[sample.job.prompt.text] for sample, _ in self.waiting]
        )
