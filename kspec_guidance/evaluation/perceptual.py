"""Perceptual distances between images of one prompt, by packages that the user has installed: LPIPS and DreamSim."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.evaluation.image_sets import ImageSet, by_prompt, load_images
from kspec_guidance.kernels.distances import evenly_spaced
from kspec_guidance.statistics import Interval, jackknife
from kspec_guidance.utils.arguments import choices

__all__ = ["PERCEPTUAL_NAMES", "SIZES", "PairDistance", "mean_distance", "pair_distance", "perceptual_diversity"]

PERCEPTUAL_NAMES = ("lpips", "dreamsim")
SIZES = {"lpips": 256, "dreamsim": 224}  # side of their inputs
IMAGES_PER_PROMPT, IMAGES = 8, 160  # that are compared, at most: 28 pairs of a prompt
BATCH = 16

PairDistance = Callable[[Tensor, Tensor], Tensor]
"""Maps two batches of images ``[n, 3, size, size]`` in 0..1 to distances ``[n]``."""


def pair_distance(name: str, device: str = "cpu") -> PairDistance:
    """A perceptual distance by name; its package may download its weights on first use.

    Args:
        name: ``lpips`` (AlexNet, package ``lpips``) or ``dreamsim`` (package ``dreamsim``).
        device: of the model.

    Raises:
        ValueError: for an unknown name.
        ImportError: naming the package that is not installed.
    """
    if name not in PERCEPTUAL_NAMES:
        raise ValueError(f"unknown perceptual distance {name!r}; {choices(name, PERCEPTUAL_NAMES)}")
    try:
        module = import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} needs: pip install {name}") from error
    if name == "lpips":
        network: Any = module.LPIPS(net="alex", verbose=False).eval().to(device)
        return lambda a, b: network(a.to(device), b.to(device), normalize=True).flatten().cpu()
    model, _ = module.dreamsim(pretrained=True, device=device)
    return lambda a, b: model(a.to(device), b.to(device)).flatten().cpu()


def perceptual_diversity(images: ImageSet, distance: PairDistance, size: int = 256) -> tuple[Interval, int] | None:
    """Mean distance between two images of the same prompt, over prompts; larger is more varied.

    At most 8 images of a prompt and 160 images are compared, evenly spaced.

    Args:
        images: the set; its files are read again.
        distance: between images.
        size: side of its inputs in pixels.

    Returns:
        The mean with a 95% jackknife interval over prompts (equal to the mean for fewer than 4 prompts), and the number of
        pairs; None if no prompt has two images.

    Raises:
        SourceError: if the files are gone.
    """
    groups = by_prompt(images.prompts or [""] * len(images)).values()  # without prompts, all count as of one
    chosen = [[g[k] for k in evenly_spaced(len(g), IMAGES_PER_PROMPT)] for g in groups]
    chosen = [chosen[k] for k in evenly_spaced(len(chosen), IMAGES // IMAGES_PER_PROMPT)]
    if not chosen:
        return None
    pixels = _pixels(images, sorted(i for g in chosen for i in g), size)
    means, pairs = [], 0
    for group in chosen:
        means.append(mean_distance(distance, torch.stack([pixels[i] for i in group])))
        pairs += len(group) * (len(group) - 1) // 2
    values = torch.stack(means).double()
    if len(values) < 4:
        mean = float(values.mean())
        return Interval(mean, mean, mean, 0.0, 0.95), pairs
    return jackknife(torch.mean, values), pairs


@torch.no_grad()
def mean_distance(distance: PairDistance, pixels: Tensor) -> Tensor:
    """Mean distance of the pairs of different images, in batches.

    Args:
        distance: between images.
        pixels: of at least two images, 8-bit, ``[n, 3, size, size]``.

    Raises:
        ValueError: if the distance returns another shape, or values that are not finite.
    """
    both, found = torch.combinations(torch.arange(len(pixels))), []
    for pairs in both.split(BATCH):
        first, second = (pixels[k].float() / 255 for k in pairs.T)
        found.append(distance(first, second).float())
        if found[-1].shape != (len(pairs),) or not found[-1].isfinite().all():
            raise ValueError(
                f"the distance returned shape {list(found[-1].shape)} or values that are not finite for {len(pairs)} pairs"
            )
    return torch.cat(found).mean()


def _pixels(images: ImageSet, indices: list[int], size: int) -> dict[int, Tensor]:
    """8-bit pixels ``[3, size, size]`` of images by their index."""
    reader = ImageEmbedder(
        lambda x: x.flatten(1), size, f"pixels {size}", (0.0,) * 3, (1.0,) * 3, fingerprint=f"pixels {size}"
    )
    found = load_images(images.path, reader, only={images.names[i] for i in indices})
    rows = dict(zip(found.names, (255 * found.features).round().to(torch.uint8), strict=True))
    return {i: rows[images.names[i]].view(3, size, size) for i in indices}
