"""One door to what differs between the core and its baselines: a model's training loss, its bound and its chain.

The models cadd, mdlm and cdm are the core: objective.training_loss, loss.nelbo_parts, sampler.reverse_chain. Each
baseline has a file of its name with three functions: training_loss, nelbo_parts, sample. All else is shared: data,
optimiser, checkpoints, metrics.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cadd_min import objective, ops
from cadd_min.baselines import ar, sedd, udm
from cadd_min.loss import Bound, check_steps, nelbo_parts
from cadd_min.model import Guided, Model
from cadd_min.objective import Batch, Loss
from cadd_min.orders import HITTING, Sampling, check_hitting
from cadd_min.sampler import Step, first_tokens, reverse_chain
from cadd_min.utils.errors import InputError

MODULES: dict[str, ModuleType] = {"ar": ar, "udm": udm, "sedd": sedd}  # each has training_loss, nelbo_parts, sample
UNDERSTOOD = ("steps", "temperature", "top_p", "zhat")  # zhat has no effect on a baseline, nor steps on ar
PLANNED = ("time_grid", "order", "block", "remask")  # settings of a plan, which sedd takes as the core does
STEPPED = ("udm", "sedd")  # these take their steps from a time grid; ar takes one step for each token


def training_loss(name: str) -> Callable[..., Loss]:
    """Return a model's training loss by the model's name. It takes the arguments of `objective.training_loss`."""
    if name not in MODULES:
        return objective.training_loss

    def loss(model: Model, batch: Batch, *rest: Any) -> Loss:
        """Refuse what a baseline does not know before it is trained."""
        check_batch(batch, name)
        return MODULES[name].training_loss(model, batch, *rest)

    return loss


def check_batch(batch: Batch, name: str) -> None:
    """Raise InputError for given tokens, which a baseline would score like all tokens, and for labels."""
    for part, known in ((batch.free, "given tokens"), (batch.label, "labels")):
        if part is not None:
            raise InputError(f"{known} are for cadd, mdlm and cdm, and this is {name}")


def bound(model: Model, batch: Batch, *, steps: int | None = None, generator: torch.Generator | None = None) -> Bound:
    """Estimate the likelihood bound of a batch: two parts, (B,) nats each.

    For the core, the bound is on the free tokens given the others, and given the labels where the batch has them. For a
    baseline it is on all tokens.
    Args: steps: of the discrete chain, or None for continuous time; "ar" has no steps.
    Raises InputError for steps below 1, and for given tokens and labels under a baseline.
    """
    check_steps(steps)
    x_0, label, free = batch
    if model.config.model in MODULES:
        check_batch(batch, model.config.model)
        return MODULES[model.config.model].nelbo_parts(model, x_0, steps=steps, generator=generator)
    denoiser = model if label is None else Guided(model, label)
    chain = (model.table(), model.schedule, model.mask_id)
    return nelbo_parts(denoiser, x_0, *chain, steps=steps, free=free, generator=generator)


def planned(name: str, settings: Sampling) -> bool:
    """Tell whether a baseline's samples come from the core's chain: those of sedd in an order, and so on.

    softmax(f) of sedd's score is p(x_0 | x_t), as the masked model's logits are.
    """
    return name == "sedd" and (settings.in_order or settings.remask > 0 or settings.time_grid == HITTING)


def check(model: Model, settings: Sampling) -> None:
    """Raise InputError for a setting that this model's chain refuses. A baseline accepts those in UNDERSTOOD."""
    name, defaults = model.config.model, Sampling()
    if name not in MODULES or planned(name, settings):
        check_hitting(settings, model.schedule)
    if name not in MODULES:
        return
    for field, value in vars(settings).items():
        if field in UNDERSTOOD or value == getattr(defaults, field) or (name == "sedd" and field in PLANNED):
            continue
        if field != "time_grid":
            models = "cadd, mdlm, cdm and sedd" if field in PLANNED else "cadd, mdlm and cdm"
            raise InputError(f"{field.replace('_', ' ')} is for {models}, and this is {name}")
        if name not in STEPPED or value == HITTING:
            raise InputError(f"the time grid {value} is not for {name}")


def steps_of(model: Model, settings: Sampling) -> int:
    """Return the number of steps of a model's chain: T, or a step for each token."""
    by_token = settings.time_grid == HITTING or model.config.model == "ar"
    return model.config.length if by_token else settings.steps


def draw(
    model: Model,
    count: int,
    settings: Sampling,
    *,
    denoiser: Any = None,
    prompt: Tensor | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """Draw samples (count, L) by the chain of the model.

    Args: denoiser: the model under guidance, or None for the model itself; a baseline ignores it. prompt, generator,
    callback: see `sampler.sample`.
    Raises InputError for a setting that `check` refuses, and for a prompt of another shape or with other numbers.
    """
    check(model, settings)
    name, shape, table = model.config.model, (count, model.config.length), model.table()
    if name in MODULES and not planned(name, settings):
        x, seed = first_tokens(shape, model.mask_id, prompt, table), ops.draw_seed(generator, model.device)
        return MODULES[name].sample(model, x, settings, seed, callback)
    chain = (denoiser or model, shape, table, model.schedule, model.mask_id, settings)
    return reverse_chain(*chain, prompt=prompt, generator=generator, callback=callback)
