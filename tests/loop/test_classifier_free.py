"""Classifier-free guidance, found from what the denoiser returns: the combination of two predictions, and its weight."""

import inspect

import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.loop.classifier_free import _fitted
from tests.samples import rows
from tests.tiny import build, call_kwargs

WEIGHTS = (1.3, 3.0, 7.5)
# a doubled batch, two calls, a learned variance, both halves stepped together, tokens, lists with another sign, norms kept
FAMILIES = {
    "StableDiffusionPipeline": "guidance_scale",
    "StableDiffusion3Pipeline": "guidance_scale",
    "WanPipeline": "guidance_scale",
    "HunyuanDiTPipeline": "guidance_scale",
    "DiTPipeline": "guidance_scale",
    "LTXPipeline": "guidance_scale",
    "FluxPipeline": "true_cfg_scale",
    "QwenImagePipeline": "true_cfg_scale",
    "Lumina2Pipeline": "guidance_scale",
    "ZImagePipeline": "guidance_scale",
    "KandinskyV22Pipeline": "guidance_scale",
}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("cond_first", [True, False])
def test_weight_and_direction_of_a_combination_are_recovered(weight: float, sign: int, cond_first: bool) -> None:
    cond, uncond = (rows(4, 16, seed).float() for seed in (0, 1))
    guided = sign * (uncond + weight * (cond - uncond))
    found = _fitted(guided, *((cond, uncond) if cond_first else (uncond, cond)), 1e-3)
    assert bool(found.fits)
    assert float(found.weight) == pytest.approx(weight, rel=1e-4)
    torch.testing.assert_close(found.direction, sign * (cond - uncond))
    eased = found.at_weight(guided, torch.tensor(1.0))
    torch.testing.assert_close(eased, sign * cond, atol=1e-4, rtol=1e-4)


def test_equal_predictions_have_weight_1_and_stay() -> None:
    x = rows(4, 16, 0).float()
    found = _fitted(x, x, x.clone(), 1e-3)
    assert bool(found.fits)
    assert float(found.weight) == 1.0
    torch.testing.assert_close(found.at_weight(x, torch.tensor(1.0)), x)


@pytest.mark.parametrize("cond_first", [True, False])
def test_combination_that_keeps_norms_is_recovered(cond_first: bool) -> None:
    cond, uncond = (rows(4, 48, seed).float().view(4, 3, 16) for seed in (0, 1))

    def combined(weight: float) -> torch.Tensor:
        mixed = uncond + weight * (cond - uncond)
        return mixed * (cond.norm(dim=-1, keepdim=True) / mixed.norm(dim=-1, keepdim=True))

    found = _fitted(combined(4.0), *((cond, uncond) if cond_first else (uncond, cond)), 1e-3)
    assert bool(found.fits)
    assert bool(found.normed)
    assert float(found.weight) == pytest.approx(4.0, rel=1e-4)
    torch.testing.assert_close(found.at_weight(combined(4.0), torch.tensor(1.5)), combined(1.5), atol=1e-5, rtol=1e-4)


def test_other_combinations_do_not_fit() -> None:
    cond, uncond, other = (rows(4, 16, seed).float() for seed in (0, 1, 2))
    assert not bool(_fitted(uncond + 3 * (cond - uncond) + 0.05 * other, uncond, cond, 1e-3).fits)


def sample(name: str, weight: float, guide: SPARKE | None = None, steps: int = 1) -> torch.Tensor:
    pipe, scale = build(name), FAMILIES.get(name, "guidance_scale")
    pipe.set_progress_bar_config(disable=True)
    given = {scale: weight, "num_inference_steps": steps, "output_type": "latent"}
    if scale == "true_cfg_scale":
        prompt = call_kwargs(pipe).get("prompt")
        given["negative_prompt"] = ["something else"] * len(prompt) if isinstance(prompt, list) else "something else"
    accepted = inspect.signature(type(pipe).__call__).parameters
    arguments = call_kwargs(pipe, **{k: v for k, v in given.items() if k in accepted and k != "output_type"})
    final: list[torch.Tensor] = []
    step = pipe.scheduler.step

    def watched(*args: object, **kwargs: object) -> object:
        result = step(*args, **kwargs)
        final[:] = [result[0]]
        return result

    pipe.scheduler.step = watched
    if guide is None:
        pipe(**arguments)
    else:
        with guide.attach(pipe):
            pipe(**arguments)
    return final[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_eased_step_is_that_of_a_call_with_less_guidance(name: str) -> None:
    """In a run of one step nothing fades, so easing is the same call with a smaller weight."""
    shift = 1 if name == "ZImagePipeline" else 0  # its scale is what is added to 1
    guide = SPARKE(1e-9, ease_cfg=1.5)
    eased = sample(name, 4.0, guide)
    weight, least = guide.report().eased_cfg
    assert weight == pytest.approx(4.0 + shift, rel=1e-3)
    assert least == pytest.approx(1.5, rel=1e-5)
    torch.testing.assert_close(eased, sample(name, 1.5 - shift), atol=2e-4, rtol=1e-3)
