"""Pictures as samples of each family's loop: the shape the loop has, the autoencoder's own latents behind it, and back."""

import pytest
import torch
from PIL import Image

from kspec_guidance import SPARKE, MMDGuidance, encode_reference
from kspec_guidance.evaluation.embedders import pipeline_embedder
from kspec_guidance.loop.components import autoencoder_of, image_size
from kspec_guidance.loop.latents import encode, from_loop
from tests.tiny import making

IMAGES = [
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "Flux2Pipeline",
    "PixArtSigmaPipeline", "SanaPipeline", "Lumina2Pipeline", "QwenImagePipeline", "ZImagePipeline",
]  # fmt: skip
CLIPS = ["WanPipeline", "LTXPipeline", "CogVideoXPipeline"]


def pictures(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def own_shape(pipe, **more):
    """Of one sample in the loop, as a guide sees it."""
    guide = SPARKE(0.0)
    with guide.attach(pipe):
        pipe(**making.call(pipe, **more))
    return guide.memory.shape


@pytest.mark.parametrize("name", IMAGES)
def test_pictures_become_samples_of_the_loop_and_back(name):
    pipe = making.build(name)
    size = (64, 128) if name == "SanaPipeline" else (32, 64)
    part = 4 if name == "Lumina2Pipeline" else 1  # its factor of 8 is in its code, whatever the tiny autoencoder does
    x = pictures(3, 3, *(s // part for s in size))
    found = encode_reference(pipe, x, batch_size=2)
    more = {"height": size[0], "width": size[1]}
    assert tuple(found.shape[1:]) == own_shape(pipe, **more)
    vae = autoencoder_of(pipe)
    latents = encode(vae, x)
    back = from_loop(found, pipe, size=size)
    torch.testing.assert_close(back.reshape(latents.shape), latents, atol=1e-4, rtol=1e-4)
    with MMDGuidance(found, 0.5).attach(pipe):
        pipe(**making.call(pipe, **more))
    assert pipeline_embedder(pipe, 64)(x / 2 + 0.5).shape[0] == 3


@pytest.mark.parametrize("name", CLIPS)
def test_clips_become_samples_of_the_loop(name):
    pipe = making.build(name)
    arguments = making.call(pipe)
    frames, height, width = (arguments[k] for k in ("num_frames", "height", "width"))
    found = encode_reference(pipe, pictures(2, 3, frames, height, width))
    assert tuple(found.shape[1:]) == own_shape(pipe)


def test_an_encoder_of_pictures_with_a_decoder_of_clips_takes_pictures():
    vae = making.build("StableVideoDiffusionPipeline").vae
    assert encode(vae, pictures(2, 3, 16, 16)).ndim == 4


def test_scaled_and_shifted_statistics_are_those_of_the_pipeline():
    """SDXL's playground weights have channel statistics beside the scale: the decoder is given ``x std / scale + mean``."""
    pipe = making.build("StableDiffusionXLPipeline")
    c = pipe.vae.config.latent_channels
    pipe.vae.register_to_config(latents_mean=[0.5] * c, latents_std=[2.0] * c, scaling_factor=0.25)
    x = torch.randn(2, c, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(from_loop(x, pipe), x * 2.0 / 0.25 + 0.5)


def test_sizes_are_read_off_the_pipeline(pipe):
    assert image_size(pipe) == (64, 64)
    flux = making.build("FluxPipeline")
    assert image_size(flux) == (flux.default_sample_size * flux.vae_scale_factor,) * 2
    assert image_size(making.build("WanPipeline")) == (480, 832)
    assert image_size(making.build("ZImagePipeline")) is None  # it says so nowhere but in its code


def test_references_are_taken_from_a_folder_and_from_pictures(pipe, tmp_path):
    made = [Image.new("RGB", (90 + k, 64), (50 * k, 120, 10)) for k in range(4)]
    for k, image in enumerate(made):
        image.save(tmp_path / f"{k}.png")
    found = encode_reference(pipe, tmp_path)
    assert found.shape == (4, 9, 8, 8)
    torch.testing.assert_close(encode_reference(pipe, made), found)
    assert encode_reference(pipe, made, size=(64, 128)).shape == (4, 9, 8, 16)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.png").write_bytes(b"hidden")
    assert encode_reference(pipe, tmp_path).shape == found.shape
    (tmp_path / "z.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"z\.png cannot be read"):
        encode_reference(pipe, tmp_path)
    with pytest.raises(ValueError, match="give size="):
        encode_reference(making.build("ZImagePipeline"), made)


def test_bad_references_are_named(pipe):
    with pytest.raises(ValueError, match="is no folder"):
        encode_reference(pipe, "nowhere")
    with pytest.raises(ValueError, match="leave size out"):
        encode_reference(pipe, torch.zeros(2, 3, 64, 64), size=64)
    with pytest.raises(ValueError, match=r"shape \[m, 3, h, w\]"):
        encode_reference(pipe, torch.zeros(2, 1, 64, 64))
    with pytest.raises(ValueError, match="divide 8-bit values"):
        encode_reference(pipe, torch.full((2, 3, 64, 64), 255.0))
    with pytest.raises(ValueError, match="has no autoencoder"):
        encode_reference(making.build("IFPipeline"), torch.zeros(2, 3, 64, 64))
