"""Prompt features from the results of a pipeline's own encoder."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kspec_guidance.loop.context import DenoiserCall
from kspec_guidance.utils.messages import warn_user

__all__ = [
    "PROMPT_INPUTS",
    "condition_of",
    "condition_states",
    "masked_mean",
    "prompt_count",
    "prompt_major",
    "prompt_tensor",
    "prompts_of_samples",
    "repeat_rows",
    "token_mask",
    "wanted_rows",
]

INSTRUCT = "StableDiffusionInstructPix2PixPipeline"
PROMPT_INPUTS = ("encoder_hidden_states", "prompt_embeds", "cap_feats", "text_bth")  # names of prompts in denoisers' inputs
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
    """Unit-norm mean over tokens: ``[n, l, ..., c]`` and ``[n, l]`` to ``[n, c]``; ``[n, c]`` is only normalised."""
    embeds = embeds.detach().float()
    if embeds.ndim > 3 and mask is not None:
        embeds = embeds.flatten(2, -2).mean(2)
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


def prompt_count(given: dict[str, Any]) -> int | None:
    """Number of prompts in the arguments of an encoder; None if unknown."""
    prompt = given.get("prompt") if given.get("prompt") is not None else given.get("prompt_embeds")
    return 1 if isinstance(prompt, str) else len(prompt) if isinstance(prompt, list | Tensor) else None


def prompt_major(mask: Tensor, n: int | None) -> Tensor:
    """A mask ``[n r, l]`` of ``n`` prompts with the rows of each prompt together, as the embeddings have them.

    Some encoders (PixArt, Sana) return ``r`` copies of the masks of all prompts.
    """
    if not n or len(mask) % n:
        return mask
    copies = mask.unflatten(0, (-1, n))
    return copies[0].repeat_interleave(len(copies), dim=0) if bool((copies == copies[:1]).all()) else mask


def wanted_rows(rows: Tensor, given: dict[str, Any], pipe: Any = None) -> Tensor:
    """Rows of an encoder's result without the negative prompts that some encoders return with the others.

    Args:
        rows: ``[rows, ...]``.
        given: arguments of the encoder.
        pipe: the pipeline. Negative prompts come first (AudioLDM, Kandinsky, unCLIP); only InstructPix2Pix adds two copies
            of them at the end.
    """
    n = prompt_count(given)
    if n is None or not given.get("do_classifier_free_guidance", False):
        return rows
    per = next((given[k] for k in PER_PROMPT if isinstance(given.get(k), int)), 1)
    if len(rows) in (3 * n, 3 * n * per) and INSTRUCT in {cls.__name__ for cls in type(pipe).__mro__}:
        return rows[: len(rows) // 3]
    if len(rows) in (2 * n, 2 * n * per) and len(rows) != n * per:
        return rows[len(rows) // 2 :]
    return rows


def condition_states(inputs: dict[str, Any]) -> Tensor | None:
    """Prompt embeddings ``[rows, ..., c]`` among the inputs of a denoiser, by name; None if there are none."""
    return prompt_tensor((next((inputs[name] for name in PROMPT_INPUTS if inputs.get(name) is not None), None),))


def condition_of(call: DenoiserCall) -> tuple[Tensor, int | None] | None:
    """Prompt features from a denoiser's arguments, for pipelines without ``encode_prompt``.

    Means of its prompt embeddings ``[rows, c]`` and None, else one-hot class labels and the number of rows that have a
    class; the other rows, of unconditional predictions, have the last label. None if there are neither.
    """
    states, labels = condition_states(call.arguments), call.arguments.get("class_labels")
    if states is not None:
        return masked_mean(states, None), None
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim == 1:
        classes = getattr(getattr(call.module, "config", None), "num_embeds_ada_norm", None) or 1000
        found = labels.cpu()
        return nn.functional.one_hot(found, max(int(found.max()), classes) + 1).float(), int((found != classes).sum())
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


def prompts_of_samples(
    prompts: Tensor | None,
    n: int,
    device: torch.device,
    class_labels: bool = False,
    warn: Callable[[str], None] = warn_user,
) -> Tensor | None:
    """Prompt features ``[n, p]`` of ``n`` samples, from the prompts ``[rows, p]`` that a pipeline encoded.

    Warns:
        UserWarning: if the rows cannot be assigned to the samples; the result is then None.
    """
    if prompts is None:
        return None
    rows = len(prompts)
    if rows == 2 * n:  # with negative prompts, which come first; negative class labels come last
        prompts = prompts[:n] if class_labels else prompts[n:]
    elif rows > n and rows % n == 0:  # one row per frame, if the rows of each sample are equal
        frames = prompts.unflatten(0, (n, -1))
        prompts = frames[:, 0] if bool((frames == frames[:, :1]).all()) else prompts
    if n % len(prompts):
        warn(
            f"the pipeline encoded {rows} prompts for {n} samples, so prompts are ignored in this run: all samples are "
            "treated as samples of one prompt"
        )
        return None
    return repeat_rows(prompts.to(device), n)
