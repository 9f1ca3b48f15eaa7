import diffusers
import pytest
import torch

from kspec_guidance import SPARKE, MemoryBank
from kspec_guidance.guidance.spaces import Activations
from kspec_guidance.guidance.spaces.activations import wanted_rows
from kspec_guidance.loop.context import CallContext, DenoiserCall
from kspec_guidance.memory import CentroidMemory
from kspec_guidance.objectives import ConditionalRKE
from tests import tiny
from tests.emoji import generators, sample_latents


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
    torch.testing.assert_close(pullback(w), expected, atol=1e-5, rtol=1e-3)


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
    with pytest.raises(ValueError, match=r"its cache would count two steps \(here .*Hook\); call denoiser.disable_cache"):
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


@pytest.mark.parametrize("way", ["attach", "callback"])
def test_each_step_is_compared_with_the_rows_of_that_step(pipe, monkeypatch, way):
    guide, found = SPARKE(1.0, space="activations", stop=1.0), []
    sample_latents(pipe, guide=guide, steps=4)
    gradient, rows = ConditionalRKE.gradient, guide.memory.x.view(3, 4, -1)

    def noted(self, x, prompts, memory, **settings):
        found.append(memory.x)
        return gradient(self, x, prompts, memory, **settings)

    monkeypatch.setattr(ConditionalRKE, "gradient", noted)
    others = generators(3, 7)  # other samples than those in the memory, with which they would coincide
    if way == "attach":
        sample_latents(pipe, guide=guide, steps=4, generator=others)
    else:
        sample_latents(pipe, steps=4, callback_on_step_end=guide, generator=others)
    first = 0 if way == "attach" else 1  # callbacks guide from the second step on
    assert len(found) == 4 - first
    assert all(torch.equal(x, rows[:, k]) for k, x in enumerate(found, first))


def test_memory_is_read_once_in_a_run(pipe, monkeypatch):
    guide, calls = SPARKE(1.0, space="activations", stop=1.0), []
    sample_latents(pipe, guide=guide, steps=4)
    parts = MemoryBank.parts
    monkeypatch.setattr(MemoryBank, "parts", lambda self, count: calls.append(count) or parts(self, count))
    monkeypatch.setattr(MemoryBank, "x", property(lambda self: pytest.fail("the rows were copied")))
    sample_latents(pipe, guide=guide, steps=4)
    assert calls == [4]


def test_memory_that_does_not_keep_steps_apart_is_refused(pipe):
    guide = SPARKE(1.0, space="activations", memory=CentroidMemory(4))
    with pytest.raises(TypeError, match="a CentroidMemory does not keep those of each step apart; use a MemoryBank"):
        sample_latents(pipe, guide=guide, steps=4)
