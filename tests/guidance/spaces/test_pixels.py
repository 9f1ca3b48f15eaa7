import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.guidance.spaces import Embedder, Pixels
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


def seen_dtypes(vae, fail=False):
    """Dtypes of the decoder's inputs, appended at each call; with ``fail`` the decoder raises."""
    seen = []

    def note(module, args):
        seen.append(args[0].dtype)
        if fail:
            raise RuntimeError("out of memory")

    vae.decoder.register_forward_pre_hook(note)
    return seen


def test_decoder_that_overflows_in_half_precision_runs_in_float32():
    pipe, x = tiny.build("StableDiffusionXLPipeline"), torch.randn(2, 4, 8, 8)
    expected, pullback = Pixels(size=4).features(x, CallContext(pipe))
    gradient = pullback(torch.ones_like(expected))
    pipe.vae.half()
    seen = seen_dtypes(pipe.vae)
    rows, pullback = Pixels(size=4).features(x, CallContext(pipe))
    torch.testing.assert_close(rows, expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(pullback(torch.ones_like(rows)), gradient, atol=2e-3 * float(gradient.abs().max()), rtol=0.1)
    assert set(seen) == {torch.float32}
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float16}
    pipe.vae.register_to_config(force_upcast=False)
    Pixels(size=4).features(x, CallContext(pipe))
    assert seen[-1] == torch.float16
    for dtype in (torch.bfloat16, torch.float32):  # they do not overflow
        pipe.vae.to(dtype)
        pipe.vae.register_to_config(force_upcast=True)
        Pixels(size=4).features(x, CallContext(pipe))
        assert seen[-1] == dtype


def test_decoder_is_cast_back_after_an_error():
    pipe = tiny.build("StableDiffusionXLPipeline")
    pipe.vae.half()
    seen_dtypes(pipe.vae, fail=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        Pixels().features(torch.randn(2, 4, 8, 8), CallContext(pipe))
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoder_with_float8_storage(dtype):
    pipe, x = tiny.build("StableDiffusionPipeline"), torch.randn(2, 4, 8, 8)
    pipe.vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    seen = seen_dtypes(pipe.vae)
    rows, pullback = Pixels(size=4).features(x, CallContext(pipe))
    assert torch.isfinite(pullback(rows)).all()
    assert set(seen) == {dtype}
    assert any(p.dtype == torch.float8_e4m3fn for p in pipe.vae.parameters())


def test_decoder_that_returns_nan_is_named():
    pipe, x = tiny.build("StableDiffusionPipeline"), torch.randn(2, 4, 8, 8)
    torch.nn.init.constant_(pipe.vae.decoder.conv_out.bias, float("inf"))
    with pytest.raises(ValueError, match=r"AutoencoderKL returned NaN or infinite values in torch.float32: run it in"):
        Pixels().final(x, CallContext(pipe))
    with pytest.raises(ValueError, match="AutoencoderKL returned NaN or infinite values"):
        Pixels().features(x, CallContext(pipe))


def test_embedder_resamples_as_interpolation(pipe):
    """A module with an attribute ``mean`` of its own is called as it is."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.tensor(0.5))

        def forward(self, y):
            return (y - self.mean).flatten(1)

    x = sample_latents(pipe)
    pixels = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample.detach()
    for size in (24, 64, 96):
        expected = torch.nn.functional.interpolate(
            (pixels / 2 + 0.5).clamp(0, 1), (size, size), mode="bilinear", antialias=True, align_corners=False
        )
        found = Embedder(embedder=Network(), size=size).features(x, CallContext(pipe))[0]
        torch.testing.assert_close(found, (expected - 0.5).flatten(1), atol=1e-5, rtol=1e-5)
