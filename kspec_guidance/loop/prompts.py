"""Prompt features from the results of a pipeline's own encoder."""

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from kspec_guidance.loop.context import DenoiserCall

__all__ = [
    "condition_of",
    "masked_mean",
    "prompt_tensor",
    "prompts_of_samples",
    "repeat_rows",
    "token_mask",
    "wanted_half",
]

PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


def token_mask(ids: Tensor, bos: int | None = None) -> Tensor:
    """Mask ``[n, l]`` of the prompt tokens: without the start token, and with only the first of the trailing equal tokens.

    >>> token_mask(torch.tensor([[0, 7, 9, 1, 1, 1]]), bos=0).int().tolist()
    [[0, 1, 1, 1, 0, 0]]
    """
    differs = ids != ids[:, -1:]
    position = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = torch.where(differs, position, -1).amax(1, keepdim=True)
    mask = position <= last + 1
    if bos is not None:
        mask = mask & ~((ids == bos) & (position == 0) & (mask.sum(1, keepdim=True) > 1))
    return mask


def masked_mean(embeds: Tensor, mask: Tensor | None) -> Tensor:
    """Unit-norm mean over tokens: ``[n, l, c]`` and ``[n, l]`` to ``[n, c]``; ``[n, c]`` is only normalised."""
    embeds = embeds.detach().float()
    if embeds.ndim > 2:
        embeds = embeds.flatten(1, -2)
        if mask is None:
            embeds = embeds.mean(1)
        else:
            weight = mask.to(embeds)[..., None]
            embeds = (embeds * weight).sum(1) / weight.sum(1).clamp_min(1)
    return embeds / embeds.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def prompt_tensor(result: Any) -> Tensor | None:
    """Prompt embeddings in the result of an ``encode_prompt``: the first tensor ``[n, ...]``, or the means of a list."""
    first = result
    while isinstance(first, tuple | list) and len(first):
        if all(isinstance(p, Tensor) and p.ndim == 2 for p in first) and isinstance(result, tuple) and first is not result:
            return torch.stack([p.float().mean(0) for p in first])  # one [l, c] per prompt, with different lengths
        first = first[0]
    return first if isinstance(first, Tensor) and first.ndim >= 2 and first.is_floating_point() else None


def wanted_half(features: Tensor, signature: inspect.Signature, args: tuple, kwargs: dict) -> Tensor:
    """Features without the negative prompts that some encoders return first (AudioLDM, Kandinsky, unCLIP)."""
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return features
    prompt = given.get("prompt")
    n = 1 if isinstance(prompt, str) else len(prompt) if isinstance(prompt, list) else None
    per = next((given[k] for k in PER_PROMPT if isinstance(given.get(k), int)), 1)
    doubled = given.get("do_classifier_free_guidance", False)
    if n is not None and doubled and len(features) in (2 * n, 2 * n * per) and len(features) != n * per:
        return features[len(features) // 2 :]
    return features


def condition_of(call: DenoiserCall) -> tuple[Tensor, bool] | None:
    """Prompt features from a denoiser's arguments, for pipelines without ``encode_prompt``, and whether they are labels.

    Means of ``encoder_hidden_states`` ``[rows, c]``, else one-hot class labels; None if there are neither.
    """
    states, labels = call.arguments.get("encoder_hidden_states"), call.arguments.get("class_labels")
    states = None if states is None else prompt_tensor((states,))
    if states is not None:
        return masked_mean(states, None), False
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim == 1:
        known = getattr(getattr(call.module, "config", None), "num_embeds_ada_norm", None) or 1000
        return nn.functional.one_hot(labels, max(int(labels.max()), known) + 1).float(), True
    return None


def repeat_rows(prompts: Tensor, n: int) -> Tensor:
    """Prompt features ``[rows, p]`` repeated to one row per sample ``[n, p]``.

    Raises:
        ValueError: if ``n`` is not a multiple of the number of rows.
    """
    if n % len(prompts):
        raise ValueError(
            f"{n} samples cannot be divided evenly among {len(prompts)} prompts; pass one prompt row per sample"
        )
    return prompts if len(prompts) == n else prompts.repeat_interleave(n // len(prompts), dim=0)


def prompts_of_samples(prompts: Tensor | None, n: int, device: torch.device, class_labels: bool = False) -> Tensor | None:
    """Prompt features ``[n, p]`` of ``n`` samples, from the prompts ``[rows, p]`` that a pipeline encoded.

    Warns:
        UserWarning: if the number of rows does not match the samples; the result is then None.
    """
    if prompts is None:
        return None
    rows = len(prompts)
    if rows == 2 * n:  # with negative prompts, which come first; negative class labels come last
        prompts = prompts[:n] if class_labels else prompts[n:]
    elif rows > n and rows % n == 0:  # one row per frame
        prompts = prompts.unflatten(0, (n, -1)).mean(1)
    if n % len(prompts):
        warnings.warn(
            f"the pipeline encoded {rows} prompts for {n} samples, so prompts are ignored in this run: all samples are "
            "treated as samples of one prompt",
            stacklevel=2,
        )
        return None
    return repeat_rows(prompts.to(device), n)
