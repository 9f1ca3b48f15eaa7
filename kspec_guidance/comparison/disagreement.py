"""PromptSplit: the prompts on which two models disagree."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance.comparison.joint import check_counts, joint_rows, largest_first, simplest_turn, strongest
from kspec_guidance.functional.inputs import KernelLike, as_kernel, check_matrix, on_host
from kspec_guidance.functional.novelty import check_eta
from kspec_guidance.kernels import Kernel

__all__ = ["PromptSplit", "prompt_split"]

NEAR_PROMPT = 0.8  # nearness to the prompts of a mode, relative to the mode's own samples, from which prompts are the same
ROUNDING = 1e-9  # values below it, of shares that add up to 1, are rounding errors


@dataclass(frozen=True)
class PromptSplit:
    """What one of two models makes of its prompts more often than the other.

    Attributes:
        values: ``[modes]``, largest first: how much larger the share of each mode is; 0 where nothing is left.
        indices_a: for each mode, samples of the first model, the strongest first. Modes of like value are mixtures: the
            samples are those of the same modes, turned in their span to their simplest form (quartimax).
        indices_b: for each mode, samples of the second model. In the modes of the first model, those of the same prompts.
        p_values: ``[modes]``: probability that the largest value would be as large if both models made the same of each
            prompt; None if it was not computed.
        reverse: the modes of which the second model has more: ``indices_b`` are then the strongest samples, and
            ``indices_a`` those of the same prompts. None for the modes of the second model themselves.
    """

    values: Tensor
    indices_a: list[list[int]]
    indices_b: list[list[int]]
    p_values: Tensor | None = None
    reverse: "PromptSplit | None" = None


@torch.no_grad()
def prompt_split(
    x_a: Tensor,
    t_a: Tensor,
    x_b: Tensor,
    t_b: Tensor,
    modes: int = 3,
    per_mode: int = 8,
    kernel: KernelLike | None = None,
    prompt_kernel: KernelLike | None = None,
    eta: float = 1.0,
    features: int | None = None,
    method: str | None = None,
    permutations: int = 0,
    seed: int = 0,
) -> PromptSplit:
    """The prompts on which two models disagree most, with the samples that show it (Lotfian et al. 2026, arXiv 2602.04009).

    With the joint kernel ``k_X(x, x') k_T(t, t')`` of output and prompt, and ``C`` the second moment of its features, modes
    are the eigenvectors of ``C_A - eta C_B``. Positive eigenvalues belong to what A makes of some prompts more often than
    B, negative ones to the reverse. A model that makes x of a prompt with share p of all samples, where the other makes y
    as unlike, has the eigenvalues p and -p. By the kernel matrix ``[[K_AA / n, K_AB / sqrt(nm)], [-K_BA / sqrt(nm),
    -K_BB / m]]`` of both sets, with the cross terms that the published program leaves out; in O((n + m)^3) exactly, and in
    O((n + m) r^2 + r^3) with r features.

    Args:
        x_a: outputs of the first model ``[n, d]``.
        t_a: features of their prompts ``[n, p]``.
        x_b: outputs of the second model ``[m, d]``.
        t_b: features of their prompts ``[m, p]``.
        modes: number of modes of each model.
        per_mode: number of samples listed for each mode, at most.
        kernel: of outputs; cosine by default. An unset bandwidth is the median distance over both sets.
        prompt_kernel: of prompts; cosine by default.
        eta: how many times as frequent as in B a mode of A must be.
        features: number of random features instead of the exact kernel.
        method: of these features: ``fourier``, joint random Fourier features, or ``projection``, ``(U x) o (V t)``; see
            :class:`~kspec_guidance.features.RandomProductProjection`. By default Fourier features of Gaussian kernels, and
            the projection for cosine kernels.
        permutations: number of random exchanges of samples of the same prompt between the models, for ``p_values``.
        seed: of the features and of the exchanges.

    Raises:
        TypeError: for what is no tensor, or no kernel.
        ValueError: for shapes that do not match, values that are not finite, counts below 1, an unknown method, or
            permutations without a prompt that both models have.

    >>> t = torch.eye(5).repeat_interleave(4, 0)                              # five prompts, four samples of each
    >>> x_a, x_b = torch.eye(3)[[0] * 20], torch.eye(3)[[0] * 16 + [1] * 4]   # of the last one they make different things
    >>> found = prompt_split(x_a, t, x_b, t, modes=1)
    >>> round(float(found.values[0]), 6), found.indices_a[0]
    (0.2, [16, 17, 18, 19])
    """
    check_eta(eta)
    check_counts(modes=modes, per_mode=per_mode, features=features, permutations=permutations or None)
    sets = [_checked(x_a, t_a, "a"), _checked(x_b, t_b, "b")]
    n, m = len(sets[0][0]), len(sets[1][0])
    both = []
    for what, a, b in zip(("x", "t"), *sets, strict=True):
        if a.shape[1] != b.shape[1]:
            raise ValueError(f"{what}_a has {a.shape[1]} features per row and {what}_b has {b.shape[1]}; embed both alike")
        both.append(torch.cat([a, b]))
    kernels = [as_kernel(k).fit(z) for k, z in zip((kernel, prompt_kernel), both, strict=True)]
    phi = joint_rows(both, kernels, features, method, seed)
    weight = torch.cat([phi.new_full((n,), 1 / n), phi.new_full((m,), -eta / m)])
    l, u = torch.linalg.eigh(_difference(phi, weight))
    chance = _extremes(phi, both[1], weight, n, permutations, seed) if permutations else None

    def side(sign: int) -> PromptSplit:
        order = (sign * l).argsort(descending=True)[:modes]
        values = torch.where(sign * l[order] > ROUNDING, sign * l[order], 0.0)
        values = torch.cat([values, values.new_zeros(modes - len(values))])
        own, other = (slice(0, n), slice(n, None))[::sign]
        positive = values[values > 0]
        functions = u[:, order[: len(positive)]].T @ phi[own].T  # [modes, n]
        turn = simplest_turn(functions)
        functions = (turn @ functions)[(turn.square() @ positive).argsort(descending=True, stable=True)]
        listed: list[list[int]] = [[] for _ in range(modes)]
        alike: list[list[int]] = [[] for _ in range(modes)]
        for k, f in enumerate(functions.square()):
            listed[k] = strongest(f.sqrt(), at_most=per_mode)
            prompts = both[1][own][listed[k]]
            alike[k] = _same_prompts(prompts, f[listed[k]], both[1][other], kernels[1], per_mode)
        p = None
        if chance is not None:
            p = (1 + (chance[:, 0 if sign > 0 else 1, None] >= values).sum(0)).double() / (1 + permutations)
        first, second = (listed, alike)[::sign]
        return PromptSplit(values, first, second, p)

    found, reverse = side(1), side(-1)
    return PromptSplit(found.values, found.indices_a, found.indices_b, found.p_values, reverse)


def _checked(x: Tensor, t: Tensor, name: str) -> tuple[Tensor, Tensor]:
    x, t = on_host(check_matrix(x, f"x_{name}")), on_host(check_matrix(t, f"t_{name}"))
    if len(x) != len(t):
        raise ValueError(
            f"x_{name} has {len(x)} samples and t_{name} {len(t)} rows; give one row of prompt features per sample"
        )
    return x, t


def _difference(phi: Tensor, weight: Tensor) -> Tensor:
    """``sum_i w_i phi_i phi_i'`` ``[r, r]``."""
    return phi.mT @ (weight[:, None] * phi)


def _same_prompts(own: Tensor, shares: Tensor, others: Tensor, kernel: Kernel, at_most: int) -> list[int]:
    """Rows of ``others`` whose prompts are near to those of a mode, the nearest first."""
    shares = shares / shares.sum()
    nearness = kernel.normalised(others, own) @ shares
    enough = NEAR_PROMPT * float((kernel.normalised(own, own) @ shares).max())
    order = largest_first(nearness)[:at_most]
    return order[nearness[order] >= enough].tolist()


def _extremes(phi: Tensor, t: Tensor, weight: Tensor, n: int, permutations: int, seed: int) -> Tensor:
    """The largest eigenvalue, and minus the smallest, after exchanges of samples of the same prompt ``[permutations, 2]``.

    Raises:
        ValueError: if no prompt has samples of both models.
    """
    prompt = t.unique(dim=0, return_inverse=True)[1]
    if not set(prompt[:n].tolist()) & set(prompt[n:].tolist()):
        raise ValueError("permutations exchange samples of the same prompt, and the models have no prompt in common")
    g, place = torch.Generator().manual_seed(seed), prompt.argsort(stable=True)
    found = []
    for _ in range(permutations):
        shuffled = torch.randperm(len(prompt), generator=g)
        shuffled = shuffled[prompt[shuffled].argsort(stable=True)]  # of each prompt, its samples in another order
        exchanged = torch.empty_like(weight)
        exchanged[place] = weight[shuffled]
        l = torch.linalg.eigvalsh(_difference(phi, exchanged))
        found.append(torch.stack([l[-1], -l[0]]))
    return torch.stack(found)
