"""Small comparisons of pipelines with tiny random weights."""

from dataclasses import replace

from kspec_guidance.bench.compare import Job
from kspec_guidance.bench.models import RECIPES
from kspec_guidance.bench.plan import choose_methods
from kspec_guidance.bench.prompts import BenchPrompt
from kspec_guidance.loop.components import call_parameters
from tests.tiny import build
from tests.tiny.families import rule_for

SMALL = {"num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 16, "use_resolution_binning": False}


def small_job(name, methods="plain,sparke", prompts=("a red heart", "two green cats"), pipe=None, **changes):
    """The comparison of a recipe on tiny weights of its class: 2 images of each prompt, 2 steps."""
    recipe = replace(RECIPES[name], dtype="float32")
    pipe = build(recipe.pipeline) if pipe is None else pipe
    own = {k: v() if callable(v) else v for k, v in rule_for(recipe.pipeline).call.items()}
    taken = call_parameters(type(pipe))
    small = {k: v for k, v in (SMALL | {k: own[k] for k in ("height", "width") if k in own}).items() if k in taken}
    settings = {
        "images": 2, "batch_size": 2, "seed": 0, "call": {**recipe.call, **small},
        "prompts": [BenchPrompt(text) for text in prompts], "methods": choose_methods(methods, recipe),
    }  # fmt: skip
    return Job(pipe, recipe, **(settings | changes))
