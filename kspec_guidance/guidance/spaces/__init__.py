"""Feature spaces in which samples are compared: latents, block means, pixels, embeddings, or the denoiser's hidden states.

A space maps samples of the loop to feature rows, and pulls gradients in these rows back. ``latents``, ``x0`` and
``pooled`` have negligible cost; ``pixels`` and ``embedder`` run the decoder; ``activations`` runs the first half of the
denoiser again; ``block`` and ``context`` move hidden states of a transformer inside its own call, at negligible cost.
"""

from kspec_guidance.guidance.spaces.activations import Activations
from kspec_guidance.guidance.spaces.base import FeatureSpace
from kspec_guidance.guidance.spaces.blocks import Block, Context
from kspec_guidance.guidance.spaces.latents import X0, Latents, Pooled
from kspec_guidance.guidance.spaces.pixels import Embedder, Pixels

__all__ = [
    "SPACES",
    "Activations",
    "Block",
    "Context",
    "Embedder",
    "FeatureSpace",
    "Latents",
    "Pixels",
    "Pooled",
    "X0",
    "make_space",
]

SPACES: dict[str, type[FeatureSpace]] = {
    "x0": X0,
    "latents": Latents,
    "pooled": Pooled,
    "pixels": Pixels,
    "embedder": Embedder,
    "activations": Activations,
    "block": Block,
    "context": Context,
}


def make_space(space: str | FeatureSpace) -> FeatureSpace:
    """The space with this name; a space is returned unchanged.

    Raises:
        ValueError: for an unknown name, or for ``embedder``, which needs a network.
    """
    if isinstance(space, FeatureSpace):
        return space
    if not isinstance(space, str) or space not in SPACES:
        raise ValueError(f"unknown space {space!r}; choose one of {', '.join(SPACES)}, or a FeatureSpace")
    if space == "embedder":
        raise ValueError(
            "space 'embedder' needs a network: space=kspec_guidance.guidance.spaces.Embedder(embedder=my_module)"
        )
    return SPACES[space]()
