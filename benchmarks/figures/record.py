"""Run two trained models once and store what the process figures show, in docs/tables/process.json.

    python train_text.py --tokenizer chars --batch-size 16 --discrete cosine --continuous linear --evidence 0.35 \\
        --latent-dim 4 --out runs/chars
    python train_image.py --out runs/digits
    python -m benchmarks.figures.record --text runs/chars --digits runs/digits

A frame has the clocks at its time. For each position it has the token, or null for a mask, and what the latent alone
says: the most probable token under p(x_0 | z_t), without the network and the neighbours, and that probability.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.figures.style import DOCS
from cadd_min.checkpoints.load import load_denoiser
from cadd_min.data.images import open_images
from cadd_min.data.pixels import Pixels
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.forward import q_step
from cadd_min.latent import log_likelihood
from cadd_min.model import Model
from cadd_min.orders import Sampling
from cadd_min.sampler import Step, reverse_chain
from cadd_min.sampling.text import parse_prompt
from cadd_min.utils.cli import Parser, as_path, run
from cadd_min.utils.files import atomic_write, cache_folder

TIMES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
SENTENCE = "the people of the United States have chosen peace"
PROMPT = "the people of the[15]have chosen peace"
STEPS = 64
Frame = dict[str, Any]


def forward(model: Model, x_0: Tensor, seed: int) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Run the forward chain on x_0 (1, L) through TIMES, and give (t, x_t (1, L), z_t (1, L, D)) at each."""
    generator = torch.Generator().manual_seed(seed)
    x, z, s = x_0, model.table()[x_0], 0.0
    for t in TIMES:
        if t > 0:
            x, z = q_step(
                x, z, *(torch.tensor([v]) for v in (s, t)), model.schedule, model.mask_id, generator=generator
            )
        yield t, x, z
        s = t


def reverse(model: Model, prompt: Tensor, settings: Sampling, seed: int) -> list[tuple[float, Tensor, Tensor, Tensor]]:
    """Run the reverse chain, and return (s, x_s, z_s, fresh) of the steps that end nearest to TIMES, from 1 to 0."""
    steps: list[Step] = []
    chain = (model, tuple(prompt.shape), model.table(), model.schedule, model.mask_id, settings)
    reverse_chain(*chain, prompt=prompt, generator=torch.Generator().manual_seed(seed), callback=steps.append)
    chosen = sorted({min(range(len(steps)), key=lambda n: abs(steps[n].s - t)) for t in TIMES})
    frames, before = [], prompt == model.mask_id
    for n in chosen:
        masked = steps[n].x == model.mask_id
        frames.append((steps[n].s, steps[n].x, steps[n].z[0], before & ~masked))
        before = masked
    return frames


def frame(model: Model, t: float, x: Tensor, z: Tensor, say: Callable[[Tensor, Tensor], list[Any]]) -> Frame:
    """Describe one state: the clocks, and `say` of the tokens (L,) and of p(x_0 | z_t) under the table alone (L, V)."""
    time = torch.tensor([t])
    p = log_likelihood(z, time.clamp(min=1e-6), model.table()[: model.config.vocab_size], model.schedule).softmax(-1)
    clocks = {
        "t": round(t, 3),
        "alpha": float(model.schedule.alpha(time)),
        "gamma_bar": float(model.schedule.gamma_bar(time)),
    }
    return {k: round(v, 3) for k, v in clocks.items()} | {"cells": say(x[0], p[0])}


def text(model: Model, tokenizer: Tokenizer) -> dict[str, list[Frame]]:
    """Record SENTENCE in the forward process, and the reverse process that fills the gap of PROMPT, in characters."""

    def say(x: Tensor, p: Tensor) -> list[Any]:
        best = p.max(-1)
        return [
            [None if token == model.mask_id else tokenizer.decode([token]), tokenizer.decode([guess]), round(sure, 3)]
            for token, guess, sure in zip(x.tolist(), best.indices.tolist(), best.values.tolist())
        ]

    ids = torch.tensor([tokenizer.encode(SENTENCE)])
    there = [frame(model, t, x, z, say) for t, x, z in forward(model, ids, seed=1)]
    prompt = parse_prompt(PROMPT, tokenizer, model.config.length)[None]
    shown = len(SENTENCE)
    back = []
    for s, x, z, fresh in reverse(model, prompt, Sampling(STEPS, "soft", temperature=0.7), seed=4):
        back.append(frame(model, s, x[:, :shown], z[:, :shown], say) | {"fresh": fresh[0, :shown].tolist()})
    return {"forward": there, "reverse": back}


def digits(model: Model, pixels: Pixels) -> dict[str, list[Frame]]:
    """Record a digit in the forward process, and the reverse process of a digit that the model draws."""

    def say(x: Tensor, p: Tensor) -> list[Any]:
        told = (p @ torch.arange(p.shape[-1], dtype=p.dtype)).round().int()  # E[value | z_t]
        values = [None if token == model.mask_id else token for token in x.tolist()]
        return [values, torch.where(x == model.mask_id, told, x).tolist()]

    x_0 = torch.as_tensor(pixels.encode(open_images("digits", Path(cache_folder())).held_out[3:4])).long().view(1, -1)
    there = [frame(model, t, x, z, say) for t, x, z in forward(model, x_0, seed=1)]
    masks = torch.full_like(x_0, model.mask_id)
    back = [frame(model, s, x, z, say) for s, x, z, _ in reverse(model, masks, Sampling(STEPS, "soft"), seed=0)]
    return {"forward": there, "reverse": back}


@torch.no_grad()
def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--text", type=as_path, required=True, help="a run of train_text.py")
    parser.add_argument("--digits", type=as_path, required=True, help="a run of train_image.py")
    parser.add_argument("--out", type=as_path, default=DOCS / "tables" / "process.json")
    args = parser.parse_args()
    stored = {}
    for name, record in (("text", text), ("digits", digits)):
        model, codec, content = load_denoiser(getattr(args, name))
        stored[name] = {"settings": {k: v for k, v in content["settings"].items() if k in KEPT}, **record(model, codec)}
    with atomic_write(args.out) as part:
        part.write_text(json.dumps(stored, indent=1))
    print(args.out)


KEPT = ("dataset", "preset", "steps", "batch_size", "discrete", "continuous", "evidence", "latent_dim", "seed")

if __name__ == "__main__":
    run(main)
