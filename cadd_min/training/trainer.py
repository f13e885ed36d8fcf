"""One training step, and everything that must survive to the next one.

A step is a pure function of the weights, the seed and its number: data, times, masks and noise are drawn from
generators seeded by (seed, micro-batch number). So a resumed run needs no random state to go on bit for bit, and N
processes that share out a step's micro-batches make the step of one, up to the order in which its gradients are added.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadd_min import ops
from cadd_min.baselines.dispatch import baseline, bound
from cadd_min.loss import T_MIN, WEIGHTINGS, stratified_times, time_weights, token_losses
from cadd_min.model import Denoiser
from cadd_min.training.distributed import World, accumulate_only, share_of, shared, whole
from cadd_min.utils.cli import option
from cadd_min.utils.errors import InputError, choose

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# x_0 (B, L) int64; or with it the label (B,) of each sequence, or free (B, L) bool: which tokens are not given
Batch = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the model's own shape is in ModelConfig."""

    steps: int = option(4000, "optimiser steps")
    batch_size: int = option(8, "sequences in a micro-batch")
    accumulate: int = option(0, "micro-batches in a step, shared out among the processes; 0: one for each of them")
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
    shard: bool = option(False, "each process keeps a share of the weights (FSDP2): for models that do not fit")

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("accumulate", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
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


def seeded(seed: int, index: int, device: torch.device | str = "cpu", *, use: int = 0) -> torch.Generator:
    """The generator of micro-batch `index` of a run; another `use`, another generator.

    The numbers are hashed: torch's CPU generator looks at the low 32 bits of its seed only.
    """
    state = np.random.SeedSequence((seed, index, use)).generate_state(1, np.uint32)
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


def unpack(batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """x_0, and {"label": (B,)} or {"free": (B, L)} where the batch has them, on the device."""
    if not isinstance(batch, tuple):
        return batch.to(device, non_blocking=True), {}
    x_0, more = (part.to(device, non_blocking=True) for part in batch)
    return x_0, {"free" if more.dtype == torch.bool else "label": more}


def training_loss(
    model: Denoiser,
    x_0: Tensor,
    u: Tensor,
    config: TrainConfig,
    generator: torch.Generator,
    label: Tensor | None = None,
    free: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """E_t E_q [-sum over masked i of log p(x_0^i | x_t, z_t)] per token, plus the weighted squared error if asked for.

    Args: x_0 (B, L); u (B,) times on (0, 1]; label (B,) or None; free (B, L), the tokens that are ever masked and
    scored, or None for all. Returns: the scalar loss, divided by B L, not by the number of masked positions, so that
    equal batches weigh the same; its parts, detached: the CE summed over masked positions and their number, and the
    squared error.
    """
    schedule, table = model.schedule, model.table()
    t = T_MIN + (1 - T_MIN) * u  # elbo weights grow like 1/t
    hinted = misled(x_0, config.wrong_hints, model.config.vocab_size, generator)
    x_t, z_t = ops.forward_noising(x_0, hinted, table, t, schedule, model.mask_id, ops.draw_seed(generator))
    x_t = x_t if free is None else torch.where(free, x_t, x_0)
    if config.drop_latent > 0:
        kept = torch.rand(len(x_0), generator=generator, device=x_0.device) >= config.drop_latent
        z_t = z_t * kept[:, None, None]
    if label is not None and config.drop_label > 0:  # so that one network knows p(x) beside p(x | label)
        known = torch.rand(len(x_0), generator=generator, device=x_0.device) >= config.drop_label
        label = torch.where(known, label, model.config.classes)
    masked = x_t == model.mask_id if free is None else (x_t == model.mask_id) & free
    rows = masked.flatten().nonzero()[:, 0]  # the one look at a GPU's values in a step
    features = model.features(x_t, z_t, t.float(), label).flatten(0, 1)[rows]
    z_0 = table if config.mse > 0 else None
    ce, mse = token_losses(features, model.head_matrix(), x_0.flatten()[rows], table=z_0, mask_id=model.mask_id)
    ce_weight, mse_weight = (w[rows // x_0.shape[1]].float() for w in time_weights(t, schedule, config.weighting))
    loss = (ce_weight * ce + config.mse * mse_weight * mse).sum() / x_0.numel()
    return loss, {"ce": ce.detach().sum(), "masked": masked.sum(), "mse": mse.detach().sum()}


class Trainer:
    """A model, its optimiser, its EMA and the number of the next step.

    data(index) gives micro-batch `index`, (B, L) int64 on any device, with labels (B,) where the model has classes: a
    pure function, called from another thread while the step before is computed.
    """

    def __init__(self, model: Denoiser, data: Callable[[int], Batch], config: TrainConfig, world: World | None = None):
        self.model, self.data, self.config = model, data, config
        self.world = world or World(model.embedding.weight.device)
        self.device, self.accumulate = self.world.device, config.accumulate or self.world.size
        if self.accumulate % self.world.size:
            raise InputError(
                f"accumulate {config.accumulate}: must be a multiple of the {self.world.size} processes that share it"
            )
        self.training_loss = getattr(baseline(model.config.model), "training_loss", training_loss)
        if model.config.model == "cdm" and config.weighting == "elbo" and config.mse == 0:
            raise InputError(
                "weighting elbo gives the CE of a cdm no weight at all: set mse to 1, or weighting uniform"
            )
        fixed: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.ema = copy.deepcopy(model, fixed).requires_grad_(False).eval()  # what is not trained needs no copy
        if config.compile and config.shard:  # a block at a time: FSDP2 fetches its weights around its forward
            for block in model.blocks():
                block.forward = torch.compile(block.forward, fullgraph=True)  # type: ignore[method-assign]
        elif config.compile:
            model.backbone.compile(fullgraph=True)
        self._model = shared(model, self.world, config.shard)
        self._ema = shared(self.ema, self.world, config.shard)
        self.step = self.seen = 0  # seen: sequences trained on, which is the place in the data
        # steps without a finite gradient, all and the last in a row: on the device, so that counting does not wait
        self.skipped, self.in_a_row = torch.zeros(2, device=self.device).unbind()
        self.dtype = config.dtype
        if config.dtype == "auto":  # the slowest process decides for all
            self.dtype = "float32" if self.world.any(best_dtype(self.device) == "float32") else "bfloat16"
        decay = [p for p in model.backbone.parameters() if p.dim() >= 2 and p.requires_grad]
        rest = [p for p in model.parameters() if p.requires_grad and not any(p is d for d in decay)]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(0.9, 0.98),
            fused=True,
        )
        self._reader, self._ahead = ThreadPoolExecutor(1), dict[int, Future[Batch]]()

    def parameters(self) -> int:
        """How many the model has."""
        return sum(p.numel() for p in self.model.parameters())

    def autocast(self) -> torch.autocast:
        """The context in which the network runs."""
        return torch.autocast(self.device.type, DTYPES[self.dtype], enabled=self.dtype != "float32")

    def train_step(self) -> dict[str, Tensor]:
        """One optimiser step, skipped if its gradient is not finite. Nothing here waits for the device but the masks.

        Returns: of this process's share, the CE per masked token (nats) and the squared error; the gradient's norm.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        for model in (self.model, self.ema):
            if (at_step := getattr(model, "at_step", None)) is not None:  # a model that is opened by and by
                at_step(self.step)
        totals = self.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        bad = (~torch.isfinite(norm)).float()  # then the fused AdamW leaves weights, moments and its count alone
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped, self.in_a_row = self.skipped + bad, (self.in_a_row + 1) * bad
        self._update_ema()
        self.step, self.seen = self.step + 1, self.seen + self.accumulate * self.config.batch_size
        masked = totals["masked"].clamp(min=1)
        return {"ce": totals["ce"] / masked, "mse": totals["mse"] / masked, "grad_norm": norm}

    def backward(self) -> dict[str, Tensor]:
        """Add up the step's gradients, of all processes, in the parameters. Returns this one's sums of the parts."""
        config, mine = self.config, self.accumulate // self.world.size
        shift = seeded(config.seed, self.step, self.device, use=1)
        u = stratified_times(self.accumulate * config.batch_size, shift, self.device)
        u = u.view(self.accumulate, config.batch_size)
        totals = dict.fromkeys(("ce", "masked", "mse"), torch.zeros((), device=self.device))
        for n in range(mine):
            share = n * self.world.size + self.world.rank
            index = self.seen // config.batch_size + share
            following = index + self.world.size if n + 1 < mine else index + self.accumulate - share + self.world.rank
            x_0, given = unpack(self._read(index, following), self.device)
            accumulate_only(self._model, n + 1 < mine)
            noise = seeded(config.seed, index, self.device)
            with self.autocast():
                loss, parts = self._model(self.training_loss, x_0, u[share, : len(x_0)], config, noise, **given)
            (loss / mine).backward()
            totals = {name: totals[name] + parts[name] for name in totals}
        return totals

    def _read(self, index: int, following: int) -> Batch:
        """Micro-batch `index`, read ahead if it was foreseen; `following` is read from now on."""

        def read(index: int) -> Batch:
            batch = self.data(index)
            if self.device.type != "cuda":
                return batch
            return (batch[0].pin_memory(), batch[1].pin_memory()) if isinstance(batch, tuple) else batch.pin_memory()

        batch = self._ahead.pop(index, None) or self._reader.submit(read, index)
        found = batch.result()
        self._ahead = {following: self._reader.submit(read, following)}
        return found

    @torch.no_grad()
    def averaged(self, f: Callable[..., Any], *args: Any, **given: Any) -> Any:
        """f(the EMA model, ...): everything that looks at the averaged weights goes through here."""
        return self._ema(f, *args, **given)

    @torch.no_grad()
    def latent_norm(self) -> float:
        """Mean length of the latent table's rows: watch it, a growing one means a leak (see latent.py)."""
        return float(self._model(lambda model: model.table().norm(dim=-1).mean()))

    def _update_ema(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))  # early on, forget the random start quickly
        with torch.no_grad():
            pairs = zip(self.ema.parameters(), self.model.parameters())
            averages, weights = zip(*[(a, w) for a, w in pairs if a is not w])
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> dict[str, float]:
        """Held-out CE per masked token, and the valid bound with its parts in nats per token, of the EMA weights.

        The noise is the same at every call, and no hint is wrong. CE is not comparable between models; the bound is.
        """
        config = dataclasses.replace(self.config, wrong_hints=0.0, drop_latent=0.0, drop_label=0.0)
        ce, masked, discrete, continuous, tokens = 0.0, 0, 0.0, 0.0, 0
        for i, batch in enumerate(batches):
            (x_0, given), gen = unpack(batch, self.device), seeded(config.seed + 1, i, self.device)
            u = stratified_times(len(x_0), gen, self.device)
            with self.autocast():
                _, parts = self.averaged(self.training_loss, x_0, u, config, gen, **given)
                found = self.averaged(bound, x_0, **given, generator=gen)
            ce, masked = ce + float(parts["ce"]), masked + int(parts["masked"])
            discrete, continuous = discrete + float(found.discrete.sum()), continuous + float(found.continuous.sum())
            tokens += int(given["free"].sum()) if "free" in given else x_0.numel()
        return {
            "val_ce": ce / max(1, masked),
            "val_bound": (discrete + continuous) / tokens,
            "val_bound_discrete": discrete / tokens,
            "val_bound_continuous": continuous / tokens,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, whole: it can go on in another number of processes.

        What is sharded, only the first process has; all must ask.
        """
        parts: dict[str, Any] = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer}
        state = {name: whole(part.state_dict(), self.world.first) for name, part in parts.items()}
        return state | {"step": self.step, "seen": self.seen, "skipped": int(self.skipped)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for module, part in ((self.model, state["model"]), (self.ema, state["ema"])):
            own = module.state_dict()
            module.load_state_dict({key: share_of(v, own[key]) if key in own else v for key, v in part.items()})
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        for n, found in state["optimizer"]["state"].items():
            shapes = {key: tuple(v.shape) for key, v in found.items()}
            if shapes != {"step": (), "exp_avg": ordered[n].shape, "exp_avg_sq": ordered[n].shape}:
                raise ValueError(f"the optimiser's moments of parameter {n} have the shapes {shapes}")
        moments = {  # cloned: torch would go on counting steps in the caller's tensor
            n: {key: share_of(v.float().clone(), ordered[n]) for key, v in found.items()}
            for n, found in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})  # groups are of the settings
        for name in ("step", "seen", "skipped"):
            if type(state[name]) is not int or not 0 <= state[name] < 2**63:
                raise ValueError(f"{name} is {state[name]!r}")
        self.step, self.seen = state["step"], state["seen"]
        self.skipped = torch.tensor(float(state["skipped"]), device=self.device)
