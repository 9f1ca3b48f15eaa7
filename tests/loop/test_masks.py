"""Inpainting: samples move only where the mask allows."""

import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.guidance.run import Run
from kspec_guidance.loop.layouts import Layout
from kspec_guidance.loop.masks import mask_of_samples
from tests import tiny

CHANNELS_OF_THE_MASK = {"unet": ("UNet2DConditionModel", {"in_channels": 9})}  # the mask is an input of the denoiser


def build(name, components=None):
    return tiny.build(name, **{k: tiny.build_component([cls], kw) for k, (cls, kw) in (components or {}).items()})


@pytest.mark.parametrize(
    ("name", "components"),
    [
        ("StableDiffusionInpaintPipeline", CHANNELS_OF_THE_MASK),
        ("FluxFillPipeline", None),
        ("StableDiffusion3ControlNetInpaintingPipeline", None),
    ],
)
@pytest.mark.parametrize("space", ["x0", "latents"])
def test_nothing_moves_outside_of_the_mask(name, components, space, monkeypatch):
    pipe, moves, move = build(name, components), [], Run._move
    monkeypatch.setattr(Run, "_move", lambda self, x, *rest: moves.append(move(self, x, *rest)) or moves[-1])
    with SPARKE(1.0, stop=1.0, space=space).attach(pipe):
        pipe(**tiny.call_kwargs(pipe))
    assert len(moves) >= 2
    for found in moves:  # the mask has rows 8 to 19 of 32
        image = found.norm(dim=2).unflatten(1, (8, 8)) if found.ndim == 3 else found.norm(dim=1)
        rows = image.norm(dim=2).sum(0).nonzero().flatten().tolist()
        assert rows == (list(range(2, 5)) if found.ndim == 3 else list(range(4, 10)))


@pytest.mark.parametrize("name", ["StableDiffusionInpaintPipeline", "FluxInpaintPipeline"])
def test_images_are_unchanged_outside_of_the_mask_where_the_pipeline_keeps_them(name):
    pipe = build(name)
    call = lambda: pipe(**tiny.call_kwargs(pipe))[0]  # noqa: E731
    plain = call()
    with SPARKE(1.0, stop=1.0).attach(pipe):
        moved = call()
    same = (moved == plain).flatten(1).all(0)
    assert 0.5 < float(same.float().mean()) < 1
    assert torch.equal(call(), plain)


def test_each_image_of_a_batch_has_its_own_mask():
    masks = torch.zeros(2, 1, 8, 16)
    masks[0, :, :4] = masks[1, :, :, 8:] = 1
    found = mask_of_samples(masks, Layout("sequence"), torch.zeros(4, 8, 3))  # 2 x 4 tokens
    assert found.int()[..., 0].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 1, 1]] * 2
    frames = mask_of_samples(masks, Layout("frames", group=3), torch.zeros(6, 4, 2, 4))
    assert frames.shape == (2, 1, 1, 2, 4)
    assert torch.equal(frames[:, 0, 0].flatten(1), found[:2, :, 0])


def test_masks_that_do_not_fit_are_ignored():
    mask = torch.ones(1, 1, 8, 8)
    assert mask_of_samples(None, Layout("image"), torch.zeros(2, 4, 4, 4)) is None
    assert mask_of_samples(mask, Layout("vector"), torch.zeros(2, 4)) is None
    assert mask_of_samples(mask.repeat(3, 1, 1, 1), Layout("image"), torch.zeros(2, 4, 4, 4)) is None
    assert mask_of_samples(mask, Layout("sequence"), torch.zeros(2, 7, 4)) is None
    frames = mask.repeat(2, 1, 1, 1)  # of one clip, not of two
    assert mask_of_samples(frames, Layout("video"), torch.zeros(2, 4, 2, 4, 4)) is None
