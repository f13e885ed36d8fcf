"""Start a model of text at the counts of its corpus: the unigram law in the head, word vectors in the embedding.

    head's bias   log p(v), the best prediction without a context
    embedding     U sqrt(S) of the singular value decomposition of PPMI, with rows of length 1
    head          0.3 times the embedding (docs/speedrun.md has what each part gains)

An alphabet is too small for word vectors. Its embedding stays random, and its models get embeddings of pairs of
neighbours, which start at zero.

PPMI(v, w) = max(0, log p(v, w) / (p(v) p(w))) compares with chance how often w stands next to v: once for w before v,
once for w behind v. Tokens with the same neighbours get close vectors (Levy & Goldberg 2014). Gradient steps find both
laws too, but slowly: a network that cannot tell tokens apart stays at the unigram law.

The counts are for networks whose gates start open (dit.py), which are the small ones. The paper's size starts as in the
paper.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from cadd_min.data.batches import RowBatches, TextBatches
from cadd_min.dit import Size
from cadd_min.model import ALPHABET, Denoiser, ModelConfig

MOST = 2**23  # tokens that are counted: of a larger corpus, a random part
WINDOW = 2  # neighbours on each side; the second counts half
HEAD = 0.3  # length of the head's rows


def fast_start(config: ModelConfig) -> ModelConfig:
    """Return the configuration of a new model of text that learns fast: with a bias of the head, and with neighbours.

    Alphabets get neighbours. A cdm gets none, because its input is masks only. A network whose gates start closed stays
    as it is.
    """
    if not isinstance(config.size, Size) or config.size.gate == 0:
        return config
    near = config.vocab_size <= ALPHABET and config.model != "cdm"
    return dataclasses.replace(config, head_bias=True, neighbours=near)


def sequences(data: TextBatches | RowBatches) -> Tensor:
    """Read sequences (N, L) in the order of the first epoch: all of it, or as many as MOST tokens hold.

    The model trains on these sequences. Lines are padded, and lines that do not fit are missing.
    """
    count = min(data.per_epoch, MOST // data.length) // data.batch_size
    return torch.cat([data(index).x_0 for index in range(max(1, count))])


def log_frequencies(x_0: Tensor, vocab_size: int) -> Tensor:
    """Compute log p(v) of each token, (V,). Each count is increased by 1, so every token is possible."""
    counts = torch.bincount(x_0.flatten(), minlength=vocab_size).float() + 1
    return (counts / counts.sum()).log()


def ppmi(x_0: Tensor, vocab_size: int) -> Tensor:
    """Compute the sparse matrix (V, V) of PPMI(v, w), for w at most WINDOW places behind v in sequences (N, L)."""
    pairs, weights = [], []
    for d in range(1, WINDOW + 1):
        pairs.append(torch.stack([x_0[:, :-d].flatten(), x_0[:, d:].flatten()]))
        weights.append(torch.full(pairs[-1].shape[1:], 1 / d))
    joint = sparse(torch.cat(pairs, 1), torch.cat(weights), vocab_size)
    (v, w), n = joint.indices(), joint.values()
    before, behind = (torch.zeros(vocab_size).index_add_(0, end, n) for end in (v, w))
    return sparse(joint.indices(), (n * n.sum() / (before[v] * behind[w])).log().clamp(min=0), vocab_size)


def sparse(places: Tensor, values: Tensor, vocab_size: int) -> Tensor:
    """Make a sparse matrix (V, V) of values (N,) at places (2, N). Values at one place are added."""
    return torch.sparse_coo_tensor(places, values, (vocab_size, vocab_size), check_invariants=True).coalesce()


def word_vectors(x_0: Tensor, vocab_size: int, width: int) -> Tensor:
    """Compute a vector of length 1 for each token, (V, width), from sequences (N, L), where width < V.

    A random rotation spreads the singular directions over all entries. Tokens that do not occur get random vectors.
    """
    behind = ppmi(x_0, vocab_size)
    u, s, _ = torch.svd_lowrank(torch.cat([behind, behind.t()], 1), q=min(width + 16, vocab_size))  # (V, q), (q,)
    vectors = (u * s.sqrt())[:, :width] @ torch.linalg.qr(torch.randn(width, width)).Q
    known = vectors.norm(dim=-1, keepdim=True) > 1e-3 * s[0].sqrt()
    return F.normalize(torch.where(known, vectors, torch.randn_like(vectors)), dim=-1)


@torch.no_grad()
def start_at_counts(model: Denoiser, data: TextBatches | RowBatches) -> Denoiser:
    """Set the head and the embedding of a new model by the sequences of its corpus, and return the model.

    A model on the meta device, which has no values, stays as it is. A vocabulary that is not larger than the width gets
    no word vectors: the random rows of its embedding are nearly orthogonal.
    """
    weight, vocab_size = model.embedding.weight, model.config.vocab_size
    if weight.is_meta:
        return model
    x_0 = sequences(data)
    if model.config.head_bias:
        model.head.bias.copy_(log_frequencies(x_0, vocab_size))
    if vocab_size > weight.shape[1]:
        weight[:vocab_size] = word_vectors(x_0, vocab_size, weight.shape[1])
    model.head.weight.copy_(HEAD * weight[:vocab_size])
    return model
