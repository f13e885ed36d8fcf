"""Compare a trained network with the exact denoiser on true states, and on the states that its own sampling visits.

    python -m benchmarks.shift                mdlm, cadd and a late latent on the Markov chain, one seed
    python -m benchmarks.shift --tune 500     and each again after 500 steps on the exact posterior at visited states
    python -m benchmarks.shift --teach        and another network, taught by the exact posterior alone

The exact denoiser of the chain can be asked at any state. The columns are means of KL(exact || network), in nats per
masked position, over the times of a chain of T steps, and the errors of the samples:

    true       at states of the forward process: what the network has not learned
    doubt      KL(exact || exact that expects wrong hints) at true states. Training has a share of wrong hints, so this
               part of `true` is asked for
    visited    at states that the network's own chain visits, of sequences that are still possible. If `visited` is much
               larger than `true`, the fault is the shift from true latents to the network's guesses
    lost       visited states of which the unmasked tokens alone are impossible: no prediction can mend them
    errors     impossible transitions of the network's samples
    exact      errors of the exact denoiser with the same table

A taught network takes as many steps as the first, at true states without wrong hints. Its targets are probabilities,
not drawn tokens. So if `true` stays large, the noise of the tokens is not to blame, nor are the wrong hints. The
network cannot do the inference, or does not learn the inference in these steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.budget import LATE, open_models, settings, trained
from benchmarks.sources import ExactDenoiser
from benchmarks.specs import markdown, run_all, spread
from benchmarks.tasks import Chain
from cadd_min.forward import q_sample
from cadd_min.loss import T_MIN, DenoiserFn, log_probs
from cadd_min.model import Denoiser, Model
from cadd_min.objective import Batch, Loss, Objective
from cadd_min.orders import Sampling
from cadd_min.sampler import Step, reverse_chain
from cadd_min.training.trainer import Trainer
from cadd_min.utils.cli import as_path, run
from cadd_min.utils.device import seeded
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import check_writable

State = tuple[Tensor, Tensor, Tensor]  # x_t (B, L), z_t (B, L, D), t (B,)


def visited(
    denoiser: DenoiserFn, model: Denoiser, chain: Sampling, count: int, seed: int
) -> tuple[Tensor, list[State]]:
    """Run the reverse chain of a denoiser. Returns its samples (count, L), and its state at each time but 1 and 0."""
    states: list[State] = []

    def keep(step: Step) -> None:
        if step.s > 0:
            states.append((step.x, step.z[0], torch.full((count,), step.s)))

    shape, noise = (count, model.config.length), seeded(seed, chain.steps)
    law = (denoiser, shape, model.table(), model.schedule, model.mask_id, chain)
    return reverse_chain(*law, generator=noise, callback=keep), states


def true_states(task: Chain, model: Denoiser, steps: int, count: int, seed: int) -> list[State]:
    """Draw states of the forward process at the times of a chain of `steps` steps, but 1 and 0."""
    states = []
    for n in range(1, steps):
        noise, t = seeded(seed, n), torch.full((count,), n / steps)
        x_0 = task.source.draw(count, noise)
        x_t, z_t = q_sample(x_0, model.table()[x_0], t, model.schedule, model.mask_id, generator=noise)
        states.append((x_t, z_t, t))
    return states


@torch.no_grad()
def divergence(task: Chain, exact: DenoiserFn, other: DenoiserFn, states: list[State]) -> tuple[float, float]:
    """Compute the mean of KL(exact || other) over masked positions and then over states, in nats.

    Impossible sequences are left out. Returns their share, too. The mean is NaN where all are impossible.
    """
    found, lost = [], []
    for x_t, z_t, t in states:
        fine = task.source.possible(x_t)
        lost.append(1 - float(fine.double().mean()))
        masked = (x_t == task.source.mask_id) & fine[:, None]
        if masked.any():
            p, q = (
                log_probs(denoiser(x_t, z_t, t), task.source.mask_id)[masked].double() for denoiser in (exact, other)
            )
            found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return sum(found) / len(found) if found else math.nan, sum(lost) / len(lost)


def tune(model: Denoiser, task: Chain, exact: DenoiserFn, chain: Sampling, steps: int, seed: int) -> None:
    """Train a network for `steps` steps on the exact posterior at states that its own chain visits.

    Each rollout of a batch gives a step for each of its times. The embedding stays, because the latents are made of it.
    """
    weights = [weight for name, weight in model.named_parameters() if name != "embedding.weight"]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer, done = torch.optim.AdamW(weights, lr=5e-4, betas=(0.9, 0.98)), 0
    while done < steps:
        _, states = visited(model.eval(), model, chain, task.batch_size, seed + 1 + done)
        for x_t, z_t, t in states[: steps - done]:
            masked = (x_t == model.mask_id) & task.source.possible(x_t)[:, None]
            if masked.any():
                target = exact(x_t, z_t, t)[masked].exp()
                F.cross_entropy(model.train()(x_t, z_t, t)[masked], target).backward()
                torch.nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        done += len(states)
    model.eval()


def exact_loss(
    task: Chain, model: Model, batch: Batch, u: Tensor, objective: Objective, generator: torch.Generator
) -> Loss:
    """Compute the cross-entropy to the exact posterior, where `training_loss` has the true tokens. No hint is wrong."""
    t, table, schedule = T_MIN + (1 - T_MIN) * u, model.table(), model.schedule
    x_t, z_t = q_sample(batch.x_0, table[batch.x_0], t, schedule, model.mask_id, generator=generator)
    masked, t = x_t == model.mask_id, t.float()
    with torch.no_grad():
        target = ExactDenoiser(task.source, table, schedule)(x_t, z_t, t)[masked].exp()
    ce = F.cross_entropy(model(x_t, z_t, t)[masked], target, reduction="sum")
    return Loss(ce / batch.x_0.numel(), ce.detach(), masked.sum(), torch.zeros(()))


def taught(task: Chain, job: dict[str, Any], steps: int) -> Denoiser:
    """Train another network for `steps` steps on the exact posterior. Returns its average."""
    model, train = settings(task, job)
    net, data = task.build(job["preset"], job["seed"], **model), task.data(train.batch_size, job["seed"])
    trainer = Trainer(net, data, dataclasses.replace(train, steps=steps, wrong_hints=0.0))
    trainer.training_loss = partial(exact_loss, task)
    for _ in range(steps):
        trainer.train_step()
    return trainer.ema


def measured(model: Denoiser, task: Chain, wrong_hints: float, job: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Measure a network's divergence from the exact denoiser of its table, and the errors of both, by each zhat.

    wrong_hints: the share in the network's training.
    """
    found, count, seed = {}, job["samples"], job["seed"]
    exact, doubting = (ExactDenoiser(task.source, model.table(), model.schedule, p) for p in (0.0, wrong_hints))
    states = true_states(task, model, job["T"], count, seed + 50)
    true, doubt = (divergence(task, exact, other, states)[0] for other in (model, doubting))
    for zhat in job["zhat"] if model.latent.dim else ["hard"]:
        x, states = visited(model, model, Sampling(job["T"], zhat), count, seed)
        at_visited, lost = divergence(task, exact, model, states)
        least, _ = visited(exact, model, Sampling(job["T"], zhat), count, seed)
        found[zhat] = {"true": true, "doubt": doubt, "visited": at_visited, "lost": lost}
        found[zhat] |= {"errors": task.score(x)["error"], "exact": task.score(least)["error"]}
    return found


def one_run(job: dict[str, Any]) -> dict[str, Any]:
    """Train one model and measure it, then a taught network, then the model tuned at visited states."""
    torch.set_num_threads(1)
    task = Chain(job["seed"])
    trainer, _ = trained(task, job)
    net = trainer.ema
    wrong = settings(task, job)[1].wrong_hints if net.latent.dim else 0.0
    row = job | {"updates": trainer.step, "trained": measured(net, task, wrong, job)}
    if job["teach"]:
        row["taught"] = measured(taught(task, job, trainer.step), task, 0.0, job)
    if job["tune"]:
        exact = ExactDenoiser(task.source, net.table(), net.schedule)
        tune(net, task, exact, Sampling(job["T"], next(iter(row["trained"]))), job["tune"], job["seed"])
        row["tuned"] = measured(net, task, wrong, job)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows as Markdown."""
    heads = ("model", "zhat", "true", "doubt", "visited", "lost", "errors", "exact")
    lines = []
    for spec in dict.fromkeys(row["spec"] for row in rows):
        group = [row for row in rows if row["spec"] == spec]
        for kind in ("trained", "taught", "tuned"):
            for zhat in group[0].get(kind, ()):
                cell = {name: spread([row[kind][zhat][name] for row in group]) for name in group[0][kind][zhat]}
                cell |= {"model": spec + (f", {kind}" if kind != "trained" else ""), "zhat": zhat}
                lines.append([cell[head] for head in heads])
    first, seeds = rows[0], len({row["seed"] for row in rows})
    said = f"T = {first['T']}, {first['preset']}, {first['minutes']:g} minutes, {first['samples']} sequences"
    return f"{markdown(heads, lines)}\n\n{said}, seeds: {seeds}, ± their standard deviation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", nargs="+", default=["mdlm", "cadd", LATE], help="models to train")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training")
    parser.add_argument("--tune", type=int, default=0, help="steps on the exact posterior at visited states")
    parser.add_argument("--teach", action="store_true", help="another network, on the exact posterior at true states")
    parser.add_argument("--preset", default="tiny", help="size of the networks")
    parser.add_argument("--T", type=int, default=8, help="steps of the chains")
    parser.add_argument("--zhat", nargs="+", default=["soft", "hard"], help="estimates of z_0; the first is tuned for")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each model")
    parser.add_argument("--samples", type=int, default=512, help="sequences that are measured")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--out", type=as_path, help="append each run as a line of JSON")
    args = parser.parse_args()
    if min(args.seeds, args.samples, args.jobs) < 1 or args.T < 2 or args.tune < 0 or not args.minutes > 0:
        raise InputError("--seeds, --samples, --jobs and --minutes must be above 0, --T at least 2, --tune 0 or more")
    out: Path | None = args.out
    if out:
        check_writable(out, "--out")
    shared = {k: v for k, v in vars(args).items() if k not in ("train", "seeds", "jobs", "out")}
    jobs = [
        shared | {"spec": spec, "model": model, "options": options, "seed": seed}
        for seed in range(args.seeds)
        for spec, model, options in open_models(args.train)
    ]
    task = Chain(0)
    for job in jobs:  # whatever is wrong is said before the first model is trained
        task.config(args.preset, **settings(task, job)[0])
    for zhat in args.zhat:
        Sampling(args.T, zhat)
    print(table(run_all(one_run, jobs, args.jobs, out)))


if __name__ == "__main__":
    run(main)
