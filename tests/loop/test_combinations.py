"""Guidance combined with exchanged adapters, regions with prompts of their own, offloaded blocks, second passes."""

import diffusers
import pytest
import torch

from kspec_guidance import SPARKE
from tests import tiny
from tests.tiny import inputs
from tests.tiny.encoders import WIDTH


def generate(pipe, guide=None, **kwargs):
    call = tiny.call_kwargs(pipe, prompt=["a red heart"] * 2, **kwargs)
    if guide is None:
        return pipe(**call)[0]
    with guide.attach(pipe):
        return pipe(**call)[0]


@pytest.mark.parametrize(("space", "offload_type"), [("x0", "block_level"), ("x0", "leaf_level"), ("pixels", "leaf_level")])
def test_group_offloading_changes_no_image(space, offload_type):
    pipe = tiny.build("FluxPipeline")
    expected = generate(pipe, SPARKE(0.5, space=space))
    pipe.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), offload_type=offload_type, num_blocks_per_group=1
    )  # fmt: skip
    assert torch.equal(generate(pipe, SPARKE(0.5, space=space)), expected)
    assert not torch.equal(generate(pipe), expected)


def lora(unet, seed):
    """Random low-rank weights for a UNet, as a state dict."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in unet.named_modules():
        if name.endswith(("to_q", "to_v")):
            found[f"{name}.lora_A.weight"] = torch.randn(2, layer.in_features, generator=g)
            found[f"{name}.lora_B.weight"] = torch.randn(layer.out_features, 2, generator=g)
    return found


def test_a_lora_is_exchanged_while_a_guide_is_attached():
    pytest.importorskip("peft")
    pipe, guide, both = tiny.build("StableDiffusionPipeline"), SPARKE(0.5), SPARKE(0.5)
    first, second = lora(pipe.unet, 1), lora(pipe.unet, 2)
    expected = []
    for weights in (first, second):
        fresh = tiny.build("StableDiffusionPipeline")
        fresh.unet.load_lora_adapter(dict(weights), prefix=None, adapter_name="style")
        expected.append(generate(fresh, both))
    with guide.attach(pipe):
        pipe.unet.load_lora_adapter(dict(first), prefix=None, adapter_name="style")
        found = [generate(pipe)]
        pipe.unet.load_lora_adapter(dict(second), prefix=None, adapter_name="style", hotswap=True)
        found.append(generate(pipe))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert len(guide.memory) == 8
    assert not torch.allclose(*found)


class Regions:
    """Attention in which the left half of the image sees the first half of the tokens, and the right half the others."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
        if encoder_hidden_states is None:
            return self.inner(attn, hidden_states, **kwargs)
        left, right = (self.inner(attn, hidden_states, part) for part in encoder_hidden_states.chunk(2, dim=1))
        side = round(hidden_states.shape[1] ** 0.5)
        where = (torch.arange(side * side) % side < side // 2)[None, :, None]
        return torch.where(where, left, right)


def test_regional_prompts():
    pipe = tiny.build("StableDiffusionPipeline")
    pipe.unet.set_attn_processor(
        {k: Regions(v) if "attn2" in k else v for k, v in pipe.unet.attn_processors.items()}
    )  # fmt: skip
    hearts, cats, negative = (
        pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("a red heart", "two green cats", "")
    )
    prompts = torch.cat([torch.cat(p, dim=1) for p in ((hearts, cats), (hearts, cats), (cats, cats), (cats, cats))])
    idle, guide = SPARKE(0.0), SPARKE(1.0, stop=1.0)
    embeds = {"prompt_embeds": prompts, "negative_prompt_embeds": torch.cat([negative, negative], 1).repeat(4, 1, 1)}

    def call():
        return pipe(**tiny.call_kwargs(pipe, prompt=None, num_images_per_prompt=1, **embeds))[0]

    plain = call()
    with idle.attach(pipe):
        assert torch.equal(call(), plain)
    with guide.attach(pipe):
        assert not torch.equal(call(), plain)
    similarity = guide.memory.prompts @ guide.memory.prompts.T
    assert torch.allclose(similarity[0, 1], torch.tensor(1.0), atol=1e-5)  # images of the same regions repel each other
    assert float(similarity[0, 2]) < 1 - 1e-4


def test_images_of_a_second_pass_at_twice_the_size():
    pipe, first, second = tiny.build("StableDiffusionPipeline"), SPARKE(1.0, stop=1.0), SPARKE(1.0, stop=1.0)
    again = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    large = torch.nn.functional.interpolate(generate(pipe, first), scale_factor=2)
    plain = generate(again, image=large, num_images_per_prompt=2)
    moved = generate(again, second, image=large, num_images_per_prompt=2)
    assert moved.shape == plain.shape == (4, 4, 32, 32)
    assert not torch.equal(moved, plain)
    assert (first.memory.shape, second.memory.shape) == ((4, 16, 16), (4, 32, 32))


def test_calls_of_several_sizes_share_a_memory_of_block_means():
    pipe, guide = tiny.build("FluxPipeline"), SPARKE(1.0, stop=1.0, space="pooled")
    for k, (height, width) in enumerate([(32, 32), (64, 32), (32, 48)], start=1):
        generate(pipe, guide, height=height, width=width)
        assert len(guide.memory) == 4 * k
    assert guide.report().steps_guided == 4


def test_ip_adapter_with_a_region_for_its_image():
    from tests.loop.test_scheduler_hook import ip_adapter

    encoder = tiny.build_component(["CLIPVisionModelWithProjection"], None)
    pipe = tiny.build("StableDiffusionPipeline", image_encoder=encoder)
    pipe.feature_extractor = tiny.build_component(["CLIPImageProcessor"], None)
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    assert encoder.config.projection_dim == WIDTH
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    where = {"ip_adapter_image": inputs.image(9), "cross_attention_kwargs": {"ip_adapter_masks": [mask]}}
    plain, guide = generate(pipe, **where), SPARKE(1.0, stop=1.0)
    assert torch.equal(generate(pipe, SPARKE(0.0), **where), plain)
    assert not torch.equal(generate(pipe, guide, **where), plain)
    assert len(guide.memory) == 4
