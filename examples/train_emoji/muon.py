"""Muon for the weight matrices and convolutions, AdamW for the rest.

Muon (Jordan et al. 2024) updates a matrix by its momentum with all singular values set to about 1, so that rare directions,
such as a prompt of two images in seven thousand, are learnt as fast as common ones. Its step is scaled to the size of
AdamW's (Liu et al. 2025, arXiv 2502.16982), so both use one learning rate.
"""

import torch
from torch import Tensor, nn

QUINTIC = 3.4445, -4.7750, 2.0315  # x -> a x + b x^3 + c x^5 drives singular values in (0, 1] to about 1


def orthogonalise(x: Tensor, iterations: int = 5) -> Tensor:
    """Approximate the nearest (semi-)orthogonal matrix of ``[..., m, n]`` by Newton-Schulz iteration."""
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)).bfloat16()
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class MuonAdamW(torch.optim.Optimizer):
    """Muon for inner weights of two or more dimensions; AdamW for biases, norms, embeddings, first and last layers.

    Args:
        module: whose parameters are trained.
        ends: parts of the names of the embeddings, first and last layers.
    """

    def __init__(
        self, module: nn.Module, lr: float, momentum: float = 0.95, betas=(0.9, 0.99), weight_decay: float = 0.01,
        ends: tuple[str, ...] = ("conv_in", "conv_out", "embedding", "time_emb"),
    ):  # fmt: skip
        named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        muon = [p for n, p in named if p.ndim >= 2 and not any(e in n for e in ends)]
        chosen = {id(p) for p in muon}
        super().__init__(
            [{"params": muon, "muon": True}, {"params": [p for _, p in named if id(p) not in chosen], "muon": False}],
            {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    (self._muon if group["muon"] else self._adam)(p, group)

    def _muon(self, p: Tensor, group: dict) -> None:
        state = self.state[p]
        m = state.setdefault("momentum", torch.zeros_like(p))
        m.lerp_(p.grad, 1 - group["momentum"])
        update = p.grad.lerp(m, group["momentum"]).reshape(len(p), -1)  # Nesterov
        update = orthogonalise(update).mul_(0.2 * max(update.shape) ** 0.5)
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view(p.shape), alpha=group["lr"])

    def _adam(self, p: Tensor, group: dict) -> None:
        state, (b1, b2) = self.state[p], group["betas"]
        if not state:
            state.update(step=torch.zeros(()), first=torch.zeros_like(p), second=torch.zeros_like(p))
        state["step"] += 1
        n = float(state["step"])
        state["first"].lerp_(p.grad, 1 - b1)
        state["second"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
        scale = (state["second"] / (1 - b2**n)).sqrt_().add_(1e-8)
        p.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(state["first"], scale, value=-group["lr"] / (1 - b1**n))
