"""Spaces, encoding and embedders with samples on a device without float64, and with networks that are offloaded from it."""

import pytest
import torch
from torch import nn

from kspec_guidance import SPARKE, encode_reference
from kspec_guidance.evaluation.embedders import ImageEmbedder, pipeline_embedder
from kspec_guidance.guidance.spaces import Activations, Embedder, Pixels, Pooled
from kspec_guidance.guidance.spaces.latents import _projection
from kspec_guidance.loop.context import CallContext, DenoiserCall
from kspec_guidance.utils.placement import execution_device
from tests import tiny
from tests.devices.simulated import SimulatedDevice

DEVICE = torch.device("mps:0")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def simulated():
    with SimulatedDevice(DEVICE.type):
        yield
    _projection.cache_clear()


def build(name="StableDiffusionPipeline", dtype=torch.float32):
    pipe = tiny.build(name)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype=dtype)
    return pipe


def samples():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def apply(space, x, call=CallContext(), denoiser_call=None):  # noqa: B008
    """Rows and a gradient, on the CPU; both are checked to be on the device of the samples, in float32."""
    rows, pullback = space.features(x, call, denoiser_call)
    d = pullback(torch.linspace(-1, 1, rows.numel()).view(rows.shape).to(x.device))
    assert rows.device == d.device == x.device
    assert rows.dtype == d.dtype == torch.float32
    return rows.cpu(), d.cpu()


def assert_same(found, expected, dtype=torch.float32):
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < (1e-5 if dtype == torch.float32 else 0.1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.GELU(), nn.Flatten(), nn.Linear(64, 8)).eval()


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 16, 4), (2, 4, 3, 8, 8)])
@pytest.mark.parametrize("space", [Pooled(3), Pooled(project=5)], ids=str)
def test_pooled(space, shape):
    x = torch.randn(*shape)
    assert_same(apply(space, x.to(DEVICE)), apply(space, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_pixels(name, dtype):
    pipe = build(name, dtype)
    x = samples() if name == "StableDiffusionPipeline" else torch.randn(2, 16, 16)
    expected = apply(Pixels(size=4), x, CallContext(pipe))
    pipe.vae.to(DEVICE)
    assert_same(apply(Pixels(size=4), x.to(DEVICE), CallContext(pipe)), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype):
    pipe, x = build(dtype=dtype), samples()
    states = torch.randn(4, 7, pipe.unet.config.cross_attention_dim).to(dtype)

    def arguments(device):
        sample = torch.cat([x, x]).to(device, dtype)
        return {"sample": sample, "timestep": torch.tensor(5).to(device), "encoder_hidden_states": states.to(device)}

    call = CallContext(pipe)
    expected = apply(Activations(), x, call, DenoiserCall(pipe.unet, arguments("cpu")))
    pipe.unet.to(DEVICE)
    found = apply(Activations(), x.to(DEVICE), call, DenoiserCall(pipe.unet, arguments(DEVICE)))
    assert_same(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", ["cpu", DEVICE], ids=str)
def test_embedder_computes_on_its_own_device_in_its_own_dtype(device, dtype):
    pipe, x = build(), samples()
    expected = apply(Embedder(embedder=network(), size=32), x, CallContext(pipe))
    pipe.vae.to(DEVICE)
    embedder = Embedder(embedder=network().to(device, dtype), size=32)
    assert_same(apply(embedder, x.to(DEVICE), CallContext(pipe)), expected, dtype)


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("space", [Pixels(size=4), Embedder(embedder=network(), size=32)], ids=["pixels", "embedder"])
@pytest.mark.filterwarnings("ignore:space=.* with enable_model_cpu_offload")
def test_decoding_with_offloaded_autoencoder(space, offload):
    pipe, x = build(), samples()
    expected = apply(space, x, CallContext(pipe))
    getattr(pipe, offload)(device=DEVICE)
    assert execution_device(pipe.vae, torch.device("cpu")) == DEVICE
    assert_same(apply(space, x.to(DEVICE), CallContext(pipe)), expected)


@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_encoding_with_offloaded_autoencoder(offload):
    pipe, images = build(), torch.rand(3, 3, 32, 32)
    expected, features = encode_reference(pipe, images * 2 - 1), pipeline_embedder(pipe)(images)
    getattr(pipe, offload)(device=DEVICE)
    offloaded = {p.device for p in pipe.vae.parameters()}
    found = encode_reference(pipe, images * 2 - 1, batch_size=2)
    assert found.device == DEVICE
    torch.testing.assert_close(found.cpu(), expected)
    assert {p.device for p in pipe.vae.parameters()} == offloaded
    embedder = pipeline_embedder(pipe)
    assert embedder.fingerprint == pipeline_embedder(build()).fingerprint
    torch.testing.assert_close(embedder(images), features)


@pytest.mark.slow
@pytest.mark.parametrize("space", ["x0", "pooled", "pixels", "activations"])
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.filterwarnings("ignore:space=.* with enable_model_cpu_offload")
def test_guided_pipeline_with_offloading(space, offload):
    pipe = build()
    getattr(pipe, offload)(device=DEVICE)
    offloaded, guide = {p.device for p in pipe.unet.parameters()}, SPARKE(0.5, space=space, stop=1.0)
    with guide.attach(pipe):
        pipe(**tiny.call_kwargs(pipe))
    assert guide.report().steps_guided == 4
    assert {p.device for p in pipe.unet.parameters()} == offloaded


def test_decoding_with_model_offload_warns():
    pipe, x = build(), samples().to(DEVICE)
    pipe.enable_model_cpu_offload(device=DEVICE)
    with pytest.warns(UserWarning, match="at each guided step the denoiser is moved to the CPU"):
        Pixels().features(x, CallContext(pipe))


def test_image_embedder_moves_images_to_its_device():
    images = torch.rand(3, 3, 32, 32)
    expected = ImageEmbedder(network(), 32, "a")(images)
    embedder = ImageEmbedder(network(), 32, "a", device=DEVICE, fingerprint="a")
    for device in ("cpu", DEVICE):
        found = embedder(images.to(device))
        assert found.device.type == "cpu"
        torch.testing.assert_close(found, expected)
