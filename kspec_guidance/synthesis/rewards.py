"""Rewards: numbers for images, which selectors of arms compare."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from kspec_guidance.evaluation.judges import JUDGE_NAMES, PromptJudge, prompt_judge
from kspec_guidance.synthesis.errors import RunFailedError, SynthesisError
from kspec_guidance.synthesis.filters import call_on_image
from kspec_guidance.synthesis.stages import load_function

__all__ = ["Reward", "Rewards", "as_reward", "reward_name"]

Reward = Callable[[Image.Image, dict[str, Any]], float] | PromptJudge | str
REWARD_JUDGES = [name for name in JUDGE_NAMES if name not in ("auto", "none")]
Rewards = Callable[[Sequence[Image.Image], Sequence[dict[str, Any]]], list[float]]


def as_reward(reward: Reward) -> Rewards:
    """Rewards of the images of a batch.

    Args:
        reward: a function of an image and its row, a :class:`~kspec_guidance.evaluation.judges.PromptJudge` or its name,
            whose agreement of image and prompt in 0..1 is the reward, or the name ``module:function`` of a function.

    Raises:
        SynthesisError: for a name that is neither, or a judge whose weights are not on this machine.
    """
    if isinstance(reward, str) and reward.partition(":")[0] in (name.partition(":")[0] for name in REWARD_JUDGES):
        try:
            found = prompt_judge(reward)
        except (OSError, ValueError) as error:
            raise SynthesisError(f"cannot load the judge {reward!r}: {error}") from error
        assert found is not None
        reward = found
    elif isinstance(reward, str):
        reward = load_function(reward, "reward")
    if isinstance(reward, PromptJudge):
        judge = reward
        return lambda images, rows: judge(images, [row["prompt"] for row in rows])
    if not callable(reward):
        raise SynthesisError(
            f"reward is a function of an image and its row, a PromptJudge or its name, got {type(reward).__name__}"
        )
    function = reward
    return lambda images, rows: [
        _as_number(call_on_image(function, image, row, "reward"), row) for image, row in zip(images, rows, strict=True)
    ]


def reward_name(reward: Reward) -> str:
    """What the settings of a run say of its reward."""
    if isinstance(reward, str | PromptJudge):
        return reward if isinstance(reward, str) else reward.name
    kind = type(reward)
    return f"{getattr(reward, '__module__', kind.__module__)}:{getattr(reward, '__qualname__', kind.__qualname__)}"


def _as_number(value: Any, row: dict[str, Any]) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise RunFailedError(
            f"the reward of an image of {row['prompt']!r}, seed {row['seed']}, must be a finite number, got {value!r}"
        )
    return found
