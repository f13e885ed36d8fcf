"""A page of HTML that replays the reverse chain: what is masked, what is fresh, and what the latents say (--html).

The page is page.html with the chains as JSON in it. It needs no server, no network and no library. The JSON has the
tokens that change in each step, and at some steps what is believed where a token is still masked.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadd_min.baselines.dispatch import steps_of
from cadd_min.data.codec import Codec
from cadd_min.data.pixels import Pixels
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.latent import log_likelihood
from cadd_min.model import Model
from cadd_min.orders import Sampling
from cadd_min.sampler import Step
from cadd_min.sampling.pictures import MASKED
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import atomic_write, check_writable

TEMPLATE = Path(__file__).with_name("page.html")
LARGEST = 5_000_000  # bytes of a page
EVENT, STEP, BELIEF, PIXEL = 14, 30, 36, 2  # bytes of a token that changes, of a step, of a belief, of a pixel's
FOR_BELIEFS = 500_000  # bytes, in all chains and samples
TOP = 3  # tokens that a latent names
AT_ONCE = 2**24  # probabilities held at once
BARS = "Grey bars are masks, underlined tokens are fresh. "
POINT = "Point at a mask, tap it, or focus a text and use the arrow keys to see more."
LEGENDS = {  # by kind and by whether there are latents
    "text True": f"{BARS}Beneath a mask stands the most probable token by its latent alone, bold if likely. {POINT}",
    "text False": f"{BARS}This model has no latents. Beneath a mask stands the network's most probable token. {POINT}",
    "image True": "Left: blue is masked. Right: each masked value as its latent alone tells it, E[value | z_t].",
    "image False": "Blue is masked. This model has no latents.",
}


def check(path: Path, model: Model, settings: Sampling, count: int, chains: int) -> None:
    """Raise InputError before sampling where the page cannot be written, cannot show the model, or would be too large.

    count: samples of each chain; chains: estimates of z_0, side by side.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--html must be a file that ends in .html, not {path}")
    if model.config.model == "udm":
        raise InputError("--html shows what is masked, and udm has no masks")
    check_writable(path, "--html")
    again = 1 + settings.remask * settings.steps  # how often a position can change
    sample, shared = (
        chains * model.config.length * EVENT * again,
        chains * steps_of(model, settings) * STEP + FOR_BELIEFS,
    )
    if count * sample + shared > LARGEST:
        fits = math.floor((LARGEST - shared) / sample)
        lower = f"lower --num to {fits}" if fits > 0 else "lower --steps, or take --remask 0"
        size = (count * sample + shared) / 1e6
        raise InputError(f"--html would write about {size:.1f} MB, and a page has 5 at most: {lower}")


class Recorder:
    """A sampler callback that keeps what the page shows of one chain.

    count: B, its samples; prompt: the given tokens (B, L), or None; chains: how many share the page.
    """

    def __init__(self, model: Model, codec: Codec, count: int, prompt: Tensor | None, settings: Sampling, chains: int):
        self.model, self.codec, self.image = model, codec, isinstance(codec, Pixels)
        x_1 = torch.full((count, model.config.length), model.mask_id) if prompt is None else prompt.cpu()
        self.table = model.table()[: model.config.vocab_size].detach()
        self.at_once = max(1, AT_ONCE // (settings.num_latents * len(self.table)))  # positions
        self.name, self.x, self.start = settings.zhat, x_1, x_1.tolist()
        self.times, self.events, self.told, self.beliefs = [1.0], [], [], []  # type: ignore[var-annotated]
        each = chains * x_1.numel() * (PIXEL if self.image else BELIEF / 2)  # about half of the tokens are masked
        steps = steps_of(model, settings)
        self.kept = set(np.linspace(0, steps - 1, min(steps, 60, int(FOR_BELIEFS / each))).round().astype(int).tolist())

    def __call__(self, step: Step) -> None:
        x = step.x.cpu()
        changed = [(new != old).nonzero()[:, 0] for new, old in zip(x, self.x)]
        self.events.append([torch.stack([at, row[at]], 1).tolist() for at, row in zip(changed, x)])
        self.times.append(step.s)
        self.x = x
        if step.number in self.kept and self.says(x):
            self.told.append(len(self.events))
            self.beliefs.append(self.values(step) if self.image else self.words(step))

    def says(self, x: Tensor) -> bool:
        """Tell whether there is something to say of the tokens x (B, L): of text at masks, of images by latents."""
        return self.table.shape[1] > 0 if self.image else bool((x == self.model.mask_id).any())

    def words(self, step: Step) -> list[list[list[int]]]:
        """List for each sample, at its masked positions: position, the network's token, and the latent's TOP tokens.

        Behind each token of the latent stands its probability in thousandths. Without latents there are none.
        """
        network, rows = step.belief().cpu(), []
        for number, row in enumerate(self.x):
            at = (row == self.model.mask_id).nonzero()[:, 0]
            columns = [at[:, None], network[number, at][:, None]]
            if self.table.shape[1]:
                z = step.z[:, number, at.to(step.z.device)]  # (K, N, D)
                p, tokens = zip(*[self.by_latent(piece, step.s).topk(TOP) for piece in z.split(self.at_once, 1)])
                each = torch.stack([torch.cat(tokens), (1000 * torch.cat(p)).round().long()], -1)
                columns.append(each.flatten(1).cpu())  # (N, 2 TOP): token, thousandths, token, ...
            rows.append(torch.cat(columns, 1).tolist())
        return rows

    def values(self, step: Step) -> list[str]:
        """Write for each image the values that its latents tell, two hexadecimal digits each."""
        p = self.by_latent(step.z.flatten(1, 2), step.s)  # (B L, V)
        told = (p @ torch.arange(p.shape[1], device=p.device, dtype=p.dtype)).round().long().cpu()
        shown = torch.where(self.x == self.model.mask_id, told.view_as(self.x), self.x)
        return ["".join(f"{value:02x}" for value in row) for row in shown.tolist()]

    def by_latent(self, z: Tensor, s: float) -> Tensor:
        """Compute p(x_0 | z_s) of latents z (K, N, D) alone, without the network and the neighbours: (N, V).

        The probabilities of the K latents are averaged.
        """
        time = torch.tensor([max(s, 1e-6)], device=z.device).expand(len(z))
        return log_likelihood(z, time, self.table, self.model.schedule).softmax(-1).mean(0)

    def chain(self, ids: dict[int, int]) -> dict[str, Any]:
        """Return the chain for the page. ids: the number of each token in the page's list of words, which grows."""

        def number(token: int) -> int:
            if token == self.model.mask_id:
                return -1
            return token if self.image else ids.setdefault(token, len(ids))

        def belief(row: list[int]) -> list[int]:
            place, network, *rest = row
            return [place, number(network), *(v if n % 2 else number(v) for n, v in enumerate(rest))]

        t = torch.tensor(self.times, dtype=torch.float64)
        clocks = {"t": t, "alpha": self.model.schedule.alpha(t), "gamma": self.model.schedule.gamma_bar(t)}
        samples = [
            {
                "start": [number(token) for token in start],
                "events": [[v for at, token in step[n] for v in (at, number(token))] for step in self.events],
                "beliefs": [b[n] if self.image else [v for row in b[n] for v in belief(row)] for b in self.beliefs],
                "final": {} if self.image else self.final(n, ids),
            }
            for n, start in enumerate(self.start)
        ]
        return {k: [round(v, 4) for v in values.tolist()] for k, values in clocks.items()} | {
            "name": self.name, "told": self.told, "samples": samples
        }  # fmt: skip

    def final(self, number: int, ids: dict[int, int]) -> dict[int, str]:
        """Return the text of the last step by position, where the text of a token depends on its neighbours."""
        assert isinstance(self.codec, Tokenizer)
        row = self.x[number].tolist()
        return {at: text for at, (text, token) in enumerate(zip(pieces(row, self.codec), row))
                if text != self.codec.decode([token])}  # fmt: skip


def pieces(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """Split tokenizer.decode(ids) into a text for each id. Bytes of an unfinished character wait for the next id."""
    parts, before, done = [], 0, 0  # the ids from `before` to `done` are context, and written already
    for end in range(1, len(ids) + 1):
        known, text = tokenizer.decode(ids[before:done]), tokenizer.decode(ids[before:end])
        whole = not text.endswith("�") or end == len(ids)
        parts.append(text[len(known) :] if whole else "")
        if whole:
            before, done = done, end
    return parts


def write(path: Path, title: str, settings: str, recorders: list[Recorder]) -> None:
    """Write the page of these chains, whole or not at all."""
    first, ids = recorders[0], {}  # type: ignore[var-annotated]
    kind, latents = "image" if first.image else "text", first.table.shape[1] > 0
    chains = [recorder.chain(ids) for recorder in recorders]
    data: dict[str, Any] = {
        "title": title, "settings": settings, "latents": latents, "chains": chains,
        "legend": LEGENDS[f"{kind} {latents}"], "kind": kind,
    }  # fmt: skip
    if isinstance(first.codec, Pixels):
        data |= {"shape": first.codec.shape, "levels": first.codec.levels, "masked": MASKED}
    elif isinstance(first.codec, Tokenizer):
        words = [first.codec.decode([token]) for token in ids]
        top = TOP if latents else 0
        data |= {"vocab": words, "width": 2 + 2 * top, "letters": all(len(w) == 1 or w[0] == "<" for w in words if w)}
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    with atomic_write(path) as part:
        part.write_text(TEMPLATE.read_text("utf-8").replace("{}</script>", f"{text}</script>", 1), "utf-8")
