"""Training steps in plain PyTorch, from the formulas of the paper, AdamW and the average: the law of `Trainer`.

Of the project it takes the network, the table, the times, and the numbers that a seed draws. Each has tests of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from cadd_min import ops
from cadd_min.kernels import philox
from cadd_min.loss import stratified_times
from cadd_min.model import Model
from cadd_min.objective import Batch
from cadd_min.training.trainer import TrainConfig
from cadd_min.utils.device import seeded

ELBO = {  # -alpha' / (1 - alpha) and -SNR' / 2 of the default schedules
    "mdlm": lambda t: (1 / t, 0 * t),
    "cadd": lambda t: (1 / t, 2 * t / (1 + t**2) ** 2),  # SNR = (1 - t^2) / (1 + t^2)
    "cdm": lambda t: (0 * t, 1 / (2 * t**2)),  # SNR = 1 / t - 1
}


def plain_loss(model: Model, batch: Batch, u: Tensor, c: TrainConfig, gen: torch.Generator) -> tuple[Tensor, ...]:
    """Compute the loss of a micro-batch, and the sums of its CE, its masked positions and its squared error."""
    x_0, label, free = batch
    (count, length), mask, w = x_0.shape, model.mask_id, model.table()
    t, hinted = 1e-4 + (1 - 1e-4) * u, x_0
    if c.wrong_hints > 0:
        random, chance = torch.randint(mask, x_0.shape, generator=gen), torch.rand(x_0.shape, generator=gen)
        hinted = torch.where(chance < c.wrong_hints, random, x_0)
    seed, position = ops.draw_seed(gen), torch.arange(x_0.numel()).view_as(x_0)
    alpha, signal, noise = (f(t)[:, None] for f in (model.schedule.alpha, model.schedule.signal, model.schedule.noise))
    masked = philox.choices(seed, position)[0] >= alpha
    eps = philox.normals(seed, position, w.shape[1]).to(w)
    z_t = torch.where(masked[..., None], signal[..., None] * w[hinted] + noise[..., None] * eps, w[hinted])
    if free is not None:
        masked = masked & free
    if c.drop_latent > 0:
        z_t = z_t * (torch.rand(count, generator=gen) >= c.drop_latent)[:, None, None]
    if label is not None and c.drop_label > 0:
        label = torch.where(torch.rand(count, generator=gen) >= c.drop_label, label, model.config.classes)
    log_p = model(torch.where(masked, mask, x_0), z_t, t.float(), label).log_softmax(-1)  # (B, L, V)
    ce = -log_p.gather(-1, x_0.clamp(max=mask - 1)[..., None])[..., 0]
    squared = (w[x_0] - log_p.exp() @ w[:mask]).square().sum(-1)
    a, b = ELBO[model.config.model](t) if c.weighting == "elbo" else (torch.ones_like(t), torch.ones_like(t))
    total = ((a[:, None] * ce + c.mse * b[:, None] * squared) * masked).sum() / (count * length)
    return total, (ce * masked).sum(), masked.sum(), (squared * masked).sum()


def learning_rate(step: int, c: TrainConfig) -> float:
    """Compute the rate of a step, counted from 0: a line up to lr, then half a cosine down to final_lr * lr."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    share = (step - c.warmup) / (c.steps - c.warmup)
    return c.lr * (c.final_lr + (1 - c.final_lr) * (1 + math.cos(math.pi * share)) / 2)


def plain_steps(
    model: Model, data: Callable[[int], Batch], c: TrainConfig, steps: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Make the first `steps` steps with `model`. Returns the averages of the weights, and what each step measured."""
    weights = dict(model.named_parameters())
    zeros = lambda: {name: torch.zeros_like(p) for name, p in weights.items()}
    average, first, second, rows = {name: p.detach().clone() for name, p in weights.items()}, zeros(), zeros(), []
    for k in range(steps):
        n = c.accumulate or 1
        u = stratified_times(n * c.batch_size, seeded(c.seed, k, use=1)).view(n, c.batch_size)
        parts = [plain_loss(model, data(k * n + i), u[i], c, seeded(c.seed, k * n + i)) for i in range(n)]
        loss = sum(total for total, *_ in parts) / n
        gradients = dict(zip(weights, torch.autograd.grad(loss, [*weights.values()], materialize_grads=True)))
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        ce, masked, squared = (sum(column) for column in list(zip(*parts))[1:])
        rows.append({"ce": ce / masked, "mse": squared / masked if c.mse else 0 * squared, "grad_norm": norm})
        with torch.no_grad():
            lr, beta = learning_rate(k, c), min(c.ema, (1 + k) / (10 + k))
            for name, p in weights.items():
                g = gradients[name] * min(1.0, c.clip / float(norm + 1e-6))
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.98 * second[name] + 0.02 * g**2
                step = first[name] / (1 - 0.9 ** (k + 1)) / ((second[name] / (1 - 0.98 ** (k + 1))).sqrt() + 1e-8)
                decay = c.weight_decay if name.startswith("backbone.") and p.dim() > 1 else 0
                p.copy_(p - lr * (decay * p + step))
                average[name] = beta * average[name] + (1 - beta) * p
    return average, rows
