"""Denoisers that cache, are compiled in place, or are quantised: guidance in x0 does not touch them."""

import functools

import diffusers
import numpy as np
import pytest
import torch

from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance.loop.observer import DenoiserWatch
from tests.emoji import sample_latents
from tests.tiny import build, call_kwargs

CACHES = {
    "FirstBlockCacheConfig": {"threshold": 1e9},
    "TaylorSeerCacheConfig": {"cache_interval": 3, "disable_cache_before_step": 1, "taylor_factors_dtype": torch.float32},
    "MagCacheConfig": {
        "threshold": 1e9, "max_skip_steps": 2, "retention_ratio": 0.0, "num_inference_steps": 6, "mag_ratios": [1.0] * 6,
    },
    "FasterCacheConfig": {"spatial_attention_timestep_skip_range": (-1, 700), "is_guidance_distilled": True},
    "PyramidAttentionBroadcastConfig": {
        "spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 1001),
    },
    "SeaCacheConfig": {"threshold": 1e9, "cache_end_steps": 0},
    "TextKVCacheConfig": {},
}  # fmt: skip
HOSTS = {"SeaCacheConfig": "WanPipeline", "TextKVCacheConfig": "NucleusMoEImagePipeline"}  # others do not take them
EXACT = {"TextKVCacheConfig"}


def test_every_cache_of_diffusers_is_tried():
    assert {n for n in dir(diffusers) if n.endswith(("CacheConfig", "BroadcastConfig"))} <= CACHES.keys()


def cached(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    pipe, settings = build(HOSTS.get(name, "FluxPipeline")), dict(CACHES[name])
    if name in ("FasterCacheConfig", "PyramidAttentionBroadcastConfig"):
        settings["current_timestep_callback"] = lambda: pipe.current_timestep
    if name == "FasterCacheConfig":
        settings |= {"attention_weight_callback": lambda _: 0.5, "tensor_format": "BCHW"}
    call = lambda: pipe(**call_kwargs(pipe, num_inference_steps=6, prompt=["a red heart"] * 2))[0]  # noqa: E731
    without = call()
    pipe.transformer.enable_cache(getattr(diffusers, name)(**settings))
    return pipe, call, without


@pytest.mark.parametrize("name", CACHES)
def test_cached_denoiser_is_guided(name):
    pipe, call, without = cached(name)
    plain = call()
    if name not in EXACT:
        assert not torch.equal(plain, without), "the cache was not hit"
    idle, guide = SPARKE(0.0), SPARKE(1.0, stop=1.0)
    with idle.attach(pipe):
        assert torch.equal(call(), plain)
    with guide.attach(pipe):
        moved = call()
    assert torch.isfinite(moved).all()
    assert (moved - plain).abs().mean() > 1e-3 * plain.abs().mean()
    assert len(idle.memory) == len(guide.memory) == len(plain)
    assert torch.equal(call(), plain)


def test_denoiser_compiled_in_place_keeps_its_graph():
    import torch._dynamo as dynamo

    pipe = load_demo_pipeline()
    plain = sample_latents(pipe, steps=3)
    dynamo.reset()
    dynamo.utils.counters.clear()
    pipe.unet.compile(backend="eager", fullgraph=True)  # fullgraph: a graph break raises
    for space in ("x0", "activations"):
        idle, guide = SPARKE(0.0, space=space), SPARKE(1.0, space=space)
        torch.testing.assert_close(sample_latents(pipe, guide=idle, steps=3), plain, atol=1e-5, rtol=0)
        moved = sample_latents(pipe, guide=guide, steps=3)
        assert torch.isfinite(moved).all()
        assert guide.report().steps_guided > 0
    assert not dynamo.utils.counters["graph_break"]
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(sample_latents(pipe, steps=3), plain, atol=1e-5, rtol=0)
    dynamo.reset()


def test_watched_module_compiled_in_place_is_restored():
    pipe = load_demo_pipeline()
    pipe.unet.compile(backend="eager")
    compiled = pipe.unet._compiled_call_impl
    watch = DenoiserWatch(pipe)
    assert pipe.unet._compiled_call_impl is not compiled
    assert not pipe.unet._forward_pre_hooks
    watch.remove()
    assert pipe.unet._compiled_call_impl is compiled


def test_outputs_of_a_module_compiled_in_place_are_seen():
    pipe = load_demo_pipeline()
    eased = sample_latents(pipe, guide=SPARKE(1.0, ease_cfg=1.0), steps=3, guidance_scale=5.0)
    dynamo = pytest.importorskip("torch._dynamo")
    dynamo.reset()
    pipe.unet.compile(backend="eager", fullgraph=True)
    guide = SPARKE(1.0, ease_cfg=1.0)
    torch.testing.assert_close(sample_latents(pipe, guide=guide, steps=3, guidance_scale=5.0), eased, atol=1e-4, rtol=1e-4)
    assert guide.report().eased_cfg is not None
    dynamo.reset()


def test_dynamically_quantised_denoiser_is_guided():
    pipe = load_demo_pipeline()
    pipe.unet = torch.ao.quantization.quantize_dynamic(pipe.unet, {torch.nn.Linear}, torch.qint8)
    plain = sample_latents(pipe, steps=3)
    guide = SPARKE(1.0)
    moved = sample_latents(pipe, guide=guide, steps=3)
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, plain)
    assert len(guide.memory) == 3


def test_torchao_quantised_denoiser_is_guided():
    torchao = pytest.importorskip("torchao.quantization")
    pipe = load_demo_pipeline()
    torchao.quantize_(pipe.unet, torchao.Int8WeightOnlyConfig())
    plain = sample_latents(pipe, steps=3)
    guide = SPARKE(1.0)
    moved = sample_latents(pipe, guide=guide, steps=3)
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, plain)
    assert len(guide.memory) == 3


def replace_linear(module, make):
    """Replace all linear layers by quantised ones of the same weights."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            layer = make(child.in_features, child.out_features, bias=child.bias is not None)
            layer.load_state_dict(child.state_dict())
            setattr(module, name, layer.to("cpu"))
        else:
            replace_linear(child, make)


@pytest.mark.parametrize("bits", [8, 4])
def test_denoiser_and_text_encoder_of_bitsandbytes_are_guided(bits):
    layers = pytest.importorskip("bitsandbytes").nn
    make = functools.partial(layers.Linear8bitLt, has_fp16_weights=False) if bits == 8 else layers.Linear4bit
    pipe, guide = build("FluxPipeline"), SPARKE(0.5, stop=1.0)
    replace_linear(pipe.transformer, make)
    replace_linear(pipe.text_encoder, make)
    plain = pipe(**call_kwargs(pipe)).images
    with guide.attach(pipe):
        moved = pipe(**call_kwargs(pipe)).images
    assert guide.report().steps_guided > 0
    assert len(guide.memory) == len(moved)
    assert not np.array_equal(moved, plain)
    assert np.array_equal(pipe(**call_kwargs(pipe)).images, plain)
