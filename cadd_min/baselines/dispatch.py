"""One door to what differs between the core and its baselines: a model's loss, its bound and its chain.

cadd, mdlm and cdm are the core: trainer.py, loss.py, sampler.py. A baseline brings its own three functions in the file
of its name in baselines/; everything around them, data, optimiser, checkpoints, metrics, is shared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cadd_min import ops
from cadd_min.guidance import Guided
from cadd_min.loss import Bound, nelbo_parts
from cadd_min.model import BASELINES, Denoiser
from cadd_min.plan import HITTING, Sampling, check_hitting, given
from cadd_min.sampler import Step, sample
from cadd_min.utils.errors import InputError

UNDERSTOOD = ("steps", "temperature", "top_p", "zhat")  # by every baseline; zhat says nothing where there is no latent
STEPPED = ("udm", "sedd")  # these take their steps from a time grid; ar takes one for each token


def baseline(name: str) -> ModuleType | None:
    """The baseline of this name: training_loss, nelbo_parts, sample. None for the core's models."""
    return importlib.import_module(f"cadd_min.baselines.{name}") if name in BASELINES else None


def bound(
    model: Denoiser,
    x_0: Tensor,
    *,
    label: Tensor | None = None,
    free: Tensor | None = None,
    steps: int | None = None,
    generator: torch.Generator | None = None,
) -> Bound:
    """The likelihood bound of x_0 (B, L), given labels (B,) or none: two parts, (B,) nats each.

    free (B, L): of these tokens given the others; steps: of the discrete chain, or None for continuous time.
    """
    other = baseline(model.config.model)
    if other is not None:
        return other.nelbo_parts(model, x_0, steps=steps, generator=generator)
    denoiser = model if label is None else Guided(model, label)
    chain = (model.table(), model.schedule, model.mask_id)
    return nelbo_parts(denoiser, x_0, *chain, steps=steps, free=free, generator=generator)


def check(model: Denoiser, options: Sampling) -> None:
    """Raise InputError for an option that this model's chain knows nothing of."""
    name, usual = model.config.model, Sampling()
    if name not in BASELINES:
        return check_hitting(options, model.schedule)
    for field, value in vars(options).items():
        if field in UNDERSTOOD or value == getattr(usual, field):
            continue
        if field != "time_grid":
            raise InputError(f"{field.replace('_', ' ')} is for cadd, mdlm and cdm, and this is {name}")
        if name not in STEPPED or value == HITTING:
            raise InputError(f"the time grid {value} is not for {name}")


def draw(
    model: Denoiser,
    count: int,
    *,
    denoiser: Any = None,
    prompt: Tensor | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[Step], None] | None = None,
    **how: Any,
) -> Tensor:
    """(count, L) samples; how: the fields of `Sampling`. denoiser: the model under guidance, or None for itself.

    Raises InputError as `check` does.
    """
    other, shape = baseline(model.config.model), (count, model.config.length)
    if other is None:
        chain = (denoiser or model, shape, model.table(), model.schedule, model.mask_id)
        return sample(*chain, prompt=prompt, generator=generator, callback=callback, **how)
    options = Sampling(**how)
    check(model, options)
    device = model.embedding.weight.device
    x, seed = given(shape, model.mask_id, prompt, device), ops.draw_seed(generator, device)
    return other.sample(model, x, options, seed, callback)
