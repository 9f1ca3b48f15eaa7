import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.guidance.spaces import Pixels
from kspec_guidance.loop.context import CallContext
from tests.emoji import draw
from tests.tiny import making


def test_pixel_gradients_agree_with_autograd_through_the_decoder(pipe):
    x = draw(pipe)
    rows, pullback = Pixels(size=8, chunk=2).features(x, CallContext(pipe))
    w = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        shown = pipe.vae.decode(leaf / pipe.vae.config.scaling_factor).sample
        y = torch.nn.functional.adaptive_avg_pool2d(shown, 8).flatten(1)
        (expected,) = torch.autograd.grad(y, leaf, w)
    torch.testing.assert_close(rows, y.detach())
    torch.testing.assert_close(pullback(w), expected)


def test_a_tiny_decoder_stands_in_for_the_pipelines_own(pipe):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    small = AutoencoderTiny(
        latent_channels=9, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    ).eval()
    moved = draw(pipe, guide=SPARKE(0.6, space=Pixels(vae=small)))
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, draw(pipe, guide=SPARKE(0.6, space="pixels")))


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "StableDiffusionXLPipeline", "WanPipeline"])
def test_pixels_are_decoded_from_each_familys_own_latents(name):
    pipe = making.build(name)
    more = {"height": 32, "width": 48}  # packed latents do not say which side is which
    shown = pipe(**making.call(pipe, output_type="pt", **more))
    shown = (shown.frames if hasattr(shown, "frames") else shown.images).float()
    guide = SPARKE(1e-9, space=Pixels(size=None), stop=1.0)
    with guide.attach(pipe):
        pipe(**making.call(pipe, **more))
    kept = guide.memory.x.view(len(shown), -1)
    expected = shown.transpose(1, 2) if shown.ndim == 5 else shown  # clips: channels first in the decoder
    torch.testing.assert_close((kept / 2 + 0.5).clamp(0, 1), expected.flatten(1), atol=2e-3, rtol=0)


def test_packed_latents_of_another_kind_are_refused_with_the_cure():
    pipe = making.build("LTXPipeline")
    with (
        pytest.raises(ValueError, match="cannot be unpacked here; choose space='x0' or 'pooled'"),
        SPARKE(0.3, space="pixels").attach(pipe),
    ):
        pipe(**making.call(pipe))
