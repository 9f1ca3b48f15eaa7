"""Checks of guidance on a tiny pipeline: plain, at scale 0, guided, and plain again."""

import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from kspec_guidance import SPARKE
from kspec_guidance.pipelines import guided
from tests.tiny import builders

EFFECT = 1e-4  # smallest relative change of the output that counts as an effect of guidance


@dataclass
class Verdict:
    """Result of the checks of one pipeline class."""

    name: str
    evidence: str = "run"
    scheduler: str = ""
    layout: str = ""
    prompts: str = ""
    ways: list[str] = field(default_factory=list)
    spaces: list[str] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def first_field(output: Any) -> Any:
    if isinstance(output, dict | tuple):
        return next(v for v in (output.values() if isinstance(output, dict) else output) if v is not None)
    return output


def as_array(output: Any) -> np.ndarray:
    """The first field of a pipeline's output as an array."""
    output = first_field(output)
    if isinstance(output, torch.Tensor):
        return output.detach().float().cpu().numpy()
    if isinstance(output, list | np.ndarray) and len(output) and isinstance(output[0], list | Image.Image | torch.Tensor):
        return np.stack([as_array(v) for v in output])
    return np.asarray(output, dtype=np.float32)


def modular_output(state: Any) -> np.ndarray:
    """What a modular pipeline has made, as an array."""
    return as_array(
        next(state.get(k) for k in ("images", "videos", "audio", "audios", "latents") if state.get(k) is not None)
    )


def run_pipeline(pipe: Any, guide: Any = None, **kwargs: Any) -> np.ndarray:
    """The pipeline's output from fixed noise, as an array."""
    arguments = builders.call_kwargs(pipe, **kwargs)
    if guide is None:
        return as_array(pipe(**arguments))
    with guide.attach(pipe):
        return as_array(pipe(**arguments))


def runs_plain(pipe: Any, **kwargs: Any) -> bool:
    """Whether the pipeline itself accepts these arguments."""
    try:
        run_pipeline(pipe, **kwargs)
    except Exception:
        return False
    return True


def has_effect(output: np.ndarray, plain: np.ndarray) -> bool:
    return float(np.abs(output - plain).mean()) > EFFECT * float(np.abs(plain).mean())


def check_memory(memory: Any, output: np.ndarray, arguments: dict[str, Any]) -> None:
    """Check that the memory has one row for each returned sample, and different features for different prompts."""
    expected = len(output) * (arguments.get("ensemble_size") or 1)  # Marigold returns the median of an ensemble
    if "video_length" in arguments:
        expected = 1  # the frames of one clip are returned as images
    assert len(memory) == expected, f"{len(memory)} rows in memory for {expected} samples"
    assert len(memory.x.flatten(1).unique(dim=0)) == expected, "samples are remembered twice"
    prompts = arguments.get("prompt")
    if memory.prompts is not None and isinstance(prompts, list) and len(set(prompts)) > 1 and expected > 1:
        per = expected // len(prompts)
        each = memory.prompts[::per], memory.prompts[: len(prompts)]  # Kandinsky's combined pipeline repeats all prompts
        orders = each[0].repeat_interleave(per, dim=0), each[1].repeat(per, 1)
        assert any(torch.equal(memory.prompts, o) for o in orders), "samples of one prompt have different prompt features"
        cosine = float(memory.prompts[0] @ memory.prompts[-1])
        assert cosine < 1 - 1e-4, f"two different prompts have features of cosine {cosine:.6f}"


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
        if not name.startswith("WanAnimate2"):
            return check_modular_pipeline(name)
        with torch.compiler.set_stance("force_eager"):  # it compiles the mask of its attention, which takes longest
            return check_modular_pipeline(name)
    start = time.perf_counter()
    pipe = builders.build(name)
    verdict = Verdict(name)
    parameters = inspect.signature(type(pipe).__call__).parameters
    arguments = builders.call_kwargs(pipe)
    plain = as_array(pipe(**arguments))
    assert np.isfinite(plain).all(), "plain output is not finite"
    idle = SPARKE(0.0)
    assert np.array_equal(run_pipeline(pipe, idle), plain), "scale 0 is not the plain pipeline"
    check_memory(idle.memory, plain, arguments)
    n, prompts = len(idle.memory), arguments.get("prompt")
    single = isinstance(prompts, list) and n == len(prompts)  # one sample for each prompt: only equal prompts repel
    same = {"prompt": [prompts[0]] * n} if single else {}
    plain = run_pipeline(pipe, **same) if same else plain
    guide = SPARKE(1.0, stop=1.0)
    moved = run_pipeline(pipe, guide, **same)
    if n == 1:  # one image is guided only by another in memory
        moved = run_pipeline(pipe, guide, **same)
    assert np.isfinite(moved).all(), "guided output is not finite"
    assert has_effect(moved, plain), "guidance changed nothing"
    assert guide.report().steps_guided > 0, "no step was guided"
    assert np.array_equal(run_pipeline(pipe, **same), plain), "the pipeline was not restored"
    verdict.scheduler = guide.report().scheduler
    verdict.layout = guide.report().layout
    verdict.prompts = "none" if idle.memory.prompts is None else encoder_name(idle.memory.prompt_encoder)
    verdict.checks = {"batch": n, "steps": guide.report().total_steps}
    verdict.ways = ["attach", "guided"]
    assert verdict.checks["steps"] >= 2, "the run was cut into single steps"
    subclass = guided(type(pipe))
    pipe.__class__ = subclass  # the guided subclass with the same components
    second_guide = SPARKE(1.0, stop=1.0)
    for _ in range(2 if n == 1 else 1):
        result = as_array(pipe(**builders.call_kwargs(pipe, **same), kspec_guidance=second_guide))
    assert np.array_equal(result, moved), "the guided subclass differs from attach"
    pipe.__class__ = subclass.__mro__[1]
    if "guidance_scale" in parameters:
        for value in (0.0, 1.0):
            without = SPARKE(0.0)
            try:
                run_pipeline(pipe, without, guidance_scale=value)
            except Exception:
                if runs_plain(pipe, guidance_scale=value):
                    raise
                verdict.checks["guidance off"] = "diffusers itself fails without guidance"
                break
            assert len(without.memory) == n, f"{len(without.memory)} rows at guidance_scale={value} for {n} samples"
        else:
            verdict.checks["guidance off"] = "runs"
    if "callback_on_step_end" in parameters:
        check_callback(pipe, verdict, plain, idle.memory, same)
    check_guider(pipe, verdict, moved, lambda: run_pipeline(pipe, **same))
    assert np.array_equal(run_pipeline(pipe, **same), plain), "the pipeline was not restored"
    verdict.seconds = time.perf_counter() - start
    return verdict


def check_modular_pipeline(name: str) -> Verdict:
    """The same for a modular pipeline: with the guide attached, with a block in its loop, and in its guiders."""
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
        return modular_output(state)

    plain = run(pipe)
    assert np.isfinite(plain).all(), "plain output is not finite"
    idle, guide = SPARKE(0.0), SPARKE(1.0, stop=1.0)
    assert np.array_equal(run(pipe, idle), plain), "scale 0 is not the plain pipeline"
    check_memory(idle.memory, plain, builders.modular_call_kwargs(pipe))
    calls = 2 if len(idle.memory) == 1 else 1  # one sample has only the memory to differ from
    moved = [run(pipe, guide) for _ in range(calls)][-1]
    assert np.isfinite(moved).all(), "guided output is not finite"
    assert has_effect(moved, plain), "guidance changed nothing"
    assert np.array_equal(run(pipe), plain), "the pipeline was not restored"
    verdict.scheduler, verdict.layout = guide.report().scheduler, guide.report().layout
    verdict.prompts = "none" if idle.memory.prompts is None else "the denoiser's condition"
    verdict.checks = {"batch": len(idle.memory), "steps": guide.report().total_steps}
    verdict.ways = ["attach", "guided"]
    try:
        blocks = insert_guidance(pipe.blocks, SPARKE(1.0, stop=1.0))
    except ValueError:  # its steps are inside a block
        check_guider(pipe, verdict, moved, lambda: run(pipe))
        verdict.seconds = time.perf_counter() - start
        return verdict
    verdict.ways.append("modular block")
    with_block = blocks.init_pipeline()
    missing = {k: v for k, v in pipe.components.items() if v is not None and getattr(with_block, k, None) is None}
    with_block.update_components(**missing)
    with_block.set_progress_bar_config(disable=True)
    assert has_effect([run(with_block) for _ in range(calls)][-1], plain), "a block in the loop changed nothing"
    check_guider(pipe, verdict, moved, lambda: run(pipe))
    verdict.seconds = time.perf_counter() - start
    return verdict


def check_spaces(name: str) -> tuple[list[str], str]:
    """Those of the spaces of transformer blocks in which the class ``name`` is guided, and why not in the others.

    Raises:
        AssertionError: naming the first check that failed.
    """
    modular = name in builders.MODULAR
    pipe = (builders.build_modular if modular else builders.build)(name)
    found, reason = [], ""

    def run() -> np.ndarray:
        if modular:
            return modular_output(pipe(**builders.modular_call_kwargs(pipe)))
        arguments = builders.call_kwargs(pipe)
        prompts = arguments.get("prompt")
        if isinstance(prompts, list):  # only samples of one prompt repel each other
            arguments["prompt"] = [prompts[0]] * len(prompts)
        return as_array(pipe(**arguments))

    plain = None
    _deepen(pipe, run)
    for space in ("block", "context"):
        guide, idle = SPARKE(1.0, space=space, stop=1.0), SPARKE(0.0, space=space)
        try:
            with guide.attach(pipe):
                moved = [run() for _ in range(2)][-1]  # from the memory of the first, if it makes one sample
        except ValueError as error:
            if "space=" not in str(error):
                raise
            reason = str(error)
            continue
        plain = run() if plain is None else plain
        assert np.isfinite(moved).all(), f"{space}: guided output is not finite"
        assert guide.memory.shape[0] == guide.report().steps_guided > 0, f"{space}: steps without rows in memory"
        with idle.attach(pipe):
            assert np.array_equal(run(), plain), f"{space}: scale 0 is not the plain pipeline"
        if has_effect(moved, plain):
            found.append(space)
        else:
            reason = f"{space}: guidance changed nothing"
    return found, reason


def _deepen(pipe: Any, run: Callable[[], np.ndarray]) -> None:
    """Give transformers of one or two blocks a third one, if they run with it: the last gives its text tokens to none."""
    replace = getattr(pipe, "update_components", None) or pipe.register_modules
    before = {}
    for part in ("transformer", "transformer_2"):
        transformer = getattr(pipe, part, None)
        layers = getattr(getattr(transformer, "config", None), "num_layers", None)
        if isinstance(layers, int) and layers < 3:
            torch.manual_seed(0)
            before[part] = transformer
            replace(**{part: type(transformer).from_config({**transformer.config, "num_layers": 3}).eval()})
    try:
        if before:
            run()
    except Exception:  # some need a number that other settings agree with
        replace(**before)


def check_guider(pipe: Any, verdict: Verdict, expected: np.ndarray, run: Callable[[], np.ndarray]) -> None:
    """Compare a guide in the guiders of a pipeline, if it has any, with the attached one; put the plain guiders back."""
    inner = {k: v for k, v in pipe.components.items() if k.startswith("guider") and v is not None}
    if not inner:
        return
    from kspec_guidance import KernelGuider

    replace = getattr(pipe, "update_components", None) or pipe.register_modules
    guide = SPARKE(1.0, stop=1.0)
    replace(**{k: KernelGuider(v, guide) for k, v in inner.items()})
    for _ in range(2 if verdict.checks["batch"] == 1 else 1):
        found = run()
    difference = float(np.abs(found - expected).max())
    assert difference <= 1e-5, f"a guide in a guider differs from the attached one by {difference:.0e}"
    verdict.checks["guider less attach"] = difference
    replace(**inner)
    verdict.ways.append("guider")


def encoder_name(encoder: str | None) -> str:
    """The class of a prompt encoder, or what else the prompt features were read from."""
    name, _, rest = str(encoder).partition("-")
    return name + (", with padding" if rest.endswith("padding") else "")


def check_callback(pipe: Any, verdict: Verdict, plain: np.ndarray, memory: Any, same: dict[str, Any]) -> None:
    """Check the guide as a callback: its effect, and the features of its prompts, or the warning that there are none."""
    guide, idle = SPARKE(1.0, stop=1.0), SPARKE(0.0)
    for _ in range(2 if len(memory) == 1 else 1):  # for single images, the first call fills the memory
        output = as_array(pipe(**builders.call_kwargs(pipe, **same), callback_on_step_end=guide))
    if not has_effect(output, plain):
        verdict.checks["callback"] = "called, without effect"
        return
    with warnings.catch_warnings(record=True) as issued:
        warnings.simplefilter("always")
        pipe(**builders.call_kwargs(pipe), callback_on_step_end=idle)
    assert len(idle.memory) == len(memory), f"{len(idle.memory)} rows of a callback for {len(memory)} samples"
    if idle.memory.prompts is not None:
        assert torch.equal(idle.memory.prompts, memory.prompts), "callback and attach read different prompts"
        assert idle.memory.prompt_encoder == memory.prompt_encoder, "callback and attach name different encoders"
    elif memory.prompts is not None:
        assert any("cannot be read" in str(w.message) for w in issued), "no warning that prompts cannot be read"
    read = idle.memory.prompts is not None or memory.prompts is None
    verdict.ways.insert(0, "callback" if read else "callback (no prompts)")
