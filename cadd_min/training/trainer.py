"""One training step, and everything that must survive to the next step.

A step depends only on the trainer's state, the seed and the data. Times are drawn from a generator of (seed, step).
Masks, noise, wrong hints and dropout are drawn from generators of (seed, micro-batch number). So a run resumes bit for
bit without a saved random state. N processes share the micro-batches of a step. Their step equals the step of one
process up to rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cadd_min.baselines import dispatch
from cadd_min.loss import stratified_times
from cadd_min.model import Model
from cadd_min.objective import Batch, Objective
from cadd_min.training.distributed import World, accumulate_only, share_of, shared, unsharded
from cadd_min.utils import device as devices
from cadd_min.utils.cli import option
from cadd_min.utils.device import DTYPES, best_dtype, seeded
from cadd_min.utils.errors import InputError, choose, described


@dataclass(frozen=True)
class TrainConfig(Objective):
    """How to train. The model's own shape is in ModelConfig."""

    steps: int = option(4000, "optimiser steps")
    batch_size: int = option(8, "sequences in a micro-batch")
    accumulate: int = option(0, "micro-batches in a step, shared out among the processes; 0: one for each process")
    lr: float = option(2e-3, "peak learning rate")
    warmup: int = option(100, "steps of linear warm-up")
    final_lr: float = option(0.1, "share of lr that the cosine decay ends at")
    weight_decay: float = option(0.01, "of the backbone's matrices")
    clip: float = option(1.0, "largest gradient norm")
    ema: float = option(0.999, "decay of the averaged weights that sampling uses")
    seed: int = option(0, "of data, noise and initial weights")
    dtype: str = option("auto", "of the network: float32, bfloat16, or auto: the faster one here, measured")
    compile: bool = option(False, "compile the backbone")
    shard: bool = option(False, "each process keeps a share of the weights (FSDP2): for models that do not fit")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("steps", 1), ("batch_size", 1), ("accumulate", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("ema", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be between 0 and 1, not {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be greater than 0, not {getattr(self, name)}")
        choose("dtype", self.dtype, ("auto", *DTYPES))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Compute the rate of a step: linear warm-up, then a cosine from lr down to final_lr * lr at the last step."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * min(1.0, progress))) / 2)


def check_settings(config: TrainConfig, model: str, processes: int) -> None:
    """Raise InputError for settings that do not fit the model's name, or the number of processes."""
    if config.accumulate % processes:
        raise InputError(
            f"accumulate {config.accumulate}: must be a multiple of the {processes} processes that share it"
        )
    if model == "cdm" and config.weighting == "elbo" and config.mse == 0:
        raise InputError("weighting elbo gives the CE of a cdm no weight at all: set mse to 1, or weighting uniform")


class Trainer:
    """Train a model: its optimiser, the average of its weights (EMA), and the number of the next step.

    data(index) gives micro-batch `index`. It is a pure function, called from another thread while a step is computed.
    """

    def __init__(self, model: Model, data: Callable[[int], Batch], config: TrainConfig, world: World | None = None):
        self.model, self.data, self.config = model, data, config
        self.world = world or World(model.device)
        self.device, self.accumulate = self.world.device, config.accumulate or self.world.size
        check_settings(config, model.config.model, self.world.size)
        self.training_loss = dispatch.training_loss(model.config.model)
        frozen: dict[int, Any] = {id(p): p for p in model.parameters() if not (p.requires_grad or config.shard)}
        # frozen weights need no copy, shares do; deepcopy notes every tensor in the dict that it gets
        self.ema = copy.deepcopy(model, dict(frozen)).requires_grad_(False).eval()
        self._compile()
        self._model = shared(model, self.world, config.shard)
        self._ema = shared(self.ema, self.world, config.shard)
        self.step = self.sequences = 0  # sequences trained on: the place in the data
        # steps without a finite gradient, in all and in a row: on the device, so that counting does not wait for it
        self.skipped, self.in_a_row = torch.zeros(2, device=self.device).unbind()
        self.dtype = self._common_dtype()
        self.optimizer = self._make_optimizer()
        self._reader, self._ahead = ThreadPoolExecutor(1), dict[int, Future[Batch]]()

    def _compile(self) -> None:
        """Compile the backbone where the settings say so. Raises InputError where nothing can be compiled here."""
        if not self.config.compile:
            return
        try:  # nothing of the run is on the disk yet
            torch.compile(torch.sin)(torch.ones(8, device=self.device))
        except Exception as error:  # no compiler, one that fails, no Triton: each raises another type
            raise InputError(f"--compile does not work here ({described(error)}): leave it out") from None
        if not self.config.shard:
            self.model.backbone.compile(fullgraph=True)
            return
        for block in self.model.blocks():  # block by block: FSDP2 fetches the weights around each block's forward
            block.forward = torch.compile(block.forward, fullgraph=True)  # type: ignore[method-assign]

    def _common_dtype(self) -> str:
        """Choose the dtype of "auto": the slowest process decides for all."""
        if self.config.dtype != "auto":
            return self.config.dtype
        return "float32" if self.world.any(best_dtype(self.device) == "float32") else "bfloat16"

    def _make_optimizer(self) -> torch.optim.AdamW:
        """Make AdamW. Only the backbone's matrices decay."""
        decay = [p for p in self.model.backbone.parameters() if p.dim() >= 2 and p.requires_grad]
        rest = [p for p in self.model.parameters() if p.requires_grad and not any(p is d for d in decay)]
        groups = [{"params": decay, "weight_decay": self.config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self.config.lr, betas=(0.9, 0.98), fused=True)

    def parameters(self) -> int:
        """Count the model's parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def autocast(self) -> torch.autocast:
        """Return the context in which the network runs."""
        return devices.autocast(self.device, self.dtype)

    def train_step(self) -> dict[str, Tensor]:
        """Make one optimiser step, or skip it where its gradient is not finite.

        Nothing here waits for the device but the count of masked positions. Returns the CE per masked token (nats) and
        the squared error of this process's share, and the gradient's norm.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config)
        for model in (self.model, self.ema):
            model.at_step(self.step)
        sums = self.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        bad = (~torch.isfinite(norm)).float()
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]  # the fused AdamW then changes nothing
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped, self.in_a_row = self.skipped + bad, (self.in_a_row + 1) * bad
        self._update_ema()
        self.step, self.sequences = self.step + 1, self.sequences + self.accumulate * self.config.batch_size
        masked = sums["masked"].clamp(min=1)
        return {"ce": sums["ce"] / masked, "mse": sums["mse"] / masked, "grad_norm": norm}

    def backward(self) -> dict[str, Tensor]:
        """Average the gradients of the step's micro-batches, over all processes, in the parameters.

        Returns the sums of the loss's parts over this process's micro-batches.
        """
        config, mine = self.config, self.accumulate // self.world.size
        shift = seeded(config.seed, self.step, self.device, use=1)
        u = stratified_times(self.accumulate * config.batch_size, shift, self.device)
        u = u.view(self.accumulate, config.batch_size)
        sums = dict.fromkeys(("ce", "masked", "mse"), torch.zeros((), device=self.device))
        for n in range(mine):
            place = n * self.world.size + self.world.rank  # among the step's micro-batches
            index = self.sequences // config.batch_size + place
            following = index + self.world.size if n + 1 < mine else index + self.accumulate - place + self.world.rank
            batch = self._read(index, following).to(self.device)
            accumulate_only(self._model, n + 1 < mine)
            noise = seeded(config.seed, index, self.device)
            torch.manual_seed(noise.initial_seed())  # dropout draws from torch's own generator
            with self.autocast():
                loss, *parts = self._model(self.training_loss, batch, u[place, : len(batch.x_0)], config, noise)
            (loss / mine).backward()
            sums = {name: sums[name] + part for name, part in zip(sums, parts)}
        return sums

    def _read(self, index: int, following: int) -> Batch:
        """Return micro-batch `index`, read ahead if it was foreseen, and begin to read `following`."""

        def read(index: int) -> Batch:
            batch = self.data(index)
            return batch.pinned() if self.device.type == "cuda" else batch

        pending = self._ahead.pop(index, None) or self._reader.submit(read, index)
        batch = pending.result()
        self._ahead = {following: self._reader.submit(read, following)}
        return batch

    @torch.no_grad()
    def averaged(self, f: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call f(the EMA model, ...). Everything that looks at the averaged weights goes through here."""
        return self._ema(f, *args, **options)

    @torch.no_grad()
    def latent_norm(self) -> float:
        """Return the mean length of the latent table's rows. A growing length means a leak (see latent.py)."""
        return float(self._model(lambda model: model.table().norm(dim=-1).mean()))

    def _update_ema(self) -> None:
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))  # early on, forget the random start quickly
        with torch.no_grad():
            pairs = zip(self.ema.parameters(), self.model.parameters())
            averages, weights = zip(*[(a, w) for a, w in pairs if a is not w])
            torch._foreach_lerp_(averages, weights, 1 - decay)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Measure the EMA weights on held-out batches: CE per masked token, the bound and its parts in nats per token.

        The noise is the same at every call, and no hint is wrong. Compare models by the bound, not by the CE.
        """
        objective = dataclasses.replace(self.config, wrong_hints=0.0, drop_latent=0.0, drop_label=0.0)
        ce, masked, discrete, continuous, tokens = 0.0, 0, 0.0, 0.0, 0
        for i, held_out in enumerate(batches):
            batch, gen = held_out.to(self.device), seeded(self.config.seed + 1, i, self.device)
            u = stratified_times(len(batch.x_0), gen, self.device)
            with self.autocast():
                loss = self.averaged(self.training_loss, batch, u, objective, gen)
                bound = self.averaged(dispatch.bound, batch, generator=gen)
            ce, masked = ce + float(loss.ce), masked + int(loss.masked)
            discrete, continuous = discrete + float(bound.discrete.sum()), continuous + float(bound.continuous.sum())
            tokens += batch.scored()
        return {
            "val_ce": ce / masked if masked else 0.0,
            "val_bound": (discrete + continuous) / tokens,
            "val_bound_discrete": discrete / tokens,
            "val_bound_continuous": continuous / tokens,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, whole: another number of processes can go on from it.

        Of sharded tensors only the first process has the values. All processes must call at the same time.
        """
        named = dict(self.model.named_parameters(remove_duplicate=False))
        model = self._whole(self.model, {})
        ema = self._whole(self.ema, {name: model[name] for name, p in named.items() if not p.requires_grad})
        state = {"model": model, "ema": ema, "optimizer": unsharded(self.optimizer.state_dict(), self.world.first)}
        return state | {"step": self.step, "seen": self.sequences, "skipped": int(self.skipped)}

    def _whole(self, module: torch.nn.Module, known: dict[str, Any]) -> dict[str, Any]:
        """Return a module's state dict, gathered where it is sharded. A tensor of two names is gathered once.

        known: tensors that are gathered already, by name: the average of a frozen weight is the weight.
        """
        first: dict[int, str] = {}  # the first name of each parameter
        alias = {n: first.setdefault(id(p), n) for n, p in module.named_parameters(remove_duplicate=False)}
        state = module.state_dict()
        missing = {n: value for n, value in state.items() if n not in known and alias.get(n, n) == n}
        whole = known | unsharded(missing, self.world.first)
        return {n: whole[n] if n in whole else whole[alias[n]] for n in state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. Raises ValueError where it is of another optimiser, or damaged."""
        for module, part in ((self.model, state["model"]), (self.ema, state["ema"])):
            own = module.state_dict()
            module.load_state_dict({key: share_of(v, own[key]) if key in own else v for key, v in part.items()})
        self._load_moments(state["optimizer"]["state"])
        for name in ("step", "seen", "skipped"):
            if type(state[name]) is not int or not 0 <= state[name] < 2**63:
                raise ValueError(f"{name} is {state[name]!r}")
        self.step, self.sequences = state["step"], state["seen"]
        self.skipped = torch.tensor(float(state["skipped"]), device=self.device)

    def _load_moments(self, saved: dict[int, dict[str, Tensor]]) -> None:
        ordered = [p for group in self.optimizer.param_groups for p in group["params"]]
        for n, moments in saved.items():
            shapes = {key: tuple(v.shape) for key, v in moments.items()}
            if shapes != {"step": (), "exp_avg": ordered[n].shape, "exp_avg_sq": ordered[n].shape}:
                raise ValueError(f"the optimiser's moments of parameter {n} have the shapes {shapes}")
        state = {  # cloned: torch would go on counting steps in the caller's tensor
            n: {key: share_of(v.float().clone(), ordered[n]) for key, v in moments.items()}
            for n, moments in saved.items()
        }
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})  # groups are the settings' own
