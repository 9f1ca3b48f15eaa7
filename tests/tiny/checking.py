"""Is a pipeline guided? Build it, run it plain, at scale 0, guided, and plain again."""

import inspect
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from kspec_guidance import SPARKE
from kspec_guidance.pipelines import guided
from tests.tiny import making as tiny


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


def family_of(cls: type) -> str:
    """The folder of diffusers that a class lives in."""
    parts = [p for p in cls.__module__.split(".") if p not in ("diffusers", "pipelines", "deprecated", "modular_pipelines")]
    return parts[0].replace("_", " ")


def check(name: str) -> Verdict:
    """Run one class through everything that is asked of it.

    Raises:
        AssertionError: naming what did not hold.
    """
    if name in tiny.MODULAR:
        return check_modular(name)
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
    assert seen.checks["steps"] >= 2, "the run was cut into single steps"
    sub = guided(type(pipe))
    pipe.__class__ = sub  # the guided subclass, on the same components
    late = SPARKE(1.0, stop=1.0)
    for _ in range(2 if n == 1 else 1):
        again = numbers(pipe(**tiny.call(pipe), kspec_guidance=late))
    assert np.array_equal(again, moved), "the guided subclass differs from attach"
    pipe.__class__ = sub.__mro__[1]
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


def check_modular(name: str) -> Verdict:
    """The same for a modular pipeline: attached, and with a block in its loop."""
    from kspec_guidance.integrations.modular import insert_guidance

    began = time.perf_counter()
    seen, pipe = Verdict(name), tiny.build_modular(name)

    def out(made: Any, guide: Any = None, **more: Any) -> np.ndarray:
        arguments = tiny.call_modular(made) | more
        if guide is not None:
            with guide.attach(made):
                state = made(**arguments)
        else:
            state = made(**arguments)
        return numbers(next(state.get(k) for k in ("images", "videos", "audio", "latents") if state.get(k) is not None))

    plain = out(pipe)
    assert np.isfinite(plain).all(), "plain output is not finite"
    idle, guide = SPARKE(0.0), SPARKE(1.0, stop=1.0)
    assert np.array_equal(out(pipe, idle), plain), "scale 0 is not the plain pipeline"
    assert len(idle.memory) > 0, "the memory stayed empty"
    moved = out(pipe, guide)
    assert np.isfinite(moved).all(), "guided output is not finite"
    assert not np.array_equal(moved, plain), "guidance changed nothing"
    assert np.array_equal(out(pipe), plain), "the pipeline was not restored"
    seen.scheduler, seen.layout = guide.report().scheduler, guide.report().layout
    seen.prompts = "none" if idle.memory.prompts is None else "the denoiser's condition"
    seen.checks = {"batch": len(idle.memory), "steps": guide.report().total_steps}
    seen.ways = ["attach", "guided", "modular block"]
    blocks = insert_guidance(pipe.blocks, SPARKE(1.0, stop=1.0))
    with_block = blocks.init_pipeline()
    with_block.update_components(**{k: v for k, v in pipe.components.items() if v is not None})
    with_block.set_progress_bar_config(disable=True)
    assert not np.array_equal(out(with_block), plain), "a block in the loop changed nothing"
    seen.seconds = time.perf_counter() - began
    return seen


def as_callback(pipe: Any, seen: Verdict, plain: np.ndarray, memory: Any) -> None:
    """Try the callback way in; pipelines that show no prompts to callbacks are asked for latents alone."""
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
