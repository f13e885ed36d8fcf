"""Sources whose law is known exactly, and the perfect denoiser of each.

`Source` is a mixture of sparse Markov chains over the same states: one chain ("chain"), or several of which each
sequence follows one ("topics"), so that every token says something about all others, however far away. Given x_t and
z_t the exact p(x_0 | x_t, z_t) follows by forward-backward within each chain: an unmasked position is a certainty, a
masked one emits its latent, a Gaussian around w. No training, so it isolates the sampler from the network.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cadd_min.latent import log_likelihood
from cadd_min.schedule import NoiseSchedule

IMPOSSIBLE = 1e-5  # mass that the inference gives to forbidden transitions: one wrong draw must not wreck it


class Source:
    """`topics` chains over `states` states with `successors` possible ones each; the mask is id `states`.

    law (topics, S, S) transition probabilities; start (topics, S) the stationary distribution of each.
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
        """(count, length) sequences."""
        topic = torch.randint(self.topics, (count,), generator=generator)
        x = [torch.multinomial(self.start[topic], 1, generator=generator)[:, 0]]
        for _ in range(self.length - 1):
            x.append(torch.multinomial(self.law[topic, x[-1]], 1, generator=generator)[:, 0])
        return torch.stack(x, 1)

    def posterior(self, x_t: Tensor, z_t: Tensor, t: Tensor, table: Tensor, schedule: NoiseSchedule) -> Tensor:
        """log p(x_0^i | x_t, z_t), (B, L, S), by forward-backward in each chain and a sum over chains."""
        law, start = (softened(p).to(table.dtype) for p in (self.law, self.start))
        seen = torch.zeros(*x_t.shape, self.states, dtype=table.dtype).fill_(-torch.inf)
        seen = seen.scatter(-1, x_t.clamp(max=self.states - 1)[..., None], 0)
        hinted = log_likelihood(z_t, t, table[: self.states], schedule)
        emission = torch.where((x_t == self.mask_id)[..., None], hinted, seen)
        emission = (
            emission - emission.amax(-1, keepdim=True)
        ).exp()  # scaled per position: the scale is common to topics
        log_joint = [self._smooth(emission, law[k], start[k]) for k in range(self.topics)]
        return torch.stack(log_joint).logsumexp(0).log_softmax(-1)

    @staticmethod
    def _smooth(emission: Tensor, law: Tensor, start: Tensor) -> Tensor:
        """log p(x^i = v, emissions) up to a constant, (B, L, S), within one chain."""
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

    def score(self, x: Tensor) -> dict[str, float]:
        """How well samples x (B, L) obey the law, under each sequence's best-fitting chain.

        bad: share of impossible transitions; tv: total variation between the samples' transition counts and the law's,
        mean over rows weighted by how often the state occurs; entropy: of their bigrams, bits.
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


def softened(p: Tensor) -> Tensor:
    """Probabilities with a little mass on what is forbidden."""
    return (p + IMPOSSIBLE) / (p + IMPOSSIBLE).sum(-1, keepdim=True)


class ExactDenoiser:
    """The perfect denoiser of a source, in the sampler's interface: (x_t, z_t, t) -> logits (B, L, S)."""

    def __init__(self, source: Source, table: Tensor, schedule: NoiseSchedule):
        self.source, self.table, self.schedule = source, table, schedule

    def __call__(self, x_t: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        return self.source.posterior(x_t, z_t, t, self.table, self.schedule)


def random_table(states: int, dim: int, norm: float, generator: torch.Generator) -> Tensor:
    """(states + 1, dim) latents in random directions, all of length `norm`; dim = 0 is the masked model."""
    rows = torch.randn(states + 1, dim, generator=generator)
    return norm * torch.nn.functional.normalize(rows, dim=-1) if dim else rows
