"""Is a pipeline guided? Build it, run it plain, at scale 0, guided, and plain again."""

import inspect
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from tiny import making as tiny


@dataclass
class Verdict:
    """What was seen of one pipeline class."""

    name: str
    evidence: str = "run"
    scheduler: str = ""
    layout: str = ""
    prompts: str = ""
    ways: list[str] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def numbers(output: Any) -> np.ndarray:
    """The first field of a pipeline's output as an array."""
    if isinstance(output, dict):
        output = next(v for v in output.values() if v is not None)
    if isinstance(output, tuple):
        output = next(v for v in output if v is not None)
    if isinstance(output, torch.Tensor):
        return output.detach().float().cpu().numpy()
    if isinstance(output, list | np.ndarray) and len(output) and isinstance(output[0], list | Image.Image | torch.Tensor):
        return np.stack([numbers(v) for v in output])
    return np.asarray(output, dtype=np.float32)


def run(pipe: Any, guide: Any = None, **more: Any) -> np.ndarray:
    """The pipeline's output, always from the same noise."""
    arguments = tiny.call(pipe, **more)
    if guide is None:
        return numbers(pipe(**arguments))
    with guide.attach(pipe):
        return numbers(pipe(**arguments))


def check(name: str) -> Verdict:
    """Run one class through everything that is asked of it.

    Raises:
        AssertionError: naming what did not hold.
    """
    from kspec_guidance import SPARKE
    from kspec_guidance.pipelines import guided

    began = time.perf_counter()
    pipe = tiny.build(name)
    seen = Verdict(name)
    parameters = inspect.signature(type(pipe).__call__).parameters
    plain = run(pipe)
    assert np.isfinite(plain).all(), "plain output is not finite"
    idle = SPARKE(0.0)
    assert np.array_equal(run(pipe, idle), plain), "scale 0 is not the plain pipeline"
    n = len(idle.memory)
    assert n > 0, "the memory stayed empty"
    guide = SPARKE(1.0, stop=1.0)
    moved = run(pipe, guide)
    if n == 1:  # one image has nothing to differ from until another is in memory
        moved = run(pipe, guide)
    assert np.isfinite(moved).all(), "guided output is not finite"
    assert not np.array_equal(moved, plain), "guidance changed nothing"
    assert guide.report().steps_guided > 0, "no step was guided"
    assert np.array_equal(run(pipe), plain), "the pipeline was not restored"
    seen.scheduler = guide.report().scheduler
    seen.layout = guide.report().layout
    seen.prompts = "none" if idle.memory.prompts is None else str(idle.memory.prompt_encoder).rpartition("-")[0]
    seen.checks = {"batch": n, "steps": guide.report().total_steps}
    seen.ways = ["attach", "guided"]
    wrapped = guided(type(pipe))
    assert issubclass(wrapped, type(pipe))
    if "guidance_scale" in parameters:
        for value in (0.0, 1.0):
            try:
                run(pipe, guidance_scale=value)
            except Exception:
                seen.checks["guidance off"] = "diffusers itself fails without guidance"
                break
            run(pipe, SPARKE(1.0), guidance_scale=value)
        else:
            seen.checks["guidance off"] = "runs"
    if "callback_on_step_end" in parameters:
        as_callback(pipe, seen, plain, idle.memory)
    assert np.array_equal(run(pipe), plain), "the pipeline was not restored"
    seen.seconds = time.perf_counter() - began
    return seen


def as_callback(pipe: Any, seen: Verdict, plain: np.ndarray, memory: Any) -> None:
    """Try the callback way in; pipelines that show no prompts to callbacks are asked for latents alone."""
    from kspec_guidance import SPARKE

    for tensors in (["latents", "prompt_embeds"], ["latents"]):
        guide = SPARKE(1.0, stop=1.0)
        guide.tensor_inputs = tensors
        try:
            for _ in range(2 if len(memory) == 1 else 1):  # the first of two single images fills the memory
                out = numbers(pipe(**tiny.call(pipe), callback_on_step_end=guide))
        except ValueError as error:
            if "callback_on_step_end_tensor_inputs" not in str(error):
                raise
            seen.checks["callback"] = "its callbacks are not shown latents"
            continue
        if np.array_equal(out, plain):
            seen.checks["callback"] = "called, without effect"
        else:
            seen.checks.pop("callback", None)
            seen.ways.insert(0, "callback" if "prompt_embeds" in tensors else "callback (latents)")
        return
