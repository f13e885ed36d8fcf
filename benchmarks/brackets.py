"""Draw balanced brackets of several kinds, and compute the exact denoiser by inside-outside.

A bracket's partner may stand at the other end of the sequence, so a token depends on tokens far away, and on which
brackets are between them. All balanced sequences of the length are equally likely. The grammar is

    S -> ( S ) S  of each kind,  or nothing

and a balanced sequence has one tree. `inside` sums the evidence over all trees. The gradient of its logarithm in the
logarithms of the evidence is the exact posterior of each position: no outside pass is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.sources import evidence, softened
from cadd_min.schedule import NoiseSchedule


class Brackets:
    """Balanced sequences of brackets of `kinds` kinds: token c opens kind c, and token kinds + c closes kind c."""

    def __init__(self, kinds: int = 8, length: int = 32):
        self.kinds, self.states, self.length, self.mask_id = kinds, 2 * kinds, length, 2 * kinds
        paths = torch.zeros(length + 1, length + 2, dtype=torch.float64)  # [r, h]: ways from height h to 0 in r steps
        paths[0, 0] = 1
        for r in range(1, length + 1):
            paths[r, :-1] = paths[r - 1, 1:]
            paths[r, 1:] += paths[r - 1, :-1]
        self.paths = paths

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw sequences (count, length), each with the same probability."""
        x = torch.empty(count, self.length, dtype=torch.int64)
        height, rows = torch.zeros(count, dtype=torch.int64), torch.arange(count)
        stack = torch.zeros(count, self.length + 1, dtype=torch.int64)  # the kinds that are open
        for i in range(self.length):
            left = self.length - i
            up = self.paths[left - 1, height + 1] / self.paths[left, height]
            opens = torch.rand(count, dtype=torch.float64, generator=generator) < up
            kind = torch.randint(self.kinds, (count,), generator=generator)
            x[:, i] = torch.where(opens, kind, self.kinds + stack[rows, height])
            height = height + torch.where(opens, 1, -1)
            stack[rows[opens], height[opens]] = kind[opens]
        return x

    def posterior(
        self, x_t: Tensor, z_t: Tensor, t: Tensor, table: Tensor, schedule: NoiseSchedule, wrong_hints: float = 0.0
    ) -> Tensor:
        """Compute log p(x_0^i | x_t, z_t), (B, L, S), as `Source.posterior` does.

        Every token keeps a little evidence everywhere, so that the posterior exists after a wrong draw.
        """
        e = softened(evidence(x_t, z_t, t, table[: self.states], schedule, wrong_hints).double())
        with torch.enable_grad():
            log_e = e.log().requires_grad_(True)
            total = self.inside(log_e.exp()).log().sum()
            (found,) = torch.autograd.grad(total, log_e)
        return found.clamp(min=1e-38).log().to(table.dtype)

    def inside(self, e: Tensor) -> Tensor:
        """Sum the evidence e (B, L, S) over all balanced sequences, (B,): prod_i e[i, x_i] for each sequence x."""
        length = e.shape[1]
        pair = e[..., : self.kinds] @ e[..., self.kinds :].transpose(1, 2)  # (B, L, L): i opens what m closes
        spans = {0: torch.ones_like(e[:, :1, 0]).expand(-1, length + 1)}  # by length: (B, first position)
        for span in range(2, length + 1, 2):
            starts = torch.arange(length - span + 1)
            parts = [
                pair[:, starts, starts + inner + 1]
                * spans[inner][:, starts + 1]
                * spans[span - inner - 2][:, starts + inner + 2]
                for inner in range(0, span, 2)
            ]
            spans[span] = torch.stack(parts).sum(0)
        return spans[length][:, 0]

    def possible(self, x_t: Tensor) -> Tensor:
        """Tell for each x_t (B, L) whether some balanced sequence agrees with its tokens, (B,) bool."""
        allowed = torch.ones(*x_t.shape, self.states, dtype=torch.float64)
        known = x_t != self.mask_id
        allowed[known] = torch.nn.functional.one_hot(x_t[known], self.states).double()
        return self.inside(allowed / self.states) > 0

    def score(self, x: Tensor) -> dict[str, float]:
        """Score samples x (B, L).

        bad: share of the brackets without a partner. A closing bracket that does not fit the last open bracket is left
        without a partner, and so is what is open at the end. entropy: of pairs of neighbours, bits.
        """
        rows, bad = torch.arange(len(x)), torch.zeros(len(x), dtype=torch.float64)
        height = torch.zeros(len(x), dtype=torch.int64)
        stack = torch.full((len(x), self.length + 1), -1)
        for token in x.T:
            opens = token < self.kinds
            fits = ~opens & (stack[rows, height] == token - self.kinds)
            bad += ~opens & ~fits
            height = height + opens.long() - fits.long()
            stack[rows[opens], height[opens]] = token[opens]
        pairs = torch.bincount((x[:, :-1] * self.states + x[:, 1:]).flatten(), minlength=self.states**2).double()
        p = pairs[pairs > 0] / pairs.sum()
        return {"bad": float((bad + height).sum() / x.numel()), "entropy": float(-(p * p.log2()).sum())}
