import copy
import json
import warnings

import diffusers
import numpy as np
import pytest
import torch
from packaging.version import Version

from kspec_guidance import SPARKE, KernelGuidance, MemoryBank, MMDGuidance
from kspec_guidance.kernels import Kernel
from tests import tiny
from tests.tiny.pipeline_checks import as_array, modular_output

if Version(diffusers.__version__) < Version("0.42"):
    pytest.skip("requires the guiders of diffusers 0.42", allow_module_level=True)

from diffusers import ClassifierFreeGuidance, guiders
from diffusers.guiders import BaseGuidance

from kspec_guidance import KernelGuider

MODULAR = [
    "StableDiffusionXLModularPipeline",
    "StableDiffusion3ModularPipeline",
    "Flux2KleinBaseModularPipeline",
    "QwenImageModularPipeline",
    "QwenImage21ModularPipeline",
    "ZImageModularPipeline",
    "WanModularPipeline",
    "Wan22ModularPipeline",
    "LTXModularPipeline",
    "LTX2ModularPipeline",
    "ErnieImageModularPipeline",
    "AnimaModularPipeline",
    "Krea2ModularPipeline",
    "Flux3ModularPipeline",
    "HeliosModularPipeline",
]
QUICK = {"StableDiffusion3ModularPipeline", "QwenImageModularPipeline", "ZImageModularPipeline"}
CLASSIC = [
    "HunyuanImagePipeline",
    "HunyuanVideo15Pipeline",
    "HunyuanVideo15ImageToVideoPipeline",
    "MotifVideoPipeline",
]
BLOCK = {"indices": [0], "fqn": "transformer_blocks", "skip_attention": False, "skip_ff": True}
HOSTS = {"MagnitudeAwareGuidance": "QwenImageModularPipeline", "PerturbedAttentionGuidance": "HunyuanImagePipeline"}
INNER = {
    "ClassifierFreeGuidance": {"guidance_scale": 3.0},
    "AdaptiveProjectedGuidance": {"adaptive_projected_guidance_momentum": -0.5},
    "AdaptiveProjectedMixGuidance": {},
    "ClassifierFreeZeroStarGuidance": {},
    "MagnitudeAwareGuidance": {},
    "TangentialClassifierFreeGuidance": {},
    "LTX2Guidance": {"guidance_scale": 3.0},
    "AutoGuidance": {"auto_guidance_config": {**BLOCK, "dropout": 0.5}},
    "SkipLayerGuidance": {"skip_layer_config": BLOCK, "skip_layer_guidance_stop": 0.9},
    "PerturbedAttentionGuidance": {"perturbed_guidance_layers": [0], "perturbed_guidance_stop": 0.9},
    "SmoothedEnergyGuidance": {"seg_guidance_layers": [0], "seg_guidance_stop": 0.9},
}


def build(name):
    return (tiny.build_modular if name in tiny.MODULAR else tiny.build)(name)


def generate(pipe, **kwargs):
    if not isinstance(pipe, diffusers.ModularPipeline):
        return as_array(pipe(**tiny.call_kwargs(pipe, **kwargs)))
    return modular_output(pipe(**tiny.modular_call_kwargs(pipe, **kwargs)))


def set_guiders(pipe, **parts):
    (pipe.update_components if isinstance(pipe, diffusers.ModularPipeline) else pipe.register_modules)(**parts)


def guiders_of(pipe):
    return {k: v for k, v in pipe.components.items() if isinstance(v, BaseGuidance) and not k.startswith("audio")}


@pytest.fixture(scope="module")
def qwen():
    return tiny.build_modular("QwenImageModularPipeline")


@pytest.fixture(scope="module")
def sd3():
    return tiny.build_modular("StableDiffusion3ModularPipeline")


@pytest.fixture
def pipe(qwen):
    qwen.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
    return qwen


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in [*MODULAR, *CLASSIC]]
)
def test_guider_makes_the_images_of_attach(name):
    pipe = build(name)
    inner = guiders_of(pipe)
    plain = generate(pipe)
    attached, guide, idle = SPARKE(1.0, stop=1.0), SPARKE(1.0, stop=1.0), SPARKE(0.0)
    with attached.attach(pipe):
        expected = [generate(pipe) for _ in range(2)]  # the second call is also guided by the memory
    set_guiders(pipe, **{k: KernelGuider(v, guide) for k, v in inner.items()})
    found = [generate(pipe) for _ in range(2)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
    assert not np.array_equal(found[1], plain)
    torch.testing.assert_close(guide.memory.x, attached.memory.x)
    if attached.memory.prompts is not None:
        torch.testing.assert_close(guide.memory.prompts, attached.memory.prompts)
        assert guide.memory.prompt_encoder == attached.memory.prompt_encoder
    set_guiders(pipe, **{k: KernelGuider(v, idle) for k, v in inner.items()})
    assert np.array_equal(generate(pipe), plain)
    assert len(idle.memory) == len(guide.memory) // 2
    assert "step" not in vars(pipe.scheduler)


def test_less_classifier_free_guidance_is_that_of_an_inner_guider_with_a_lower_scale(pipe):
    for weight, share in ((3.0, 0.5), (2.0, None)):
        guide = SPARKE(0.5, cfg_share=share)
        pipe.update_components(guider=KernelGuider(ClassifierFreeGuidance(guidance_scale=weight), guide))
        found = generate(pipe)
        if share is not None:
            expected = found
            assert guide.report().eased_cfg == pytest.approx((3.0, 2.0), rel=1e-2)
            assert [step for step, *_ in guide.report().eased] == list(range(guide.report().total_steps))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


def test_every_guider_is_parametrised():
    known = {n for n in dir(guiders) if n.endswith("Guidance") and n != "BaseGuidance"}
    assert known == {*INNER, "FrequencyDecoupledGuidance"}  # that one needs kornia


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in HOSTS else n for n in INNER])
def test_inner_guider_is_unchanged_at_scale_0_and_equals_attach(name, sd3):
    pipe = build(HOSTS[name]) if name in HOSTS else sd3  # not every guider of diffusers works with every pipeline

    def inner():
        return getattr(guiders, name)(**INNER[name])

    set_guiders(pipe, guider=inner())
    plain = generate(pipe)
    with SPARKE(1.0).attach(pipe):
        expected = generate(pipe)
    set_guiders(pipe, guider=KernelGuider(inner(), SPARKE(0.0)))
    assert np.array_equal(generate(pipe), plain)
    set_guiders(pipe, guider=KernelGuider(inner(), SPARKE(1.0)))
    np.testing.assert_allclose(generate(pipe), expected, atol=1e-5)
    assert not np.array_equal(expected, plain)


@pytest.mark.parametrize("name", INNER)
def test_settings_of_every_guider_survive_saving(tmp_path, name):
    guider = KernelGuider(inner=getattr(guiders, name)(**INNER[name]), guide=SPARKE(0.42, every=3))
    guider.save_pretrained(tmp_path)
    loaded = KernelGuider.from_pretrained(tmp_path)
    assert type(loaded.inner) is type(guider.inner)
    saved = {k: v for k, v in json.loads(guider.inner.to_json_string()).items() if v is not None}
    assert saved.items() <= json.loads(loaded.inner.to_json_string()).items()
    assert (loaded.guide.terms[0].scale, loaded.guide.terms[0].every) == (0.42, 3)


@pytest.mark.parametrize("name", ["QwenImageModularPipeline", "StableDiffusion3ModularPipeline"])
def test_modular_pipeline_saves_its_guider(tmp_path, name):
    pipe = build(name)
    pipe.update_components(guider=KernelGuider(ClassifierFreeGuidance(guidance_scale=2.5), SPARKE(0.42)))
    pipe._component_specs = {k: v for k, v in pipe._component_specs.items() if k == "guider"}  # without the networks
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    loaded = diffusers.ModularPipeline.from_pretrained(str(tmp_path))
    loaded.load_components(names="guider")
    assert isinstance(loaded.guider, KernelGuider)
    assert (loaded.guider.inner.guidance_scale, loaded.guider.guide.terms[0].scale) == (2.5, 0.42)


def test_classic_pipeline_saves_its_guider(tmp_path):
    pipe = build("HunyuanVideo15Pipeline")
    pipe.register_modules(guider=KernelGuider(ClassifierFreeGuidance(guidance_scale=2.5), SPARKE(0.42)))
    pipe.save_pretrained(str(tmp_path))
    loaded = diffusers.HunyuanVideo15Pipeline.from_pretrained(
        str(tmp_path), **{k: v for k, v in pipe.components.items() if k != "guider"}
    )
    assert isinstance(loaded.guider, KernelGuider)
    assert (loaded.guider.inner.guidance_scale, loaded.guider.guide.terms[0].scale) == (2.5, 0.42)


def test_references_are_saved_beside_the_configuration(tmp_path):
    reference = torch.randn(4, 3, 2, 2)
    guider = KernelGuider(guide=MMDGuidance(reference, scale=0.3))
    guider.save_pretrained(tmp_path)
    assert "tensor0" in (tmp_path / "guider_config.json").read_text()
    assert len((tmp_path / "guider_config.json").read_text()) < 4000
    loaded = KernelGuider.from_pretrained(tmp_path)
    found = loaded.guide.to_config()[1]
    assert all(torch.equal(found[k], v) for k, v in guider.guide.to_config()[1].items())
    assert guider.new().guide.to_config()[0] == guider.guide.to_config()[0]
    with pytest.raises(ValueError, match="from_pretrained"):
        KernelGuider.from_config(guider.config)
    (tmp_path / "kspec_guidance.safetensors").unlink()
    with pytest.raises(ValueError, match="tensor0"):
        KernelGuider.from_pretrained(tmp_path)
    KernelGuider(guide=SPARKE()).save_pretrained(tmp_path)
    assert isinstance(KernelGuider.from_pretrained(tmp_path).guide, SPARKE)


def test_memory_and_later_changes_in_saved_settings(tmp_path):
    guider = KernelGuider(ClassifierFreeGuidance(guidance_scale=2.0), SPARKE(memory=MemoryBank()))
    guider.guide.memory.add(torch.randn(2, 3))
    guider.guide.terms[0].scale = 0.7
    guider.save_pretrained(tmp_path)
    loaded = KernelGuider.from_pretrained(tmp_path)
    assert len(loaded.guide.memory) == 0
    assert loaded.guide.terms[0].scale == 0.7
    assert KernelGuider.from_config(guider.config).guide.terms[0].scale == 0.7
    copied = guider.new(inner=ClassifierFreeGuidance(guidance_scale=5.0))
    assert (copied.guidance_scale, copied.guide.terms[0].scale) == (5.0, 0.7)
    assert copied.guide is not guider.guide


def test_guide_that_cannot_be_saved_can_be_used(tmp_path):
    class Own(Kernel):
        pass

    guide = SPARKE()
    guide.terms[0].objective.kernel = Own()
    guider = KernelGuider(guide=guide)
    with pytest.raises(TypeError, match="Own"):
        guider.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no settings that can be loaded"):
        KernelGuider.from_config(guider.config)


def test_attributes_are_those_of_the_inner_guider(pipe):
    inner = ClassifierFreeGuidance(guidance_scale=3.0)
    guider = KernelGuider(inner, SPARKE())
    guider.guidance_scale = 7.0
    assert inner.guidance_scale == 7.0
    guider.disable()
    assert (guider._enabled, inner._enabled, guider.num_conditions) == (False, False, 1)
    guider.enable()
    guider.set_state(1, 4, torch.tensor(5.0))
    assert (inner._step, guider.num_conditions, guider._input_predictions) == (1, 2, inner._input_predictions)
    assert not hasattr(guider, "zero_init_steps")
    assert "guide" in repr(guider)
    assert isinstance(copy.deepcopy(guider).inner, ClassifierFreeGuidance)


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="inner must be a guider"):
        KernelGuider(inner=4.0)
    with pytest.raises(TypeError, match="guide must be a guide"):
        KernelGuider(guide=0.5)
    with pytest.raises(TypeError, match="guide \\+ other"):
        KernelGuider(inner=KernelGuider())
    with pytest.raises(ValueError, match="'Own'"):
        KernelGuider(inner={"_class_name": "Own"})


def own_loop(guider, scheduler, model, x, prompts, steps=6):
    scheduler.set_timesteps(steps)
    for k, t in enumerate(scheduler.timesteps):
        guider.set_state(k, steps, t)
        batches = guider.prepare_inputs({"encoder_hidden_states": prompts})
        for batch in batches:
            guider.prepare_models(model)
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            batch.noise_pred = model(scaled, batch.encoder_hidden_states)
            guider.cleanup_models(model)
        x = scheduler.step(guider(batches)[0], t, x).prev_sample
    return x


class Denoiser(torch.nn.Module):
    def forward(self, x, states):
        return 0.7 * x + 0.1 * states.mean((1, 2)).view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        ("DDIMScheduler", {"prediction_type": "epsilon"}),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        ("HeunDiscreteScheduler", {}),
    ],
)
def test_guider_in_a_loop_of_ones_own(scheduler, settings):
    scheduler = getattr(diffusers, scheduler)(**settings)
    x, states = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(4, 3, 5)

    def loop(guider):
        return own_loop(guider, scheduler, Denoiser(), x, (states, -states))

    inner = ClassifierFreeGuidance(guidance_scale=2.0)
    plain, attached, guide = loop(inner), SPARKE(1.0), SPARKE(1.0)
    with attached.attach(scheduler):
        expected = loop(inner)
    torch.testing.assert_close(loop(KernelGuider(inner, guide, scheduler)), expected)
    assert not torch.equal(expected, plain)
    assert torch.equal(guide.memory.x, attached.memory.x)
    assert torch.equal(loop(KernelGuider(inner, SPARKE(0.0), scheduler)), plain)


def test_loop_of_ones_own_needs_its_scheduler():
    scheduler = diffusers.DDIMScheduler()
    states = torch.ones(2, 3, 5)
    with pytest.raises(RuntimeError, match="scheduler=scheduler"):
        own_loop(KernelGuider(), scheduler, Denoiser(), torch.randn(2, 2, 4, 4), (states, states))


def test_second_guider_without_the_guide_is_warned_of():
    pipe = build("Wan22ModularPipeline")
    pipe.update_components(guider=KernelGuider(pipe.guider, SPARKE(1.0)))
    with pytest.warns(UserWarning, match="steps of guider_2 are not guided"):
        generate(pipe)


def test_different_prompts_do_not_repel_through_the_guider():
    pipe = build("ZImageModularPipeline")
    pipe.update_components(guider=KernelGuider(ClassifierFreeGuidance(guidance_scale=3.0), SPARKE(1.0)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(pipe, prompt=["a red heart", "two green cats"], num_images_per_prompt=1)
    prompts = pipe.guider.guide.memory.prompts
    assert prompts is not None
    assert float(prompts[0] @ prompts[1]) < 1 - 1e-4


def test_interrupted_call_leaves_nothing_behind(pipe):
    guide = SPARKE(1.0)
    pipe.update_components(guider=KernelGuider(ClassifierFreeGuidance(guidance_scale=3.0), guide))
    first = generate(pipe)
    guide.memory.clear()
    calls = []

    def fail(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe)
    hook.remove()
    assert len(guide.memory) == 0
    assert np.array_equal(generate(pipe), first)
    other = KernelGuidance.from_config(guide.to_config()[0])
    with other.attach(pipe):
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=3.0))
        generate(pipe)
    assert len(other.memory) == len(first)


def test_attached_guide_takes_precedence(pipe):
    guide = SPARKE(1.0)
    pipe.update_components(guider=KernelGuider(ClassifierFreeGuidance(guidance_scale=3.0), guide))
    with guide.attach(pipe):
        images = generate(pipe)
    assert len(guide.memory) == len(images)  # once, not twice
