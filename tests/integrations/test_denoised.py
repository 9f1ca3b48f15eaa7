import math

import pytest
import torch

from kspec_guidance import SPARKE, VendiGuidance
from kspec_guidance.integrations.denoised import (
    DenoisedGuidance,
    MemoryBySize,
    noise_levels,
    prompts_of_conditioning,
)
from kspec_guidance.loop.context import CallContext, StepContext
from kspec_guidance.loop.layouts import Layout
from kspec_guidance.loop.prediction import Prediction
from kspec_guidance.memory import MemoryBank, MemoryFileError

SIGMAS = [8.0, 4.0, 2.0, 1.0, 0.0]
SHAPES = {"image": (4, 6, 6), "clip": (4, 3, 6, 6), "tokens": (9, 8), "several latents, packed": (1, 90)}


class Flow:
    """``x = (1 - sigma) x0 + sigma noise``, adding in place as ComfyUI does."""

    def noise_scaling(self, sigma, noise, latent_image, max_denoise=False):
        return noise.mul_(sigma).add_((1 - sigma) * latent_image)


def target(x):
    return torch.tanh(x)


def euler(guidance, x, sigmas=SIGMAS, announced=True, **kwargs):
    """Euler's method with a denoiser that is a function of the sample."""
    levels = torch.tensor(sigmas)
    if announced:
        guidance.begin(levels)
    for k in range(len(levels) - 1):
        x0 = guidance(target(x), x, levels[k].expand(len(x)), levels, **kwargs)
        x = x0 + levels[k + 1] / levels[k] * (x - x0)
    if announced:
        guidance.end(x)
    return x


def noise(n=4, shape=(4, 6, 6), seed=0):
    return 8 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def diverse(scale=1.0, memory=None, **kwargs):
    def make(x0):
        return SPARKE(scale, memory=None if memory is None else memory.of(x0), **kwargs)

    return DenoisedGuidance(make)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("announced", [True, False])
def test_scale_0_changes_nothing_and_others_move_samples_of_any_layout(shape, announced):
    x, memory = noise(shape=shape), MemoryBySize()
    plain = euler(lambda x0, *_: x0, x, announced=False)
    assert torch.equal(euler(diverse(0.0), x, announced=announced), plain)
    guided = euler(diverse(memory=memory), x, announced=announced)
    assert torch.isfinite(guided).all()
    assert not torch.equal(guided, plain)
    torch.testing.assert_close(memory.of(x).x, guided.flatten(1))  # what was sampled is remembered, once
    assert torch.equal(euler(diverse(), x, announced=announced), guided)


def test_move_is_that_of_a_guided_step():
    x, sigma = noise(), 8.0
    guide = SPARKE(1.0)
    context = StepContext(CallContext(), None, SIGMAS, Layout.of(x), x.shape, 4)
    guide._run.begin(context, x)
    expected = guide._run.step(Prediction(target(x), x, 1.0, sigma, 1.0), context)
    found = diverse()(target(x), x, sigma, SIGMAS)
    torch.testing.assert_close(found - target(x), expected, rtol=1e-4, atol=1e-5)


def test_noise_levels_are_those_of_the_host():
    assert noise_levels(None, 3.0) == (1.0, 3.0)
    alpha, sigma = noise_levels(Flow(), 0.25)
    assert (alpha, sigma) == (0.75, 0.25)


def test_one_image_after_another_differs_from_those_in_the_memory():
    memory = MemoryBySize()
    guidance = diverse(memory=memory)
    plain = [euler(lambda x0, *_: x0, noise(1, seed=s), announced=False) for s in (0, 1)]
    first, second = (euler(guidance, noise(1, seed=s)) for s in (0, 1))
    assert torch.equal(first, plain[0])
    assert not torch.equal(second, plain[1])
    assert len(memory) == 2


def test_prompts_keep_images_apart():
    memory = MemoryBySize()
    guidance = diverse(memory=memory)
    prompts = {k: torch.nn.functional.one_hot(torch.tensor([k]), 4).float() for k in (0, 1)}
    plain = euler(lambda x0, *_: x0, noise(1, seed=1), announced=False)
    euler(guidance, noise(1, seed=0), prompts=lambda: (prompts[0], "tokens 4"))
    torch.testing.assert_close(euler(guidance, noise(1, seed=1), prompts=lambda: (prompts[1], "tokens 4")), plain)
    assert not torch.equal(euler(guidance, noise(1, seed=1), prompts=lambda: (prompts[0], "tokens 4")), plain)


def test_runs_that_do_not_reach_the_end_are_not_remembered():
    memory = MemoryBySize()
    guidance = diverse(memory=memory)
    euler(guidance, noise(), sigmas=[8.0, 4.0, 2.0])
    euler(guidance, noise(), sigmas=[8.0, 4.0, 2.0], announced=False)
    guidance.begin(SIGMAS)
    guidance(target(noise()), noise(), 8.0, SIGMAS)
    guidance.end()  # an error in the sampler
    assert len(memory) == 0
    euler(guidance, noise())
    assert len(memory) == 4


def test_image_to_image_without_announcement_has_its_own_interval():
    guides = []
    guidance = DenoisedGuidance(lambda x0: guides.append(SPARKE(1.0)) or guides[-1])
    x = noise() / 8
    for level in SIGMAS[2:4]:
        x = guidance(target(x), x, level, SIGMAS)
    assert guides[0].report().total_steps == 2
    assert len(guides[0].memory) == 4


def test_samplers_of_higher_order_begin_one_run():
    memory, guides = MemoryBySize(), []

    def make(x0):
        guides.append(SPARKE(1.0, memory=memory.of(x0)))
        return guides[-1]

    guidance, x, levels = DenoisedGuidance(make), noise(), torch.tensor(SIGMAS)
    guidance.begin(levels)
    for k in range(4):
        for level in (SIGMAS[k], math.sqrt(SIGMAS[k] * max(SIGMAS[k + 1], 0.5))):  # a stage between two levels
            x0 = guidance(target(x), x, level, levels)
        x = x0 + levels[k + 1] / levels[k] * (x - x0)
    guidance.end(x)
    assert len(guides) == 1
    assert [step for step, *_ in guides[0].report().moves] == sorted(step for step, *_ in guides[0].report().moves)
    assert len(memory) == 4


def test_each_size_has_its_own_memory():
    memory = MemoryBySize()
    guidance = diverse(memory=memory)
    for shape in ((4, 6, 6), (4, 8, 6), (4, 6, 6)):
        euler(guidance, noise(2, shape))
    assert {shape: len(bank) for shape, bank in memory.banks.items()} == {(4, 6, 6): 4, (4, 8, 6): 2}


def test_state_of_a_memory_changes_with_its_samples(tmp_path):
    memory = MemoryBySize()
    states = [memory.state]
    for change in (
        lambda: euler(diverse(memory=memory), noise(2)),
        lambda: memory.save(tmp_path),
        memory.clear,
        lambda: euler(diverse(memory=memory), noise(2, seed=1)),  # as many as before
        lambda: memory.load(tmp_path),
    ):
        change()
        states.append(memory.state)
    assert states[1] == states[2]  # saved only
    assert len({str(s) for s in states}) == 5


def test_memory_is_saved_and_loaded(tmp_path):
    memory = MemoryBySize()
    for shape in ((4, 6, 6), (4, 3, 6, 6)):
        euler(diverse(memory=memory), noise(2, shape))
    memory.save(tmp_path / "m")
    loaded = MemoryBySize()
    loaded.load(tmp_path / "m")
    assert {s: len(b) for s, b in loaded.banks.items()} == {(4, 6, 6): 2, (4, 3, 6, 6): 2}
    assert torch.equal(loaded.of(noise()).x, memory.of(noise()).x)
    memory.clear()
    euler(diverse(memory=memory), noise(3))
    memory.save(tmp_path / "m")
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["4x6x6.safetensors"]
    with pytest.raises(FileNotFoundError, match="no memory in"):
        loaded.load(tmp_path / "other")
    (tmp_path / "m" / "4x6x6.safetensors").write_bytes(b"damaged")
    with pytest.raises(MemoryFileError):
        loaded.load(tmp_path / "m")
    assert len(loaded) == 4


def test_half_precision_stays_half_precision():
    x = noise().half()
    guided = diverse(4.0)(target(x), x, 8.0, SIGMAS)
    assert guided.dtype == torch.float16
    assert not torch.equal(guided, target(x))


def test_inference_mode():
    with torch.inference_mode():
        first = euler(diverse(), noise())
    assert torch.equal(first, euler(diverse(), noise()))


def test_guide_that_moves_noisy_samples_is_refused():
    guidance = DenoisedGuidance(lambda x0: SPARKE(1.0, space="latents"))
    with pytest.raises(ValueError, match="space='x0' or 'pooled'"):
        guidance(target(noise()), noise(), 8.0, SIGMAS)


def test_any_guide_serves():
    guidance = DenoisedGuidance(lambda x0: VendiGuidance(1.0, space="pooled", memory=MemoryBank()))
    assert torch.isfinite(euler(guidance, noise())).all()


def test_prompt_features_of_a_conditioning():
    tokens, pooled = torch.randn(1, 5, 8), torch.randn(1, 6)
    features, name = prompts_of_conditioning([[tokens, {"pooled_output": pooled}]])
    assert name == "conditioning, pooled 6"
    torch.testing.assert_close(features, pooled / pooled.norm())
    features, name = prompts_of_conditioning([{"cross_attn": tokens, "pooled_output": None}])
    assert name == "conditioning, tokens 8"
    torch.testing.assert_close(features, torch.nn.functional.normalize(tokens.mean(1), dim=1))
    mask = torch.tensor([[1, 1, 0, 0, 0]])
    features, _ = prompts_of_conditioning([[tokens, {"attention_mask": mask}]])
    torch.testing.assert_close(features, torch.nn.functional.normalize(tokens[:, :2].mean(1), dim=1))
    assert prompts_of_conditioning(None) == (None, None)
    assert prompts_of_conditioning([[tokens, {}], [None, {"pooled_output": pooled}]]) == (None, None)
    zero = torch.zeros(1, 6)  # of models without a pooled embedding
    assert prompts_of_conditioning([[tokens, {"pooled_output": zero}]])[1] == "conditioning, tokens 8"
