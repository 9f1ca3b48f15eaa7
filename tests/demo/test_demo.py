"""The embedded pipeline is a real Stable Diffusion pipeline, and guidance works on it in every way in."""

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
from tests.emoji import draw, generators

ASSETS = Path(kspec_guidance.__file__).parent / "demo" / "assets"


@pytest.fixture
def swap(pipe):
    """Change the scheduler for one test."""
    before = pipe.scheduler

    def to(name):
        cls, settings = schedulers.SETTINGS[name]
        pipe.scheduler = getattr(diffusers, cls).from_config(before.config, **settings)

    yield to
    pipe.scheduler = before


def test_it_is_stable_diffusion_and_small(pipe):
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert sum(f.stat().st_size for f in ASSETS.rglob("*.safetensors")) < 40e6
    assert not [f for f in ASSETS.rglob("*") if f.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.float32}


def test_images_are_images_and_what_was_asked_for(pipe):
    images = pipe(
        "heart", num_images_per_prompt=4, num_inference_steps=20, generator=generators(4), output_type="np"
    ).images
    assert images.shape == (4, 64, 64, 3)
    centre = images[:, 20:44, 20:44].mean((0, 1, 2))
    assert centre[0] > centre[1] + 0.2  # hearts are mostly red
    assert images[:, :3, :3].mean() > 0.9  # on white


def test_style_and_tone_can_be_asked_for(pipe):
    def brightness(tone):
        x = pipe(f"man, {tone}", num_images_per_prompt=6, num_inference_steps=15, generator=generators(6), output_type="np")
        return x.images[:, 24:52, 20:44].mean()

    assert brightness("dark skin tone") < brightness("light skin tone") - 0.05


def test_classifier_free_guidance_costs_variety(pipe):
    spread = lambda cfg: draw(pipe, "heart", 12, 15, guidance_scale=cfg).std(dim=0).mean()  # noqa: E731
    assert spread(7.0) < spread(1.5)


def test_the_usual_arguments_work(pipe):
    assert draw(pipe, ["runner", "heart"], 2).shape == (4, 9, 8, 8)
    assert not torch.equal(draw(pipe), draw(pipe, negative_prompt="red"))
    seen = []
    draw(pipe, steps=4, callback_on_step_end=lambda p, i, t, kw: seen.append(i) or kw)
    assert seen == [0, 1, 2, 3]


def test_references_are_art_and_latents_decode_to_it(pipe):
    images = load_demo_reference("twemoji")
    assert images.shape == (96, 3, 64, 64)
    assert -1 <= images.min() < images.max() <= 1
    latents = encode_reference(pipe, images)
    assert latents.shape == (96, 9, 8, 8)
    assert latents.std().item() == pytest.approx(1, abs=0.3)
    with torch.no_grad():
        again = pipe.vae.decode(latents).sample.clamp(-1, 1)
    psnr = -10 * ((again - images) / 2).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.mean() > 23
    with pytest.raises(ValueError, match=r"no reference set named '../x'; there are twemoji, noto"):
        load_demo_reference("../x")
    with pytest.raises(ValueError, match=r"must lie in -1..1"):
        encode_reference(pipe, images * 127)
    with pytest.raises(ValueError, match=r"shape \[m, 3, h, w\]"):
        encode_reference(pipe, images[0])


# -- guidance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedulers.SETTINGS)
def test_every_scheduler_on_the_pipeline(pipe, swap, name):
    swap(name)
    kwargs = dict(vars(pipe.scheduler))
    plain = draw(pipe)
    idle = SPARKE(0.0)
    with idle.attach(pipe):
        assert torch.equal(draw(pipe), plain)
    assert len(idle.memory) == 3
    assert torch.equal(idle.memory.x, plain.flatten(1))
    guide = SPARKE(0.3)
    with guide.attach(pipe):
        moved = draw(pipe)
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, plain)
    assert len(guide.memory) == 3
    assert torch.equal(draw(pipe), plain)
    assert ("step" in vars(pipe.scheduler)) is ("step" in kwargs)
    assert "encode_prompt" not in vars(pipe)


@pytest.mark.slow
def test_sparke_varies_the_hearts_and_keeps_them_hearts(pipe):
    from kspec_guidance import functional as F

    rows = lambda x: torch.nn.functional.normalize(x.flatten(1))  # noqa: E731
    plain = draw(pipe, "heart", 12, 20)
    guide = SPARKE()
    with guide.attach(pipe):
        varied = draw(pipe, "heart", 12, 20)
    assert F.vendi_score(rows(varied)) > 1.3 * F.vendi_score(rows(plain))

    def outline(latents):  # what is not white
        with torch.no_grad():
            return pipe.vae.decode(latents).sample.amin(dim=1) < 0.8

    usual = outline(plain).float().mean(0) > 0.5
    shapes = outline(varied)
    overlap = (shapes & usual).sum((1, 2)) / (shapes | usual).sum((1, 2))
    assert (overlap > 0.7).float().mean() > 0.9  # not all: a white heart's outline hardly shows on white
    assert overlap.mean() > 0.85


@pytest.mark.slow
def test_mmd_guidance_moves_toward_the_reference(pipe):
    from kspec_guidance import functional as F
    from kspec_guidance.kernels import PolynomialKernel

    reference = encode_reference(pipe, load_demo_reference("dark-skin-tone"))
    plain = draw(pipe, "health worker", 12, 20)
    guide = MMDGuidance(reference)
    with guide.attach(pipe):
        moved = draw(pipe, "health worker", 12, 20)
    distance = lambda x: F.mmd(x.flatten(1), reference.flatten(1), PolynomialKernel())  # noqa: E731
    assert distance(moved) < 0.9 * distance(plain)


def test_prompts_keep_to_themselves_and_features_are_the_pipelines_own(pipe):
    guide = SPARKE(0.0)
    with guide.attach(pipe):
        draw(pipe, ["heart", "runner, dark skin tone"], 2, 2)
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


def test_the_callback_way_in(pipe):
    plain = draw(pipe)
    guide = SPARKE(0.3)
    moved = draw(pipe, callback_on_step_end=guide)
    assert not torch.equal(moved, plain)
    assert len(guide.memory) == 3
    assert guide.report().steps_guided == 3  # steps 2 to 4 of 6: the first is over before a callback is asked
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(draw(pipe), plain)
    idle = SPARKE(0.0)
    assert torch.equal(draw(pipe, callback_on_step_end=idle), plain)
    assert len(idle.memory) == 3


def test_attached_and_given_as_callback_guides_once(pipe):
    guide = SPARKE(0.3)
    with guide.attach(pipe):
        once = draw(pipe)
    again = SPARKE(0.3)
    with again.attach(pipe):
        assert torch.equal(draw(pipe, callback_on_step_end=again), once)


def test_a_run_that_breaks_adds_nothing_and_leaves_nothing(pipe):
    plain, guide = draw(pipe), SPARKE(0.3)

    def stop(p, i, t, kw):
        if i == 2:
            raise RuntimeError("stop")
        return kw

    with pytest.raises(RuntimeError, match="stop"), guide.attach(pipe):
        draw(pipe, callback_on_step_end=stop)
    assert len(guide.memory) == 0
    forward = pipe.unet.forward
    calls = []

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    pipe.unet.forward = breaks
    try:
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, callback_on_step_end=guide)
    finally:
        del pipe.unet.forward
    assert len(guide.memory) == 0
    assert torch.equal(draw(pipe), plain)  # a hook left by the broken run steps aside
    assert "step" not in vars(pipe.scheduler)


def test_a_second_thread_is_refused_and_the_first_one_finishes(pipe):
    guide, errors = SPARKE(0.3), []

    def intrude():
        try:
            draw(pipe, steps=2)
        except RuntimeError as error:
            errors.append(str(error))

    def in_the_middle(p, i, t, kw):
        if i == 2:
            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join()
        return kw

    with guide.attach(pipe):
        alone = draw(pipe)
    guide.memory.clear()
    with guide.attach(pipe):
        disturbed = draw(pipe, callback_on_step_end=in_the_middle)
    assert "give each thread its own pipeline" in errors[0]
    assert torch.equal(disturbed, alone)
    assert len(guide.memory) == 3


def test_a_subclass_takes_the_guide_as_an_argument(pipe, tmp_path):
    sub = guided(diffusers.StableDiffusionPipeline)(**pipe.components, requires_safety_checker=False)
    sub.set_progress_bar_config(disable=True)
    plain = draw(pipe)
    assert torch.equal(draw(sub), plain)
    guide = SPARKE(0.3)
    assert not torch.equal(draw(sub, kspec_guidance=guide), plain)
    assert len(guide.memory) == 3
    assert guided(diffusers.StableDiffusionPipeline) is type(sub)
    sub.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    with pytest.raises(TypeError, match="must be a guide such as SPARKE"):
        draw(sub, kspec_guidance=0.3)
    with pytest.raises(TypeError, match="takes a pipeline class"):
        guided(pipe)


def test_a_scheduler_swapped_inside_the_block_is_guided_too(pipe, swap):
    guide = SPARKE(0.3)
    first = pipe.scheduler
    with guide.attach(pipe):
        swap("DDIM")
        draw(pipe)
    assert guide.report().steps_guided > 0
    assert "step" not in vars(pipe.scheduler)
    assert "step" not in vars(first)


def test_without_classifier_free_guidance_and_with_embeddings_only(pipe):
    guide = SPARKE(0.3)
    with guide.attach(pipe):
        draw(pipe, guidance_scale=1.0)
        positive, negative = pipe.encode_prompt("heart", "cpu", 1, True)
        draw(pipe, None, prompt_embeds=positive, negative_prompt_embeds=negative)
    assert len(guide.memory) == 6


def test_memory_from_another_text_encoder_is_refused(pipe):
    bank = MemoryBank("x0", "CLIPTextModel-of-someone-else")
    bank.add(torch.zeros(1, 9, 8, 8), torch.ones(1, 160))
    with (
        pytest.raises(ValueError, match=r"prompts encoded by CLIPTextModel-of-someone-else.*clear\(\)"),
        SPARKE(0.3, memory=bank).attach(pipe),
    ):
        draw(pipe)
    assert len(bank) == 1
    assert "step" not in vars(pipe.scheduler)


def test_an_unsupported_scheduler_is_refused_before_anything_is_touched(pipe):
    before = pipe.scheduler
    pipe.scheduler = diffusers.DDIMInverseScheduler()
    try:
        with pytest.raises(ValueError, match="DDIMInverseScheduler cannot be guided"):
            SPARKE().attach(pipe)
        assert "step" not in vars(pipe.scheduler)
        assert "encode_prompt" not in vars(pipe)
    finally:
        pipe.scheduler = before
