"""Less work for code of the documentation: that it runs is tested, and no image is looked at."""

import re

MOST = {r"num_inference_steps\W+": 2, "--steps ": 2, r"\bimages_per_prompt=": 8}  # guidance acts in two steps, too


def few_steps(code: str) -> str:
    """The code with at most two denoising steps in each call and command, and eight images of a prompt in each data set.

    >>> few_steps('pipe("a", num_inference_steps=20), {"num_inference_steps": 10}, "--steps 8", images_per_prompt=12')
    'pipe("a", num_inference_steps=2), {"num_inference_steps": 2}, "--steps 2", images_per_prompt=8'
    """
    for name, most in MOST.items():
        code = re.sub(rf"({name})(\d+)", lambda found, most=most: f"{found[1]}{min(most, int(found[2]))}", code)
    return code
