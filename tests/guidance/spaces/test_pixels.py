import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.guidance.spaces import Pixels
from kspec_guidance.loop.context import CallContext
from tests import tiny
from tests.emoji import sample_latents


def test_pixel_pullback_matches_autograd(pipe):
    x = sample_latents(pipe)
    rows, pullback = Pixels(size=8, chunk=2).features(x, CallContext(pipe))
    w = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        decoded = pipe.vae.decode(leaf / pipe.vae.config.scaling_factor).sample
        y = torch.nn.functional.adaptive_avg_pool2d(decoded, 8).flatten(1)
        (expected,) = torch.autograd.grad(y, leaf, w)
    torch.testing.assert_close(rows, y.detach())
    torch.testing.assert_close(pullback(w), expected)


def test_pixels_accept_other_decoder(pipe):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    decoder = AutoencoderTiny(
        latent_channels=9, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ).eval()
    moved = sample_latents(pipe, guide=SPARKE(0.6, space=Pixels(vae=decoder)))
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, sample_latents(pipe, guide=SPARKE(0.6, space="pixels")))


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "StableDiffusionXLPipeline", "WanPipeline"])
def test_pixels_match_pipeline_output(name):
    pipe = tiny.build(name)
    size = {"height": 32, "width": 48}  # packed latents do not record the aspect ratio
    decoded = pipe(**tiny.call_kwargs(pipe, output_type="pt", **size))
    decoded = (decoded.frames if hasattr(decoded, "frames") else decoded.images).float()
    guide = SPARKE(1e-9, space=Pixels(size=None), stop=1.0)
    with guide.attach(pipe):
        pipe(**tiny.call_kwargs(pipe, **size))
    recorded = guide.memory.x.view(len(decoded), -1)
    expected = decoded.transpose(1, 2) if decoded.ndim == 5 else decoded  # video decoders put channels first
    torch.testing.assert_close((recorded / 2 + 0.5).clamp(0, 1), expected.flatten(1), atol=2e-3, rtol=0)


def test_unsupported_packed_latents_raise():
    pipe = tiny.build("LTXPipeline")
    with (
        pytest.raises(ValueError, match="cannot be unpacked; choose space='x0' or 'pooled'"),
        SPARKE(0.3, space="pixels").attach(pipe),
    ):
        pipe(**tiny.call_kwargs(pipe))
