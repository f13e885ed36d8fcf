"""One training step, and everything that must survive to the next one.

A step is a pure function of the weights, the seed and its number: data, times, masks and noise are drawn from
generators seeded by (seed, micro-batch number). So a resumed run needs no random state to go on bit for bit.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadd_min import ops
from cadd_min.errors import InputError, choose
from cadd_min.loss import T_MIN, WEIGHTINGS, stratified_times, time_weights, token_losses
from cadd_min.methods import baseline, bound
from cadd_min.model import Denoiser
from cadd_min.options import option

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Batch = Tensor | tuple[Tensor, Tensor]  # x_0 (B, L) int64, or with it the label (B,) of each sequence


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the model's own shape is in ModelConfig."""

    steps: int = option(4000, "optimiser steps")
    batch_size: int = option(8, "sequences in a micro-batch")
    accumulate: int = option(1, "micro-batches in a step")
    lr: float = option(2e-3, "peak learning rate")
    warmup: int = option(100, "steps of linear warm-up")
    final_lr: float = option(0.1, "share of lr that the cosine decay ends at")
    weight_decay: float = option(0.01, "of the backbone's matrices")
    clip: float = option(1.0, "largest gradient norm")
    ema: float = option(0.999, "decay of the averaged weights that sampling uses")
    weighting: str = option("uniform", "of the loss over t: uniform (the paper's) or elbo")
    mse: float = option(0.0, "weight of the squared error of z0_hat beside the CE (CE + MSE)")
    wrong_hints: float = option(0.1, "share of the latents that are a random token's: the network learns to doubt them")
    drop_latent: float = option(0.0, "share of the sequences that train without their latent")
    drop_label: float = option(0.1, "share that trains without its label, where there are labels (for guidance)")
    seed: int = option(0, "of data, noise and initial weights")
    dtype: str = option("auto", "of the network: float32, bfloat16, or auto: the faster one here, measured")
    compile: bool = option(False, "compile the backbone")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("ema", "wrong_hints", "drop_latent", "drop_label", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "mse", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be greater than 0, not {getattr(self, name)}")
        choose("weighting", self.weighting, WEIGHTINGS)
        choose("dtype", self.dtype, ("auto", *DTYPES))


def best_dtype(device: torch.device) -> str:
    """bfloat16 where this machine multiplies matrices faster in it than in float32, measured; else float32."""

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(512, 512, device=device, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            float((a @ a)[0, 0])  # reading a value waits for the device
            times.append(time.perf_counter() - start)
        return min(times)

    return "bfloat16" if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else "float32"


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine from lr down to final_lr * lr at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


def seeded(seed: int, index: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of micro-batch `index` of a run.

    The two numbers are hashed: torch's CPU generator looks at the low 32 bits of its seed only.
    """
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]))


def misled(x_0: Tensor, share: float, vocab_size: int, generator: torch.Generator) -> Tensor:
    """The tokens whose latents the network is shown: x_0 (B, L), but a `share` of them replaced by random ones.

    A true z_t always tells of x_0, so a network trained on it believes its hint whatever the neighbours say. When it
    samples, the hint is its own guess of a step ago, and often wrong; one that has met wrong hints weighs the two.
    """
    if share == 0:
        return x_0
    random = torch.randint(vocab_size, x_0.shape, generator=generator, device=x_0.device)
    wrong = torch.rand(x_0.shape, generator=generator, device=x_0.device) < share
    return torch.where(wrong, random, x_0)


def unpack(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """x_0 and the labels, or None, of a batch, on the device."""
    x_0, label = batch if isinstance(batch, tuple) else (batch, None)
    return x_0.to(device, non_blocking=True), None if label is None else label.to(device, non_blocking=True)


def training_loss(
    model: Denoiser, x_0: Tensor, config: TrainConfig, generator: torch.Generator, label: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """E_t E_q [-sum over masked i of log p(x_0^i | x_t, z_t)] per token, plus the weighted squared error if asked for.

    Args: x_0 (B, L); label (B,) or None. Returns: the scalar loss, divided by B L; its parts, detached: the CE summed
    over masked positions and their number, and the squared error.
    """
    schedule, table = model.schedule, model.table()
    t = T_MIN + (1 - T_MIN) * stratified_times(len(x_0), generator, x_0.device)  # elbo weights grow like 1/t
    hinted = misled(x_0, config.wrong_hints, model.mask_id, generator)
    x_t, z_t = ops.forward_noising(x_0, hinted, table, t, schedule, model.mask_id, ops.draw_seed(generator))
    if config.drop_latent > 0:
        kept = torch.rand(len(x_0), generator=generator, device=x_0.device) >= config.drop_latent
        z_t = z_t * kept[:, None, None]
    if label is not None and config.drop_label > 0:  # so that one network knows p(x) beside p(x | label)
        known = torch.rand(len(x_0), generator=generator, device=x_0.device) >= config.drop_label
        label = torch.where(known, label, model.config.classes)
    masked = x_t == model.mask_id
    features = model.features(x_t, z_t, t.float(), label)[masked]
    ce, mse = token_losses(features, model.head_matrix(), x_0[masked], table=table if config.mse > 0 else None)
    ce_weight, mse_weight = (
        w[:, None].expand_as(x_0)[masked].float() for w in time_weights(t, schedule, config.weighting)
    )
    loss = (ce_weight * ce + config.mse * mse_weight * mse).sum() / x_0.numel()
    return loss, {"ce": ce.detach().sum(), "masked": masked.sum(), "mse": mse.detach().sum()}


class Trainer:
    """A model, its optimiser, its EMA and the number of the next step.

    data(index) gives micro-batch `index`, (B, L) int64 on any device, with labels (B,) where the model has classes.
    """

    def __init__(self, model: Denoiser, data: Callable[[int], Batch], config: TrainConfig):
        self.model, self.data, self.config = model, data, config
        self.training_loss = getattr(baseline(model.config.model), "training_loss", training_loss)
        if model.config.model == "cdm" and config.weighting == "elbo" and config.mse == 0:
            raise InputError(
                "weighting elbo gives the CE of a cdm no weight at all: set mse to 1, or weighting uniform"
            )
        self.device = model.embedding.weight.device
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.step = 0
        self.dtype = best_dtype(self.device) if config.dtype == "auto" else config.dtype
        decay = [p for p in model.backbone.parameters() if p.dim() >= 2]
        rest = [p for p in model.parameters() if not any(p is d for d in decay)]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(0.9, 0.98),
            fused=True,
        )
        if config.compile:
            model.backbone.compile()

    def parameters(self) -> int:
        """How many the model has."""
        return sum(p.numel() for p in self.model.parameters())

    def autocast(self) -> torch.autocast:
        """The context in which the network runs."""
        return torch.autocast(self.device.type, DTYPES[self.dtype], enabled=self.dtype != "float32")

    def train_step(self) -> dict[str, float]:
        """One optimiser step. Returns its CE per masked token (nats), squared error, gradient norm, learning rate."""
        config, totals = self.config, dict.fromkeys(("ce", "masked", "mse"), torch.zeros((), device=self.device))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        for micro in range(config.accumulate):
            index = self.step * config.accumulate + micro
            x_0, label = unpack(self.data(index), self.device)
            with self.autocast():
                loss, parts = self.training_loss(
                    self.model, x_0, config, seeded(config.seed, index, self.device), label
                )
            (loss / config.accumulate).backward()
            totals = {name: totals[name] + parts[name] for name in totals}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._update_ema()
        self.step += 1
        masked = totals["masked"].clamp(min=1)
        return {
            "ce": float(totals["ce"] / masked),
            "mse": float(totals["mse"] / masked),
            "grad_norm": float(norm),
            "lr": self.optimizer.param_groups[0]["lr"],
            "latent_norm": self.latent_norm(),
        }

    def latent_norm(self) -> float:
        """Mean length of the latent table's rows: watch it, a growing one means a leak (see latent.py)."""
        return float(self.model.table().detach().norm(dim=-1).mean())

    def _update_ema(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))  # early on, forget the random start quickly
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> dict[str, float]:
        """Held-out CE per masked token, and the valid bound with its parts in nats per token, of the EMA weights.

        The noise is the same at every call, and no hint is wrong. CE is not comparable between models; the bound is.
        """
        config = dataclasses.replace(self.config, wrong_hints=0.0, drop_latent=0.0, drop_label=0.0)
        ce, masked, discrete, continuous, tokens = 0.0, 0, 0.0, 0.0, 0
        for i, batch in enumerate(batches):
            (x_0, label), gen = unpack(batch, self.device), seeded(self.config.seed + 1, i, self.device)
            with self.autocast():
                _, parts = self.training_loss(self.ema, x_0, config, gen, label)
                found = bound(self.ema, x_0, label=label, generator=gen)
            ce, masked = ce + float(parts["ce"]), masked + int(parts["masked"])
            discrete, continuous = discrete + float(found.discrete.sum()), continuous + float(found.continuous.sum())
            tokens += x_0.numel()
        return {
            "val_ce": ce / max(1, masked),
            "val_bound": (discrete + continuous) / tokens,
            "val_bound_discrete": discrete / tokens,
            "val_bound_continuous": continuous / tokens,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
