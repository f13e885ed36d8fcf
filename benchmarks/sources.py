"""Sources of tokens whose law is known exactly, and the exact denoiser of each.

A `Source` is a mixture of sparse Markov chains over the same states. Each sequence follows one chain ("topic"). With
several topics every token tells something of all other tokens, however far away. The exact p(x_0 | x_t, z_t) follows by
forward-backward in each chain: an unmasked position emits its token, a masked position emits its latent, a Gaussian
around w. No network is trained, so errors of the samples are the sampler's.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from cadd_min.latent import log_likelihood
from cadd_min.schedule import NoiseSchedule

IMPOSSIBLE = 1e-5  # mass of forbidden transitions in the inference: after one wrong draw it must go on


class Source:
    """A mixture of `topics` Markov chains over `states` states, each state with `successors` possible successors.

    law (topics, S, S): transition probabilities. start (topics, S): stationary distributions. The mask's id is S.
    """

    def __init__(self, states: int = 64, successors: int = 4, topics: int = 1, length: int = 32, seed: int = 0):
        gen = torch.Generator().manual_seed(seed)
        self.states, self.topics, self.length, self.mask_id = states, topics, length, states
        self.law = torch.zeros(topics, states, states, dtype=torch.float64)
        for chain in self.law:
            for row in chain:
                to = torch.randperm(states, generator=gen)[:successors]
                weights = torch.empty(successors, dtype=torch.float64).exponential_(generator=gen)
                row[to] = weights / weights.sum()  # a flat Dirichlet over the successors
        self.start = torch.linalg.matrix_power(self.law, 512)[:, 0]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw sequences (count, length)."""
        topic = torch.randint(self.topics, (count,), generator=generator)
        x = [torch.multinomial(self.start[topic], 1, generator=generator)[:, 0]]
        for _ in range(self.length - 1):
            x.append(torch.multinomial(self.law[topic, x[-1]], 1, generator=generator)[:, 0])
        return torch.stack(x, 1)

    def posterior(
        self, x_t: Tensor, z_t: Tensor, t: Tensor, table: Tensor, schedule: NoiseSchedule, wrong_hints: float = 0.0
    ) -> Tensor:
        """Compute log p(x_0^i | x_t, z_t), (B, L, S), by forward-backward in each chain and a sum over chains.

        wrong_hints: the share of the latents that are around a random state, as in training.
        """
        law, start = (softened(p).to(table.dtype) for p in (self.law, self.start))
        emission = evidence(x_t, z_t, t, table[: self.states], schedule, wrong_hints)  # (B, L, S)
        log_joint = [self._smooth(emission, law[k], start[k]) for k in range(self.topics)]
        return torch.stack(log_joint).logsumexp(0).log_softmax(-1)

    @staticmethod
    def _smooth(emission: Tensor, law: Tensor, start: Tensor) -> Tensor:
        """Compute log p(x^i = v, emissions) in one chain up to a constant, (B, L, S)."""
        length = emission.shape[1]
        forward, log_scale = [], torch.zeros(len(emission), dtype=emission.dtype)
        message = start.expand(len(emission), -1)
        for i in range(length):
            message = message * emission[:, i]
            scale = message.sum(-1, keepdim=True)
            message = message / scale
            log_scale = log_scale + scale[:, 0].log()
            forward.append(message)
            message = message @ law
        backward, message = [torch.ones_like(emission[:, 0])], torch.ones_like(emission[:, 0])
        for i in range(length - 1, 0, -1):
            message = (message * emission[:, i]) @ law.T
            message = message / message.sum(-1, keepdim=True)
            backward.append(message)
        joint = torch.stack(forward, 1) * torch.stack(backward[::-1], 1)
        joint = joint / joint.sum(-1, keepdim=True)
        return joint.clamp(min=1e-38).log() + log_scale[:, None, None]

    def possible(self, x_t: Tensor) -> Tensor:
        """Tell for each x_t (B, L) whether some sequence of one of the chains agrees with its tokens, (B,) bool."""
        allowed = torch.ones(*x_t.shape, self.states, dtype=torch.float64)  # (B, L, S)
        allowed[x_t != self.mask_id] = torch.nn.functional.one_hot(x_t[x_t != self.mask_id], self.states).double()
        found = []
        for chain in self.law:
            message = allowed[:, 0]
            for i in range(1, x_t.shape[1]):
                message = (message @ (chain > 0).double() > 0) * allowed[:, i]
            found.append(message.sum(-1) > 0)
        return torch.stack(found).any(0)

    def score(self, x: Tensor) -> dict[str, float]:
        """Score how well samples x (B, L) obey the law. Each sequence is judged by the chain that fits it best.

        bad: share of impossible transitions. tv: total variation between the samples' transitions and the law, the mean
        over states by how often each occurs. entropy: of the samples' bigrams, bits.
        """
        pairs = (x[:, :-1], x[:, 1:])
        possible = torch.stack([(chain > 0)[pairs].sum(-1) for chain in self.law])  # (topics, B)
        topic = possible.argmax(0)
        bad = 1 - possible.amax(0).sum() / pairs[0].numel()
        index = (topic[:, None] * self.states + pairs[0]) * self.states + pairs[1]
        counts = torch.bincount(index.flatten(), minlength=self.law.numel()).double().view_as(self.law)
        rows = counts.sum(-1, keepdim=True)
        tv = (0.5 * (counts / rows.clamp(min=1) - self.law).abs().sum(-1) * rows[..., 0]).sum() / rows.sum()
        joint = counts.sum(0).flatten() / counts.sum()
        return {"bad": float(bad), "tv": float(tv), "entropy": float(-(joint * joint.clamp(min=1e-300).log2()).sum())}


def evidence(
    x_t: Tensor, z_t: Tensor, t: Tensor, table: Tensor, schedule: NoiseSchedule, wrong_hints: float = 0.0
) -> Tensor:
    """Compute how likely each token makes x_t and z_t at its position, (B, L, S), with a maximum of 1.

    An unmasked position tells its token, and a masked position (x_t = S) its latent. table (S, D).
    wrong_hints: the share of the latents that are around a random token's row.
    """
    states = len(table)
    by_token = torch.zeros(*x_t.shape, states, dtype=table.dtype).fill_(-torch.inf)
    by_token = by_token.scatter(-1, x_t.clamp(max=states - 1)[..., None], 0)
    by_latent = log_likelihood(z_t, t, table, schedule)
    if wrong_hints:
        random = by_latent.logsumexp(-1, keepdim=True) - math.log(states)
        right = by_latent + (math.log1p(-wrong_hints) if wrong_hints < 1 else -math.inf)
        by_latent = torch.logaddexp(right, random + math.log(wrong_hints))
    found = torch.where((x_t == states)[..., None], by_latent, by_token)
    return (found - found.amax(-1, keepdim=True)).exp()


def softened(p: Tensor) -> Tensor:
    """Add the mass IMPOSSIBLE to all probabilities, and normalise."""
    return (p + IMPOSSIBLE) / (p + IMPOSSIBLE).sum(-1, keepdim=True)


class Law(Protocol):
    """What an exact denoiser asks of a source."""

    def posterior(
        self, x_t: Tensor, z_t: Tensor, t: Tensor, table: Tensor, schedule: NoiseSchedule, wrong_hints: float = 0.0
    ) -> Tensor: ...


class ExactDenoiser:
    """The exact denoiser of a source, as the sampler calls it: (x_t, z_t, t) -> logits (B, L, S)."""

    def __init__(self, source: Law, table: Tensor, schedule: NoiseSchedule, wrong_hints: float = 0.0):
        self.source, self.table, self.schedule, self.wrong_hints = source, table, schedule, wrong_hints

    def __call__(self, x_t: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        return self.source.posterior(x_t, z_t, t, self.table, self.schedule, self.wrong_hints)


def random_table(states: int, dim: int, norm: float, generator: torch.Generator) -> Tensor:
    """Draw latents (states + 1, dim) of random directions and of length `norm`. dim = 0 is the masked model."""
    rows = torch.randn(states + 1, dim, generator=generator)
    return norm * torch.nn.functional.normalize(rows, dim=-1) if dim else rows
