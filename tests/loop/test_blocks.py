import re
from pathlib import Path

import diffusers
import pytest
import torch

from kspec_guidance.loop.blocks import UNREGISTERED, hook_block, transformer_blocks
from tests.tiny.models import build_model


def test_blocks_of_flux_are_listed_in_order_with_what_they_return():
    blocks = transformer_blocks(build_model("FluxTransformer2DModel", num_layers=2, num_single_layers=1))
    assert [b.name for b in blocks] == ["transformer_blocks.0", "transformer_blocks.1", "single_transformer_blocks.0"]
    assert [(b.image, b.text) for b in blocks[:2]] == [(1, 0)] * 2
    assert [b.depth for b in blocks] == [0, 0.5, 1]


def test_blocks_that_refine_one_kind_of_tokens_are_left_out():
    assert {b.name.split(".")[0] for b in transformer_blocks(build_model("ZImageTransformer2DModel"))} == {"layers"}


@pytest.mark.parametrize("network", [lambda: torch.nn.Linear(2, 2), lambda: build_model("UNet2DConditionModel")])
def test_networks_without_known_blocks_are_refused(network):
    with pytest.raises(ValueError, match=r"has no transformer blocks .* choose space='activations'"):
        transformer_blocks(network())


def test_unregistered_blocks_are_classes_of_diffusers():
    folder = Path(diffusers.__file__).parent / "models" / "transformers"
    found = set(re.findall(r"^class (\w+)", "\n".join(p.read_text() for p in folder.glob("*.py")), re.MULTILINE))
    assert set(UNREGISTERED) <= found


class Halving(torch.nn.Module):
    def forward(self, hidden_states, encoder_hidden_states):
        return encoder_hidden_states / 2, hidden_states / 2


@pytest.mark.parametrize("compiled", [False, True])
def test_a_hook_replaces_what_the_block_returns_until_it_is_removed(compiled):
    from kspec_guidance.loop.blocks import TransformerBlock

    module = Halving()
    if compiled:
        module._compiled_call_impl = module._call_impl
    block = TransformerBlock(module, "blocks.0", 0, 1, 1, 0)
    x, t = torch.ones(1, 3, 2), torch.ones(1, 4, 2)
    handle = hook_block(block, lambda b, tokens: (tokens.again(tokens.image), tokens.text + 1))
    text, image = module(x, encoder_hidden_states=t)
    assert torch.equal(image, x / 4)
    assert torch.equal(text, t / 2 + 1)
    handle.remove()
    text, image = module(x, encoder_hidden_states=t)
    assert torch.equal(image, x / 2)
    assert torch.equal(text, t / 2)
    assert not module._forward_hooks
