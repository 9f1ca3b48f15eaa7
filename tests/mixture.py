"""A Gaussian mixture with a closed-form denoiser, and a denoising loop for any diffusers scheduler."""

import inspect

import torch
from torch import Tensor


class GaussianMixture:
    """Modes ``[k, d]`` with standard deviation ``std``.

    ``sharpen`` is an exponent of the mode weights in the posterior, similar to classifier-free guidance.
    """

    def __init__(self, dim: int = 32, modes: int = 16, std: float = 0.1, sharpen: float = 1.6, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.centres = torch.randn(modes, dim, generator=g)
        self.centres = self.centres / self.centres.norm(dim=1, keepdim=True) * dim**0.5
        weights = torch.logspace(0, -1.48, modes)  # from 0.2 to 0.006
        self.weights, self.std, self.sharpen, self.dim = weights / weights.sum(), std, sharpen, dim

    def x0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """``E[x0 | x]`` for ``x = alpha x0 + sigma noise``, ``[n, d]``."""
        variance = (alpha * self.std) ** 2 + sigma**2
        d2 = (x[:, None] - alpha * self.centres[None]).square().sum(-1)
        responsibilities = (self.sharpen * self.weights.log() - d2 / (2 * variance)).softmax(1)
        gain = alpha * self.std**2 / variance
        return (responsibilities[..., None] * (self.centres[None] + gain * (x[:, None] - alpha * self.centres[None]))).sum(
            1
        )

    def modes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the nearest mode of each sample, and whether it is within 1.5 typical radii."""
        distances = torch.cdist(x.flatten(1), self.centres)
        return distances.argmin(1), distances.amin(1) < 1.5 * self.std * self.dim**0.5

    def sample(self, n: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
        component = torch.multinomial(
            self.weights if weights is None else weights, n, replacement=True, generator=generator
        )
        return self.centres[component] + self.std * torch.randn(n, self.dim, generator=generator)


def denoise(model: GaussianMixture, scheduler, n: int, steps: int, seed: int) -> Tensor:
    """Sample ``[n, d]`` with any diffusers scheduler; the model output has the scheduler's prediction type."""
    from kspec_guidance.loop.prediction import parametrisation_of

    scheduler.set_timesteps(steps)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, model.dim, generator=g).view(n, 1, 1, model.dim) * getattr(scheduler, "init_noise_sigma", 1.0)
    parametrisation, kwargs = parametrisation_of(scheduler), {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        kwargs["generator"] = g
    for t in scheduler.timesteps:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        alpha, sigma = parametrisation.levels(scheduler, t, {})
        x0 = model.x0(x.flatten(1), alpha, sigma).view_as(x)
        noise = (x - alpha * x0) / max(sigma, 1e-8)
        prediction = getattr(scheduler.config, "prediction_type", "flow")
        out = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x0, "sample": x0}.get(prediction, noise - x0)
        x = scheduler.step(out, t, x, return_dict=False, **kwargs)[0]
    return x.flatten(1)
