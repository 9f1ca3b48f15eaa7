"""Moves of samples in half precision: the report has what rounding has left of them."""

import contextlib
import warnings

import diffusers
import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.loop.prediction import Prediction, predict, realised_move

from .loops import STEPS, Loop, noise
from .simulated import SimulatedDevice

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


class Recording(diffusers.FlowMatchEulerDiscreteScheduler):
    """Keeps the predictions x0 of the model outputs that its step is given."""

    def step(self, model_output, timestep, sample, **kwargs):
        self.x0 = [*getattr(self, "x0", []), predict(self, model_output, timestep, sample).x0]
        self.plain = [
            *getattr(self, "plain", []),
            predict(self, noise(99 + len(self.x0)).to(sample.dtype), timestep, sample).x0,
        ]
        return super().step(model_output, timestep, sample, **kwargs)


@HALF
@pytest.mark.parametrize("scale", [0.3, 1e-3])
def test_report_has_the_move_of_the_prediction_after_rounding(dtype, scale):
    scheduler, guide = Recording(), SPARKE(scale, stop=1.0, every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Loop(guide, scheduler, dtype=dtype)()
    for x0, plain, step in zip(scheduler.x0, scheduler.plain, guide.report().steps, strict=True):
        expected = ((x0 - plain).flatten(1).norm(dim=1) / plain.flatten(1).norm(dim=1)).mean()
        assert step.relative_move == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


@HALF
@pytest.mark.parametrize("make", [lambda s: SPARKE(s, stop=1.0, every=1), lambda s: SPARKE.published(s, every=1)],
                         ids=["x0", "latents"])  # fmt: skip
@pytest.mark.parametrize("device", [None, "cuda"])
def test_move_below_rounding_warns_and_the_report_has_what_is_left(dtype, make, device):
    simulated = None if device is None else SimulatedDevice(device)
    with simulated or contextlib.nullcontext():
        guide, scheduler = make(1e-12), diffusers.FlowMatchEulerDiscreteScheduler()
        loop = Loop(guide, scheduler, simulated, dtype=dtype)
        with pytest.warns(UserWarning, match="(nothing moved|samples moved by 1%).*: moves are below the rounding"):
            loop()
        assert all(sum(reads.values()) <= 1 for reads in loop.reads[1:])
        assert sum(loop.finishing.values()) <= 4
        with simulated.not_counting() if simulated else contextlib.nullcontext():
            left = [s.relative_move for s in guide.report().steps]
        assert len(left) == STEPS
        assert left.count(0) >= STEPS - 1  # a bfloat16 that is 0 takes any move


def test_partial_loss_warns_with_its_share_and_float32_does_not():
    def run(dtype):
        guide = SPARKE.published(1e-4, every=1)
        Loop(guide, diffusers.FlowMatchEulerDiscreteScheduler(), dtype=dtype)()
        return guide.report().mean_relative_move

    with pytest.warns(UserWarning, match=r"samples moved by [1-4]\d% of what was intended"):
        left = run(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert left < 0.5 * run(torch.float32)
        run(torch.float16)


def test_realised_move_of_outputs_with_further_channels_and_of_several_tensors():
    output, move = noise(0, 2, 8, 3, 3).bfloat16(), noise(1, 2, 4, 3, 3) * 1e-2
    prediction = Prediction(None, None, 0.5, 0.5, -0.5)
    found = realised_move(output, prediction.moved(output, move), move, prediction.slope)
    assert found.shape == move.shape
    assert 0 < (found - move).norm() < 0.5 * move.norm()
    several = realised_move([output], prediction.moved([output], [move]), [move], prediction.slope)
    assert torch.equal(several[0], found)
    assert not realised_move(output, output, move).any()
    moved = prediction.moved(output.float(), move)
    assert realised_move(output.float(), moved, move, prediction.slope) is move
