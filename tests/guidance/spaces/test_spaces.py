import numpy as np
import pytest
import torch

from kspec_guidance import SPARKE, KernelGuidance, MemoryBank
from kspec_guidance.guidance.spaces import SPACES, X0, Activations, Embedder, Latents, Pixels, Pooled, make_space
from kspec_guidance.guidance.spaces.activations import middle_of
from kspec_guidance.loop.context import CallContext
from kspec_guidance.objectives import RKE
from tests import tiny
from tests.emoji import sample_latents


@pytest.mark.parametrize("space", [X0(), Latents(), Pooled(2), Pooled(3), Pooled(project=7)], ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 12), (3, 40, 6), (3, 6, 40), (3, 4, 8, 8), (3, 4, 5, 6, 6), (2, 1, 2, 3, 4, 5)], ids=str
)
def test_pullback_is_adjoint_of_features(space, shape, g):
    x, v = torch.randn(2, *shape, generator=g, dtype=torch.float64)
    rows, pullback = space.features(x, CallContext())
    assert rows.shape[0] == shape[0]
    if space.shape(x) is not None:
        assert rows.shape[1] == torch.Size(space.shape(x)).numel()
    w = torch.randn(rows.shape, generator=g, dtype=torch.float64)
    difference = space.features(x + v, CallContext())[0] - rows  # these spaces are linear
    assert float((difference * w).sum()) == pytest.approx(float((v * pullback(w).view(v.shape)).sum()), rel=1e-4, abs=1e-6)


def tiny_embedder():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 8, 8), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(256, 8))


FACTORIES = {
    "x0": lambda: "x0",
    "latents": lambda: "latents",
    "pooled": lambda: "pooled",
    "projected": lambda: Pooled(project=64),
    "pixels": lambda: "pixels",
    "embedder": lambda: Embedder(embedder=tiny_embedder(), size=64),
    "activations": lambda: "activations",
    "activations of named block": lambda: Activations("down_blocks.1"),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_space_guides_and_uses_its_memory(pipe, name):
    plain = sample_latents(pipe)
    assert torch.equal(sample_latents(pipe, guide=SPARKE(0.0, space=FACTORIES[name]())), plain)
    guide = SPARKE(0.6, space=FACTORIES[name]())
    moved = sample_latents(pipe, guide=guide)
    assert torch.isfinite(moved).all()
    assert not torch.equal(moved, plain)
    assert len(guide.memory) == 3
    assert not torch.equal(sample_latents(pipe, guide=guide), moved)  # the memory of the first call repels the second
    assert len(guide.memory) == 6
    assert guide.memory.space == guide.terms[0].space.label
    assert not any(p.grad is not None for m in (pipe.unet, pipe.vae) for p in m.parameters())
    assert torch.equal(sample_latents(pipe), plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pooled", "pixels", "embedder", "activations"])
def test_guidance_increases_diversity_in_its_space(pipe, name):
    from kspec_guidance import functional as F
    from kspec_guidance.kernels import GaussianKernel, median_bandwidth

    idle, guide = (SPARKE(s, space=FACTORIES[name](), stop=1.0) for s in (1e-9, 1.0))  # the first has no measurable effect
    sample_latents(pipe, n=6, guide=idle)
    sample_latents(pipe, n=6, guide=guide)
    rows = [m.memory.x for m in (idle, guide)]
    if name == "activations":
        rows = [r.unflatten(1, (6, -1))[:, -1] for r in rows]
    normalized = [r / r.norm(dim=1, keepdim=True) for r in rows]
    kernel = GaussianKernel(median_bandwidth(normalized[0]))
    assert F.vendi_score(normalized[1], kernel) > 1.1 * F.vendi_score(normalized[0], kernel)


@pytest.mark.parametrize("name", ["FluxPipeline", "QwenImagePipeline", "StableDiffusion3Pipeline", "WanPipeline",
"LTXPipeline", "StableAudioPipeline"])  # fmt: skip
@pytest.mark.parametrize("space", ["pooled", "activations"])
def test_spaces_support_sequences_video_and_audio(name, space):
    pipe = tiny.build(name)
    guide = SPARKE(1.0, space=space, stop=1.0)
    with guide.attach(pipe):
        output = pipe(**tiny.call_kwargs(pipe))
    assert guide.report().steps_guided == 4
    assert len(guide.memory) == len(output[0])


def linear(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5)).requires_grad_(False)


@pytest.mark.parametrize(
    "make",
    [
        lambda k: Pooled(project=16, seed=k),
        lambda k: Embedder(embedder=linear(k), size=8),
        lambda k: Activations(["down_blocks.0", "down_blocks.1"][k]),
    ],
    ids=["projection", "network", "block"],
)
def test_spaces_of_one_name_and_width_have_separate_memories(pipe, tmp_path, make):
    guide = SPARKE(0.3, space=make(0))
    sample_latents(pipe, guide=guide, steps=2)
    guide.memory.save(tmp_path / "memory")
    with pytest.raises(ValueError, match="memory holds entries of space"):
        sample_latents(pipe, guide=SPARKE(0.3, space=make(1), memory=MemoryBank.load(tmp_path / "memory")), steps=2)
    again = MemoryBank.load(tmp_path / "memory")
    sample_latents(pipe, guide=SPARKE(0.3, space=make(0), memory=again), steps=2)
    older = MemoryBank.load(tmp_path / "memory")
    older.space = older.space.partition("(")[0]  # as in files of earlier versions
    sample_latents(pipe, guide=SPARKE(0.3, space=make(0), memory=older), steps=2)
    assert len(again) == len(older) == 6
    assert len(guide.memory) == 3


def test_calls_of_other_numbers_of_steps_are_told_so(pipe):
    guide = SPARKE(0.3, space="activations")
    sample_latents(pipe, guide=guide, steps=2)
    with pytest.raises(ValueError, match="features of 2 guided steps, and this call has 3"):
        sample_latents(pipe, guide=guide, steps=4)


def test_spaces_have_separate_memories(pipe):
    bank = MemoryBank()
    sample_latents(pipe, guide=SPARKE(0.3, memory=bank))
    with pytest.raises(ValueError, match="entries of space 'x0', this guide works in 'pooled'"):
        sample_latents(pipe, guide=SPARKE(0.3, space="pooled", memory=bank))
    combined = SPARKE(0.3) + SPARKE(0.3, space="pooled")
    assert len(combined.memories) == 2
    sample_latents(pipe, guide=combined)
    assert [m.space for m in combined.memories] == ["x0", "pooled"]


def test_invalid_space_raises(pipe):
    with pytest.raises(ValueError, match="unknown space 'pixel'"):
        make_space("pixel")
    with pytest.raises(ValueError, match=r"unknown space \['x0'\]; choose one of"):
        make_space(["x0"])
    with pytest.raises(ValueError, match="needs a network"):
        make_space("embedder")
    with pytest.raises(ValueError, match="differentiable callable"):
        Embedder()
    with pytest.raises(ValueError, match=r"grid must be .*, got 0"):
        Pooled(0)
    with pytest.raises(ValueError, match=r"project must be .*, got True"):
        Pooled(project=True)
    assert type(Pooled(np.int64(2)).grid) is int
    with pytest.raises(ValueError, match="has no vae"):
        Pixels().features(torch.zeros(1, 3, 4, 4), CallContext())
    with pytest.raises(ValueError, match="needs the arguments of the denoiser"):
        Activations().features(torch.zeros(1, 3, 4, 4), CallContext())
    with pytest.raises(ValueError, match="no middle block"):
        middle_of(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="give start= and stop= instead of sigma_interval="):
        KernelGuidance(RKE(), 0.3, space="activations", sigma_interval=(0.1, 1.0))
    assert set(SPACES) == {"x0", "latents", "pooled", "pixels", "embedder", "activations", "block", "context"}
