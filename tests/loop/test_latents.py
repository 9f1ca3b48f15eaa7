"""Images encoded to samples of each family's denoising loop, and unpacked to latents of its autoencoder."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from kspec_guidance import SPARKE, MMDGuidance, encode_reference
from kspec_guidance.evaluation.embedders import pipeline_embedder
from kspec_guidance.loop.components import autoencoder_of, image_size
from kspec_guidance.loop.latents import encode, from_loop
from tests import tiny

IMAGES = [
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "Flux2Pipeline",
    "PixArtSigmaPipeline", "SanaPipeline", "Lumina2Pipeline", "QwenImagePipeline", "ZImagePipeline",
]  # fmt: skip
CLIPS = ["WanPipeline", "LTXPipeline", "CogVideoXPipeline"]


def random_images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def loop_shape(pipe, **kwargs):
    """Shape of one sample in the denoising loop, as recorded by a guide."""
    guide = SPARKE(0.0)
    with guide.attach(pipe):
        pipe(**tiny.call_kwargs(pipe, **kwargs))
    return guide.memory.shape


@pytest.mark.parametrize("name", IMAGES)
def test_images_round_trip_through_loop_layout(name):
    pipe = tiny.build(name)
    size = (64, 128) if name == "SanaPipeline" else (32, 64)
    divisor = 4 if name == "Lumina2Pipeline" else 1  # its factor of 8 is hard-coded, whatever the autoencoder's
    x = random_images(3, 3, *(s // divisor for s in size))
    reference = encode_reference(pipe, x, batch_size=2)
    kwargs = {"height": size[0], "width": size[1]}
    assert tuple(reference.shape[1:]) == loop_shape(pipe, **kwargs)
    vae = autoencoder_of(pipe)
    latents = encode(vae, x)
    decoded = from_loop(reference, pipe, size=size)
    torch.testing.assert_close(decoded.reshape(latents.shape), latents, atol=1e-4, rtol=1e-4)
    guide = MMDGuidance(reference, 0.5)
    with guide.attach(pipe):
        pipe(**tiny.call_kwargs(pipe, **kwargs))
    assert guide.report().steps_guided > 0
    features = pipeline_embedder(pipe, 64)(x[[0, 1, 0]] / 2 + 0.5)
    assert torch.equal(features[0], features[2])
    assert not torch.allclose(features[0], features[1], atol=1e-3)


@pytest.mark.parametrize("name", CLIPS)
def test_clips_match_loop_shape(name):
    pipe = tiny.build(name)
    arguments = tiny.call_kwargs(pipe)
    frames, height, width = (arguments[k] for k in ("num_frames", "height", "width"))
    reference = encode_reference(pipe, random_images(2, 3, frames, height, width))
    assert tuple(reference.shape[1:]) == loop_shape(pipe)


def test_image_encoder_with_video_decoder_accepts_images():
    vae = tiny.build("StableVideoDiffusionPipeline").vae
    assert encode(vae, random_images(2, 3, 16, 16)).ndim == 4


def test_from_loop_applies_channel_statistics():
    """The SDXL Playground weights have channel statistics: the decoder takes ``x std / scale + mean``."""
    pipe = tiny.build("StableDiffusionXLPipeline")
    channels = pipe.vae.config.latent_channels
    pipe.vae.register_to_config(latents_mean=[0.5] * channels, latents_std=[2.0] * channels, scaling_factor=0.25)
    x = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(from_loop(x, pipe), x * 2.0 / 0.25 + 0.5)


def test_image_size_of_pipelines(pipe):
    assert image_size(pipe) == (64, 64)
    flux = tiny.build("FluxPipeline")
    assert image_size(flux) == (flux.default_sample_size * flux.vae_scale_factor,) * 2
    assert image_size(tiny.build("WanPipeline")) == (480, 832)
    assert image_size(tiny.build("ZImagePipeline")) is None  # hard-coded in the pipeline


def test_encode_reference_accepts_folder_and_images(pipe, tmp_path):
    images = [Image.new("RGB", (90 + k, 64), (50 * k, 120, 10)) for k in range(4)]
    for k, image in enumerate(images):
        image.save(tmp_path / f"{k}.png")
    reference = encode_reference(pipe, tmp_path)
    assert reference.shape == (4, 9, 8, 8)
    torch.testing.assert_close(encode_reference(pipe, images), reference)
    assert encode_reference(pipe, images, size=(64, 128)).shape == (4, 9, 8, 16)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "a.png").write_bytes(b"hidden")
    assert encode_reference(pipe, tmp_path).shape == reference.shape
    (tmp_path / "z.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"z\.png cannot be read"):
        encode_reference(pipe, tmp_path)
    with pytest.raises(ValueError, match=r"pass size=\(height, width\)"):
        encode_reference(tiny.build("ZImagePipeline"), images)


def test_invalid_reference_raises(pipe):
    for none in ([], torch.zeros(0, 3, 64, 64)):
        with pytest.raises(ValueError, match="one image or more, got none"):
            encode_reference(pipe, none)
    with pytest.raises(TypeError, match="must be PIL images or one tensor"):
        encode_reference(pipe, ["a.png"])
    with pytest.raises(ValueError, match="is not a folder"):
        encode_reference(pipe, "nowhere")
    with pytest.raises(ValueError, match="leave size out"):
        encode_reference(pipe, torch.zeros(2, 3, 64, 64), size=64)
    with pytest.raises(ValueError, match=r"shape \[m, 3, h, w\]"):
        encode_reference(pipe, torch.zeros(2, 1, 64, 64))
    with pytest.raises(ValueError, match="divide 8-bit values"):
        encode_reference(pipe, torch.full((2, 3, 64, 64), 255.0))
    with pytest.raises(ValueError, match="has no image autoencoder"):
        encode_reference(tiny.build("IFPipeline"), torch.zeros(2, 3, 64, 64))


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (None, {}, "a folder, a list of PIL images or a tensor, got NoneType"),
        (Image.new("RGB", (64, 64)), {}, "a folder, a list of PIL images or a tensor, got Image"),
        (3, {}, "a folder, a list of PIL images or a tensor, got int"),
        ("", {}, "the name of the folder is empty"),
        ([Image.new("RGB", (64, 64))], {"size": 0}, "a side, or .height, width., in pixels, got 0"),
        ([Image.new("RGB", (64, 64))], {"size": (64, 64, 3)}, "in pixels, got .64, 64, 3."),
        ([Image.new("RGB", (64, 64))], {"size": "64"}, "in pixels, got '64'"),
        ([Image.new("RGB", (64, 64))], {"batch_size": -1}, "batch_size must be an integer of at least 1, got -1"),
        (torch.zeros(1, 3, 64, 64), {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_kinds_of_images_and_sizes_are_refused(images, settings, message, pipe):
    with pytest.raises((TypeError, ValueError), match=message):
        encode_reference(pipe, images, **settings)


def test_a_size_may_be_an_integer_of_numpy(pipe):
    images = [Image.new("RGB", (80, 64), "red")]
    assert torch.equal(encode_reference(pipe, images, size=np.int64(64)), encode_reference(pipe, images, size=64))


def test_encoder_that_overflows_in_half_precision_runs_in_float32():
    pipe, x = tiny.build("StableDiffusionXLPipeline"), random_images(2, 3, 32, 32)
    expected = encode_reference(pipe, x)
    pipe.vae.half()
    seen = []
    handle = pipe.vae.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    torch.testing.assert_close(encode_reference(pipe, x), expected, atol=2e-3, rtol=1e-2)
    assert seen == [torch.float32]
    assert pipe.vae.dtype == torch.float16
    handle.remove()
    torch.nn.init.constant_(pipe.vae.encoder.conv_out.bias, float("nan"))
    with pytest.raises(ValueError, match=r"AutoencoderKL returned NaN or infinite values in torch\.float16"):
        encode_reference(pipe, x)


def test_upcast_of_weights_in_pinned_memory_raises():
    pipe = tiny.build("StableDiffusionXLPipeline")
    pipe.vae.half()
    hook = SimpleNamespace(group=SimpleNamespace(stream=object(), onload_device="cpu"))
    pipe.vae._diffusers_hook = SimpleNamespace(hooks={"group_offloading": hook}, get_hook=lambda name: None)
    with pytest.raises(ValueError, match=r"must run in float32 .* use_stream=True keeps copies"):
        encode(pipe.vae, random_images(1, 3, 32, 32))
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float16}


def test_reference_encoded_in_inference_mode_is_a_normal_tensor(pipe):
    x = random_images(2, 3, 64, 64)
    with torch.inference_mode():
        reference = encode_reference(pipe, x)
    assert not reference.is_inference()
    assert torch.equal(reference, encode_reference(pipe, x))
    assert not reference.requires_grad
