"""Guided steps on a simulated accelerator: the results of the CPU, no mixed devices, and one wait of the host per step."""

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kspec_guidance.kernels as kernels
from kspec_guidance import SPARKE, KernelGuidance, MemoryBank, MMDGuidance, NoveltyGuidance, VendiGuidance
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.guidance.run import Run
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.loop.blocks import Tokens
from kspec_guidance.loop.classifier_free import _fitted
from kspec_guidance.loop.context import CallContext, ComingStep
from kspec_guidance.memory import CentroidMemory
from kspec_guidance.objectives import RKE, Balance, Vendi
from tests.gpu.steps import Step
from tests.tiny.models import build_model

from .loops import SHAPE, STEPS, Loop, noise, prompts
from .simulated import SimulatedDevice

REFERENCE = noise(7, 6, *SHAPE[1:])
WIDTH = REFERENCE[0].numel()
GUIDES = {
    **{f"preset {name}": lambda name=name: SPARKE.preset(name, stop=1.0, every=1) for name in SPARKE.PRESETS},
    "Vendi, order 1": lambda: VendiGuidance(order=1.0, stop=1.0),
    "log det": lambda: VendiGuidance(order="logdet", stop=1.0),
    "MMD": lambda: MMDGuidance(REFERENCE, stop=1.0),
    "MMD, published": lambda: MMDGuidance.published(REFERENCE),
    "MMD, prompts": lambda: MMDGuidance(REFERENCE, stop=1.0, reference_prompts=prompts(6)),
    "novelty": lambda: NoveltyGuidance(REFERENCE, stop=1.0),
    "novelty, prompts": lambda: NoveltyGuidance(REFERENCE, stop=1.0, reference_prompts=prompts(6)),
}
OTHERS = {
    "random features": lambda: SPARKE(
        stop=1.0,
        feature_map=RandomFourierFeatures(GaussianKernel(1.0), WIDTH, 8 * WIDTH),
        prompt_feature_map=RandomFourierFeatures(GaussianKernel(0.35), 5, 64),
    ),
    "balance": lambda: KernelGuidance(Balance([REFERENCE[:3], REFERENCE[3:]]), 0.3),
    "means": lambda: SPARKE(stop=1.0, memory=CentroidMemory(capacity=2)),
    "pooled": lambda: SPARKE(stop=1.0, space="pooled"),
    "two terms": lambda: SPARKE(stop=1.0) + MMDGuidance(REFERENCE, stop=1.0),
    "Vendi, cosine": lambda: KernelGuidance(Vendi(), 0.5),
    "function": lambda: SPARKE(stop=1.0, kernel=lambda x, y: 1 / (1 + torch.cdist(x, y).square())),
    **{f"RKE, {name}": lambda name=name: KernelGuidance(RKE(getattr(kernels, name)()), 0.5)
       for name in ("CosineKernel", "RationalQuadraticKernel", "LaplacianKernel", "PolynomialKernel")},
}  # fmt: skip
SCHEDULERS = {
    "DDIM": {"clip_sample": False},
    "DDPM": {"clip_sample": False},
    "EulerDiscrete": {},
    "EulerAncestralDiscrete": {},
    "DPMSolverMultistep": {"algorithm_type": "dpmsolver++"},
    "UniPCMultistep": {},
    "FlowMatchEulerDiscrete": {},
    "LCM": {"clip_sample": False},
    "HeunDiscrete": {},
}


def scheduler(name="DDIM"):
    return getattr(diffusers, f"{name}Scheduler")(**SCHEDULERS[name])


def on_device(make, kind="cuda", name="DDIM", runs=2, **settings):
    """The last of several runs of one guide, and the report's text."""
    with SimulatedDevice(kind) as device:
        guide = make()
        for _ in range(runs):
            loop = Loop(guide, scheduler(name), device, **settings)
            x = loop()
        with device.not_counting():
            text = str(guide.report())
    return x, loop, text


def on_cpu(make, name="DDIM", runs=2, **settings):
    guide = make()
    for _ in range(runs):
        x = Loop(guide, scheduler(name), **settings)()
    return x


def assert_same(found, expected, rtol=1e-3):
    assert found.dtype == expected.dtype
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < rtol


@pytest.mark.parametrize("name", GUIDES)
def test_a_guided_step_waits_for_the_device_once(name):
    x, loop, text = on_device(GUIDES[name])
    assert_same(x, on_cpu(GUIDES[name]))
    assert all(sum(reads.values()) <= 1 for reads in loop.reads[1:]), loop.reads[1:]
    # the first: timesteps, prompts, whether rows of memory and of references are far from the origin, the step itself
    assert sum(loop.reads[0].values()) <= 5, loop.reads[0]
    assert sum(loop.finishing.values()) <= 3, loop.finishing
    assert f"Guided {STEPS} of {STEPS} steps" in text
    assert ("guidance of 4 was lowered to 2.5" in text) == (name == "preset explore")


@pytest.mark.parametrize("name", ["preset default", "preset vivid"])
def test_memory_on_host_costs_no_further_wait(name):
    def make():
        guide = GUIDES[name]()
        guide.terms[0].memory = MemoryBank(device="cpu")
        return guide

    x, loop, _ = on_device(make)
    assert_same(x, on_cpu(make))
    assert all(sum(reads.values()) <= 1 for reads in loop.reads[1:]), loop.reads[1:]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_runs_on_device_with_result_of_cpu(name):
    x, loop, _ = on_device(GUIDES["preset default"], name=name)
    assert_same(x, on_cpu(GUIDES["preset default"], name=name))
    assert all(sum(reads.values()) <= 1 for reads in loop.reads[1:]), loop.reads[1:]


@pytest.mark.parametrize("name", OTHERS)
def test_other_objectives_kernels_and_memories_run_on_device(name):
    assert_same(on_device(OTHERS[name])[0], on_cpu(OTHERS[name]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_on_device(dtype):
    x, loop, _ = on_device(GUIDES["preset default"], name="FlowMatchEulerDiscrete", dtype=dtype)
    assert_same(x, on_cpu(GUIDES["preset default"], name="FlowMatchEulerDiscrete", dtype=dtype), rtol=0.02)
    assert all(sum(reads.values()) <= 1 for reads in loop.reads[1:]), loop.reads[1:]


@pytest.mark.parametrize("name", {**GUIDES, **OTHERS})
def test_no_float64_on_device(name):
    make = {**GUIDES, **OTHERS}[name]
    on_device(make, kind="mps", name="FlowMatchEulerDiscrete")


@pytest.mark.parametrize("name", ["preset default", "preset vivid", "MMD"])
def test_deterministic_algorithms(name):
    torch.use_deterministic_algorithms(True)
    try:
        on_device(GUIDES[name])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["preset default", "preset vivid"])
def test_coincident_samples_are_separated_alike_on_every_device(name):
    make = GUIDES[name]
    same = {"prompts": prompts()[:1].expand(3, -1).clone()}

    class Coincident(Loop):
        def _to(self, x):
            return super()._to(x[:1].expand_as(x).clone())

    def run(device=None):
        return Coincident(make(), scheduler(), device, **same)()

    with SimulatedDevice() as device:
        x = run(device)
    assert (x[0] - x[1]).norm() > 1e-2 * x[0].norm()
    assert_same(x, run())


def test_seconds_on_cuda_are_those_of_events():
    with SimulatedDevice() as device:
        guide = GUIDES["preset default"]()
        Loop(guide, scheduler(), device)()
    assert guide.report().seconds == pytest.approx(2 * STEPS * 2e-3)  # before and after each step
    assert guide.report().seconds == pytest.approx(2 * STEPS * 2e-3)  # read again: not counted twice


def test_distinct_samples_are_not_separated(monkeypatch):
    monkeypatch.setattr("kspec_guidance.guidance.run.jitter", None)
    for name in GUIDES:
        on_cpu(GUIDES[name], runs=1)


def test_easing_of_classifier_free_guidance_does_not_wait():
    cond, uncond = noise(1), noise(2)
    guided = uncond + 4 * (cond - uncond)
    with SimulatedDevice("cuda") as device:
        on = [x.to(device.device) for x in (guided, uncond, cond)]
        device.reads.clear()
        found = _fitted(*on, 1e-3)
        eased = found.at_weight(on[0], found.weight - (found.weight - 1).clamp_min(0) * 0.5)
        assert not device.reads
        with device.not_counting():
            torch.testing.assert_close(eased.cpu(), uncond + 2.5 * (cond - uncond), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moves_inside_a_block_do_not_wait(dtype):
    image, text = noise(1, 6, 5, 8).to(dtype), noise(2, 6, 7, 8).to(dtype)

    def moved(place):
        handler, transformer = Run(SPARKE(space="block", stop=1.0)), build_model("FluxTransformer2DModel")
        (block,) = handler.blocks(transformer)
        tokens = Tokens(place(image), place(text), lambda x: x)
        coming = ComingStep(CallContext(), None, 0, 2, slice(3, 6))
        return lambda: handler.inside(block, tokens, coming)[0]

    expected = moved(lambda x: x)()
    with SimulatedDevice("cuda") as device:
        change = moved(lambda x: x.to(device.device))
        device.reads.clear()
        found = change()
        assert not device.reads
        assert found.device == device.device
        with device.not_counting():
            torch.testing.assert_close(found.cpu(), expected)
    assert not torch.equal(expected, image)


class Operations(TorchDispatchMode):
    """Counts operations that compute something: on an accelerator, each is at least one launch."""

    views = ("view", "slice", "select", "expand", "transpose", "t", "detach", "unsqueeze", "diagonal", "split")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name.removeprefix("aten::") not in self.views
        return function(*args, **(kwargs or {}))


def test_a_step_of_the_default_guide_has_at_most_78_operations():
    step = Step(SPARKE(), torch.randn(2, 4, 16, 16), torch.ones(2, 1), reading=True)
    step()  # what is computed once in a run
    with torch.no_grad(), Operations() as operations:
        step()
    assert operations.count <= 78
