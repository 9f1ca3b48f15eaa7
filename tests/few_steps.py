"""Fewer denoising steps for code of the documentation: that it runs is tested, and no image is looked at."""

import re

MOST = 3


def few_steps(code: str) -> str:
    """The code with at most three denoising steps in each call and command.

    >>> few_steps('pipe("a", num_inference_steps=20), {"num_inference_steps": 10}, "--steps 8", "--steps 2"')
    'pipe("a", num_inference_steps=3), {"num_inference_steps": 3}, "--steps 3", "--steps 2"'
    """
    return re.sub(r"(num_inference_steps\W+|--steps )(\d+)", lambda found: f"{found[1]}{min(MOST, int(found[2]))}", code)
