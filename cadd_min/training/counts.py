"""Start a model of text at the counts of its corpus: the unigram law in the head, word vectors in the embedding.

    head's bias   log p(v), the best prediction without a context
    embedding     U sqrt(S) of the singular value decomposition of PPMI, with rows of length 1
    head          0.3 times the embedding: a token is expected where its neighbours' neighbours are

PPMI(v, w) = max(0, log p(v, w) / (p(v) p(w))) compares with chance how often w stands next to v: once for w before v,
once for w behind v. Tokens with the same neighbours get close vectors (Levy & Goldberg 2014). Gradient steps find both
laws too, but slowly: a network that cannot tell tokens apart stays at the unigram law. Counting takes seconds.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cadd_min.data.token_folder import TokenView
from cadd_min.model import Denoiser

MOST = 2**23  # tokens that are counted, from the start of the corpus
WINDOW = 2  # neighbours on each side; the second counts half
HEAD = 0.3  # length of the head's rows


def log_frequencies(tokens: Tensor, vocab_size: int) -> Tensor:
    """Compute log p(v) of each token, (V,). Each token counts once more than it occurs, so that none is impossible."""
    counts = torch.bincount(tokens, minlength=vocab_size).float() + 1
    return (counts / counts.sum()).log()


def ppmi(tokens: Tensor, vocab_size: int) -> Tensor:
    """Compute the sparse matrix (V, V) of PPMI(v, w), for w at most WINDOW places behind v."""
    pairs = torch.cat([torch.stack([tokens[:-d], tokens[d:]]) for d in range(1, WINDOW + 1)], -1)
    weight = torch.cat([torch.full((len(tokens) - d,), 1 / d) for d in range(1, WINDOW + 1)])
    joint = torch.sparse_coo_tensor(
        pairs, weight, (vocab_size, vocab_size), check_invariants=True
    ).coalesce()  # sums what occurs again
    (v, w), n = joint.indices(), joint.values()
    before, behind = (torch.zeros(vocab_size).index_add_(0, end, n) for end in (v, w))
    values = (n * n.sum() / (before[v] * behind[w])).log().clamp(min=0)
    return torch.sparse_coo_tensor(joint.indices(), values, joint.shape, check_invariants=True).coalesce()


def word_vectors(tokens: Tensor, vocab_size: int, width: int) -> Tensor:
    """Compute a vector of length 1 for each token, (V, width). Tokens that do not occur get random vectors.

    A random rotation spreads the singular directions over all entries.
    """
    behind = ppmi(tokens, vocab_size)
    rank = min(width, vocab_size)
    u, s, _ = torch.svd_lowrank(torch.cat([behind, behind.t()], 1), q=min(rank + 16, vocab_size))  # (V, rank)
    rotation = torch.linalg.qr(torch.randn(width, width)).Q[:rank]  # (rank, width)
    vectors = (u[:, :rank] * s[:rank].sqrt()) @ rotation
    known = vectors.norm(dim=-1, keepdim=True) > 1e-3 * s[0].sqrt()
    return F.normalize(torch.where(known, vectors, torch.randn_like(vectors)), dim=-1)


@torch.no_grad()
def start_at_counts(model: Denoiser, tokens: np.ndarray | TokenView) -> Denoiser:
    """Set the head and the embedding of a new model by the tokens of its corpus, and return the model.

    A model on the meta device, which has no values, stays as it is. A vocabulary that is not larger than the width gets
    no word vectors: the random rows of its embedding are nearly orthogonal.
    """
    weight, vocab_size = model.embedding.weight, model.config.vocab_size
    if weight.is_meta:
        return model
    counted = torch.from_numpy(np.asarray(tokens[0 : min(MOST, len(tokens))]).astype(np.int64))
    if model.config.head_bias:
        model.head.bias.copy_(log_frequencies(counted, vocab_size))
    if vocab_size > weight.shape[1]:
        weight[:vocab_size] = word_vectors(counted, vocab_size, weight.shape[1])
        model.head.weight.copy_(HEAD * weight[:vocab_size])
    return model
