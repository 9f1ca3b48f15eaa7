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
        """Take a step. Nothing is read by the host, so that a CUDA graph can hold it; ``lr`` may be a tensor."""
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            if not group["muon"]:
                for p in trained:
                    self._adam(p, group)
                continue
            shapes: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in trained:
                shapes.setdefault((len(p), p.numel() // len(p)), []).append(p)
            for shape, same in shapes.items():
                self._muon(same, shape, group)

    def _muon(self, parameters: list[nn.Parameter], shape: tuple[int, int], group: dict) -> None:
        updates = []
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            m = self.state[p]["momentum"]
            m.lerp_(p.grad, 1 - group["momentum"])
            updates.append(p.grad.lerp(m, group["momentum"]).reshape(shape))  # Nesterov
        lr = group["lr"]
        scaled = orthogonalise(torch.stack(updates)) * (0.2 * max(shape) ** 0.5 * lr)
        for p, update in zip(parameters, scaled, strict=True):
            p.mul_(1 - lr * group["weight_decay"]).sub_(update.view(p.shape))

    def _adam(self, p: Tensor, group: dict) -> None:
        state, (b1, b2), lr = self.state[p], group["betas"], group["lr"]
        if not state:
            zeros = torch.zeros_like(p)
            state.update(step=torch.zeros((), device=p.device), first=zeros, second=zeros.clone())
        n = state["step"].add_(1)
        state["first"].lerp_(p.grad, 1 - b1)
        state["second"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
        scale = (state["second"] / (1 - b2**n)).sqrt_().add_(1e-8)
        p.mul_(1 - lr * group["weight_decay"]).sub_(state["first"] / scale * (lr / (1 - b1**n)))
