"""A run's loop: train, log, evaluate, sample and save, until the last step or until the run is asked to stop."""

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

import torch
from torch import Tensor
from tqdm import tqdm

from cadd_min.checkpoints import file as checkpoint
from cadd_min.objective import Batch
from cadd_min.training.log import MetricsLog
from cadd_min.training.trainer import Trainer
from cadd_min.utils.cli import option
from cadd_min.utils.device import launched
from cadd_min.utils.errors import InputError, Interrupted, is_out_of_memory

LOOK = 10  # most steps between two checks: for an interrupt (many processes), for skipped steps (a run without log)
LOOK_SECONDS = 1.0  # between two checks for an interrupt: torchrun kills its processes 30 seconds after SIGTERM
LIMIT = 10  # skipped steps in a row after which the run stops


@dataclass(frozen=True)
class FitConfig:
    """How often a run logs, evaluates, samples and saves; 0 is never. A run also saves when it ends or is stopped."""

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
    """A run's folder, its held-out data, its samples, and what its checkpoints hold beside the trainer's state."""

    out: Path
    held_out: list[Batch]
    show_sample: Callable[[Trainer, Path | None], str]  # draws a sample; writes only where a folder is given
    contents: dict[str, Any]  # model_config, tokenizer, settings: plain values


class Fit:
    """The loop of one run. All processes take the same turns; only the first process writes and prints."""

    def __init__(self, trainer: Trainer, run: Run, config: FitConfig):
        self.trainer, self.run, self.config = trainer, run, config
        self.first = trainer.world.first
        self.log = MetricsLog(run.out, trainer.step) if self.first else None
        self.count = len(torch.cat([batch.x_0 for batch in run.held_out]).unique(dim=0)) if run.held_out else 0
        self.saved_step = -1  # of this process's last save
        self.last_look, self.next_look = (trainer.step, time.monotonic()), trainer.step  # see `_stopping`
        self.step_tokens = trainer.config.batch_size * trainer.accumulate * trainer.model.config.length
        steps, name = trainer.config.steps, trainer.model.config.model
        self.bar = tqdm(total=steps, initial=trainer.step, desc=name, unit="step", disable=not self.first)

    def __call__(self) -> None:
        """Train to the last step. Raises Interrupted after Ctrl-C or SIGTERM, InputError where it cannot go on."""
        trainer, every, steps = self.trainer, self.config, self.trainer.config.steps
        try:
            with interrupts() as interrupted, _naming_shortages(self.run):
                while trainer.step < steps and not self._stopping(interrupted):
                    values = trainer.train_step()
                    self.bar.update()
                    last, saving = trainer.step == steps, self._due(every.save_every)
                    if self._due(every.log_every, last):
                        self._log(values)
                    if self._due(every.log_every or LOOK, last) or saving:
                        self._check_skipped()
                    if self._due(every.eval_every, last) and self.run.held_out:
                        self._evaluate()
                    if self._due(every.sample_every, last):
                        self._say(self.run.show_sample(trainer, self.run.out if self.first else None))
                    if saving:
                        self.save()
                if self.saved_step != trainer.step:  # a second copy of a step would push out the checkpoint before it
                    self.save()
        finally:
            self.bar.close()
            if self.log is not None:
                self.log.close()
        if trainer.step < steps:
            out = self.run.out
            raise Interrupted(f"stopped after step {trainer.step}, saved in {out}; --resume --out {out} continues")

    def save(self) -> None:
        """Write the checkpoint. All processes must call at the same time."""
        state, self.saved_step = self.trainer.state_dict(), self.trainer.step
        if self.first:
            checkpoint.save(self.run.out / checkpoint.FILE, {**self.run.contents, "trainer": state})

    def _due(self, every: int, last: bool = False) -> bool:
        return every > 0 and (self.trainer.step % every == 0 or last)

    def _stopping(self, interrupted: list[int]) -> bool:
        """Tell whether any process was asked to stop. All processes get the same answer.

        A single process checks after every step. Many processes have to ask each other, so they check about once in
        LOOK_SECONDS, but at least every LOOK steps.
        """
        world, step, now = self.trainer.world, self.trainer.step, time.monotonic()
        if world.size == 1:
            return bool(interrupted)
        if step < self.next_look:
            return False
        last_step, last_time = self.last_look
        own_pace = (now - last_time) / (step - last_step) if step > last_step else LOOK_SECONDS
        pace = world.mean(own_pace)  # seconds a step: the mean, so that all processes choose the same next look
        self.last_look, self.next_look = (step, now), step + max(1, min(LOOK, int(LOOK_SECONDS / max(pace, 1e-9))))
        return world.any(bool(interrupted))

    def _log(self, values: dict[str, Tensor]) -> None:
        """Write a row of metrics: means over the processes."""
        row = {name: self.trainer.world.mean(value) for name, value in values.items()}
        row["lr"], row["latent_norm"] = self.trainer.optimizer.param_groups[0]["lr"], self.trainer.latent_norm()
        row["skipped"] = int(self.trainer.skipped)
        speed = (self.bar.format_dict["rate"] or 0) * self.step_tokens
        skipped = f", {row['skipped']} skipped" if row["skipped"] else ""
        self.bar.set_postfix_str(f"loss {row['ce']:.3f}, {speed:,.0f} tokens/s{skipped}")
        if self.log is not None:
            self.log.write(self.trainer.step, **row, tokens_per_second=round(speed))

    def _check_skipped(self) -> None:
        """Raise InputError after LIMIT skipped steps in a row, or after half of a shorter run.

        The gradient's norm is that of all processes together, so all of them raise at the same step.
        """
        count = int(self.trainer.in_a_row)
        if count >= min(LIMIT, max(1, self.trainer.config.steps // 2)):
            raise InputError(
                f"the loss or its gradient was not finite in {count} steps in a row, to step {self.trainer.step}: "
                "lower --lr or --clip, or try --dtype float32; the last checkpoint is untouched"
            )

    def _evaluate(self) -> None:
        """Measure the averaged weights on held-out data, print and log the result."""
        measures = self.trainer.evaluate(self.run.held_out)
        ce, bound = measures["val_ce"], measures["val_bound"]
        bits = bound / math.log(2)
        self._say(f"held-out CE {ce:.3f}, bound {bound:.3f} nats/token ({bits:.3f} bits), {self.count} sequences")
        if self.log is not None:
            self.log.write(self.trainer.step, **measures)

    def _say(self, text: str) -> None:
        if self.first:
            self.bar.write(f"step {self.trainer.step}: {text}")


def fit(trainer: Trainer, run: Run, config: FitConfig) -> None:
    """Train to the last step. Ctrl-C finishes the step, saves and raises Interrupted; a second one stops at once."""
    Fit(trainer, run, config)()


@contextmanager
def _naming_shortages(run: Run) -> Iterator[None]:
    """Turn a lack of memory or of disk space into an InputError that names the options which need less."""
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
    """Collect Ctrl-C and SIGTERM in a list, empty at first. A second signal raises KeyboardInterrupt, as usual."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received and not launched():  # torchrun sends its processes a signal that they may have received already
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
