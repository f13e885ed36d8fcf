"""A terminal that shows the denoising live, of text or of an image."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from cadd_min.sampler import Step

HOME = "\x1b[H\x1b[2J"


class Watch:
    """A sampler callback that shows the first sample after each step by draw(step), at most 20 steps a second."""

    def __init__(self, mask_id: int, steps: int, draw: Callable[[Step], str]):
        self.mask_id, self.steps, self.draw = mask_id, steps, draw
        self.clear = HOME if sys.stdout.isatty() else "\n"

    def __call__(self, step: Step) -> None:
        masked = int((step.x[0] == self.mask_id).sum())
        print(f"{self.clear}step {step.number + 1}/{self.steps}  t = {step.s:.3f}  {masked} masked\n")
        print(self.draw(step), flush=True)
        time.sleep(1 / 20)
