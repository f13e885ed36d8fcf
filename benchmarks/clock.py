"""Training against the clock: as many steps as the seconds allow. The learning rate ends its decay with them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

from cadd_min.training.trainer import Trainer

PACE = 10  # steps, after which the number of steps that the seconds allow is estimated again


def train_for(trainer: Trainer, seconds: float, marks: Sequence[float] = (1.0,)) -> Iterator[float]:
    """Train, and yield the seconds that steps have taken at each of `marks`, shares of `seconds` in rising order.

    The clock stands still while the caller has a mark: measuring costs the model no training.
    """
    config, clock, left = trainer.config, 0.0, [share * seconds for share in marks]
    while left:
        start = time.perf_counter()
        trainer.train_step()
        clock += time.perf_counter() - start
        if trainer.step % PACE == 0:  # the learning rate follows the number of steps that the pace allows
            trainer.config = dataclasses.replace(config, steps=max(trainer.step, round(trainer.step * seconds / clock)))
        if clock >= left[0]:
            left = [mark for mark in left if mark > clock]
            yield clock
