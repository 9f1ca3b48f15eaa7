"""Checks of guidance on a tiny pipeline: plain, at scale 0, guided, and plain again."""

import inspect
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from kspec_guidance import SPARKE
from kspec_guidance.pipelines import guided
from tests.tiny import builders


@dataclass
class Verdict:
    """Result of the checks of one pipeline class."""

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


def as_array(output: Any) -> np.ndarray:
    """The first field of a pipeline's output as an array."""
    if isinstance(output, dict):
        output = next(v for v in output.values() if v is not None)
    if isinstance(output, tuple):
        output = next(v for v in output if v is not None)
    if isinstance(output, torch.Tensor):
        return output.detach().float().cpu().numpy()
    if isinstance(output, list | np.ndarray) and len(output) and isinstance(output[0], list | Image.Image | torch.Tensor):
        return np.stack([as_array(v) for v in output])
    return np.asarray(output, dtype=np.float32)


def run_pipeline(pipe: Any, guide: Any = None, **kwargs: Any) -> np.ndarray:
    """The pipeline's output from fixed noise, as an array."""
    arguments = builders.call_kwargs(pipe, **kwargs)
    if guide is None:
        return as_array(pipe(**arguments))
    with guide.attach(pipe):
        return as_array(pipe(**arguments))


def family_of(cls: type) -> str:
    """The folder of diffusers in which a class is defined."""
    packages = [
        p for p in cls.__module__.split(".") if p not in ("diffusers", "pipelines", "deprecated", "modular_pipelines")
    ]
    return packages[0].replace("_", " ")


def check_pipeline(name: str) -> Verdict:
    """Run all checks on the class ``name``.

    Raises:
        AssertionError: naming the first check that failed.
    """
    if name in builders.MODULAR:
        return check_modular_pipeline(name)
    start = time.perf_counter()
    pipe = builders.build(name)
    verdict = Verdict(name)
    parameters = inspect.signature(type(pipe).__call__).parameters
    plain = run_pipeline(pipe)
    assert np.isfinite(plain).all(), "plain output is not finite"
    idle = SPARKE(0.0)
    assert np.array_equal(run_pipeline(pipe, idle), plain), "scale 0 is not the plain pipeline"
    n = len(idle.memory)
    assert n > 0, "the memory stayed empty"
    guide = SPARKE(1.0, stop=1.0)
    moved = run_pipeline(pipe, guide)
    if n == 1:  # one image is guided only by another in memory
        moved = run_pipeline(pipe, guide)
    assert np.isfinite(moved).all(), "guided output is not finite"
    assert not np.array_equal(moved, plain), "guidance changed nothing"
    assert guide.report().steps_guided > 0, "no step was guided"
    assert np.array_equal(run_pipeline(pipe), plain), "the pipeline was not restored"
    verdict.scheduler = guide.report().scheduler
    verdict.layout = guide.report().layout
    verdict.prompts = "none" if idle.memory.prompts is None else str(idle.memory.prompt_encoder).rpartition("-")[0]
    verdict.checks = {"batch": n, "steps": guide.report().total_steps}
    verdict.ways = ["attach", "guided"]
    assert verdict.checks["steps"] >= 2, "the run was cut into single steps"
    subclass = guided(type(pipe))
    pipe.__class__ = subclass  # the guided subclass with the same components
    second_guide = SPARKE(1.0, stop=1.0)
    for _ in range(2 if n == 1 else 1):
        result = as_array(pipe(**builders.call_kwargs(pipe), kspec_guidance=second_guide))
    assert np.array_equal(result, moved), "the guided subclass differs from attach"
    pipe.__class__ = subclass.__mro__[1]
    if "guidance_scale" in parameters:
        for value in (0.0, 1.0):
            try:
                run_pipeline(pipe, guidance_scale=value)
            except Exception:
                verdict.checks["guidance off"] = "diffusers itself fails without guidance"
                break
            run_pipeline(pipe, SPARKE(1.0), guidance_scale=value)
        else:
            verdict.checks["guidance off"] = "runs"
    if "callback_on_step_end" in parameters:
        check_callback(pipe, verdict, plain, idle.memory)
    assert np.array_equal(run_pipeline(pipe), plain), "the pipeline was not restored"
    verdict.seconds = time.perf_counter() - start
    return verdict


def check_modular_pipeline(name: str) -> Verdict:
    """The same for a modular pipeline: with the guide attached, and with a block in its loop."""
    from kspec_guidance.integrations.modular import insert_guidance

    start = time.perf_counter()
    verdict, pipe = Verdict(name), builders.build_modular(name)

    def run(pipeline: Any, guide: Any = None, **kwargs: Any) -> np.ndarray:
        arguments = builders.modular_call_kwargs(pipeline) | kwargs
        if guide is not None:
            with guide.attach(pipeline):
                state = pipeline(**arguments)
        else:
            state = pipeline(**arguments)
        return as_array(next(state.get(k) for k in ("images", "videos", "audio", "latents") if state.get(k) is not None))

    plain = run(pipe)
    assert np.isfinite(plain).all(), "plain output is not finite"
    idle, guide = SPARKE(0.0), SPARKE(1.0, stop=1.0)
    assert np.array_equal(run(pipe, idle), plain), "scale 0 is not the plain pipeline"
    assert len(idle.memory) > 0, "the memory stayed empty"
    moved = run(pipe, guide)
    assert np.isfinite(moved).all(), "guided output is not finite"
    assert not np.array_equal(moved, plain), "guidance changed nothing"
    assert np.array_equal(run(pipe), plain), "the pipeline was not restored"
    verdict.scheduler, verdict.layout = guide.report().scheduler, guide.report().layout
    verdict.prompts = "none" if idle.memory.prompts is None else "the denoiser's condition"
    verdict.checks = {"batch": len(idle.memory), "steps": guide.report().total_steps}
    verdict.ways = ["attach", "guided", "modular block"]
    blocks = insert_guidance(pipe.blocks, SPARKE(1.0, stop=1.0))
    with_block = blocks.init_pipeline()
    with_block.update_components(**{k: v for k, v in pipe.components.items() if v is not None})
    with_block.set_progress_bar_config(disable=True)
    assert not np.array_equal(run(with_block), plain), "a block in the loop changed nothing"
    verdict.seconds = time.perf_counter() - start
    return verdict


def check_callback(pipe: Any, verdict: Verdict, plain: np.ndarray, memory: Any) -> None:
    """Check the guide as a callback, with prompts if the pipeline passes them to callbacks, else with latents only."""
    for tensors in (["latents", "prompt_embeds"], ["latents"]):
        guide = SPARKE(1.0, stop=1.0)
        guide.tensor_inputs = tensors
        try:
            for _ in range(2 if len(memory) == 1 else 1):  # for single images, the first call fills the memory
                output = as_array(pipe(**builders.call_kwargs(pipe), callback_on_step_end=guide))
        except ValueError as error:
            if "callback_on_step_end_tensor_inputs" not in str(error):
                raise
            verdict.checks["callback"] = "latents are not passed to callbacks"
            continue
        if np.array_equal(output, plain):
            verdict.checks["callback"] = "called, without effect"
        else:
            verdict.checks.pop("callback", None)
            verdict.ways.insert(0, "callback" if "prompt_embeds" in tensors else "callback (latents)")
        return
