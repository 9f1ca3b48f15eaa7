"""Values that are not finite: they never reach the result of a run, nor the memory."""

import contextlib
from dataclasses import dataclass

import diffusers
import pytest
import torch

from kspec_guidance import SPARKE, KernelGuidance
from kspec_guidance.guidance.spaces.latents import X0
from kspec_guidance.loop.prediction import Prediction, keep_finite
from kspec_guidance.objectives import RKE

from .loops import Loop, noise
from .simulated import SimulatedDevice


@dataclass(frozen=True)
class Broken(X0):
    """A space whose gradient is not finite, like that of a decoder that overflows."""

    direct = False

    def features(self, x, call, denoiser_call=None):
        return x.flatten(1), lambda g: torch.full_like(x, float("inf"))


class Spoilt(Loop):
    """Model outputs are NaN from the third step on."""

    def _to(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super()._to(x * float("nan") if x is not None and x.ndim == 4 and self.calls > 4 else x)


@pytest.mark.parametrize("preset", ["default", "vivid", "published"])
@pytest.mark.parametrize("stop", [0.2, 1.0])
def test_nan_of_model_is_an_error_at_its_step(preset, stop):
    guide = SPARKE.preset(preset, stop=stop, every=1)
    with pytest.raises(ValueError, match=r"NaN or infinite values in the prediction at step [34] of 5"):
        Spoilt(guide, diffusers.DDIMScheduler(clip_sample=False))()
    assert not len(guide.memory)


@pytest.mark.parametrize("device", [None, "cuda"])
def test_move_that_is_not_finite_is_an_error(device):
    guide = KernelGuidance(RKE(), 0.5, space=Broken())
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    simulated = None if device is None else SimulatedDevice(device)
    with simulated or contextlib.nullcontext(), pytest.raises(ValueError, match="in the move at step 1 of 5"):
        Loop(guide, scheduler, simulated)()
    assert not len(guide.memory)


def test_result_that_is_not_finite_is_an_error_without_memory_too():
    guide = SPARKE(stop=0.0)
    guide.remember = False

    class Scheduler(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            x, *others = super().step(model_output, timestep, sample, **kwargs)
            return (x * float("inf") if timestep == self.timesteps[-1] else x, *others)

    with pytest.raises(ValueError, match="NaN or infinite values in the result"):
        Loop(guide, Scheduler(clip_sample=False))()


def test_move_that_overflows_float16_is_left_out_for_its_row():
    output, overflows = noise(0, 2, 4, 3, 3).half(), []
    move = noise(1, 2, 4, 3, 3)
    move[0] *= 1e3
    prediction = Prediction(None, None, 1.0, 1e-2, -1e-2)
    found = keep_finite(prediction.moved(output, move), output, overflows)
    assert torch.equal(found[0], output[0])
    assert torch.equal(found[1], prediction.moved(output, move)[1])
    assert [bool(flag) for flag in overflows] == [True]


def test_run_in_float16_with_overflow_warns_and_stays_finite():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1e-3)  # the last noise levels are below 1e-3
    guide = SPARKE.published(scale=200.0, space="x0", every=1)
    with pytest.warns(UserWarning, match="overflowed float16"):
        x = Loop(guide, scheduler, dtype=torch.float16)()
    assert torch.isfinite(x).all()
    assert len(guide.memory) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_with_range_of_float32_are_not_checked(dtype):
    output, overflows = noise(0, 2, 4, 3, 3).to(dtype), []
    assert keep_finite(output, output, overflows) is output
    assert not overflows
