"""Guidance combined with offloading, slicing, compilation, half precision, few steps, LoRA, ControlNet and threads."""

import threading

import diffusers
import numpy as np
import pytest
import torch

from kspec_guidance import SPARKE, MemoryBank, MMDGuidance, guided, load_demo_pipeline
from tests import schedulers, tiny
from tests.emoji import sample_latents
from tests.tiny import inputs


@pytest.fixture
def fresh_pipe():
    """An embedded pipeline that one test may modify."""
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_guidance(pipe, plain, n=3, atol=0.0, **kwargs):
    """Check that scale 0 matches ``plain``, that guided output is finite and differs, and that the pipeline is restored."""
    idle, guide = SPARKE(0.0), SPARKE(0.6)
    torch.testing.assert_close(sample_latents(pipe, n=n, guide=idle, **kwargs), plain, atol=atol, rtol=0)
    moved = sample_latents(pipe, n=n, guide=guide, **kwargs)
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, plain)
    assert len(idle.memory) == len(guide.memory) == n
    torch.testing.assert_close(sample_latents(pipe, n=n, **kwargs), plain, atol=atol, rtol=0)
    return moved


# Both tests of offloading execute on the CPU, so they show that hooks and meta parameters work with guidance. They do not
# show that tensors are on the right device: offload and execution device are the same here.


def test_guidance_with_sequential_cpu_offload(fresh_pipe):
    from accelerate import cpu_offload

    plain = sample_latents(fresh_pipe)
    expected = sample_latents(fresh_pipe, guide=SPARKE(0.6))
    for module in (fresh_pipe.unet, fresh_pipe.vae, fresh_pipe.text_encoder):  # as enable_sequential_cpu_offload, on CPU
        cpu_offload(module, torch.device("cpu"), offload_buffers=True)
    assert all(p.device.type == "meta" for p in fresh_pipe.unet.parameters())
    moved = check_guidance(fresh_pipe, plain)
    assert torch.equal(moved, expected)
    assert all(p.device.type == "meta" for p in fresh_pipe.unet.parameters())


def test_guidance_with_model_cpu_offload(fresh_pipe):
    from accelerate import cpu_offload_with_hook

    plain, hook = sample_latents(fresh_pipe), None
    for module in (fresh_pipe.text_encoder, fresh_pipe.unet, fresh_pipe.vae):
        _, hook = cpu_offload_with_hook(module, torch.device("cpu"), prev_module_hook=hook)
    check_guidance(fresh_pipe, plain)


@pytest.mark.parametrize("space", ["x0", "pixels"])
def test_guidance_with_slicing_and_tiling(fresh_pipe, space):
    plain = sample_latents(fresh_pipe)
    fresh_pipe.enable_attention_slicing(1)
    fresh_pipe.vae.enable_slicing()
    fresh_pipe.vae.enable_tiling()
    torch.testing.assert_close(sample_latents(fresh_pipe, guide=SPARKE(0.0, space=space)), plain, atol=1e-4, rtol=0)
    moved = sample_latents(fresh_pipe, guide=SPARKE(0.6, space=space))
    assert torch.isfinite(moved).all()
    assert (moved - plain).abs().max() > 0.01


def test_compiled_denoiser_has_no_graph_breaks(fresh_pipe):
    import torch._dynamo as dynamo

    plain = sample_latents(fresh_pipe)
    dynamo.reset()
    dynamo.utils.counters.clear()
    unet = fresh_pipe.unet
    fresh_pipe.unet = torch.compile(unet, backend="eager", fullgraph=True)  # fullgraph: a graph break raises
    check_guidance(fresh_pipe, plain, atol=1e-5)
    graphs = dynamo.utils.counters["stats"]["unique_graphs"]
    sample_latents(fresh_pipe, guide=SPARKE(0.6))
    assert dynamo.utils.counters["stats"]["unique_graphs"] == graphs  # guidance does not recompile
    assert not dynamo.utils.counters["graph_break"]
    fresh_pipe.unet = unet
    dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_guidance_with_half_precision_weights(dtype):
    pipe = load_demo_pipeline(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    plain = sample_latents(pipe, n=2, steps=3)  # slow on a processor
    assert plain.dtype == dtype
    moved = check_guidance(pipe, plain, n=2, steps=3)
    assert moved.dtype == dtype


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 7.5, 15.0])
def test_guidance_with_guidance_scale(pipe, scale):
    plain = sample_latents(pipe, guidance_scale=scale)
    check_guidance(pipe, plain, guidance_scale=scale)


@pytest.mark.parametrize("name", ["LCM", "TCD", "Euler", "DPM++ 2M"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_guidance_with_few_steps(pipe, name, steps):
    cls, settings = schedulers.SETTINGS[name]
    before = pipe.scheduler
    pipe.scheduler = getattr(diffusers, cls).from_config(before.config, **settings)
    try:
        plain = sample_latents(pipe, steps=steps, guidance_scale=1.0)
        check_guidance(pipe, plain, steps=steps, guidance_scale=1.0)
    finally:
        pipe.scheduler = before


# mechanisms of prompt guidance: pipeline class, arguments of its call
PROMPT_GUIDANCE = {
    "guidance-distilled": ("FluxPipeline", {"guidance_scale": 3.5}),
    "true CFG, two denoiser calls per step": (
        "FluxPipeline",
        {"true_cfg_scale": 3.0, "negative_prompt": ["dull"] * 2},
    ),
    "true CFG of Qwen-Image": (
        "QwenImagePipeline",
        {"true_cfg_scale": 4.0, "negative_prompt": ["dull"] * 2},
    ),
    "guider": ("HunyuanVideo15Pipeline", {}),
    "consistency, two steps": ("SanaSprintPipeline", {}),
    "consistency, four steps": ("LatentConsistencyModelPipeline", {"num_inference_steps": 4}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMPT_GUIDANCE)
def test_guidance_with_other_prompt_guidance(name):
    cls, kwargs = PROMPT_GUIDANCE[name]
    if not hasattr(diffusers, cls):
        pytest.skip(f"diffusers {diffusers.__version__} has no {cls}")
    pipe = tiny.build(cls)
    call = lambda: pipe(**tiny.call_kwargs(pipe, **kwargs))[0]  # noqa: E731
    plain = call()
    idle, guide = SPARKE(0.0), SPARKE(1.0, stop=1.0)
    with idle.attach(pipe):
        assert torch.equal(call(), plain)
    with guide.attach(pipe):
        assert not torch.equal(call(), plain)
    assert torch.equal(call(), plain)
    if "negative_prompt" in kwargs:  # the memory has the positive prompts, although the negative ones are encoded last
        alone = SPARKE(0.0)
        with alone.attach(pipe):
            pipe(**tiny.call_kwargs(pipe))
        torch.testing.assert_close(idle.memory.prompts, alone.memory.prompts)


def test_guidance_interval_is_relative_to_strength():
    pipe = tiny.build("StableDiffusionImg2ImgPipeline")
    guide = SPARKE(1.0, stop=0.5)
    with guide.attach(pipe):
        pipe(**tiny.call_kwargs(pipe, strength=0.5, num_inference_steps=20))
    assert (guide.report().total_steps, guide.report().steps_guided) == (10, 5)
    assert len(guide.memory) == 4


def test_guidance_with_base_and_refiner():
    base, refiner = tiny.build("StableDiffusionXLPipeline"), tiny.build("StableDiffusionXLImg2ImgPipeline")
    guide = SPARKE(1.0, stop=1.0)
    with guide.attach(base):
        base_latents = base(**tiny.call_kwargs(base, denoising_end=0.5, num_inference_steps=8)).images
    assert (guide.report().total_steps, len(guide.memory)) == (4, 4)
    assert torch.equal(guide.memory.x, base_latents.flatten(1))
    refiner_guide = SPARKE(1.0, stop=1.0)
    arguments = tiny.call_kwargs(refiner, denoising_start=0.5, num_inference_steps=8, image=base_latents, strength=None)
    with refiner_guide.attach(refiner):
        output = refiner(**arguments).images
    assert torch.isfinite(output).all()
    assert (refiner_guide.report().total_steps, len(refiner_guide.memory)) == (4, 4)


def test_prompt_embeds_without_prompts():
    pipe = tiny.build("StableDiffusionXLPipeline")
    positive, negative, pooled, negative_pooled = pipe.encode_prompt(
        list(inputs.PROMPTS), num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    with_prompts, with_embeds = SPARKE(0.0), SPARKE(0.0)
    with with_prompts.attach(pipe):
        pipe(**tiny.call_kwargs(pipe))
    kwargs = {
        "prompt_embeds": positive,
        "negative_prompt_embeds": negative,
        "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": negative_pooled,
    }
    with with_embeds.attach(pipe):
        pipe(**tiny.call_kwargs(pipe, prompt=None, **kwargs))
    assert with_embeds.memory.prompts.shape == with_prompts.memory.prompts.shape
    assert torch.equal(with_embeds.memory.prompts[0], with_embeds.memory.prompts[1])
    assert not torch.equal(with_embeds.memory.prompts[0], with_embeds.memory.prompts[2])


def test_user_callback_is_called_in_order(pipe):
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    class RecordingCallback(PipelineCallback):
        tensor_inputs = ["latents"]
        calls = []

        def callback_fn(self, pipeline, step_index, timestep, kwargs):
            self.calls.append((step_index, kwargs["latents"].clone()))
            return kwargs

    callback, guide = RecordingCallback(), SPARKE(0.6)
    final = sample_latents(pipe, guide=guide, callback_on_step_end=callback)
    assert [k for k, _ in callback.calls] == list(range(6))
    assert torch.equal(callback.calls[-1][1], final)  # the callback receives guided latents
    second_guide = SPARKE(0.6)
    callback.calls.clear()
    output = sample_latents(pipe, callback_on_step_end=MultiPipelineCallbacks([second_guide, callback]))
    assert [k for k, _ in callback.calls] == list(range(6))
    assert not torch.equal(output, sample_latents(pipe))
    assert len(second_guide.memory) == 3


def test_interrupted_run_adds_nothing_to_memory(pipe):
    def stop(p, i, t, kw):
        p._interrupt = i == 2
        return kw

    guide = SPARKE(0.6)
    sample_latents(pipe, guide=guide, callback_on_step_end=stop)
    assert len(guide.memory) == 0
    sample_latents(pipe, guide=guide)
    assert len(guide.memory) == 3


def test_changed_resolution_raises(pipe):
    guide = SPARKE(0.6)
    sample_latents(pipe, guide=guide)
    with pytest.raises(ValueError, match=r"shape \(9, 8, 8\), this pipeline makes \(9, 16, 16\); use a separate memory"):
        sample_latents(pipe, guide=guide, height=128, width=128)
    assert len(guide.memory) == 3
    assert "step" not in vars(pipe.scheduler)
    pooled = SPARKE(0.6, space="pooled")  # the number of block means does not depend on resolution
    sample_latents(pipe, guide=pooled)
    sample_latents(pipe, guide=pooled, height=128, width=128)
    assert len(pooled.memory) == 6


def test_threads_with_separate_pipelines_are_independent():
    pipes = [load_demo_pipeline() for _ in range(2)]
    for p in pipes:
        p.set_progress_bar_config(disable=True)
    alone = [sample_latents(p, guide=SPARKE(0.6), steps=6 + k) for k, p in enumerate(pipes)]
    results, guides = [None, None], [SPARKE(0.6), SPARKE(0.6)]

    def work(k):
        results[k] = sample_latents(pipes[k], guide=guides[k], steps=6 + k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for result, expected, guide in zip(results, alone, guides, strict=True):
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
        assert len(guide.memory) == 3
    bank = MemoryBank()
    for guide in guides:
        bank.merge(guide.memory)
    assert len(bank) == 6


def test_guidance_with_lora_scale(fresh_pipe):
    peft = pytest.importorskip("peft")
    plain = sample_latents(fresh_pipe)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    fresh_pipe.unet.add_adapter(config)
    lora_output = sample_latents(fresh_pipe)
    assert not torch.equal(lora_output, plain)
    check_guidance(fresh_pipe, lora_output)
    half_scale = sample_latents(fresh_pipe, cross_attention_kwargs={"scale": 0.5})
    check_guidance(fresh_pipe, half_scale, cross_attention_kwargs={"scale": 0.5})


def test_guidance_with_ip_adapter():
    pipe = tiny.build(
        "StableDiffusionPipeline", image_encoder=tiny.build_component(["CLIPVisionModelWithProjection"], None)
    )
    pipe.feature_extractor = tiny.build_component(["CLIPImageProcessor"], None)
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    pipe.set_ip_adapter_scale(0.7)
    call = lambda: pipe(**tiny.call_kwargs(pipe, ip_adapter_image=inputs.image(9))).images  # noqa: E731
    plain, guide = call(), SPARKE(1.0)
    with SPARKE(0.0).attach(pipe):
        assert torch.equal(call(), plain)
    with guide.attach(pipe):
        assert not torch.equal(call(), plain)
    assert len(guide.memory) == 4


def ip_adapter(unet):
    """Random IP-Adapter weights in the format of its checkpoint files."""
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


def test_guidance_with_two_controlnets():
    control = diffusers.MultiControlNetModel([tiny.build_component(["ControlNetModel"], None) for _ in range(2)])
    pipe = tiny.build("StableDiffusionControlNetPipeline", controlnet=control)
    arguments = tiny.call_kwargs(pipe, image=[inputs.image(1), inputs.image(2)], controlnet_conditioning_scale=[0.5, 1.0])
    guide = SPARKE(1.0)
    with guide.attach(pipe):
        pipe(**arguments)
    assert len(guide.memory) == 4


def test_unguidable_scheduler_raises(fresh_pipe):
    fresh_pipe.scheduler = diffusers.DDIMInverseScheduler()
    with pytest.raises(ValueError, match="DDIMInverseScheduler cannot be guided: it runs from images to noise"):
        SPARKE().attach(fresh_pipe)
    with pytest.raises(ValueError, match="has no scheduler named 'audio' to guide; it has scheduler"):
        SPARKE().attach(fresh_pipe, scheduler="audio")


def test_mmd_and_combined_guides_on_packed_latents():
    pipe = tiny.build("FluxPipeline")
    reference = torch.randn(8, 64, 16, generator=torch.Generator().manual_seed(0))
    for guide in (MMDGuidance(reference), SPARKE(0.5) + MMDGuidance(reference)):
        with guide.attach(pipe):
            output = pipe(**tiny.call_kwargs(pipe)).images
        assert np.isfinite(output.numpy()).all()
        assert guide.report().steps_guided > 0


def test_guided_classes_accept_guide_argument():
    for name in ("FluxPipeline", "StableDiffusionXLPipeline", "PixArtSigmaPipeline", "WanPipeline", "DDPMPipeline"):
        pipe = tiny.build(guided(getattr(diffusers, name)))
        guide = SPARKE(1.0, stop=1.0)
        output = pipe(**tiny.call_kwargs(pipe), kspec_guidance=guide)
        assert guide.report().steps_guided > 0, name
        assert len(guide.memory) == len(output[0]), name
