"""Muon: the optimiser of the backbone's matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    B <- momentum B + (1 - momentum) G             the average of the gradients of a matrix
    U  = U V^T of the SVD of Nesterov's (1 - momentum) G + momentum B
    W <- W - lr 0.2 sqrt(max(rows, columns)) U     each step is orthogonal: all its singular values are equal

A gradient has a few large singular values. Adam's step has too. The orthogonal step also moves in the many directions
in which the gradient is small. The factor makes its entries as large as those of AdamW's step (Liu et al. 2025,
arXiv:2502.16982), so that both take one learning rate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cadd_min.training.distributed import share_of, whole

QUINTIC = (3.4445, -4.7750, 2.0315)  # a, b, c of the step s -> a s + b s^3 + c s^5, from the page above


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of matrices (..., m, n) by numbers between 0.7 and 1.2, by Newton-Schulz steps.

    Each step maps a singular value s to a s + b s^3 + c s^5. Values below 0.005 of the Frobenius norm come out smaller.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(steps):
        gram = x @ x.mT  # (..., m, m)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Train matrices by orthogonal steps. A group's `stack` says how many matrices each of its parameters stacks.

    The queries, keys and values of attention are three matrices in one parameter (3 W, W), and each is orthogonal.
    found_inf: a scalar tensor; where it is not 0, a step changes nothing, as with torch's fused AdamW.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "stack": 1})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)

    def averages(self) -> list[Tensor]:
        """List the averages of the gradients, in the order of the parameters: the state that a resumed run needs."""
        return [self.state[p]["momentum"] for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one step with the gradients in the parameters. Parameters without a gradient stay as they are."""
        for group in self.param_groups:
            by_shape = defaultdict(list)  # matrices of one shape are orthogonalised at once
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                self._step(params, **{k: group[k] for k in ("lr", "momentum", "weight_decay", "stack")})

    def _step(self, params: list[Tensor], lr: float, momentum: float, weight_decay: float, stack: int) -> None:
        """Make the step of parameters of one shape (stack m, n)."""
        good = 1.0 if self.found_inf is None else 1 - self.found_inf
        gradients = [torch.nan_to_num(p.grad, 0, 0, 0) for p in params]  # type: ignore[arg-type]
        averages = [self.state[p]["momentum"] for p in params]
        for average, gradient in zip(averages, gradients):
            average.add_((gradient - average) * ((1 - momentum) * good))
        nesterov = torch.stack([whole(g.lerp(b, momentum)) for g, b in zip(gradients, averages)])
        matrices = nesterov.unflatten(1, (stack, -1))  # (params, stack, m, n)
        scale = 0.2 * math.sqrt(max(matrices.shape[-2:]))
        steps = (orthogonalized(matrices) * (lr * scale * good)).flatten(1, 2)
        for p, step in zip(params, steps):
            p.mul_(1 - lr * weight_decay * good).sub_(share_of(step, p))
