import pytest
import torch
from torch import nn

from kspec_guidance.guidance.spaces.base import by_autograd, constant_weights


def network(dtype=torch.float32, activation=nn.SiLU, dims=2):
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    parts = [
        conv(3, 8, 3, padding=1), nn.GroupNorm(2, 8), activation(), conv(8, 8, 3, stride=2, padding=1, groups=2),
        nn.GroupNorm(4, 8, affine=False), activation(), conv(8, 4, 3, padding="same", dilation=2),
    ]  # fmt: skip
    return nn.Sequential(*parts).to(dtype)


def by_torch(net, x, w):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(net(leaf).flatten(1), leaf, w)[0]


@pytest.mark.parametrize(
    ("dtype", "activation", "dims"),
    [
        (torch.float32, nn.SiLU, 1), (torch.float32, nn.SiLU, 2), (torch.float32, nn.SiLU, 3),
        (torch.float32, lambda: nn.SiLU(inplace=True), 2), (torch.float32, nn.GELU, 2), (torch.bfloat16, nn.SiLU, 2),
    ],
)  # fmt: skip
def test_gradients_match_those_of_torch(dtype, activation, dims, g):
    net, x = network(dtype, activation, dims), torch.randn(2, 3, *[8] * dims, generator=g).to(dtype)
    rows, pullback = by_autograd(net, x)
    w = torch.randn(rows.shape, generator=g)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(rows, net(x).flatten(1).float())
    torch.testing.assert_close(pullback(w), by_torch(net, x, w.to(dtype)).float(), **close)
    torch.testing.assert_close(pullback(w), by_torch(net, x, w.to(dtype)).float(), **close)  # without the kept graph


def test_gradients_under_autocast(g):
    net, x = network(), torch.randn(2, 3, 8, 8, generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        rows, pullback = by_autograd(net, x)
        found = pullback(torch.ones_like(rows))
    torch.testing.assert_close(found, by_torch(net, x, torch.ones_like(rows)), rtol=0.1, atol=0.1)


def test_gradient_checkpointing(g):
    from torch.utils.checkpoint import checkpoint

    net, x = network(), torch.randn(2, 3, 8, 8, generator=g)
    rows, pullback = by_autograd(lambda p: checkpoint(net, p, use_reentrant=False), x)
    found = pullback(torch.ones_like(rows))
    torch.testing.assert_close(found, by_torch(net, x, torch.ones_like(rows)), rtol=1e-5, atol=1e-5)


def test_decoder_keeps_inputs_of_norms_only(pipe):
    """A block of a decoder is a norm, an activation and a convolution; torch keeps the input of each."""
    z, sizes = torch.randn(2, 9, 8, 8), {}

    def kept(run):
        saved = {}
        weights = {p.data_ptr() for p in pipe.vae.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
            out = run()
        assert out.requires_grad
        return sum(t.numel() for address, t in saved.items() if address not in weights)

    sizes["torch"] = kept(lambda: pipe.vae.decode(z.clone().requires_grad_()).sample)
    with constant_weights():
        sizes["ours"] = kept(lambda: pipe.vae.decode(z.clone().requires_grad_()).sample)
    assert sizes["ours"] < 0.4 * sizes["torch"]
