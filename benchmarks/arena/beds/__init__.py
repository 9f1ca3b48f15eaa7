"""Test beds: pipelines whose modes can be counted and whose fidelity can be measured."""

from collections.abc import Callable

from .analytic import Analytic
from .base import Bed, Case
from .digits import AnyDigit, Digits, DistilledDigits
from .emoji import Emoji
from .transformer import DistilledEmojiTransformer, EmojiTransformer

BEDS: dict[str, Callable[[], Bed]] = {
    "mixture-2": lambda: Analytic(2, True),
    "mixture-8": lambda: Analytic(8, False),
    "mixture-32": lambda: Analytic(32, True),
    "mixture-64": lambda: Analytic(64, True),
    "digits": Digits,
    "digits-4": lambda: Digits(4),
    "digits-distilled": DistilledDigits,
    "digits-any": AnyDigit,
    "emoji": Emoji,
    "emoji-4": lambda: Emoji(4),
    "emoji-transformer": EmojiTransformer,
    "emoji-transformer-distilled": DistilledEmojiTransformer,
}

__all__ = ["BEDS", "Bed", "Case"]
