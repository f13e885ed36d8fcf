"""A run: train, log, look at held-out data and samples now and then, save, and stop when asked or when it must."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from tqdm import tqdm

from cadd_min.checkpoints import file as checkpoint
from cadd_min.objective import Batch
from cadd_min.training.distributed import launched
from cadd_min.training.log import MetricsLog
from cadd_min.training.trainer import Trainer
from cadd_min.utils.cli import option
from cadd_min.utils.errors import InputError, Interrupted, is_out_of_memory

LOOK = 10  # steps between two looks whether to stop, at most, where there are many processes, or no log
LOOK_SECONDS = 1.0  # torchrun kills its processes half a minute after SIGTERM
LIMIT = 10  # skipped steps in a row after which going on makes no sense


@dataclass(frozen=True)
class FitConfig:
    """How often a run looks up from training; 0 is never."""

    log_every: int = option(10, "steps between rows of metrics.jsonl")
    eval_every: int = option(1000, "steps between evaluations on held-out data")
    sample_every: int = option(1000, "steps between samples")
    save_every: int = option(1000, "steps between checkpoints")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 0:
                raise InputError(f"{name} must be 0 (never) or more, not {value}")


@dataclass(frozen=True)
class Run:
    """What `fit` needs beside the trainer: where to write, what to look at, what travels in the checkpoint."""

    out: Path
    held_out: list[Batch]
    show_sample: Callable[[Trainer, Path | None], str]  # writes into the folder, if it is given one
    contents: dict[str, Any]  # model_config, tokenizer, settings: plain values


class Fit:
    """One run's loop. Every process has one and takes the same turns; only the first writes and prints."""

    def __init__(self, trainer: Trainer, run: Run, config: FitConfig):
        self.trainer, self.run, self.config = trainer, run, config
        self.first = trainer.world.first
        self.log = MetricsLog(run.out, trainer.step) if self.first else None
        self.looked, self.next_look = (trainer.step, time.monotonic()), trainer.step
        self.tokens = trainer.config.batch_size * trainer.accumulate * trainer.model.config.length
        total, what = trainer.config.steps, trainer.model.config.model
        self.bar = tqdm(total=total, initial=trainer.step, desc=what, unit="step", disable=not self.first)

    def __call__(self) -> None:
        """Train to the last step. Raises Interrupted after Ctrl-C or SIGTERM, InputError where it cannot go on."""
        trainer, target = self.trainer, self.trainer.config.steps
        try:
            with interrupts() as interrupted, _want_is_named(self.run):
                while trainer.step < target and not self._stopping(interrupted):
                    values = trainer.train_step()
                    self.bar.update()
                    self._look_up(values, trainer.step == target)
                self.save()
        finally:
            self.bar.close()
            if self.log is not None:
                self.log.close()
        if trainer.step < target:
            out = self.run.out
            raise Interrupted(f"stopped after step {trainer.step}, saved in {out}; --resume --out {out} continues")

    def save(self) -> None:
        """Write the checkpoint."""
        state = self.trainer.state_dict()
        if self.first:
            checkpoint.save(self.run.out / checkpoint.FILE, {**self.run.contents, "trainer": state})

    def _stopping(self, interrupted: list[int]) -> bool:
        """Whether any process was asked to: with many, they look together every second or so, and every LOOK steps."""
        world, step, now = self.trainer.world, self.trainer.step, time.monotonic()
        if world.size == 1:
            return bool(interrupted)
        if step < self.next_look:
            return False
        done = step - self.looked[0]
        pace = world.mean((now - self.looked[1]) / done if done else LOOK_SECONDS)  # seconds a step, agreed upon
        self.looked, self.next_look = (step, now), step + max(1, min(LOOK, int(LOOK_SECONDS / max(pace, 1e-9))))
        return world.any(bool(interrupted))

    def _look_up(self, values: dict[str, Tensor], last: bool) -> None:
        """What this step asks for beside training."""
        trainer, config, step = self.trainer, self.config, self.trainer.step
        saving = _due(step, config.save_every, False)
        if _due(step, config.log_every, last):
            self._write(values)
        if _due(step, config.log_every or LOOK, last) or saving:
            self._check()
        if self.run.held_out and _due(step, config.eval_every, last):
            held_out = trainer.evaluate(self.run.held_out)
            ce, bound = held_out["val_ce"], held_out["val_bound"]
            self._say(f"held-out CE {ce:.3f}, bound {bound:.3f} nats/token ({bound / math.log(2):.3f} bits)")
            if self.log is not None:
                self.log.write(step, **held_out)
        if _due(step, config.sample_every, last):
            self._say(self.run.show_sample(trainer, self.run.out if self.first else None))
        if saving:
            self.save()

    def _check(self) -> None:
        """Stop a run whose steps are all skipped. The norm is of all processes' gradients, so all find the same."""
        count = int(self.trainer.in_a_row)
        if count >= min(LIMIT, max(1, self.trainer.config.steps // 2)):
            raise InputError(
                f"the loss or its gradient was not finite in {count} steps in a row, to step {self.trainer.step}: "
                "lower --lr or --clip, or try --dtype float32; the last checkpoint is untouched"
            )

    def _write(self, values: dict[str, Tensor]) -> None:
        """A row of metrics, means over the processes."""
        row = {name: self.trainer.world.mean(value) for name, value in values.items()}
        row["lr"], row["latent_norm"] = self.trainer.optimizer.param_groups[0]["lr"], self.trainer.latent_norm()
        row["skipped"] = int(self.trainer.skipped)
        speed = (self.bar.format_dict["rate"] or 0) * self.tokens
        skipped = f", {row['skipped']} skipped" if row["skipped"] else ""
        self.bar.set_postfix_str(f"loss {row['ce']:.3f}, {speed:,.0f} tokens/s{skipped}")
        if self.log is not None:
            self.log.write(self.trainer.step, **row, tokens_per_second=round(speed))

    def _say(self, text: str) -> None:
        if self.first:
            self.bar.write(f"step {self.trainer.step}: {text}")


def fit(trainer: Trainer, run: Run, config: FitConfig) -> None:
    """Train to the last step. Ctrl-C finishes the step, saves and raises Interrupted; a second one stops at once."""
    Fit(trainer, run, config)()


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (step % every == 0 or last)


@contextmanager
def _want_is_named(run: Run) -> Iterator[None]:
    """Out of memory is an InputError that names the settings that need less; out of room on the disk is one, too."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tuned = run.contents.get("settings", {}).get("script") == "finetune.py"
        fewer = "--length, or take --checkpointing or --lora 16" if tuned else "--length, --preset or --vocab-size"
        raise InputError(
            f"out of memory: lower --batch-size and raise --accumulate by as much, or lower {fewer}, "
            "or take --dtype bfloat16, or --shard over several GPUs; the last checkpoint is untouched"
        ) from None
    except OSError as error:
        raise InputError(
            f"--out {run.out} cannot be written to ({error.strerror}); the last checkpoint is untouched"
        ) from None


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that stays empty until Ctrl-C (or SIGTERM) is received once; the second one interrupts as usual."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and not launched():  # torchrun passes on what its processes have received already
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
