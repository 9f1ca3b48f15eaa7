"""``ease_cfg=`` and the transform ``keep_prompt``: what they change, where they are off, and what they refuse."""

import pytest
import torch

from kspec_guidance import SPARKE, KernelGuidance, MMDGuidance, VendiGuidance, load_demo_pipeline
from kspec_guidance.guidance.transforms import TransformState, keep_prompt
from tests.samples import rows
from tests.tiny import build, call_kwargs

GUARDED = ("tangent", "off_score", "keep_prompt", "bound", "fade")
PROMPT = ["heart", "person"]


@pytest.fixture(scope="module")
def pipe():
    found = load_demo_pipeline()
    found.set_progress_bar_config(disable=True)
    return found


def latents(pipe, guide=None, steps=3, weight=5.0, **call):
    arguments = {
        "num_images_per_prompt": 2,
        "num_inference_steps": steps,
        "guidance_scale": weight,
        "output_type": "latent",
    }
    arguments |= {"generator": [torch.Generator().manual_seed(k) for k in range(4)]} | call
    if guide is None:
        return pipe(PROMPT, **arguments).images
    guide.calibration = 1.0
    with guide.attach(pipe):
        return pipe(PROMPT, **arguments).images


def test_weight_returns_to_the_pipelines_as_moves_fade(pipe):
    guide = SPARKE(scale=0.5, stop=1.0, ease_cfg=2.0)
    latents(pipe, guide, steps=4)
    own, eased = (torch.stack(column) for column in list(zip(*guide.report().eased, strict=True))[1:])
    torch.testing.assert_close(own, torch.full((4,), 5.0), rtol=1e-3, atol=0)
    fade = torch.cos(torch.arange(4) / 4 * torch.pi / 2) ** 2
    torch.testing.assert_close(eased, 5.0 - 3.0 * fade, rtol=1e-3, atol=1e-3)
    assert "eased to 2" in str(guide.report())
    assert guide.report().to_dict()["eased_cfg"] == pytest.approx((5.0, 2.0), rel=1e-3)


def test_steps_after_the_guided_interval_keep_their_weight(pipe):
    guide = SPARKE(scale=0.5, stop=0.5, ease_cfg=1.0)
    latents(pipe, guide, steps=4)
    assert [step for step, *_ in guide.report().eased] == [0, 1]


@pytest.mark.parametrize("make", [SPARKE, VendiGuidance])
def test_without_classifier_free_guidance_nothing_changes(pipe, make):
    plain = latents(pipe, make(scale=0.5), weight=1.0)
    guide = make(scale=0.5, ease_cfg=1.0, transforms=GUARDED)
    assert torch.equal(latents(pipe, guide, weight=1.0), plain)
    assert guide.report().eased_cfg is None
    assert "changed nothing" in str(guide.report())


def test_weight_of_the_pipeline_or_above_changes_nothing(pipe):
    plain = latents(pipe, SPARKE(scale=0.5))
    torch.testing.assert_close(latents(pipe, SPARKE(scale=0.5, ease_cfg=7.5)), plain, atol=1e-4, rtol=1e-4)


def test_strength_0_is_plain_sampling_and_removal_restores(pipe):
    plain = latents(pipe)
    assert torch.equal(latents(pipe, SPARKE(variety=0, ease_cfg=1.0)), plain)
    assert not torch.equal(latents(pipe, SPARKE(variety=50, ease_cfg=1.0)), plain)
    assert torch.equal(latents(pipe), plain)
    assert not pipe.unet._forward_hooks
    assert not pipe.unet._forward_pre_hooks


def test_mmd_guidance_eases_too(pipe):
    guide = MMDGuidance(torch.randn(8, *latents(pipe).shape[1:]), ease_cfg=1.5)
    latents(pipe, guide)
    assert guide.report().eased_cfg == pytest.approx((5.0, 1.5), rel=1e-3)


def test_callback_eases_from_the_second_step_on(pipe):
    guide = SPARKE(scale=0.5, stop=1.0, ease_cfg=1.0)
    latents(pipe, callback_on_step_end=guide)
    assert [step for step, *_ in guide.report().eased] == [1, 2]


def test_combined_guides_take_the_least_weight(pipe):
    guide = SPARKE(scale=0.2, ease_cfg=3.0) + VendiGuidance(scale=0.2, ease_cfg=2.0)
    latents(pipe, guide)
    assert guide.report().eased_cfg == pytest.approx((5.0, 2.0), rel=1e-3)


def test_comparison_leaves_the_plain_run_alone(pipe):
    plain = latents(pipe)
    call = {"num_images_per_prompt": 2, "num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
    call["generator"] = [torch.Generator().manual_seed(k) for k in range(4)]
    found = SPARKE(variety=50, ease_cfg=1.0).compare(pipe, PROMPT, **call)
    assert torch.equal(found.plain, plain)
    assert not torch.equal(found.guided, plain)


def test_half_precision_is_recognised(pipe):
    half = load_demo_pipeline().to(torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    guide = SPARKE(scale=0.5, ease_cfg=1.0)
    assert torch.isfinite(latents(half, guide)).all()
    assert guide.report().eased_cfg == pytest.approx((5.0, 1.0), rel=0.02, abs=0.05)


def test_settings_keep_it(tmp_path):
    guide = SPARKE(variety=50, ease_cfg=1.5, transforms=GUARDED)
    guide.save_config(tmp_path)
    loaded = KernelGuidance.from_config(tmp_path)
    assert loaded.terms[0].ease_cfg == 1.5
    assert loaded.terms[0].transforms == GUARDED
    assert "ease_cfg=1.5" in repr(loaded)
    assert "ease_cfg" not in SPARKE().to_config()[0]["terms"][0]


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "1", True])
def test_impossible_weights_are_refused(value):
    with pytest.raises(ValueError, match="ease_cfg must be a weight"):
        SPARKE(ease_cfg=value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("StableDiffusionInstructPix2PixPipeline", "two for each are needed"),
        ("StableVideoDiffusionPipeline", "does not combine its predictions"),
    ],
)
def test_other_combinations_are_refused(name, reason):
    made = build(name)
    guide = SPARKE(scale=0.5, ease_cfg=1.0)
    with (
        pytest.raises(ValueError, match=f"ease_cfg= cannot be used with this call of {name}.*{reason}"),
        guide.attach(made),
    ):
        made(**call_kwargs(made))
    assert len(guide.memory) == 0


def test_bare_scheduler_is_refused(pipe):
    guide = SPARKE(scale=0.5, ease_cfg=1.0)
    with pytest.raises(ValueError, match="denoiser cannot be seen here"), guide.attach(pipe.scheduler):
        latents(pipe)


def test_keep_prompt_removes_what_goes_against_the_prompt_only():
    move, prompt = rows(4, 16, 0), rows(4, 16, 1)
    state = TransformState(move, None, 0.0, (0.0, 1.0), 1.0, prompt=prompt)
    kept = keep_prompt(move, state)
    before, after = (move * prompt).sum(1), (kept * prompt).sum(1)
    assert (before < 0).any()
    assert (before > 0).any()
    torch.testing.assert_close(after, before.clamp_min(0))
    torch.testing.assert_close(kept[before > 0], move[before > 0])


def test_calls_of_the_denoiser_by_others_are_not_counted(pipe):
    wanted = latents(pipe, SPARKE(scale=0.5, ease_cfg=1.0))
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    guide = SPARKE(scale=0.5, ease_cfg=1.0)
    guide.calibration = 1.0
    with guide.attach(pipe):
        with pytest.warns(UserWarning, match="shares its scheduler"):
            latents(other)  # same scheduler, same network
        apart = type(pipe)(**pipe.components | {"scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)})
        apart.set_progress_bar_config(disable=True)

        def preview(_, step, timestep, kwargs):
            latents(apart, steps=2)
            return kwargs

        torch.testing.assert_close(latents(pipe, callback_on_step_end=preview), wanted)
        guide.memory.clear()
        with pytest.raises(RuntimeError, match="stop"):
            latents(pipe, callback_on_step_end=stopped)
        found = pipe(
            PROMPT, num_images_per_prompt=2, num_inference_steps=3, guidance_scale=5.0, output_type="latent",
            generator=[torch.Generator().manual_seed(k) for k in range(4)],
        ).images  # fmt: skip
    torch.testing.assert_close(found, wanted)


def stopped(*args):
    raise RuntimeError("stop")


def test_perturbed_attention_alone_is_not_classifier_free_guidance():
    made = build("StableDiffusionPAGPipeline")
    call = {"guidance_scale": 1.0, "pag_scale": 3.0}
    guide = SPARKE(scale=0.5, ease_cfg=1.0)
    with guide.attach(made):
        made(**call_kwargs(made, **call))
    assert guide.report().eased_cfg is None
    with pytest.raises(ValueError, match="two for each are needed"), guide.attach(made):
        made(**call_kwargs(made, **call | {"guidance_scale": 4.0}))
