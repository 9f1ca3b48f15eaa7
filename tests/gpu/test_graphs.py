"""CUDA graphs of the guidance arithmetic: captured once, replayed with other samples."""

import pytest
import torch

from kspec_guidance import SPARKE, MemoryBank, MMDGuidance, NoveltyGuidance, VendiGuidance
from kspec_guidance.memory import CentroidMemory
from tests.gpu.steps import Step, captured, waits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SHAPE = (4, 4, 32, 32)
REFERENCE = torch.randn(20, *SHAPE[1:], generator=torch.Generator().manual_seed(7))
GUIDES = {
    "default": lambda memory: SPARKE(memory=memory),
    "safe": lambda memory: SPARKE.preset("safe", memory=memory),
    "published": lambda memory: SPARKE.preset("published", memory=memory),
    "pooled": lambda memory: SPARKE(space="pooled", memory=memory),
    "off the score": lambda memory: SPARKE(transforms=("off_score", "tangent", "bound", "fade"), memory=memory),
    "MMD": lambda memory: MMDGuidance(REFERENCE, memory=memory),
    "novelty": lambda memory: NoveltyGuidance(REFERENCE, memory=memory),
}
MEMORIES = {
    "empty": lambda: MemoryBank(),
    "on the device": lambda: MemoryBank(device="cuda"),
    "on the host": lambda: MemoryBank(device="cpu"),
    "in float16": lambda: MemoryBank(dtype=torch.float16),
    "means": lambda: CentroidMemory(50),
}


def samples(seed, n=SHAPE[0]):
    return torch.randn(n, *SHAPE[1:], generator=torch.Generator().manual_seed(seed)).cuda()


def prompts(n, seed=99):
    t = torch.nn.functional.normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)), dim=1)
    return t[:1].expand(n, -1).clone().cuda()


def make(name, memory, n=300):
    """A guide whose memory has ``n`` rows, unless it is the empty one."""
    found = MEMORIES[memory]()
    guide = GUIDES[name](found)
    if memory != "empty":
        rows = samples(5, n)
        rows = rows if name != "pooled" else guide.terms[0].space.features(rows, None, None)[0]
        found.bind(tuple(rows.shape[1:]), guide.terms[0].space.name, "e")
        found.add(rows, prompts(n))
    return guide


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", GUIDES)
def test_guidance_arithmetic_is_captured_and_replayed(name, memory):
    if memory != "empty" and name in ("MMD", "novelty") and memory != "on the device":
        pytest.skip("one memory is enough for this guide")
    first, second, x = samples(1), samples(2), samples(3)
    step = Step(make(name, memory), x, prompts(len(x)))
    graph, result = captured(step)
    for given in (first, second):
        x.copy_(given)
        graph.replay()
        replayed = result.clone()
        torch.testing.assert_close(replayed, step(), rtol=1e-4, atol=1e-6 * float(replayed.abs().max()))
    assert float(result.abs().max()) > 0


@pytest.mark.parametrize("memory", ["empty", "on the device", "on the host"])
@pytest.mark.parametrize("name", [*GUIDES, "vivid"])
def test_arithmetic_waits_for_the_device_once(name, memory, monkeypatch):
    """The step itself, without a pipeline: one read of finiteness, or that of the matrix whose eigenvalues are needed."""
    monkeypatch.setitem(GUIDES, "vivid", lambda memory: VendiGuidance(memory=memory))
    x = samples(1)
    step = Step(make(name, memory), x, prompts(len(x)), reading=True)
    with torch.no_grad():
        step(), step()
        found = waits(step)
    assert sum(found.values()) == 1, found
