"""The guides by name: SPARKE, MMDGuidance and NoveltyGuidance, and the settings their papers used."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.guidance.guide import KernelGuidance
from kspec_guidance.guidance.spaces import FeatureSpace
from kspec_guidance.guidance.term import DEFAULT_CHAIN
from kspec_guidance.kernels import GaussianKernel, Kernel, PolynomialKernel
from kspec_guidance.memory import Memory
from kspec_guidance.objectives import MMD, PROMPT_BANDWIDTH, ConditionalRKE, Novelty, Objective, Vendi

__all__ = ["PRESETS", "MMDGuidance", "NoveltyGuidance", "SPARKE", "make_preset"]


class SPARKE(KernelGuidance):
    """More variety: every image away from the others, and from earlier ones, *of similar prompts*.

    Ascends conditional RKE (Jalali, Lei, Gohari, Farnia 2025, arXiv 2506.10173), the conditional Renyi entropy of order 2.

    Args:
        scale: largest move of a step relative to the norm of the prediction, at the start of the guided interval, from
            where it fades. See docs/arena.md for what it buys, and ``kspec-guidance tune`` to find it for a pipeline.
        kernel: of samples scaled to norm 1; Gaussian at half the median distance of the pairs at hand by default, at the
            median for other orders than 2.
        prompt_kernel: of prompt features of norm 1; Gaussian with bandwidth 0.35 by default.
        space, start, stop, every, chain, memory, seed: see :class:`~kspec_guidance.guidance.KernelGuidance`.
        order: of the entropy. 2 sums over every memory row that matters, whatever the kind of memory. Others need
            eigenvalues of the batch and the 128 memory rows nearest to it; 0.5 finds more modes (docs/arena.md).
        features, prompt_features: random Fourier features of the two kernels, for a memory of constant size; order 2 only.

    Raises:
        ValueError: for settings outside their ranges, or ``features`` with another order than 2.
    """

    def __init__(
        self,
        scale: float = 1.0,
        kernel: Kernel | None = None,
        prompt_kernel: Kernel | None = None,
        space: str | FeatureSpace = "x0",
        start: float = 0.0,
        stop: float = 0.65,
        every: int = 1,
        memory: Memory | None = None,
        *,
        order: float = 2.0,
        chain: Sequence[str] = DEFAULT_CHAIN,
        features: RandomFourierFeatures | None = None,
        prompt_features: RandomFourierFeatures | None = None,
        **more: Any,
    ):
        kernel, prompt_kernel = kernel or GaussianKernel(), prompt_kernel or GaussianKernel(PROMPT_BANDWIDTH)
        if order == 2:
            objective: Objective = ConditionalRKE(
                kernel=kernel, features=features, prompt_kernel=prompt_kernel, prompt_features=prompt_features
            )
        elif features is not None:
            raise ValueError(f"features= keeps sums of squared kernels, which is order 2; got order={order!r}")
        else:
            objective = Vendi(kernel, order, prompt_kernel)
        super().__init__(objective, scale, space, start, stop, every, chain=chain, memory=memory, **more)

    @classmethod
    def published(cls, scale: float = 0.1, **more: Any) -> "SPARKE":
        """The paper's chain: noisy latents, fixed bandwidths, the gradient rescaled to the norm at every 10th step."""
        settings: dict[str, Any] = {"space": "latents", "stop": 1.0, "every": 10, "chain": ("rescale",), "order": 2.0}
        return cls(scale, GaussianKernel(0.7), GaussianKernel(0.35), **(settings | more))


class MMDGuidance(KernelGuidance):
    """Toward a reference set: what is generated, memory included, comes to be distributed as the references are.

    Descends the squared maximum mean discrepancy (Sani, Jamali, Jalali, Farnia 2026). That compares whole distributions: a
    batch of one prompt against references of many subjects is told to be as varied as they are first of all. To move a
    style or a domain, generate several prompts in one batch, or share one memory over many calls.

    Args:
        reference: ``[m, ...]`` samples in the pipeline's own latent space (:func:`encode_reference` makes them).
        scale: move per step, relative to the norm of the prediction.
        kernel: Gaussian at the median distance of the references by default; the papers' cubic kernel spends most of its
            gradient on the norm of the latents, and moved skin tones on the embedded pipeline hardly at all.
        reference_prompts: prompt features of the references; each prompt is then drawn to those of similar prompts.
        prompt_kernel: for these; Gaussian with bandwidth 0.35 by default.
        features, prompt_features: random Fourier features of the two kernels (Gaussian or Laplacian), for a memory of
            constant size.
        space, start, stop, every, chain, memory, seed: see :class:`~kspec_guidance.guidance.KernelGuidance`.
    """

    def __init__(
        self,
        reference: Tensor,
        scale: float = 0.7,
        kernel: Kernel | None = None,
        space: str | FeatureSpace = "x0",
        start: float = 0.0,
        stop: float = 0.6,
        every: int = 1,
        memory: Memory | None = None,
        *,
        reference_prompts: Tensor | None = None,
        prompt_kernel: Kernel | None = None,
        features: RandomFourierFeatures | None = None,
        prompt_features: RandomFourierFeatures | None = None,
        chain: Sequence[str] = ("off_score", "rescale"),
        **more: Any,
    ):
        objective = MMD(
            reference,
            kernel=kernel or GaussianKernel(),
            reference_prompts=reference_prompts,
            prompt_kernel=prompt_kernel or GaussianKernel(PROMPT_BANDWIDTH),
            features=features,
            prompt_features=prompt_features,
        )
        super().__init__(objective, scale, space, start, stop, every, chain=chain, memory=memory, **more)

    @classmethod
    def published(cls, reference: Tensor, scale: float = 1e-3, **more: Any) -> "MMDGuidance":
        """The paper's chain: cubic kernel, noisy latents, the gradient rescaled to the norm at every step."""
        settings: dict[str, Any] = {"space": "latents", "stop": 1.0, "chain": ("rescale",), "kernel": PolynomialKernel()}
        return cls(reference, scale, **(settings | more))


class NoveltyGuidance(KernelGuidance):
    """Away from a fixed reference set: what must not be repeated.

    Args:
        reference: ``[m, ...]`` samples in the pipeline's own latent space.
        reference_prompts: prompt features of the references; only those of similar prompts then repel.
        scale, kernel, space, start, stop, every, chain, memory, seed: as for :class:`SPARKE`.
    """

    def __init__(
        self,
        reference: Tensor,
        scale: float = 1.0,
        kernel: Kernel | None = None,
        space: str | FeatureSpace = "x0",
        start: float = 0.0,
        stop: float = 0.65,
        every: int = 1,
        memory: Memory | None = None,
        *,
        reference_prompts: Tensor | None = None,
        prompt_kernel: Kernel | None = None,
        features: RandomFourierFeatures | None = None,
        prompt_features: RandomFourierFeatures | None = None,
        chain: Sequence[str] = DEFAULT_CHAIN,
        **more: Any,
    ):
        objective = Novelty(
            kernel=kernel or GaussianKernel(),
            features=features,
            prompt_kernel=prompt_kernel or GaussianKernel(PROMPT_BANDWIDTH),
            prompt_features=prompt_features,
            reference=reference,
            reference_prompts=reference_prompts,
        )
        super().__init__(objective, scale, space, start, stop, every, chain=chain, memory=memory, **more)


PRESETS: dict[str, dict[str, Any]] = {  # of SPARKE; docs/which-method.md says what each is for
    "default": {},
    "safe": {"scale": 0.5},
    "vivid": {"order": 0.5, "scale": 1.5},
    "few-step": {"order": 0.5, "scale": 0.6, "stop": 0.6},
    "published": {},
}


def make_preset(name: str, scale: float | None = None, **more: Any) -> SPARKE:
    """A guide by the name of its purpose; see :meth:`~kspec_guidance.guidance.KernelGuidance.preset`.

    Raises:
        ValueError: for another name; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    settings = PRESETS[name] | more | ({} if scale is None else {"scale": scale})
    return SPARKE.published(**settings) if name == "published" else SPARKE(**settings)
