import diffusers
import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.guidance.spaces import Activations
from kspec_guidance.guidance.spaces.activations import wanted_rows
from kspec_guidance.loop.context import CallContext, DenoiserCall
from tests import tiny


def test_activation_pullback_matches_autograd(pipe):
    unet, g = pipe.unet, torch.Generator().manual_seed(0)
    h = torch.randn(4, 9, 8, 8, generator=g)  # with classifier-free guidance the conditional half is last
    states = torch.randn(4, 16, unet.config.cross_attention_dim, generator=g)
    arguments = {"sample": h, "timestep": torch.tensor(500), "encoder_hidden_states": states, "return_dict": False}
    rows, pullback = Activations().features(h[2:], CallContext(pipe), DenoiserCall(unet, arguments))
    outputs = []
    handle = unet.mid_block.register_forward_hook(lambda m, a, o: outputs.append(o))
    leaf = h[2:].clone().requires_grad_()
    with torch.enable_grad():
        unet(leaf, 500, states[2:])
        y = outputs[0].flatten(2).mean(2)
        w = torch.randn(rows.shape, generator=g)
        (expected,) = torch.autograd.grad(y, leaf, w)
    handle.remove()
    torch.testing.assert_close(rows, y.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pullback(w), expected, atol=1e-6, rtol=1e-3)


def test_wanted_rows_are_last_rows_of_call(g):
    x = torch.randn(4, 3, generator=g)
    selected = wanted_rows(
        {"sample": x, "timestep": torch.tensor(3), "added_cond_kwargs": {"text_embeds": x}, "parts": (x, x)}, 2
    )
    assert torch.equal(selected["sample"], x[2:])
    assert torch.equal(selected["added_cond_kwargs"]["text_embeds"], x[2:])
    assert torch.equal(selected["parts"][1], x[2:])
    assert selected["timestep"].ndim == 0
    assert torch.equal(wanted_rows({"sample": x}, 4)["sample"], x)


CACHES = {
    "first block": lambda: diffusers.FirstBlockCacheConfig(threshold=0.1),
    "pyramid": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "taylor": lambda: diffusers.TaylorSeerCacheConfig(),
    "mag": lambda: diffusers.MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4),
    "faster": lambda: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}


@pytest.mark.parametrize("name", CACHES)
def test_cached_denoiser_is_refused(name):
    pipe = tiny.build("FluxPipeline")
    pipe.transformer.enable_cache(CACHES[name]())
    x = torch.randn(2, 16, 16)
    with pytest.raises(ValueError, match=r"its cache \(.*Hook\) would count as a step; call denoiser.disable_cache"):
        Activations().features(x, CallContext(pipe), DenoiserCall(pipe.transformer, {"hidden_states": x}))


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offloaded_weights_are_offloaded_again(monkeypatch, offload_type):
    """On the CPU both devices are the same, so the groups' own calls are counted."""
    from diffusers.hooks.group_offloading import ModuleGroup

    loaded = set()
    for name, note in (("onload_", loaded.add), ("offload_", loaded.discard)):
        original = getattr(ModuleGroup, name)
        monkeypatch.setattr(ModuleGroup, name, lambda group, f=original, note=note: (note(group), f(group))[1])
    pipe, guide = tiny.build("FluxPipeline"), SPARKE(0.5, space="activations", stop=1.0)
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1
    )
    with guide.attach(pipe):
        pipe(**tiny.call_kwargs(pipe))
    assert guide.report().steps_guided == 4
    assert not loaded


def test_denoiser_with_float8_storage():
    pipe, guide = tiny.build("StableDiffusionPipeline"), SPARKE(0.5, space="activations", stop=1.0)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with guide.attach(pipe):
        pipe(**tiny.call_kwargs(pipe))
    assert guide.report().steps_guided == 4
    assert any(p.dtype == torch.float8_e4m3fn for p in pipe.unet.parameters())
