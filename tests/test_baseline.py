"""Baselines of a pipeline: what they are, their cache, and that they move a style at one prompt a batch."""

import threading
import time
import warnings

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from kspec_guidance import (
    MMDGuidance,
    encode_reference,
    load_demo_pipeline,
    load_demo_reference,
    make_baseline,
    toward_reference,
)
from kspec_guidance.baseline import BASELINE_PROMPTS
from kspec_guidance.demo import load_demo_judge
from kspec_guidance.demo.pipeline import DEMO_PROMPTS
from kspec_guidance.objectives import MMD
from tests import tiny

CALL = {"num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KSPEC_GUIDANCE_HOME", str(tmp_path))
    return tmp_path / "baselines"


@pytest.fixture(scope="module")
def pipe():
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def plain(pipe, k):
    return pipe(
        DEMO_PROMPTS[k], generator=torch.Generator().manual_seed(k), output_type="latent", **CALL
    ).images  # fmt: skip


def test_samples_are_those_of_plain_sampling(pipe, home):
    found = make_baseline(pipe, n=3, batch_size=2, call=CALL)
    expected = torch.cat([plain(pipe, k) for k in range(3)])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


def test_cache_is_read_extended_and_cut(pipe, home):
    first = make_baseline(pipe, n=4, call=CALL)
    files = list(home.iterdir())
    made = []
    longer = make_baseline(pipe, n=6, call=CALL, progress_callback=lambda k, n: made.append(k))
    assert made == [6]
    assert torch.equal(longer[:4], first)
    assert torch.equal(make_baseline(pipe, n=2, call=CALL, progress_callback=lambda k, n: made.append(k)), first[:2])
    assert made == [6]
    assert list(home.iterdir()) == files
    make_baseline(pipe, n=2, call=CALL | {"guidance_scale": 2.0})
    assert len(list(home.iterdir())) == 2


def test_a_damaged_cache_and_another_model_are_not_read(pipe, home):
    first = make_baseline(pipe, n=2, call=CALL)
    next(home.iterdir()).write_bytes(b"damaged")
    torch.testing.assert_close(make_baseline(pipe, n=2, call=CALL), first)
    other = load_demo_pipeline()
    with torch.no_grad():
        for p in other.unet.parameters():
            p.mul_(1.05 if p.ndim == 1 else 1).add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    found = make_baseline(other, DEMO_PROMPTS, n=2, call=CALL)
    assert not torch.allclose(found, first, atol=0.1)


def _with_noise(module, size=0.05):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))


def _with_lora(pipe, seed):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


CHANGES = {
    "scheduler": lambda pipe: setattr(pipe, "scheduler", EulerDiscreteScheduler.from_config(pipe.scheduler.config)),
    "text encoder": lambda pipe: _with_noise(pipe.text_encoder),
    "weights in place": lambda pipe: _with_noise(pipe.unet, 1e-3),  # as a LoRA that is fused
    "precision": lambda pipe: pipe.to(torch.bfloat16),
    "LoRA": lambda pipe: _with_lora(pipe, 1),
    "another LoRA": lambda pipe: _with_lora(pipe, 2),
    "LoRA off": lambda pipe: (_with_lora(pipe, 1), pipe.unet.disable_adapters()),
}


def test_all_that_decides_samples_decides_whether_a_cache_is_read(home):
    """Whatever differs, the baseline is that which is made without a cache."""
    for change in (None, *CHANGES.values()):
        changed = load_demo_pipeline()
        changed.set_progress_bar_config(disable=True)
        if change is not None:
            make_baseline(changed, n=1, call=CALL)  # its fingerprint may be known by then
            change(changed)
        found = make_baseline(changed, n=1, call=CALL)
        assert torch.equal(found, make_baseline(changed, n=1, call=CALL, cache=False))
        made = []
        make_baseline(changed, n=1, call=CALL, progress_callback=lambda k, n, made=made: made.append(k))
        assert not made
    assert len(list(home.iterdir())) == 1 + len(CHANGES)


def test_values_of_a_call_decide_too(pipe, home):
    wide, other, made = torch.zeros(1, 4000), torch.zeros(1, 4000), []
    other[0, 2000] = 1.0  # not in the text of the tensor

    def make(**more):
        made.clear()
        make_baseline(pipe, n=1, call=CALL | more, progress_callback=lambda k, n: made.append(k))
        return len(made)

    assert [make(negative_prompt_embeds=value) for value in (wide, other, wide, other)] == [1, 1, 0, 0]
    for _ in range(2):  # functions of one name may do different things
        assert make(callback_on_step_end=lambda pipe, i, t, kwargs: kwargs)
    assert len(list(home.iterdir())) == 2


def test_a_cache_that_cannot_be_written_loses_no_sample(pipe, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KSPEC_GUIDANCE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="is not kept for the next time"):
        rows = make_baseline(pipe, n=2, call=CALL)
    assert len(rows) == 2


def test_an_interrupted_run_is_continued(pipe, home):
    def stop(k, n):
        if k == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_baseline(pipe, n=6, batch_size=2, call=CALL, progress_callback=stop)
    made = []
    make_baseline(pipe, n=6, batch_size=2, call=CALL, progress_callback=lambda k, n: made.append(k))
    assert made == [6]
    assert pipe.scheduler.step.__qualname__ == type(pipe.scheduler).step.__qualname__  # nothing is left patched


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionXLPipeline"])
def test_any_pipeline_has_a_baseline(name, home):
    pipe = tiny.build(name)
    given = ("prompt", "generator", "output_type", "num_images_per_prompt")
    call = {k: v for k, v in tiny.call_kwargs(name).items() if k not in given}
    found = make_baseline(pipe, n=3, batch_size=2, call=call)
    assert len(found) == 3
    assert found.isfinite().all()


def test_bad_input_is_refused(pipe, home):
    with pytest.raises(ValueError, match="needs prompts"):
        make_baseline(pipe, [])
    with pytest.raises(ValueError, match="are texts, got"):
        make_baseline(pipe, [1, 2])
    with pytest.raises(ValueError, match=r"got \d+ prompts, 0 and 4"):
        make_baseline(pipe, n=0)
    with pytest.raises(ValueError, match=r"got \d+ prompts, 2.5 and 4"):
        make_baseline(pipe, n=2.5)
    with pytest.raises(ValueError, match=r"an integer, got 0\.5"):
        make_baseline(pipe, n=2, seed=0.5)
    with pytest.raises(ValueError, match=r"took no denoising step with .*; give num_inference_steps"):
        make_baseline(pipe, n=2, call={"num_inference_steps": -1})
    with pytest.warns(UserWarning, match="baseline of 1 prompts"):  # one prompt, not its letters
        make_baseline(pipe, "heart", n=1, call=CALL)
    with pytest.warns(UserWarning, match="baseline of 2 prompts"):
        make_baseline(pipe, ["heart", "bird"], n=2, call=CALL)
    assert len(set(BASELINE_PROMPTS)) == len(BASELINE_PROMPTS) == 50


def test_the_judge_knows_the_prompts_of_the_embedded_pipeline():
    judge = load_demo_judge()
    assert all(judge.described(p).any() for p in DEMO_PROMPTS)


def test_one_line_is_references_baseline_and_guide(pipe, home, tmp_path):
    images = pipe("heart", num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **CALL).images
    folder = tmp_path / "references"
    folder.mkdir()
    for k, image in enumerate(images):
        image.save(folder / f"{k}.png")
    found = toward_reference(pipe, folder, call=CALL, n=3, batch_size=3, stop=0.8)
    expected = MMDGuidance(encode_reference(pipe, folder), baseline=make_baseline(pipe, n=3, call=CALL), stop=0.8)
    assert repr(found) == repr(expected)
    own, other = (guide.terms[0].objective for guide in (found, expected))
    assert torch.equal(own.reference, other.reference)
    assert torch.equal(own.baseline, other.baseline)


@pytest.mark.parametrize(
    ("call", "given", "scale"),
    [({"num_inference_steps": 8}, None, 3.0), ({"num_inference_steps": 4}, None, 2.0), ({}, None, 3.0),
     ({"timesteps": [999, 700, 400, 100]}, None, 2.0), ({"num_inference_steps": 4}, 1.5, 1.5)],
    ids=["8 steps", "4 steps", "steps of the pipeline", "4 timesteps", "a given scale"],
)  # fmt: skip
def test_early_moves_are_large_and_end_after_a_fifth_of_the_run(pipe, monkeypatch, call, given, scale):
    config, images = pipe.unet.config, torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    baseline = torch.zeros(3, config.in_channels, config.sample_size, config.sample_size)
    monkeypatch.setattr("kspec_guidance.baseline.make_baseline", lambda *_, **__: baseline)
    guide = toward_reference(pipe, images, given, call=call, early=True)
    assert (guide.terms[0].scale, guide.terms[0].stop) == (scale, 0.2)
    usual = toward_reference(pipe, images, call=call)
    assert (usual.terms[0].scale, usual.terms[0].stop) == (1.0, 0.6)


def test_early_moves_refuse_what_contradicts_them(pipe):
    with pytest.raises(ValueError, match=r"stop=0\.2, got stop=0\.5 too"):
        toward_reference(pipe, torch.rand(2, 3, 64, 64), early=True, stop=0.5)
    with pytest.raises(ValueError, match="DiTPipeline takes no prompts"):
        toward_reference(tiny.build("DiTPipeline"), torch.rand(3, 3, 16, 16), early=True)


def test_captions_make_the_guide_prompt_aware(pipe, home):
    images = pipe("heart", num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **CALL).images
    about = {"call": CALL, "n": 10, "batch_size": 5, "prompts": list(DEMO_PROMPTS[:8])}
    guide = toward_reference(pipe, images, captions=["heart", DEMO_PROMPTS[1]], **about)
    objective = guide.terms[0].objective
    assert objective.conditional
    assert torch.equal(objective.reference_prompts[1], objective.baseline_prompts[1])
    assert torch.equal(objective.baseline_prompts[:2], objective.baseline_prompts[8:])  # prompts over and over
    with guide.attach(pipe):
        pipe("heart", output_type="latent", **CALL)
    torch.testing.assert_close(guide.finished[0].prompts[0].cpu(), objective.reference_prompts[0])
    with pytest.raises(ValueError, match="a text for each of the 2 images, got 1"):
        toward_reference(pipe, images, captions=["heart"], **about)


def test_captions_beside_the_images_of_a_folder_are_those_in_a_list(pipe, home, tmp_path):
    images = pipe("heart", num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **CALL).images
    folder, texts = tmp_path / "references", ["heart", DEMO_PROMPTS[1]]
    folder.mkdir()
    for k, (image, text) in enumerate(zip(images, texts, strict=True)):
        image.save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(text)
    about = {"call": CALL, "n": 8, "batch_size": 8, "prompts": list(DEMO_PROMPTS[:8])}
    found = toward_reference(pipe, folder, captions=True, **about).terms[0].objective
    expected = toward_reference(pipe, folder, captions=texts, **about).terms[0].objective
    assert torch.equal(found.reference_prompts, expected.reference_prompts)
    assert not toward_reference(pipe, folder, captions=False, **about).terms[0].objective.conditional
    with pytest.raises(ValueError, match="captions=True reads those of a folder"):
        toward_reference(pipe, images, captions=True, **about)
    (folder / "1.txt").unlink()
    with pytest.raises(ValueError, match=r"without a caption: 1\.png"):
        toward_reference(pipe, folder, captions=True, **about)


def test_two_processes_make_a_baseline_once(pipe, home):
    made, waited = [], []

    def other():  # begins when the first has made one of three samples
        found.append(make_baseline(load_demo_pipeline(), n=3, call=CALL, progress_callback=lambda k, n: waited.append(k)))

    def progress(k, n):
        made.append(k)
        if k == 1:
            thread.start()
            while not waited:  # for the first, and so for its lock
                time.sleep(0.05)

    found, thread = [], threading.Thread(target=other)
    first = make_baseline(pipe, n=3, batch_size=1, call=CALL, progress_callback=progress)
    thread.join()
    assert made == [1, 2, 3]
    assert waited[0] == 0  # it reads what the first has written, and makes none of its own
    assert torch.equal(found[0], first)
    assert len(list(home.iterdir())) == 1


def test_processes_of_a_group_do_not_wait_for_each_other(pipe, home, monkeypatch):
    """They may share one model, which none can call alone."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr("filelock.FileLock", lambda *args, **kwargs: pytest.fail("waits"))
    assert len(make_baseline(pipe, n=2, call=CALL)) == 2


def test_one_line_takes_the_size_of_the_call(home, tmp_path):
    pipe = tiny.build("StableDiffusionPipeline")
    image = pipe("a", num_inference_steps=1, generator=torch.Generator().manual_seed(0)).images[0]
    image.save(tmp_path / "0.png")
    call = {"num_inference_steps": 1, "height": 16, "width": 32}
    objective = toward_reference(pipe, tmp_path, call=call, n=1).terms[0].objective
    assert objective.reference.shape[1:] == objective.baseline.shape[1:]
    assert objective.reference.shape[-1] == 2 * objective.reference.shape[-2]


def test_a_pipeline_without_prompts_is_matched_as_a_whole(home):
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    guide = toward_reference(tiny.build("DiTPipeline"), images, 0.5, n=1)
    assert isinstance(guide.terms[0].objective, MMD)
    assert guide.terms[0].scale == 0.5
    with pytest.raises(ValueError, match="guides of DiTPipeline get no features of prompts, so captions are of no use"):
        toward_reference(tiny.build("DiTPipeline"), images, captions=["a", "b", "c"], n=1)
    assert not home.exists()


@pytest.mark.parametrize(
    ("prompts", "settings", "warned"),
    [
        (["heart"], {}, True),
        (["heart", "bird"], {}, True),
        (["heart"], {"scale": 0.0}, False),
        (["heart"], {"reference_prompts": torch.ones(4, 160)}, False),
        (["heart"], {"baseline": torch.zeros(2, 9, 8, 8)}, False),
        ([""], {}, False),
        (list(DEMO_PROMPTS[:8]), {}, False),
    ],
    ids=["one prompt", "two", "scale 0", "prompt-aware", "baseline", "empty prompt", "eight"],
)
def test_a_batch_of_few_prompts_needs_a_baseline(pipe, prompts, settings, warned):
    reference = torch.randn(4, 9, 8, 8, generator=torch.Generator().manual_seed(0))
    with MMDGuidance(reference, **settings).attach(pipe), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        pipe(prompts, output_type="latent", **CALL)
    assert any("make_baseline(pipe)" in str(w.message) for w in found) == warned


@pytest.mark.slow
def test_a_style_moves_at_one_prompt_a_batch(pipe, home):
    call = {"num_inference_steps": 8, "guidance_scale": 5.0}
    judge, reference = load_demo_judge(), encode_reference(pipe, load_demo_reference("noto"))
    guides = {
        "plain": None,
        "batch alone": MMDGuidance(reference),
        "baseline": MMDGuidance(reference, 2.0, baseline=make_baseline(pipe, n=48, batch_size=8, call=call)),
    }
    noto, other = judge.classes["style"].index("noto style"), {}
    for name, guide in guides.items():
        found = []
        for prompt in ("firefighter", "student", "singer"):
            generator = torch.Generator().manual_seed(0)
            with (guide or MMDGuidance(reference, 0)).attach(pipe):
                images = pipe(prompt, num_images_per_prompt=8, generator=generator, output_type="pt", **call).images
            found.append(1 - judge.network(2 * images - 1)["style"].softmax(1)[:, noto].mean())
        other[name] = sum(found) / len(found)
    assert other["baseline"] < 0.2
    assert other["baseline"] < other["plain"] / 2
    assert other["batch alone"] > other["plain"] / 2
