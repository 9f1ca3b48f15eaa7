"""Denoising loops with given model outputs, on a CPU or on a simulated device."""

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from kspec_guidance import KernelGuidance
from kspec_guidance.guidance.run import Run
from kspec_guidance.loop.context import CallContext, DenoiserCall
from kspec_guidance.loop.scheduler_hook import SchedulerHook

from .simulated import SimulatedDevice

SHAPE = (3, 4, 6, 6)
STEPS = 5
CFG = 4.0  # weight of classifier-free guidance in the given model outputs


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


def prompts(n: int = SHAPE[0]) -> Tensor:
    """Prompt features ``[n, 5]`` of norm 1, of which the first two are equal."""
    t = noise(99, n, 5)
    t[1] = t[0]
    return torch.nn.functional.normalize(t, dim=1)


class Loop:
    """Runs a guide on a scheduler whose model outputs are random, but pull samples toward a few fixed images.

    Attributes:
        reads: reads of device values in each step, by place.
        finishing: those at the end of the run.
    """

    def __init__(self, guide: KernelGuidance, scheduler: Any, device: SimulatedDevice | None = None, **settings: Any):
        self.guide, self.scheduler, self.device = guide, scheduler, device
        self.dtype = settings.get("dtype", torch.float32)
        self.prompts = settings.get("prompts", prompts())
        self.seed = settings.get("seed", 0)
        self.shape = settings.get("shape", SHAPE)
        self.reads: list[dict[str, int]] = []
        self.finishing: dict[str, int] = {}

    def _to(self, x: Tensor | None) -> Tensor | None:
        return x if x is None or self.device is None else x.to(self.device.device)

    def __call__(self) -> Tensor:
        device, scheduler, place = self.device, self.scheduler, None if self.device is None else self.device.device
        run = self.guide._run = Run(self.guide)
        given = self._to(self.prompts)
        call = DenoiserCall(nn.Identity(), {})
        hook = SchedulerHook(
            scheduler, run, lambda: CallContext(prompts=given, encoder="e"), self, denoiser_call=lambda: call
        )
        original, finish = scheduler.step, run.finish

        def uncounted(*args: Any, **kwargs: Any) -> Any:
            with contextlib.nullcontext() if device is None else device.not_counting():
                return original(*args, **kwargs)

        def finishing(context: Any) -> None:
            before = {} if device is None else dict(device.reads)
            if device is not None:
                device.reads.clear()
            finish(context)
            if device is not None:
                self.finishing = dict(device.reads)
                device.reads.clear()
                device.reads.update(before)

        run.finish = finishing  # type: ignore[method-assign]
        object.__setattr__(scheduler, "step", uncounted)
        hook.install()
        try:
            scheduler.set_timesteps(STEPS, device=place)
            scheduler.is_scale_input_called = True  # outputs are given, so no input is scaled
            x = self._to(
                (noise(self.seed, *self.shape) * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(self.dtype)
            )
            random = "generator" in inspect.signature(type(scheduler).step).parameters
            keywords = {"generator": torch.Generator().manual_seed(1)} if random else {}
            for k, t in enumerate(scheduler.timesteps):
                output = self._to(noise(100 + k, *self.shape).to(self.dtype))
                toward = output.roll(1, -1) / CFG
                call.outputs[:] = [output - CFG * toward, output - (CFG - 1) * toward]  # without the prompt, and with it
                if device is not None:
                    device.reads.clear()
                x = scheduler.step(output, t, x, return_dict=False, **keywords)[0]
                if device is not None:
                    self.reads.append(dict(device.reads))
        finally:
            hook.remove()
            object.__delattr__(scheduler, "step")
        return x if device is None else device.to_host(x)
