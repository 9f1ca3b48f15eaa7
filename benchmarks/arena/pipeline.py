"""A minimal conditional diffusers pipeline: a denoiser, a scheduler and a table of prompts."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn


class Conditions(nn.Module):
    """Prompts by name, each with a vector ``[c]``; the last row is the empty prompt."""

    def __init__(self, names: list[str], vectors: Tensor):
        super().__init__()
        self.names = names
        self.vectors = nn.Parameter(vectors.clone(), requires_grad=vectors.requires_grad)

    def rows(self, prompts: list[str]) -> Tensor:
        return self.vectors[[self.names.index(p) if p else len(self.names) for p in prompts]][:, None]


class ConditionPipeline(DiffusionPipeline):
    """``pipe(prompt, num_images_per_prompt=n)``: a loop as in Stable Diffusion, classifier-free guidance included.

    ``unet(sample, timestep, encoder_hidden_states=..., return_dict=False)[0]`` is what the scheduler's ``step`` takes.
    """

    def __init__(self, unet: nn.Module, scheduler: Any, conditions: Conditions):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, conditions=conditions)
        self.guidance_scale = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        own = getattr(self.unet, "shape", None)
        if own is not None:
            return own
        size = self.unet.config.sample_size
        return self.unet.config.in_channels, size, size

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guidance_scale > 1

    def check_inputs(self, prompt: str | list[str]) -> None:
        unknown = [p for p in ([prompt] if isinstance(prompt, str) else prompt) if p and p not in self.conditions.names]
        if unknown:
            raise ValueError(f"unknown prompts {unknown}; known are {self.conditions.names}")

    def encode_prompt(self, prompt: list[str]) -> tuple[Tensor, Tensor]:
        return self.conditions.rows(prompt), self.conditions.rows([""] * len(prompt))

    def prepare_latents(self, n: int, generator: Any) -> Tensor:
        generators = generator if isinstance(generator, list) else [generator] * n
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in generators])
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        generator: Any = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        self.check_inputs(prompt)
        self.guidance_scale = guidance_scale
        prompts = [p for p in ([prompt] if isinstance(prompt, str) else prompt) for _ in range(num_images_per_prompt)]
        positive, negative = self.encode_prompt(prompts)
        noise = self.prepare_latents(len(prompts), generator)
        x = noise if latents is None else latents
        self.scheduler.set_timesteps(num_inference_steps)
        states = torch.cat([negative, positive]) if self.do_classifier_free_guidance else positive
        for t in self.scheduler.timesteps:
            both = torch.cat([x, x]) if self.do_classifier_free_guidance else x
            out = self.unet(both, t, encoder_hidden_states=states, return_dict=False)[0]
            if self.do_classifier_free_guidance:
                uncond, cond = out.chunk(2)
                out = uncond + guidance_scale * (cond - uncond)
            x = self.scheduler.step(out, t, x, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return x
