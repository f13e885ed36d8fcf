"""Brackets: the law by enumeration, the exact denoiser by Bayes' rule over all sequences, errors by hand."""

import itertools

import scipy.stats
import torch

from benchmarks.brackets import Brackets
from benchmarks.sources import ExactDenoiser, random_table
from cadd_min.forward import q_sample
from cadd_min.schedule import NoiseSchedule
from tests.toys import ALPHA, rng


def balanced(kinds: int, length: int) -> torch.Tensor:
    """List all balanced sequences, (N, length), by trying all sequences."""

    def right(word: tuple[int, ...]) -> bool:
        stack = []
        for token in word:
            if token < kinds:
                stack.append(token)
            elif not stack or stack.pop() != token - kinds:
                return False
        return not stack

    return torch.tensor([word for word in itertools.product(range(2 * kinds), repeat=length) if right(word)])


def test_every_balanced_sequence_is_drawn_as_often():
    source = Brackets(2, 6)
    words = balanced(2, 6)
    assert len(words) == 5 * 2**3, "Catalan's number, and a kind for each pair"
    x = source.draw(20_000, rng(0))
    code = lambda rows: (rows * 4 ** torch.arange(6)).sum(1)
    places = {int(c): n for n, c in enumerate(code(words))}
    counts = torch.bincount(torch.tensor([places[int(c)] for c in code(x)]), minlength=len(words)).double()
    assert scipy.stats.chisquare(counts).pvalue > ALPHA


def test_the_exact_denoiser_is_bayes_rule_over_all_sequences():
    source, schedule, table = Brackets(2, 6), NoiseSchedule(), random_table(4, 3, 1.0, rng(0))
    words, x_0, t = balanced(2, 6), source.draw(60, rng(1)), torch.full((60,), 0.6)
    x_t, z_t = q_sample(x_0, table[x_0], t, schedule, source.mask_id, generator=rng(2))
    signal, noise = schedule.signal(t[:1]), schedule.noise(t[:1])
    likelihood = torch.ones(60, len(words), dtype=torch.float64)
    for i in range(6):
        latent = -((z_t[:, i, None] - signal * table[words[:, i]]).double() ** 2).sum(-1) / (2 * noise.double() ** 2)
        token = (x_t[:, i, None] == words[:, i]).double()
        likelihood *= torch.where(x_t[:, i, None] == 4, latent.exp(), token)
    weights = likelihood / likelihood.sum(1, keepdim=True)
    expected = torch.stack([(weights[:, :, None] * (words == v)).sum(1) for v in range(4)], -1)  # (60, 6, 4)
    p = ExactDenoiser(source, table, schedule)(x_t, z_t, t).double().exp()
    torch.testing.assert_close(p, expected, rtol=1e-3, atol=2e-4)
    assert (p - p.mean(0)).abs().max() > 0.3, "the evidence counts"


def test_possible_and_errors_by_hand():
    source = Brackets(2, 6)
    words = balanced(2, 6)
    assert source.possible(words).all() and source.score(words)["bad"] == 0
    x = torch.tensor([[0, 2, 0, 2, 0, 0], [0, 3, 2, 0, 1, 3], [2, 2, 2, 0, 0, 0], [0, 1, 2, 3, 1, 3]])
    assert not source.possible(x).any()
    assert source.score(x[:1])["bad"] == 2 / 6 and source.score(x[1:2])["bad"] == 2 / 6
    assert source.score(x[2:3])["bad"] == 1 and source.score(x[3:])["bad"] == 2 / 6
    masked = torch.tensor([[4, 4, 4, 4, 4, 4], [0, 4, 4, 4, 4, 3], [4, 2, 4, 4, 4, 4], [4, 2, 2, 4, 4, 4]])
    assert source.possible(masked).tolist() == [True, True, True, False]
