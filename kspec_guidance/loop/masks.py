"""Masks of inpainting: where samples may move."""

import torch
from torch import Tensor

from kspec_guidance.loop.layouts import Layout

__all__ = ["mask_of_samples"]


def mask_of_samples(mask: Tensor | None, layout: Layout, sample: Tensor) -> Tensor | None:
    """Where samples may move: 1 at latents with a pixel of the mask, else 0. None if that is unknown.

    Args:
        mask: pixels to repaint ``[1 or n, 1, h, w]`` in 0..1, with 1 for those to repaint; None without inpainting.
        layout: of the samples.
        sample: samples in the layout of the loop.

    Returns:
        A tensor that can be multiplied with packed samples ``[n, ...]``.

    >>> mask = torch.zeros(1, 1, 32, 32)
    >>> mask[..., :8, 16:] = 1
    >>> mask_of_samples(mask, Layout("image"), torch.zeros(2, 4, 4, 4))[0, 0].int().tolist()
    [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    >>> mask_of_samples(mask, Layout("sequence"), torch.zeros(2, 4, 16))[0].flatten().int().tolist()  # 2 x 2 tokens
    [0, 1, 0, 0]
    """
    if mask is None or mask.ndim != 4 or mask.shape[1] != 1 or layout.kind not in ("image", "frames", "video", "sequence"):
        return None
    n = layout.count(sample)
    if n % len(mask) or (layout.kind == "video" and sample.shape[2] > 1 and len(mask) > 1):  # those of a clip's frames
        return None
    if layout.kind == "sequence":  # tokens of an image, row by row
        rows = round((sample.shape[1] * mask.shape[2] / mask.shape[3]) ** 0.5)
        size = [rows, sample.shape[1] // max(rows, 1)]
        if rows * size[1] != sample.shape[1]:
            return None
    else:
        size = list(sample.shape[-2:])
    allowed = torch.nn.functional.adaptive_max_pool2d(mask.float(), size) >= 0.5
    allowed = allowed.to(sample.device, torch.float32).repeat(n // len(mask), 1, 1, 1)
    if layout.kind == "sequence":
        return allowed.flatten(1)[..., None]
    return allowed if layout.kind == "image" else allowed[:, :, None]
