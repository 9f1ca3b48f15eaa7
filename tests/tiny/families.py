"""What a family of pipelines needs beside the shared builders: a rule each, later rules adding to earlier ones."""

import re
from typing import Any

from tests.tiny import rules_clips, rules_images, rules_unet, rules_unfit
from tests.tiny.rules import Rule

__all__ = ["Rule", "rule"]

RULES: list[tuple[str, dict[str, Any]]] = [*rules_unet.RULES, *rules_images.RULES, *rules_clips.RULES, *rules_unfit.RULES]


def rule(name: str) -> Rule:
    """Everything that is said of the class ``name``."""
    made = Rule()
    for pattern, says in RULES:
        if re.search(pattern, name):
            for key in ("parts", "call", "settings", "attributes"):
                setattr(made, key, getattr(made, key) | says.get(key, {}))
            made.not_run = says.get("not_run", made.not_run)
            made.unfit = says.get("unfit", made.unfit)
    return made
