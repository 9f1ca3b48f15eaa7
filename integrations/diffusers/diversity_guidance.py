# Copyright 2026 the kspec-guidance authors.
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with it.
# A copy is at http://www.apache.org/licenses/LICENSE-2.0. The file is distributed "as is", without warranties or
# conditions of any kind.

import math

import torch

from ..configuration_utils import register_to_config
from .classifier_free_guidance import ClassifierFreeGuidance
from .guider_utils import GuiderOutput

PROMPT_FIELDS = ("encoder_hidden_states", "prompt_embeds", "cap_feats")
LATENT_FIELDS = ("hidden_states", "latents", "latent_model_input")
DENOISER_ARGUMENTS = ("hidden_states", "x", "sample")


class DiversityGuidance(ClassifierFreeGuidance):
    """
    Classifier-free guidance, and diversity guidance within a batch (SPARKE): https://huggingface.co/papers/2506.10173

    The clean predictions of a batch repel each other, in proportion to a Gaussian kernel of their distances and of those
    of their prompts, so images of one prompt differ more and images of unrelated prompts are left alone. Only for
    flow-matching models, whose noise level is the timestep. A batch of one image is not changed.

    Args:
        guidance_scale (`float`, defaults to `7.5`):
            See [`ClassifierFreeGuidance`].
        diversity_scale (`float`, defaults to `0.4`):
            The largest move of a clean prediction at the first step, relative to its norm. `0.0` is classifier-free
            guidance alone.
        diversity_start (`float`, defaults to `0.0`):
            The fraction of the denoising steps from which on predictions repel each other.
        diversity_stop (`float`, defaults to `0.65`):
            The fraction of the denoising steps at which they stop. The moves fade until then.
        bandwidth (`float`, defaults to `0.5`):
            Bandwidth of the kernel of predictions, as a multiple of the median distance of the batch.
        prompt_bandwidth (`float`, defaults to `0.35`):
            Bandwidth of the kernel of prompts, whose features are means over tokens with norm 1.
        num_train_timesteps (`int`, defaults to `1000`):
            The timestep of pure noise.
        guidance_rescale (`float`, defaults to `0.0`), use_original_formulation (`bool`, defaults to `False`), start
            (`float`, defaults to `0.0`), stop (`float`, defaults to `1.0`), enabled (`bool`, defaults to `True`):
            See [`ClassifierFreeGuidance`].
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 7.5,
        diversity_scale: float = 0.4,
        diversity_start: float = 0.0,
        diversity_stop: float = 0.65,
        bandwidth: float = 0.5,
        prompt_bandwidth: float = 0.35,
        num_train_timesteps: int = 1000,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled)

        if diversity_scale < 0.0:
            raise ValueError(f"Expected `diversity_scale` to be at least 0.0, but got {diversity_scale}.")
        if not (0.0 <= diversity_start < diversity_stop <= 1.0):
            raise ValueError(
                "Expected `diversity_start` and `diversity_stop` to be between 0.0 and 1.0, the first one smaller, but got "
                f"{diversity_start} and {diversity_stop}."
            )
        if bandwidth <= 0.0 or prompt_bandwidth <= 0.0:
            raise ValueError(f"Expected bandwidths above 0.0, but got {bandwidth} and {prompt_bandwidth}.")

        self.diversity_scale = diversity_scale
        self.diversity_start = diversity_start
        self.diversity_stop = diversity_stop
        self.bandwidth = bandwidth
        self.prompt_bandwidth = prompt_bandwidth
        self.num_train_timesteps = num_train_timesteps
        self._latents: torch.Tensor | None = None
        self._prompts: torch.Tensor | None = None
        self._hook = None

    def prepare_inputs(self, data):
        self._latents = self._find(data.get, LATENT_FIELDS)
        self._prompts = self._find(data.get, PROMPT_FIELDS)
        return super().prepare_inputs(data)

    def prepare_inputs_from_block_state(self, data, input_fields):
        self._latents = getattr(data, "latents", None)
        fields = {k: v[0] if isinstance(v, tuple) else v for k, v in input_fields.items()}
        self._prompts = self._find(lambda name: getattr(data, fields.get(name) or "", None), PROMPT_FIELDS)
        return super().prepare_inputs_from_block_state(data, input_fields)

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        super().prepare_models(denoiser)
        if self._latents is None and self._is_diversity_enabled():
            self._hook = denoiser.register_forward_pre_hook(self._note_latents, with_kwargs=True)

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        super().cleanup_models(denoiser)

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        output = super().forward(pred_cond, pred_uncond)
        if self._is_diversity_enabled() and len(output.pred) > 1:
            output.pred = self._diversify(output.pred)
        return output

    def _diversify(self, pred: torch.Tensor) -> torch.Tensor:
        """The velocity whose clean predictions are moved apart."""
        if self._latents is None or self._latents.shape != pred.shape:
            found = None if self._latents is None else tuple(self._latents.shape)
            raise ValueError(
                f"Expected latents of the shape {tuple(pred.shape)} of the prediction, but found {found}. This pipeline's "
                "denoiser takes its latents in another form, which `DiversityGuidance` does not support."
            )
        sigma = torch.as_tensor(self._timestep).to(pred.device, torch.float32).flatten()[0] / self.num_train_timesteps
        latents, velocity = self._latents.float(), pred.float()
        clean = latents - sigma * velocity
        noise = latents - (1.0 - sigma) * clean
        move = diversity_move(
            clean.flatten(1), noise.flatten(1), self._prompts, self.bandwidth, self.prompt_bandwidth, self._strength()
        )
        return (velocity - move.view_as(clean) / sigma.clamp_min(1e-4)).to(pred.dtype)

    def _strength(self) -> float:
        """The scale at this step: it fades to 0 by a squared cosine."""
        position = (self._step / self._num_inference_steps - self.diversity_start) / (
            self.diversity_stop - self.diversity_start
        )
        return self.diversity_scale * math.cos(position * math.pi / 2) ** 2

    def _is_diversity_enabled(self) -> bool:
        if not self._enabled or self.diversity_scale == 0.0 or self._step is None:
            return False
        return self.diversity_start <= self._step / self._num_inference_steps < self.diversity_stop

    def _note_latents(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        found = args[0] if args else self._find(kwargs.get, DENOISER_ARGUMENTS)
        self._latents = torch.stack(list(found)) if isinstance(found, list | tuple) else found

    @staticmethod
    def _find(get, names):
        for name in names:
            value = get(name)
            value = value[0] if isinstance(value, tuple) else value
            if value is not None:
                return value
        return None


def diversity_move(
    clean: torch.Tensor,
    noise: torch.Tensor,
    prompts: torch.Tensor | None,
    bandwidth: float,
    prompt_bandwidth: float,
    strength: float,
) -> torch.Tensor:
    """
    The move of clean predictions `(batch, dim)` along the gradient of the order-2 entropy of their kernel matrix. The parts
    along the predictions and along the noise are left out. The one with the largest gradient moves by `strength` times its
    norm.
    """
    norm = clean.norm(dim=1, keepdim=True).clamp_min(1e-12)
    rows = clean / norm
    weights = 1.0 - torch.eye(len(rows), device=rows.device)
    features = prompt_features(prompts, len(rows))
    if features is not None:
        weights = weights * torch.exp(-squared_distances(features.to(rows)) / prompt_bandwidth**2)
    squares = squared_distances(rows)
    width = bandwidth * weighted_median(squares.sqrt(), weights)
    kernel = weights * torch.exp(-squares / width.square().clamp_min(1e-12))
    gradient = (kernel.sum(1, keepdim=True) * rows - kernel @ rows) / norm
    gradient = orthogonal(orthogonal(gradient, rows), noise)
    largest = gradient.norm(dim=1).amax().clamp_min(1e-12)
    related = weights.sum(1).amax().clamp_max(1.0)  # below 1 if no two prompts are alike
    return strength * related * norm * gradient / largest


def prompt_features(prompts, batch: int) -> torch.Tensor | None:
    """Means over tokens with norm 1 `(batch, dim)`, or None if the rows do not belong to the images."""
    if isinstance(prompts, list | tuple):
        prompts = torch.stack([p.float().mean(0) for p in prompts])[:, None] if prompts else None
    if not torch.is_tensor(prompts) or prompts.ndim < 2 or len(prompts) != batch:
        return None
    prompts = prompts.float().flatten(1, -2).mean(1) if prompts.ndim > 2 else prompts.float()
    return torch.nn.functional.normalize(prompts, dim=1)


def squared_distances(rows: torch.Tensor) -> torch.Tensor:
    rows = rows - rows.mean(0)
    products = rows @ rows.mT
    norms = products.diagonal()
    return (norms[:, None] + norms - 2.0 * products).clamp_min(0.0)


def weighted_median(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    weights = torch.where(values > 1e-3 * values.max(), weights, 0.0).flatten()
    values, order = values.flatten().sort()
    total = weights[order].cumsum(0)
    return values[torch.searchsorted(total, total[-1:] / 2).clamp_max(len(values) - 1)][0]


def orthogonal(rows: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    share = (rows * direction).sum(1, keepdim=True) / direction.square().sum(1, keepdim=True).clamp_min(1e-12)
    return rows - share * direction
