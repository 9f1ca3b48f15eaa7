"""Guidance on a CUDA device, with true kernels, copies and offloading: ``make gpu``. Skipped on machines without one."""

import diffusers
import numpy as np
import pytest
import torch

from kspec_guidance import SPARKE, MemoryBank, MMDGuidance, VendiGuidance, load_demo_pipeline
from kspec_guidance import functional as F
from kspec_guidance.guidance.spaces import Activations, Embedder, Pixels, Pooled
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import CentroidMemory
from tests import schedulers, tiny
from tests.emoji import sample_latents
from tests.gpu.steps import waits
from tests.tiny import pipeline_checks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CLASSES = [
    "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "QwenImagePipeline", "WanPipeline",
    "LTXPipeline", "SanaPipeline", "StableAudioPipeline", "PixArtSigmaPipeline", "CogVideoXPipeline",
]  # fmt: skip
SCORES = ["vendi_score", "rke_score", "scendi_score", "conditional_vendi_score", "conditional_rke_score"]
OFFLOADS = ["model", "sequential", "group"]


def load(dtype=torch.float32, device="cuda"):
    pipe = load_demo_pipeline(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe if device is None else pipe.to(device)


@pytest.fixture(scope="module")
def cuda_pipe():
    """The embedded pipeline on the device. Tests restore whatever they change."""
    return load()


@pytest.fixture(scope="module")
def reference():
    return torch.randn(16, 9, 8, 8, generator=torch.Generator().manual_seed(0))


def guides(reference):
    """Guides by name, each with an empty memory."""
    made = {name: SPARKE.preset(name) for name in SPARKE.PRESETS}
    made |= {
        "vendi, order 1": VendiGuidance(order=1.0),
        "mmd": MMDGuidance(reference),
        "sum": SPARKE() + MMDGuidance(reference),
    }
    return made


def check(pipe, guide, plain=None, atol=0.0, **kwargs):
    """Two guided calls: finite, different from plain, later ones repelled by the memory, and the pipeline restored."""
    plain = sample_latents(pipe, **kwargs) if plain is None else plain
    first = sample_latents(pipe, guide=guide, **kwargs)
    second = sample_latents(pipe, guide=guide, **kwargs)
    assert torch.isfinite(second).all()
    assert not torch.equal(first, plain)
    assert len(guide.memory) in (2 * len(first), 16, 16 + len(first), 16 + 2 * len(first))
    torch.testing.assert_close(sample_latents(pipe, **kwargs), plain, atol=atol, rtol=0)
    return first


# -- every guide, dtype, scheduler and space --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_guides_with_dtype(dtype, reference):
    pipe = load(dtype)
    plain = sample_latents(pipe)
    for name, guide in guides(reference).items():
        moved = check(pipe, guide, plain)
        assert moved.dtype == dtype, name
        assert moved.device.type == "cuda", name


def test_images_are_those_of_the_processor(cuda_pipe, reference):
    host = load(device="cpu")
    torch.testing.assert_close(sample_latents(cuda_pipe).cpu(), sample_latents(host), atol=2e-3, rtol=0)
    for name, guide in guides(reference).items():
        on_device = sample_latents(cuda_pipe, guide=guide).cpu()
        on_host = sample_latents(host, guide=guides(reference)[name])
        assert (on_device - on_host).abs().max() < 0.02, name


@pytest.mark.parametrize("name", schedulers.SETTINGS)
def test_guidance_with_scheduler(cuda_pipe, name):
    cls, settings = schedulers.SETTINGS[name]
    before = cuda_pipe.scheduler
    cuda_pipe.scheduler = getattr(diffusers, cls).from_config(before.config, **settings)
    try:
        check(cuda_pipe, SPARKE(0.6))
    finally:
        cuda_pipe.scheduler = before


def network():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 4), torch.nn.Flatten(), torch.nn.Linear(8 * 15 * 15, 32)).cuda()


SPACES = {
    "x0": lambda: "x0", "latents": lambda: "latents", "pooled": Pooled, "projection": lambda: Pooled(project=32),
    "pixels": Pixels, "chunks": lambda: Pixels(chunk=2), "embedder": lambda: Embedder(embedder=network(), size=64),
    "activations": Activations,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SPACES)
def test_guidance_in_space(name, dtype):
    if name == "embedder" and dtype != torch.float32:
        pytest.skip("the network of this test is in float32")
    check(load(dtype), SPARKE(0.6, space=SPACES[name]()))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pipeline_class_runs(name, dtype, monkeypatch):
    build = tiny.build
    monkeypatch.setattr(pipeline_checks.builders, "build", lambda n, **kw: build(n, **kw).to("cuda", dtype))
    verdict = pipeline_checks.check_pipeline(name)
    assert "attach" in verdict.ways


# -- memory, scores, precision, determinism ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", [MemoryBank, lambda: MemoryBank(device="cpu"), lambda: MemoryBank(device="cuda"),
lambda: MemoryBank(dtype=torch.float16), CentroidMemory])  # fmt: skip
def test_memories_move_between_devices(cuda_pipe, make, tmp_path):
    guide = SPARKE(0.6, memory=make())
    sample_latents(cuda_pipe, guide=guide)
    expected = sample_latents(cuda_pipe, guide=guide)
    guide.memory.save(tmp_path / "memory.safetensors")
    loaded = type(guide.memory).load(tmp_path / "memory.safetensors")
    assert len(loaded) == len(guide.memory)
    host = load(device="cpu")
    assert torch.isfinite(sample_latents(host, guide=SPARKE(0.6, memory=loaded))).all()
    assert expected.device.type == "cuda"


@pytest.mark.parametrize(
    "score", ["vendi_score", "rke_score", "scendi_score", "conditional_vendi_score", "conditional_rke_score"]
)
def test_scores_are_those_of_the_processor(score, g):
    x, prompts = torch.randn(64, 32, generator=g), torch.nn.functional.normalize(torch.randn(64, 8, generator=g))
    arguments = (x,) if score in ("vendi_score", "rke_score") else (x, prompts)
    expected = float(getattr(F, score)(*arguments))
    found = float(getattr(F, score)(*(a.cuda() for a in arguments)))
    assert found == pytest.approx(expected, rel=1e-4)


def test_comparisons_of_sets_are_those_of_the_processor(g):
    x, y = torch.randn(200, 16, generator=g), torch.randn(200, 16, generator=g) + 0.3
    kernel = GaussianKernel(4.0)
    assert float(F.mmd(x.cuda(), y.cuda(), kernel)) == pytest.approx(float(F.mmd(x, y, kernel)), rel=1e-4)
    expected, found = F.fidelity_scores(x, y), F.fidelity_scores(x.cuda(), y.cuda())
    for name in expected:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-4), name


def test_autocast_and_inference_mode_and_tf32(cuda_pipe):
    plain = sample_latents(cuda_pipe, guide=SPARKE(0.6))
    with torch.inference_mode():
        guide = SPARKE(0.6)
        torch.testing.assert_close(sample_latents(cuda_pipe, guide=guide).clone(), plain)
    sample_latents(cuda_pipe, guide=guide)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.isfinite(sample_latents(cuda_pipe, guide=SPARKE(0.6))).all()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert (sample_latents(cuda_pipe, guide=SPARKE(0.6)) - plain).abs().max() < 0.2
    finally:
        torch.set_float32_matmul_precision(before)


def test_deterministic_algorithms(cuda_pipe, reference, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        for name in guides(reference):
            a, b = (sample_latents(cuda_pipe, guide=guides(reference)[name]) for _ in range(2))
            assert torch.equal(a, b), name
        for name in ("pooled", "projection", "pixels", "activations"):
            assert torch.isfinite(sample_latents(cuda_pipe, guide=SPARKE(0.6, space=SPACES[name]()))).all()
    finally:
        torch.use_deterministic_algorithms(False)


# -- host reads -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SPARKE.PRESETS, "vendi, order 1", "mmd", "sum"])
def test_a_guided_step_waits_for_the_device_at_most_once(cuda_pipe, reference, name):
    """Beyond its steps a call waits a few times: prompts and timesteps, and the memory before and after."""
    guide = guides(reference)[name]
    sample_latents(cuda_pipe, guide=guide)
    sample_latents(cuda_pipe, guide=guide)
    plain = waits(lambda: sample_latents(cuda_pipe))
    moved = waits(lambda: sample_latents(cuda_pipe, guide=guide))
    steps = guide.report().steps_guided
    assert sum(moved.values()) - sum(plain.values()) <= steps + 10, f"{steps} steps: {moved - plain}"


# -- offloading, casting, compilation ---------------------------------------------------------------------------------


def offload(pipe, kind):
    if kind == "model":
        pipe.enable_model_cpu_offload()
    elif kind == "sequential":
        pipe.enable_sequential_cpu_offload()
    else:
        pipe.enable_group_offload(onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=False)
    return pipe


@pytest.mark.parametrize("space", ["x0", "pooled", "pixels", "activations"])
@pytest.mark.parametrize("kind", OFFLOADS)
def test_guidance_with_offloading(kind, space):
    pipe = offload(load(torch.float16, device=None), kind)
    check(pipe, SPARKE(0.6, space=SPACES[space]()))


@pytest.mark.parametrize("kind", OFFLOADS)
def test_references_with_offloading(kind, cuda_pipe):
    from kspec_guidance import encode_reference

    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = encode_reference(cuda_pipe, images)
    pipe = offload(load(device=None), kind)
    found = encode_reference(pipe, images)
    torch.testing.assert_close(found.cpu(), expected.cpu(), atol=1e-3, rtol=1e-3)
    sample_latents(pipe, guide=MMDGuidance(found))


def test_layerwise_casting():
    pipe = load(torch.bfloat16)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    for name in ("x0", "activations"):
        check(pipe, SPARKE(0.6, space=SPACES[name]()))


def test_upcast_decoder():
    pipe = load(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    check(pipe, SPARKE(0.6, space="pixels"))
    assert pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_denoiser(mode, in_place):
    pipe = load()
    plain = sample_latents(pipe)
    if in_place:
        pipe.unet.compile(fullgraph=True, mode=mode)
    else:
        pipe.unet = torch.compile(pipe.unet, fullgraph=True, mode=mode)
    compiled = sample_latents(pipe)
    torch.testing.assert_close(compiled, plain, atol=0.02, rtol=0)
    moved = sample_latents(pipe, guide=SPARKE(0.6))
    assert torch.isfinite(moved).all()
    assert np.abs((moved - compiled).cpu().numpy()).max() > 0.01
