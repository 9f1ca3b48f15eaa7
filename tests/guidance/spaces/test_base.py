import threading

import pytest
import torch
from torch import nn

from kspec_guidance import SPARKE
from kspec_guidance.guidance.spaces import Activations, Embedder, Pixels, Pooled
from kspec_guidance.guidance.spaces.base import by_autograd, constant_weights
from kspec_guidance.loop.context import CallContext, DenoiserCall
from tests.emoji import sample_latents


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 5)).to(dtype)


def gradient(net, x, w, **kwargs):
    return by_autograd(lambda p: net(p.to(net[0].weight.dtype)), x, **kwargs)[1](w)


def test_small_gradients_do_not_vanish_in_half_precision():
    x, w = torch.randn(3, 6), torch.randn(3, 5) * torch.tensor([[1e-9], [1.0], [1e-5]])
    expected = gradient(network(), x, w)
    for dtype in (torch.float16, torch.bfloat16):
        found = gradient(network(dtype), x, w, chunk=2)
        assert found.dtype == torch.float32
        directions = [d / d.norm(dim=1, keepdim=True) for d in (found, expected)]
        assert float((directions[0] * directions[1]).sum(1).min()) > 0.99
        torch.testing.assert_close(found.norm(dim=1), expected.norm(dim=1), rtol=0.1, atol=0)
    assert torch.equal(gradient(network(torch.float16), x, torch.zeros(3, 5)), torch.zeros(3, 6))


def test_nothing_is_saved_for_gradients_of_weights():
    net, x = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 5)), torch.randn(3, 6, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)), lambda t: t):
        with constant_weights():
            net(x)
        assert not {(3, 6), (3, 16)} & set(saved)  # the inputs of both layers
        net(x)
        assert {(3, 6), (3, 16)} <= set(saved)
    gradient(net, torch.randn(3, 6), torch.randn(3, 5))
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_gradient_of_weights_and_buffers_made_in_inference_mode():
    """Pipelines build caches, such as rotary tables, in their first forward pass, and offloading moves weights in it."""

    class Table(nn.Module):
        def forward(self, x):
            if not hasattr(self, "table"):
                self.table = torch.linspace(1, 2, x.shape[1])
            out = torch.zeros_like(x)
            out[:, :2] = x[:, :2] * self.table[:2]
            out[:, 2:].add_(x[:, 2:]).mul_(self.table[2:])
            return out

    def build():
        return nn.Sequential(nn.Linear(6, 6), Table(), nn.LayerNorm(6))

    torch.manual_seed(0)
    normal, x, w = build(), torch.randn(2, 6), torch.randn(2, 6)
    torch.manual_seed(0)
    with torch.inference_mode():
        net = build()
        net(x)
        rows, pullback = by_autograd(net, x.clone())
        found = pullback(w.clone())
    assert not rows.is_inference()
    assert not found.is_inference()
    torch.testing.assert_close(found, gradient(normal, x, w))
    torch.testing.assert_close(by_autograd(net, x)[1](w), found)


def test_backward_pass_uses_weights_of_forward_pass():
    """Group offloading replaces the data of parameters after each forward pass."""
    net, x, w = network(), torch.randn(2, 6), torch.randn(2, 5)
    expected = gradient(net, x, w)

    def offload(module, args, output):
        for p in module.parameters():
            p.data = torch.full_like(p, float("nan"))

    def run(p):
        kept = [q.data for q in net.parameters()]
        handle = net.register_forward_hook(offload)
        try:
            return net(p)
        finally:
            handle.remove()
            moved.append(kept)

    moved = []
    pullback = by_autograd(run, x)[1]
    for q, data in zip(net.parameters(), moved[0], strict=True):
        q.data = data
    torch.testing.assert_close(pullback(w), expected)


def test_gradient_checkpointing_is_supported():
    from torch.utils.checkpoint import checkpoint

    net, x, w = network(), torch.randn(2, 6), torch.randn(2, 5)
    found = by_autograd(lambda p: checkpoint(net, p, use_reentrant=False), x)[1](w)
    torch.testing.assert_close(found, gradient(net, x, w))


@pytest.mark.parametrize(("chunk", "evaluations"), [(None, 2), (3, 5), (1, 11)])
def test_last_chunk_is_evaluated_once_for_rows_and_gradient(chunk, evaluations):
    net, x, w, calls = network(), torch.randn(4, 6), torch.randn(4, 5), []
    rows, pullback = by_autograd(lambda p: calls.append(len(p)) or net(p), x, chunk=chunk)
    found = pullback(w)
    torch.testing.assert_close(rows, net(x))
    torch.testing.assert_close(found, by_autograd(net, x)[1](w))
    torch.testing.assert_close(pullback(w), found)  # rows that coincide are moved apart, and pulled back a second time
    assert len(calls) == evaluations


@pytest.mark.parametrize("compiled", ["module", "in place", "part", "method"])
def test_compiled_networks_are_not_compiled_again(compiled):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph

    net = network()
    if compiled == "module":
        net = torch.compile(net, backend=backend, fullgraph=True)
    elif compiled == "method":
        net.forward = torch.compile(net.forward, backend=backend, fullgraph=True)
    else:
        (net if compiled == "in place" else net[1]).compile(backend=backend, fullgraph=True)
    x, w, errors = torch.randn(2, 6), torch.randn(2, 5), []
    expected = gradient(network(), x, w)

    def work():
        try:
            torch.testing.assert_close(by_autograd(net, x, modules=[net])[1](w), expected)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors
    assert not compilations
    with torch.no_grad():
        net(x)
    assert compilations  # other calls are compiled as before


def spaces(pipe):
    embedder = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.Flatten()).requires_grad_(True)
    arguments = {
        "sample": torch.randn(2, 9, 8, 8), "timestep": torch.tensor(5),
        "encoder_hidden_states": torch.randn(2, 16, pipe.unet.config.cross_attention_dim),
    }  # fmt: skip
    call = DenoiserCall(pipe.unet, arguments)
    return [
        (Pooled(), None), (Pooled(project=7), None), (Pixels(size=4), None), (Embedder(embedder=embedder, size=32), None),
        (Activations(), call),
    ]  # fmt: skip


def test_spaces_in_inference_mode_match_normal_mode(pipe):
    x = torch.randn(2, 9, 8, 8)
    for space, denoiser_call in spaces(pipe):
        rows, pullback = space.features(x, CallContext(pipe), denoiser_call)
        w = torch.randn_like(rows)
        with torch.inference_mode():
            inner = denoiser_call and DenoiserCall(pipe.unet, {k: v.clone() for k, v in denoiser_call.arguments.items()})
            found, inner_pullback = space.features(x.clone(), CallContext(pipe), inner)
            assert torch.equal(found, rows)
            torch.testing.assert_close(inner_pullback(w.clone()), pullback(w))


@pytest.mark.slow
@pytest.mark.parametrize("space", ["pooled", "pixels", "activations"])
def test_guided_run_in_inference_mode(pipe, space):
    with torch.inference_mode():
        moved = sample_latents(pipe, guide=SPARKE(0.6, space=space))
    torch.testing.assert_close(moved, sample_latents(pipe, guide=SPARKE(0.6, space=space)))


def test_backward_passes_are_deterministic_on_cuda(pipe):
    """The backward passes of pooling and interpolation raise with ``use_deterministic_algorithms(True)`` on CUDA."""
    from torch.utils._python_dispatch import TorchDispatchMode

    called = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 9, 8, 8)
    for space, denoiser_call in spaces(pipe):
        rows, pullback = space.features(x, CallContext(pipe), denoiser_call)
        with Record():
            pullback(torch.ones_like(rows))
    assert called
    assert not [name for name in called if "backward" in name and ("pool" in name or "upsample_bi" in name)]
