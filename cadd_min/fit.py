"""A run: train, log, look at held-out data and samples now and then, save, and stop when asked."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from cadd_min import checkpoint
from cadd_min.errors import InputError, Interrupted
from cadd_min.metrics import MetricsLog
from cadd_min.options import option
from cadd_min.trainer import Batch, Trainer


@dataclass(frozen=True)
class FitConfig:
    """How often a run looks up from training; 0 is never."""

    log_every: int = option(10, "steps between rows of metrics.jsonl")
    eval_every: int = option(1000, "steps between evaluations on held-out data")
    sample_every: int = option(1000, "steps between samples")
    save_every: int = option(1000, "steps between checkpoints")


@dataclass(frozen=True)
class Run:
    """What `fit` needs beside the trainer: where to write, what to look at, what travels in the checkpoint."""

    out: Path
    held_out: list[Batch]
    show_sample: Callable[[Trainer], str]
    contents: dict[str, Any]  # model_config, tokenizer, settings: plain values


def fit(trainer: Trainer, run: Run, config: FitConfig) -> None:
    """Train to the last step. Ctrl-C finishes the step, saves and raises Interrupted; a second one stops at once."""
    target, path = trainer.config.steps, run.out / checkpoint.FILE
    log = MetricsLog(run.out, trainer.step)

    def save() -> None:
        checkpoint.save(path, {**run.contents, "trainer": trainer.state_dict()})

    tokens = trainer.config.batch_size * trainer.config.accumulate * trainer.model.config.length
    bar = tqdm(total=target, initial=trainer.step, desc=trainer.model.config.model, unit="step")
    try:
        with interrupts() as interrupted:
            while trainer.step < target and not interrupted:
                values = trainer.train_step()
                step, last = trainer.step, trainer.step == target
                if not math.isfinite(values["ce"] + values["grad_norm"]):
                    raise InputError(
                        f"the loss is no number at step {step}: lower --lr; the last checkpoint is untouched"
                    )
                bar.update()
                if _due(step, config.log_every, last):
                    speed = (bar.format_dict["rate"] or 0) * tokens
                    bar.set_postfix_str(f"loss {values['ce']:.3f}, {speed:,.0f} tokens/s")
                    log.write(step, **values, tokens_per_second=round(speed))
                if run.held_out and _due(step, config.eval_every, last):
                    held_out = trainer.evaluate(run.held_out)
                    log.write(step, **held_out)
                    ce, bound = held_out["val_ce"], held_out["val_bound"]
                    bits = bound / math.log(2)
                    bar.write(f"step {step}: held-out CE {ce:.3f}, bound {bound:.3f} nats/token ({bits:.3f} bits)")
                if _due(step, config.sample_every, last):
                    bar.write(f"step {step}: {run.show_sample(trainer)}")
                if _due(step, config.save_every, False):
                    save()
            save()
    finally:
        bar.close()
        log.close()
    if trainer.step < target:
        raise Interrupted(f"stopped after step {trainer.step}, saved in {run.out}; --resume --out {run.out} continues")


def _due(step: int, every: int, last: bool) -> bool:
    return every > 0 and (step % every == 0 or last)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """A list that stays empty until Ctrl-C (or SIGTERM) is received once; the second one interrupts as usual."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
