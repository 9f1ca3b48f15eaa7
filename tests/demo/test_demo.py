"""The embedded Stable Diffusion pipeline, and guidance on it through every entry point."""

import json
import threading
from pathlib import Path

import diffusers
import pytest
import torch

import kspec_guidance
from kspec_guidance import SPARKE, MemoryBank, MMDGuidance, encode_reference, guided, load_demo_reference
from kspec_guidance.loop.prompts import masked_mean, token_mask
from tests import schedulers
from tests.emoji import generators, sample_latents

ASSETS = Path(kspec_guidance.__file__).parent / "demo" / "assets"


@pytest.fixture
def set_scheduler(pipe):
    """Replace the scheduler during one test."""
    before = pipe.scheduler

    def replace(name):
        cls, settings = schedulers.SETTINGS[name]
        pipe.scheduler = getattr(diffusers, cls).from_config(before.config, **settings)

    yield replace
    pipe.scheduler = before


def test_demo_pipeline_is_small_stable_diffusion(pipe):
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert sum(f.stat().st_size for f in ASSETS.rglob("*.safetensors")) < 40e6
    assert not [f for f in ASSETS.rglob("*") if f.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}


def test_images_match_prompt(pipe):
    images = pipe(
        "heart", num_images_per_prompt=4, num_inference_steps=20, generator=generators(4), output_type="np"
    ).images
    assert images.shape == (4, 64, 64, 3)
    centre = images[:, 20:44, 20:44].mean((0, 1, 2))
    assert centre[0] > centre[1] + 0.2  # hearts are mostly red
    assert images[:, :3, :3].mean() > 0.9  # white background


def test_prompt_controls_skin_tone(pipe):
    def brightness(skin_tone):
        x = pipe(
            f"man, {skin_tone}", num_images_per_prompt=6, num_inference_steps=15, generator=generators(6), output_type="np"
        )
        return x.images[:, 24:52, 20:44].mean()

    assert brightness("dark skin tone") < brightness("light skin tone") - 0.05


def test_standard_pipeline_arguments(pipe):
    assert sample_latents(pipe, ["runner", "heart"], 2).shape == (4, 9, 8, 8)
    assert not torch.equal(sample_latents(pipe), sample_latents(pipe, negative_prompt="red"))
    steps = []
    sample_latents(pipe, steps=4, callback_on_step_end=lambda p, i, t, kw: steps.append(i) or kw)
    assert steps == [0, 1, 2, 3]


def test_reference_sets_round_trip_through_latents(pipe):
    images = load_demo_reference("twemoji")
    assert images.shape == (96, 3, 64, 64)
    assert -1 <= images.min() < images.max() <= 1
    latents = encode_reference(pipe, images)
    assert latents.shape == (96, 9, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=0.3)
    with torch.no_grad():
        decoded = pipe.vae.decode(latents).sample.clamp(-1, 1)
    psnr = -10 * ((decoded - images) / 2).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.mean() > 23
    with pytest.raises(ValueError, match=r"no reference set named '../x'; choose one of twemoji, noto"):
        load_demo_reference("../x")
    with pytest.raises(ValueError, match=r"must lie in -1..1"):
        encode_reference(pipe, images * 127)
    with pytest.raises(ValueError, match=r"shape \[m, 3, h, w\]"):
        encode_reference(pipe, images[0])


# -- guidance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedulers.SETTINGS)
def test_guidance_with_scheduler(pipe, set_scheduler, name):
    set_scheduler(name)
    kwargs = dict(vars(pipe.scheduler))
    plain = sample_latents(pipe)
    idle = SPARKE(0.0)
    with idle.attach(pipe):
        assert torch.equal(sample_latents(pipe), plain)
    assert len(idle.memory) == 3
    assert torch.equal(idle.memory.x, plain.flatten(1))
    guide = SPARKE(0.3)
    with guide.attach(pipe):
        moved = sample_latents(pipe)
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, plain)
    assert len(guide.memory) == 3
    assert torch.equal(sample_latents(pipe), plain)
    assert ("step" in vars(pipe.scheduler)) is ("step" in kwargs)
    assert "encode_prompt" not in vars(pipe)


@pytest.mark.slow
def test_sparke_increases_variety_and_keeps_outline(pipe):
    from kspec_guidance import functional as F

    rows = lambda x: torch.nn.functional.normalize(x.flatten(1))  # noqa: E731
    plain = sample_latents(pipe, "heart", 12, 12)
    guide = SPARKE()
    with guide.attach(pipe):
        varied = sample_latents(pipe, "heart", 12, 12)
    assert F.vendi_score(rows(varied)) > 1.3 * F.vendi_score(rows(plain))

    def outline(latents):  # pixels that are not white
        with torch.no_grad():
            return pipe.vae.decode(latents).sample.amin(dim=1) < 0.8

    plain_outline = outline(plain).float().mean(0) > 0.5
    outlines = outline(varied)
    overlap = (outlines & plain_outline).sum((1, 2)) / (outlines | plain_outline).sum((1, 2))
    hearts = overlap > 0.7
    assert hearts.float().mean() > 0.8  # not all: a love letter is an envelope with a heart
    assert overlap[hearts].mean() > 0.85


@pytest.mark.slow
def test_mmd_guidance_approaches_reference(pipe):
    from kspec_guidance import functional as F
    from kspec_guidance.kernels import PolynomialKernel

    reference = encode_reference(pipe, load_demo_reference("dark-skin-tone"))
    plain = sample_latents(pipe, "health worker", 12, 20)
    guide = MMDGuidance(reference)
    with guide.attach(pipe):
        moved = sample_latents(pipe, "health worker", 12, 20)
    distance = lambda x: F.mmd(x.flatten(1), reference.flatten(1), PolynomialKernel())  # noqa: E731
    assert distance(moved) < 0.9 * distance(plain)


def test_prompt_features_are_pooled_text_encoder_states(pipe):
    guide = SPARKE(0.0)
    with guide.attach(pipe):
        sample_latents(pipe, ["heart", "runner, dark skin tone"], 2, 2)
    t = guide.memory.prompts
    assert t.shape == (4, pipe.text_encoder.config.hidden_size)
    torch.testing.assert_close(t.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(t[0], t[1])
    assert t[0] @ t[2] < 0.9
    ids = pipe.tokenizer(["heart"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = pipe.text_encoder(ids)[0]
    expected = masked_mean(hidden, token_mask(ids, pipe.text_encoder.config.bos_token_id))
    torch.testing.assert_close(t[:1], expected)


def test_guide_as_callback(pipe):
    plain = sample_latents(pipe)
    guide = SPARKE(0.3)
    moved = sample_latents(pipe, callback_on_step_end=guide)
    assert not torch.equal(moved, plain)
    assert len(guide.memory) == 3
    assert guide.report().steps_guided == 3  # steps 2 to 4 of 6: callbacks first run after step 1
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(sample_latents(pipe), plain)
    idle = SPARKE(0.0)
    assert torch.equal(sample_latents(pipe, callback_on_step_end=idle), plain)
    assert len(idle.memory) == 3


def test_attached_guide_as_callback_guides_once(pipe):
    guide = SPARKE(0.3)
    with guide.attach(pipe):
        once = sample_latents(pipe)
    second_guide = SPARKE(0.3)
    with second_guide.attach(pipe):
        assert torch.equal(sample_latents(pipe, callback_on_step_end=second_guide), once)


def test_failed_run_leaves_memory_and_pipeline_unchanged(pipe):
    plain, guide = sample_latents(pipe), SPARKE(0.3)

    def stop(p, i, t, kw):
        if i == 2:
            raise RuntimeError("stop")
        return kw

    with pytest.raises(RuntimeError, match="stop"), guide.attach(pipe):
        sample_latents(pipe, callback_on_step_end=stop)
    assert len(guide.memory) == 0
    forward = pipe.unet.forward
    calls = []

    def interrupted_forward(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    pipe.unet.forward = interrupted_forward
    try:
        with pytest.raises(KeyboardInterrupt):
            sample_latents(pipe, callback_on_step_end=guide)
    finally:
        del pipe.unet.forward
    assert len(guide.memory) == 0
    assert torch.equal(sample_latents(pipe), plain)  # a hook left by the failed run is inactive
    assert "step" not in vars(pipe.scheduler)


def test_second_thread_raises_and_first_one_finishes(pipe):
    guide, errors = SPARKE(0.3), []

    def run_in_second_thread():
        try:
            sample_latents(pipe, steps=2)
        except RuntimeError as error:
            errors.append(str(error))

    def callback(p, i, t, kw):
        if i == 2:
            thread = threading.Thread(target=run_in_second_thread)
            thread.start()
            thread.join()
        return kw

    with guide.attach(pipe):
        expected = sample_latents(pipe)
    guide.memory.clear()
    with guide.attach(pipe):
        result = sample_latents(pipe, callback_on_step_end=callback)
    assert "give each thread its own pipeline" in errors[0]
    assert torch.equal(result, expected)
    assert len(guide.memory) == 3


def test_guided_subclass_accepts_guide_argument(pipe, tmp_path):
    guided_pipe = guided(diffusers.StableDiffusionPipeline)(**pipe.components, requires_safety_checker=False)
    guided_pipe.set_progress_bar_config(disable=True)
    plain = sample_latents(pipe)
    assert torch.equal(sample_latents(guided_pipe), plain)
    guide = SPARKE(0.3)
    assert not torch.equal(sample_latents(guided_pipe, kspec_guidance=guide), plain)
    assert len(guide.memory) == 3
    assert guided(diffusers.StableDiffusionPipeline) is type(guided_pipe)
    guided_pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    with pytest.raises(TypeError, match="must be a guide such as SPARKE"):
        sample_latents(guided_pipe, kspec_guidance=0.3)
    with pytest.raises(TypeError, match="takes a pipeline class"):
        guided(pipe)


def test_scheduler_replaced_after_attach_is_guided(pipe, set_scheduler):
    guide = SPARKE(0.3)
    original = pipe.scheduler
    with guide.attach(pipe):
        set_scheduler("DDIM")
        sample_latents(pipe)
    assert guide.report().steps_guided > 0
    assert "step" not in vars(pipe.scheduler)
    assert "step" not in vars(original)


def test_guidance_without_cfg_and_with_prompt_embeds(pipe):
    positive, negative = pipe.encode_prompt("heart", "cpu", 1, True)
    given = {"prompt": None, "prompt_embeds": positive, "negative_prompt_embeds": negative}
    of_text, of_embeddings = SPARKE(0.3), SPARKE(0.3)
    sample_latents(pipe, guide=of_text, guidance_scale=1.0)
    for _ in range(2):
        sample_latents(pipe, guide=of_embeddings, **given)
    assert (len(of_text.memory), len(of_embeddings.memory)) == (3, 6)
    with pytest.raises(ValueError, match="with padding"):  # features of embeddings include padding, so they differ
        sample_latents(pipe, guide=of_text, **given)


def test_memory_of_other_text_encoder_raises(pipe):
    bank = MemoryBank("x0", "CLIPTextModel-of-someone-else")
    bank.add(torch.zeros(1, 9, 8, 8), torch.ones(1, 160))
    with (
        pytest.raises(ValueError, match=r"prompts encoded by CLIPTextModel-of-someone-else.*clear\(\)"),
        SPARKE(0.3, memory=bank).attach(pipe),
    ):
        sample_latents(pipe)
    assert len(bank) == 1
    assert "step" not in vars(pipe.scheduler)


def test_unsupported_scheduler_raises_without_side_effects(pipe):
    before = pipe.scheduler
    pipe.scheduler = diffusers.DDIMInverseScheduler()
    try:
        with pytest.raises(ValueError, match="DDIMInverseScheduler cannot be guided"):
            SPARKE().attach(pipe)
        assert "step" not in vars(pipe.scheduler)
        assert "encode_prompt" not in vars(pipe)
    finally:
        pipe.scheduler = before
