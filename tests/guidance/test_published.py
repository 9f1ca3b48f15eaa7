"""`published` against latents of the authors' code at each step, written by benchmarks/peer_steps.py with their commits."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from safetensors.torch import load_file

from kspec_guidance import SPARKE, KernelGuidance, MMDGuidance
from kspec_guidance.guidance.run import Run
from kspec_guidance.guidance.spaces import Latents
from kspec_guidance.loop.context import CallContext, StepContext
from kspec_guidance.loop.layouts import Layout
from kspec_guidance.loop.prediction import Prediction

DATA = Path(__file__).parents[1] / "data" / "published"
SPARKE_DATA, MMD_DATA = (load_file(DATA / f"{name}.safetensors") for name in ("sparke", "mmd"))
SD21 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"}


class LinearPipeline(DiffusionPipeline):
    """A denoising loop with the model output ``x W``, which returns the latents after each step."""

    def __init__(self, scheduler):
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def encode_prompt(self, prompt):
        return prompt[:, None], None

    @torch.no_grad()
    def __call__(self, prompt, latents, steps, generator=None):
        x, found = latents, []
        if prompt is not None:
            self.encode_prompt(prompt)
        self.scheduler.set_timesteps(steps)
        extra = {} if generator is None else {"generator": generator}
        for t in self.scheduler.timesteps:
            output = (x.flatten(1) @ self.weight).view(x.shape)
            x = self.scheduler.step(output, t, x, **extra, return_dict=False)[0]
            found.append(x)
        return SimpleNamespace(images=x, steps=torch.stack(found))


def linear_pipeline(scheduler, data):
    pipe = LinearPipeline(scheduler)
    pipe.weight = data["weight"]
    return pipe


def sparke_pipeline():
    return linear_pipeline(DPMSolverMultistepScheduler(**SD21), SPARKE_DATA)


def run_sparke(guide, images=None, steps=51):
    """Latents after each step ``[images, steps, ...]``, one image at a time."""
    pipe, found = sparke_pipeline(), []
    with contextlib.nullcontext() if guide is None else guide.attach(pipe):
        for noise, prompt in zip(SPARKE_DATA["noise"][:images], SPARKE_DATA["prompts"], strict=False):
            found.append(pipe(prompt[None], noise, steps).steps)
    return torch.stack(found)


def test_sparke_follows_authors_code_at_each_step():
    expected, found = SPARKE_DATA["latents"], run_sparke(SPARKE.published())
    assert (found - expected).abs().max() < 1e-5
    plain = run_sparke(None)
    moved = (expected - plain).flatten(2).norm(dim=2)[:, 10] / plain.flatten(2).norm(dim=2)[:, 10] > 1e-3
    assert moved.tolist() == [False] + [True] * 4 + [False] + [True] * 8  # image 5: too small a gradient; 13: all unrelated


def test_mmd_follows_authors_code_at_each_step_and_starts_memory_again_at_100():
    guide, lengths = MMDGuidance.published(MMD_DATA["reference"]), []
    pipe = linear_pipeline(DDPMScheduler(clip_sample=False, prediction_type="v_prediction"), MMD_DATA)
    with guide.attach(pipe):
        for k, (noise, expected) in enumerate(zip(MMD_DATA["noise"], MMD_DATA["latents"], strict=True)):
            lengths.append(len(guide.memory))
            found = pipe(None, noise, len(expected), torch.Generator().manual_seed(k)).steps
            assert (found - expected).abs().max() < 1e-5
    assert lengths == [*range(100), 1, 2, 3, 4]


def test_sparke_guides_with_any_number_of_steps():
    """The memory is filled also if the last step is not a guided one; the authors' then stays empty."""
    guide = SPARKE.published(every=4)
    assert not torch.equal(run_sparke(guide, 3, 11)[1:], run_sparke(None, 3, 11)[1:])
    assert len(guide.memory) == 3


def test_paper_subtracts_gradient_of_algorithm_1_after_step():
    guide, kept = SPARKE.published(3.0, variant="paper"), []
    pipe = sparke_pipeline()
    for k, (noise, prompt) in enumerate(zip(SPARKE_DATA["noise"][:3], SPARKE_DATA["prompts"], strict=False)):
        with guide.attach(pipe):
            found = pipe(prompt[None], noise, 50).steps
        after = pipe(prompt[None], noise, 50).steps[0]  # of the first step, before its move
        x = after.flatten().requires_grad_()
        rows = torch.stack([*[m for m, _ in kept], x])
        rows = rows / rows.norm(dim=1, keepdim=True)
        t = torch.stack([*[s for _, s in kept], prompt])
        k_x, k_t = (torch.exp(-torch.cdist(r, r).square() / (2 * b**2)) for r, b in ((rows, 0.8), (t, 0.3)))
        (g,) = torch.autograd.grad((k_x * k_t).square().sum() / len(rows) ** 2, x)
        torch.testing.assert_close(found[0].flatten(), x.detach() - 3.0 * g, rtol=0, atol=1e-5)
        assert (k == 0) == bool(g.norm() < 1e-6)
        kept.append((found[-1].flatten(), prompt))


def test_published_repels_images_of_one_batch():
    noise, prompt = SPARKE_DATA["noise"][:4, 0], SPARKE_DATA["prompts"][:1].expand(4, -1)
    pipe, guide = sparke_pipeline(), SPARKE.published()
    plain = pipe(prompt, noise, 51).images
    with guide.attach(pipe):
        guided = pipe(prompt, noise, 51).images
    assert torch.pdist(guided.flatten(1)).mean() > torch.pdist(plain.flatten(1)).mean()


@pytest.mark.parametrize("make", [SPARKE.published, lambda: SPARKE.published(variant="paper")])
def test_published_settings_round_trip(make, tmp_path):
    guide = make()
    guide.save_config(tmp_path)
    loaded = KernelGuidance.from_config(tmp_path)
    assert type(loaded) is SPARKE
    assert torch.equal(run_sparke(guide, 3), run_sparke(loaded, 3))
    assert (loaded.memory.limit, loaded.memory.forget) == (guide.memory.limit, guide.memory.forget)


def test_published_settings_can_be_replaced_and_wrong_ones_raise():
    from kspec_guidance.kernels import GaussianKernel

    guide = SPARKE.published(0.1, every=5, kernel=GaussianKernel(0.7), start=0.2, seed=3)
    term = guide.terms[0]
    assert (term.scale, term.every, term.start, term.objective.kernel.bandwidth, guide.seed) == (0.1, 5, 0.2, 0.7, 3)
    with pytest.raises(ValueError, match="variant must be 'code' or 'paper', got 'arxiv'"):
        SPARKE.published(variant="arxiv")
    with pytest.raises(ValueError, match="kernel needs a bandwidth"):
        SPARKE.published(kernel=GaussianKernel())
    with pytest.raises(TypeError, match=r"SPARKE\(\) has no argument 'strength'"):
        SPARKE.published(strength=1)


@pytest.mark.parametrize("space", [Latents(before=True), Latents()])
def test_noisy_state_of_several_tensors_moves_in_its_own_form(space):
    state = [torch.randn(3, 2, 4, 4), torch.randn(3, 5).half()]
    layout = Layout.of(state)
    context = StepContext(CallContext(), DDPMScheduler(), None, layout, [s.shape for s in state], 10)
    packed = layout.pack(state)
    prediction = Prediction(packed, packed, 0.8, 0.6, -0.75)
    run = Run(SPARKE.published(0.1, space=space))
    run.begin(context, state)
    before, after = run.before_step(state, prediction, context), run.after_step(state, prediction, context)
    moved, kept = (before, after) if space.before else (after, before)
    assert kept is None
    assert [(type(m), m.shape, m.dtype) for m in moved] == [(type(s), s.shape, s.dtype) for s in state]
    assert not torch.equal(moved[1], state[1])
