import torch

from kspec_guidance.guidance.spaces import Activations
from kspec_guidance.guidance.spaces.activations import wanted_rows
from kspec_guidance.loop.context import CallContext, DenoiserCall


def test_activation_pullback_matches_autograd(pipe):
    unet, g = pipe.unet, torch.Generator().manual_seed(0)
    h = torch.randn(4, 9, 8, 8, generator=g)  # with classifier-free guidance the conditional half is last
    states = torch.randn(4, 16, unet.config.cross_attention_dim, generator=g)
    arguments = {"sample": h, "timestep": torch.tensor(500), "encoder_hidden_states": states, "return_dict": False}
    rows, pullback = Activations().features(h[2:], CallContext(pipe), DenoiserCall(unet, arguments))
    outputs = []
    handle = unet.mid_block.register_forward_hook(lambda m, a, o: outputs.append(o))
    leaf = h[2:].clone().requires_grad_()
    with torch.enable_grad():
        unet(leaf, 500, states[2:])
        y = outputs[0].flatten(2).mean(2)
        w = torch.randn(rows.shape, generator=g)
        (expected,) = torch.autograd.grad(y, leaf, w)
    handle.remove()
    torch.testing.assert_close(rows, y.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pullback(w), expected, atol=1e-6, rtol=1e-3)


def test_wanted_rows_are_last_rows_of_call(g):
    x = torch.randn(4, 3, generator=g)
    selected = wanted_rows(
        {"sample": x, "timestep": torch.tensor(3), "added_cond_kwargs": {"text_embeds": x}, "parts": (x, x)}, 2
    )
    assert torch.equal(selected["sample"], x[2:])
    assert torch.equal(selected["added_cond_kwargs"]["text_embeds"], x[2:])
    assert torch.equal(selected["parts"][1], x[2:])
    assert selected["timestep"].ndim == 0
    assert torch.equal(wanted_rows({"sample": x}, 4)["sample"], x)
