"""Guidance beside what else people do with a pipeline: offloading, slicing, compiling, half precision, few steps,
LoRA, threads."""

import threading

import diffusers
import numpy as np
import pytest
import torch

from kspec_guidance import SPARKE, MemoryBank, MMDGuidance, guided, load_demo_pipeline
from tests import schedulers
from tests.emoji import draw
from tests.tiny import inputs, making


@pytest.fixture
def fresh():
    """An embedded pipeline of this test's own, to be changed at will."""
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same_as_plain_and_guided(pipe, plain, n=3, atol=0.0, **more):
    """The law of this file: scale 0 is the plain pipeline; guidance differs from it and is finite; nothing stays behind."""
    idle, guide = SPARKE(0.0), SPARKE(0.6)
    torch.testing.assert_close(draw(pipe, n=n, guide=idle, **more), plain, atol=atol, rtol=0)
    moved = draw(pipe, n=n, guide=guide, **more)
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, plain)
    assert len(idle.memory) == len(guide.memory) == n
    torch.testing.assert_close(draw(pipe, n=n, **more), plain, atol=atol, rtol=0)
    return moved


def test_sequential_offload_moves_weights_in_and_out_around_a_guided_step(fresh):
    from accelerate import cpu_offload

    plain = draw(fresh)
    expected = draw(fresh, guide=SPARKE(0.6))
    for module in (fresh.unet, fresh.vae, fresh.text_encoder):  # enable_sequential_cpu_offload, without a GPU
        cpu_offload(module, torch.device("cpu"), offload_buffers=True)
    assert all(p.device.type == "meta" for p in fresh.unet.parameters())
    moved = same_as_plain_and_guided(fresh, plain)
    assert torch.equal(moved, expected)
    assert all(p.device.type == "meta" for p in fresh.unet.parameters())


def test_model_offload_hooks_run_in_order_with_guidance(fresh):
    from accelerate import cpu_offload_with_hook

    plain, hook = draw(fresh), None
    for module in (fresh.text_encoder, fresh.unet, fresh.vae):
        _, hook = cpu_offload_with_hook(module, torch.device("cpu"), prev_module_hook=hook)
    same_as_plain_and_guided(fresh, plain)


@pytest.mark.parametrize("space", ["x0", "pixels"])
def test_slicing_changes_nothing(fresh, space):
    plain = draw(fresh)
    fresh.enable_attention_slicing(1)
    fresh.vae.enable_slicing()
    fresh.vae.enable_tiling()
    torch.testing.assert_close(draw(fresh, guide=SPARKE(0.0, space=space)), plain, atol=1e-4, rtol=0)
    assert torch.isfinite(draw(fresh, guide=SPARKE(0.6, space=space))).all()


def test_a_compiled_denoiser_is_called_as_it_is_with_no_break_inside(fresh):
    import torch._dynamo as dynamo

    plain = draw(fresh)
    dynamo.reset()
    dynamo.utils.counters.clear()
    own = fresh.unet
    fresh.unet = torch.compile(own, backend="eager", fullgraph=True)  # fullgraph: a break would be an error
    same_as_plain_and_guided(fresh, plain, atol=1e-5)
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    draw(fresh, guide=SPARKE(0.6))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # guidance causes no new compilation
    assert not dynamo.utils.counters["graph_break"]
    fresh.unet = own
    dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype):
    pipe = load_demo_pipeline(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe, steps=4)
    assert plain.dtype == dtype
    moved = same_as_plain_and_guided(pipe, plain, steps=4)
    assert moved.dtype == dtype


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 7.5, 15.0])
def test_guidance_scales_from_none_to_strong(pipe, scale):
    plain = draw(pipe, guidance_scale=scale)
    same_as_plain_and_guided(pipe, plain, guidance_scale=scale)


@pytest.mark.parametrize("name", ["LCM", "TCD", "Euler", "DPM++ 2M"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_steps(pipe, name, steps):
    cls, settings = schedulers.SETTINGS[name]
    before = pipe.scheduler
    pipe.scheduler = getattr(diffusers, cls).from_config(before.config, **settings)
    try:
        plain = draw(pipe, steps=steps, guidance_scale=1.0)
        same_as_plain_and_guided(pipe, plain, steps=steps, guidance_scale=1.0)
    finally:
        pipe.scheduler = before


# name, arguments: what a family does about guidance
OTHERS = {
    "a guidance-distilled model, without a second half": ("FluxPipeline", {"guidance_scale": 3.5}),
    "true classifier-free guidance, two calls a step": (
        "FluxPipeline",
        {"true_cfg_scale": 3.0, "negative_prompt": ["dull"] * 2},
    ),
    "true classifier-free guidance of Qwen-Image": (
        "QwenImagePipeline",
        {"true_cfg_scale": 4.0, "negative_prompt": ["dull"] * 2},
    ),
    "a guider": ("HunyuanVideo15Pipeline", {}),
    "consistency in two steps": ("SanaSprintPipeline", {}),
    "consistency in four steps": ("LatentConsistencyModelPipeline", {"num_inference_steps": 4}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_ways_of_being_guided_by_the_prompt(name):
    cls, more = OTHERS[name]
    if not hasattr(diffusers, cls):
        pytest.skip(f"diffusers {diffusers.__version__} has no {cls}")
    pipe = making.build(cls)
    call = lambda: pipe(**making.call(pipe, **more))[0]  # noqa: E731
    plain = call()
    idle, guide = SPARKE(0.0), SPARKE(1.0, stop=1.0)
    with idle.attach(pipe):
        assert torch.equal(call(), plain)
    with guide.attach(pipe):
        assert not torch.equal(call(), plain)
    assert torch.equal(call(), plain)
    if "negative_prompt" in more:  # the wanted prompts were kept, not the negative ones, which are encoded last
        alone = SPARKE(0.0)
        with alone.attach(pipe):
            pipe(**making.call(pipe))
        torch.testing.assert_close(idle.memory.prompts, alone.memory.prompts)


def test_strength_starts_in_the_middle_and_the_interval_counts_from_there():
    pipe = making.build("StableDiffusionImg2ImgPipeline")
    guide = SPARKE(1.0, stop=0.5)
    with guide.attach(pipe):
        pipe(**making.call(pipe, strength=0.5, num_inference_steps=20))
    assert (guide.report().total_steps, guide.report().steps_guided) == (10, 5)
    assert len(guide.memory) == 4


def test_a_base_model_hands_over_to_a_refiner():
    base, refiner = making.build("StableDiffusionXLPipeline"), making.build("StableDiffusionXLImg2ImgPipeline")
    guide = SPARKE(1.0, stop=1.0)
    with guide.attach(base):
        half = base(**making.call(base, denoising_end=0.5, num_inference_steps=8)).images
    assert (guide.report().total_steps, len(guide.memory)) == (4, 4)
    assert torch.equal(guide.memory.x, half.flatten(1))
    second = SPARKE(1.0, stop=1.0)
    arguments = making.call(refiner, denoising_start=0.5, num_inference_steps=8, image=half, strength=None)
    with second.attach(refiner):
        out = refiner(**arguments).images
    assert torch.isfinite(out).all()
    assert (second.report().total_steps, len(second.memory)) == (4, 4)


def test_prompts_given_as_embeddings_only():
    pipe = making.build("StableDiffusionXLPipeline")
    p, n, pooled, npooled = pipe.encode_prompt(
        list(inputs.PROMPTS), num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    known, given = SPARKE(0.0), SPARKE(0.0)
    with known.attach(pipe):
        pipe(**making.call(pipe))
    more = {
        "prompt_embeds": p,
        "negative_prompt_embeds": n,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": npooled,
    }
    with given.attach(pipe):
        pipe(**making.call(pipe, prompt=None, **more))
    assert given.memory.prompts.shape == known.memory.prompts.shape
    assert torch.equal(given.memory.prompts[0], given.memory.prompts[1])
    assert not torch.equal(given.memory.prompts[0], given.memory.prompts[2])


def test_the_users_callback_is_kept_and_called_in_order(pipe):
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    class Mine(PipelineCallback):
        tensor_inputs = ["latents"]
        seen = []

        def callback_fn(self, pipeline, step_index, timestep, kwargs):
            self.seen.append((step_index, kwargs["latents"].clone()))
            return kwargs

    mine, guide = Mine(), SPARKE(0.6)
    final = draw(pipe, guide=guide, callback_on_step_end=mine)
    assert [k for k, _ in mine.seen] == list(range(6))
    assert torch.equal(mine.seen[-1][1], final)  # it sees what was guided
    both = SPARKE(0.6)
    mine.seen.clear()
    out = draw(pipe, callback_on_step_end=MultiPipelineCallbacks([both, mine]))
    assert [k for k, _ in mine.seen] == list(range(6))
    assert not torch.equal(out, draw(pipe))
    assert len(both.memory) == 3


def test_an_interrupted_run_is_not_remembered(pipe):
    def stop(p, i, t, kw):
        p._interrupt = i == 2
        return kw

    guide = SPARKE(0.6)
    draw(pipe, guide=guide, callback_on_step_end=stop)
    assert len(guide.memory) == 0
    draw(pipe, guide=guide)
    assert len(guide.memory) == 3


def test_another_resolution_is_refused_with_the_cure(pipe):
    guide = SPARKE(0.6)
    draw(pipe, guide=guide)
    with pytest.raises(ValueError, match=r"shape \(9, 8, 8\), this pipeline makes \(9, 16, 16\); use a separate memory"):
        draw(pipe, guide=guide, height=128, width=128)
    assert len(guide.memory) == 3
    assert "step" not in vars(pipe.scheduler)
    pooled = SPARKE(0.6, space="pooled")  # block means are the same in number at every resolution
    draw(pipe, guide=pooled)
    draw(pipe, guide=pooled, height=128, width=128)
    assert len(pooled.memory) == 6


def test_threads_with_pipelines_and_guides_of_their_own_do_not_meet():
    pipes = [load_demo_pipeline() for _ in range(2)]
    for p in pipes:
        p.set_progress_bar_config(disable=True)
    alone = [draw(p, guide=SPARKE(0.6), steps=6 + k) for k, p in enumerate(pipes)]
    results, guides = [None, None], [SPARKE(0.6), SPARKE(0.6)]

    def work(k):
        results[k] = draw(pipes[k], guide=guides[k], steps=6 + k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for got, expected, guide in zip(results, alone, guides, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert len(guide.memory) == 3
    bank = MemoryBank()
    for guide in guides:
        bank.merge(guide.memory)
    assert len(bank) == 6


def test_lora_weights_and_their_scale(fresh):
    peft = pytest.importorskip("peft")
    plain = draw(fresh)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    fresh.unet.add_adapter(config)
    tuned = draw(fresh)
    assert not torch.equal(tuned, plain)
    same_as_plain_and_guided(fresh, tuned)
    half = draw(fresh, cross_attention_kwargs={"scale": 0.5})
    same_as_plain_and_guided(fresh, half, cross_attention_kwargs={"scale": 0.5})


def test_an_image_prompt_adapter():
    pipe = making.build("StableDiffusionPipeline", image_encoder=making.part(["CLIPVisionModelWithProjection"], None))
    pipe.feature_extractor = making.part(["CLIPImageProcessor"], None)
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    pipe.set_ip_adapter_scale(0.7)
    call = lambda: pipe(**making.call(pipe, ip_adapter_image=inputs.picture(9))).images  # noqa: E731
    plain, guide = call(), SPARKE(1.0)
    with SPARKE(0.0).attach(pipe):
        assert torch.equal(call(), plain)
    with guide.attach(pipe):
        assert not torch.equal(call(), plain)
    assert len(guide.memory) == 4


def ip_adapter(unet):
    """Random weights of an image prompt adapter, as its files hold them."""
    g, width, tokens = torch.Generator().manual_seed(0), unet.config.cross_attention_dim, 4
    rand = lambda *shape: torch.randn(*shape, generator=g) * 0.1  # noqa: E731
    layers, k = {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn1.processor") or "motion_modules" in name:
            continue
        inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        layers |= {f"{k}.to_k_ip.weight": rand(inner, width), f"{k}.to_v_ip.weight": rand(inner, width)}
        k += 2
    projection = {
        "proj.weight": rand(tokens * width, 32), "proj.bias": rand(tokens * width), "norm.weight": rand(width),
        "norm.bias": rand(width),
    }  # fmt: skip
    return {"image_proj": projection, "ip_adapter": layers}


def test_two_control_networks():
    control = diffusers.MultiControlNetModel([making.part(["ControlNetModel"], None) for _ in range(2)])
    pipe = making.build("StableDiffusionControlNetPipeline", controlnet=control)
    arguments = making.call(pipe, image=[inputs.picture(1), inputs.picture(2)], controlnet_conditioning_scale=[0.5, 1.0])
    guide = SPARKE(1.0)
    with guide.attach(pipe):
        pipe(**arguments)
    assert len(guide.memory) == 4


def test_a_scheduler_that_cannot_be_guided_is_named(fresh):
    fresh.scheduler = diffusers.DDIMInverseScheduler()
    with pytest.raises(ValueError, match="DDIMInverseScheduler cannot be guided: it runs from images to noise"):
        SPARKE().attach(fresh)
    with pytest.raises(ValueError, match="has no scheduler named 'audio' to guide; it has scheduler"):
        SPARKE().attach(fresh, scheduler="audio")


def test_mmd_and_sums_guide_packed_tokens_too():
    pipe = making.build("FluxPipeline")
    reference = torch.randn(8, 64, 16, generator=torch.Generator().manual_seed(0))
    for guide in (MMDGuidance(reference), SPARKE(0.5) + MMDGuidance(reference)):
        with guide.attach(pipe):
            out = pipe(**making.call(pipe)).images
        assert np.isfinite(out.numpy()).all()
        assert guide.report().steps_guided > 0


def test_guided_classes_of_many_families_take_the_guide_as_an_argument():
    for name in ("FluxPipeline", "StableDiffusionXLPipeline", "PixArtSigmaPipeline", "WanPipeline", "DDPMPipeline"):
        pipe = making.build(guided(getattr(diffusers, name)))
        guide = SPARKE(1.0, stop=1.0)
        pipe(**making.call(pipe), kspec_guidance=guide)
        assert guide.report().steps_guided > 0, name
        assert len(guide.memory) in (2, 4), name
