"""``cfg_share=``: the samples of a lower classifier-free guidance scale, through every path, and where it is off."""

import pytest
import torch

from kspec_guidance import SPARKE, KernelGuidance, MMDGuidance, VendiGuidance
from tests.guidance.test_ease_cfg import latents
from tests.tiny import build, call_kwargs

WEIGHT, SHARES = 5.0, (0.0, 0.5)
MAKERS = {
    "SPARKE": lambda **k: SPARKE(variety=50, **k),
    "explore": lambda **k: SPARKE.preset("explore", **{"cfg_share": None} | k),
    "late": lambda **k: SPARKE(0.5, start=0.5, stop=0.8, **k),
    "eased": lambda **k: SPARKE(0.5, ease_cfg=1.2, **k),
    "noisy": lambda **k: SPARKE(0.2, space="latents", **k),
    "guarded": lambda **k: SPARKE(0.5, transforms=("tangent", "off_score", "keep_prompt", "bound", "fade"), **k),
}


def lower(share, weight=WEIGHT):
    return 1 + share * (weight - 1)


def assert_same(found, wanted):
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", MAKERS)
def test_samples_are_those_of_the_pipeline_at_the_lower_scale(pipe, name, share):
    """Also with easing, which then starts from the lower scale."""
    guide, make = MAKERS[name](cfg_share=share), MAKERS[name]
    weight = lower(share) if share else 1 + 1e-6  # at 1 the pipeline would make no second prediction
    found = latents(pipe, guide, steps=4)
    assert_same(found, latents(pipe, make(), steps=4, weight=weight))
    assert not torch.allclose(found, latents(pipe, make(), steps=4), atol=2e-2)
    assert [step for step, *_ in guide.report().eased] == [0, 1, 2, 3]
    own = torch.stack([own for _, own, _ in guide.report().eased])
    torch.testing.assert_close(own, torch.full((4,), WEIGHT), rtol=1e-3, atol=0)


def test_memory_over_calls_is_that_of_the_lower_scale(pipe):
    shared, other = SPARKE.preset("explore"), SPARKE.preset("vivid")
    for _ in range(2):
        found, wanted = latents(pipe, shared), latents(pipe, other, weight=lower(0.5))
    assert_same(found, wanted)
    assert_same(shared.memory.x, other.memory.x)


FAMILIES = {  # the name of its scale; the last keeps a norm
    "StableDiffusionPipeline": "guidance_scale",
    "StableDiffusion3Pipeline": "guidance_scale",
    "QwenImagePipeline": "true_cfg_scale",
}


def final(name, weight, guide=None, **settings):
    """The sample after the last step."""
    made, scale = build(name), FAMILIES[name]
    kwargs = {scale: weight, "num_inference_steps": 3} | settings
    if scale == "true_cfg_scale":
        kwargs["negative_prompt"] = ["something else"] * len(call_kwargs(made)["prompt"])
    kept = []

    def keep(_, step, timestep, values):
        kept[:] = [values["latents"]]
        return values

    kwargs = call_kwargs(made, **kwargs, callback_on_step_end=keep)
    if guide is None:
        made(**kwargs)
    else:
        with guide.attach(made):
            made(**kwargs)
    return kept[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_unet_transformer_and_kept_norms_alike(name):
    found = final(name, 4.0, SPARKE(0.5, cfg_share=0.5))
    assert_same(found, final(name, 2.5, SPARKE(0.5)))
    assert not torch.allclose(found, final(name, 4.0, SPARKE(0.5)), atol=2e-2)


def test_other_combinations_are_refused():
    message = "cfg_share= cannot be used with this call of StableDiffusionPipeline; leave it out: it does not combine"
    with pytest.raises(ValueError, match=message):
        final("StableDiffusionPipeline", 4.0, SPARKE(0.5, cfg_share=0.5), guidance_rescale=0.7)
    made = build("StableDiffusionInstructPix2PixPipeline")
    guide = SPARKE(0.5, cfg_share=0.5)
    with pytest.raises(ValueError, match=r"cfg_share= cannot.*two for each are needed"), guide.attach(made):
        made(**call_kwargs(made))
    assert len(guide.memory) == 0


@pytest.mark.parametrize("guide", [SPARKE(0.5, cfg_share=1.0), SPARKE(0.0, cfg_share=0.5) + SPARKE(0.5)], ids=str)
def test_whole_share_and_scale_0_change_nothing(pipe, guide):
    assert torch.equal(latents(pipe, guide), latents(pipe, SPARKE(0.5)))
    assert guide.report().eased_cfg is None
    assert torch.equal(latents(pipe, SPARKE(0.0, cfg_share=0.5)), latents(pipe))
    assert not pipe.unet._forward_hooks


def test_without_classifier_free_guidance_nothing_changes(pipe):
    guide = SPARKE.preset("explore")
    assert torch.equal(latents(pipe, guide, weight=1.0), latents(pipe, SPARKE.preset("vivid"), weight=1.0))
    assert guide.report().eased_cfg is None
    assert "no classifier-free guidance, so cfg_share= changed nothing" in str(guide.report())


def test_report_says_what_it_did(pipe):
    guide = SPARKE(0.5, cfg_share=0.5)
    latents(pipe, guide)
    assert "Classifier-free guidance of 5 was lowered to 3 for the whole call." in str(guide.report())
    assert guide.report().to_dict()["eased_cfg"] == pytest.approx((5.0, 3.0), rel=1e-3)
    guide = SPARKE(0.5, cfg_share=0.5, ease_cfg=2.0)
    latents(pipe, guide)
    assert "of 5 was eased to 2 and returned to 3 as the moves faded" in str(guide.report())
    guide = SPARKE(0.5, cfg_share=0.5, ease_cfg=4.0)  # the share alone leaves less
    latents(pipe, guide)
    assert "of 5 was lowered to 3 for the whole call" in str(guide.report())
    guide = SPARKE(0.5, cfg_share=0.5, start=0.9, stop=0.95)  # no step is guided
    latents(pipe, guide)
    assert "Nothing was guided" in str(guide.report())
    assert "of 5 was lowered to 3 for the whole call" in str(guide.report())


def test_combined_guides_take_the_least_share(pipe):
    def make(first, second):
        return SPARKE(0.2, cfg_share=first) + VendiGuidance(0.2, cfg_share=second)

    assert_same(latents(pipe, make(0.75, 0.25)), latents(pipe, make(None, None), weight=lower(0.25)))
    assert_same(latents(pipe, make(None, 0.25)), latents(pipe, make(0.25, 0.25)))


def test_mmd_guidance_has_it_and_comparison_leaves_the_plain_run_alone(pipe):
    plain = latents(pipe)
    guide = MMDGuidance(torch.randn(8, *plain.shape[1:], generator=torch.Generator().manual_seed(0)), cfg_share=0.5)
    call = {"num_images_per_prompt": 2, "num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
    call["generator"] = [torch.Generator().manual_seed(k) for k in range(4)]
    found = guide.compare(pipe, ["heart", "person"], **call)
    assert torch.equal(found.plain, plain)
    assert found.report.eased_cfg == pytest.approx((5.0, 3.0), rel=1e-3)


def test_callback_has_it_from_the_second_step_on(pipe):
    guide = SPARKE(0.5, cfg_share=0.5)
    latents(pipe, callback_on_step_end=guide)
    assert [step for step, *_ in guide.report().eased] == [1, 2]


def test_bare_scheduler_is_refused(pipe):
    guide = SPARKE(0.5, cfg_share=0.5)
    with pytest.raises(ValueError, match=r"cfg_share= cannot.*denoiser cannot be seen here"), guide.attach(pipe.scheduler):
        latents(pipe)


def test_settings_keep_it(tmp_path):
    guide = SPARKE.preset("explore")
    guide.save_config(tmp_path)
    loaded = KernelGuidance.from_config(tmp_path)
    assert loaded.terms[0].cfg_share == 0.5
    assert repr(loaded) == repr(guide)
    assert "cfg_share=0.5" in repr(guide)
    assert "cfg_share" not in SPARKE().to_config()[0]["terms"][0]


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.5", True])
def test_impossible_shares_are_refused(value):
    with pytest.raises(ValueError, match="cfg_share must be the share"):
        SPARKE(cfg_share=value)
