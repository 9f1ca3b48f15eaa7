"""The rules of all pipeline families; later rules extend and override earlier ones."""

import re
from typing import Any

from tests.tiny import rules_images, rules_unet, rules_unguidable, rules_video
from tests.tiny.rules import Rule

__all__ = ["Rule", "rule_for"]

RULES: list[tuple[str, dict[str, Any]]] = [
    *rules_unet.RULES,
    *rules_images.RULES,
    *rules_video.RULES,
    *rules_unguidable.RULES,
]


def rule_for(name: str) -> Rule:
    """The merged rule of the pipeline class ``name``."""
    merged = Rule()
    for pattern, fields in RULES:
        if re.search(pattern, name):
            for key in ("components", "call", "init", "attributes"):
                setattr(merged, key, getattr(merged, key) | fields.get(key, {}))
            merged.not_run = fields.get("not_run", merged.not_run)
            merged.unguidable = fields.get("unguidable", merged.unguidable)
    return merged
