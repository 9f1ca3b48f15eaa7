"""Images that exist already are remembered as if a call had made them."""

import pytest
import torch

from kspec_guidance import SPARKE, MMDGuidance, NoveltyGuidance, encode_reference
from kspec_guidance.guidance.spaces import Block
from kspec_guidance.loop.blocks import hook_block
from tests import tiny
from tests.tiny import requires_modular

FLOW = {"prompt": "a red heart", "num_images_per_prompt": 3, "num_inference_steps": 4}


@pytest.fixture
def images(g):
    return torch.rand(3, 3, tiny.inputs.SIZE, tiny.inputs.SIZE, generator=g) * 2 - 1


def arguments(pipe, **settings):
    return tiny.call_kwargs(pipe, **FLOW, **settings)


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusionPipeline", "StableDiffusion3Pipeline"])
def test_memory_has_the_encoded_images_and_the_prompts_of_a_call(name, images):
    pipe, guide, made = tiny.build(name), SPARKE(1.0), SPARKE(0.0)
    assert guide.remember_images(pipe, images, **arguments(pipe)) == 3
    with made.attach(pipe):
        pipe(**arguments(pipe))
    assert torch.equal(guide.memory.x, encode_reference(pipe, images).flatten(1))
    assert torch.equal(guide.memory.prompts, made.memory.prompts)
    assert guide.memory.prompt_encoder == made.memory.prompt_encoder


def test_the_denoiser_sees_the_images_at_the_noise_level_of_each_step(images):
    """And rows of a block are means of its tokens there; computed here from the noise of a plain call."""
    pipe, guide = tiny.build("FluxPipeline"), SPARKE(1.0, space="block", stop=1.0)
    seen, tokens, block = [], [], Block().block_of(pipe.transformer)
    note = lambda _, args, kwargs: seen.append(kwargs["hidden_states"])  # noqa: E731
    handles = [
        pipe.transformer.register_forward_pre_hook(note, with_kwargs=True),
        hook_block(block, lambda _, found: tokens.append(found.image.mean(1))),
    ]
    pipe(**arguments(pipe))
    noise = seen[0].clone()
    seen.clear()
    tokens.clear()
    guide.remember_images(pipe, images, **arguments(pipe))
    for handle in handles:
        handle.remove()
    z, sigmas = encode_reference(pipe, images), pipe.scheduler.sigmas
    for x, sigma in zip(seen, sigmas, strict=False):
        torch.testing.assert_close(x, (1 - sigma) * z + sigma * noise)
    assert guide.memory.shape == (4, tokens[0].shape[1])
    torch.testing.assert_close(guide.memory.x, torch.cat(tokens, 1))


@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("FluxPipeline", "block"),
        ("FluxPipeline", "context"),
        ("PixArtSigmaPipeline", "block"),
        ("FluxPipeline", "activations"),
        ("StableDiffusionPipeline", "activations"),
    ],
)
def test_images_repel_in_spaces_whose_features_differ_from_step_to_step(name, space, images):
    """A single image is moved by nothing but the memory; the pipeline is left as it was."""
    pipe, guide = tiny.build(name), SPARKE(1.0, space=space, stop=1.0)
    single = {**arguments(pipe), "num_images_per_prompt": 1}
    single.pop("generator")

    def run():
        return torch.as_tensor(pipe(**single, generator=torch.Generator().manual_seed(5)).images)

    plain = run()
    with guide.attach(pipe):
        guide.remember_images(pipe, images, **arguments(pipe))
        assert len(guide.memory) == 3
        moved = run()
    assert len(guide.memory) == 4
    assert moved.isfinite().all()
    assert not torch.equal(moved, plain)
    assert torch.equal(run(), plain)
    assert "step" not in vars(pipe.scheduler)


def test_several_guides_and_memories_that_do_not_grow_by_themselves(images):
    pipe, guide = tiny.build("FluxPipeline"), SPARKE(1.0) + SPARKE(1.0, space="block")
    guide.remember = False
    guide.remember_images(pipe, images, **arguments(pipe))
    assert [len(memory) for memory in guide.memories] == [3, 3]


@requires_modular
def test_modular_pipelines_and_prompts_of_each_image(images):
    pipe, guide = tiny.build_modular("StableDiffusion3ModularPipeline"), SPARKE(1.0)
    prompts = ["a red heart", "two green cats", "a red heart"]
    settings = tiny.modular_call_kwargs(pipe, prompt=prompts, num_images_per_prompt=1)
    guide.remember_images(pipe, images, **settings)
    torch.testing.assert_close(guide.memory.x, encode_reference(pipe, images).flatten(1))
    assert torch.equal(guide.memory.prompts[0], guide.memory.prompts[2])
    assert not torch.equal(guide.memory.prompts[0], guide.memory.prompts[1])


def test_another_number_or_size_of_images_is_refused_and_nothing_stays_patched(images):
    pipe, guide = tiny.build("FluxPipeline"), SPARKE(1.0)
    with pytest.raises(ValueError, match=r"makes samples \[3, 64, 16\], and the images are \[2, 64, 16\]"):
        guide.remember_images(pipe, images[:2], **arguments(pipe))
    with pytest.raises(ValueError, match=r"the images are \[3, 16, 16\] in its latent space"):
        guide.remember_images(pipe, images[:, :, :16, :16], **arguments(pipe))
    assert len(guide.memory) == 0
    assert "step" not in vars(pipe.scheduler)
    assert "prepare_latents" not in vars(pipe)


@pytest.mark.parametrize("guidance", [MMDGuidance, NoveltyGuidance])
@pytest.mark.parametrize("space", ["block", "context", "activations"])
def test_fixed_references_are_refused_where_features_differ_from_step_to_step(guidance, space):
    with pytest.raises(ValueError, match=f"features of space='{space}' differ from step to step; choose 'x0'"):
        guidance(torch.randn(4, 8), space=space)
