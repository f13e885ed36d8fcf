"""The latent: which vector a masked token keeps, how long the vector is, and how the network reads it.

Why the length must be held on purpose. A masked position shows the network z_t = signal z_0 + noise eps. One number
sets how much of x_0 that gives away: the latent's signal-to-noise ratio ||w||^2 gamma_bar / (1 - gamma_bar). If the
loss could train the table w, it would make w longer until z_t spells out x_0. The loss goes to zero, the network learns
to read instead of to predict, and the samples collapse: while sampling, z_t holds only the network's own guesses. So
every row of the table has the length `norm` here, and no gradient flows into z_0. Two exceptions: the table "free" has
neither property, and the rows of "ordered" in dimension 1 differ in length.

How long? Naming one of V tokens takes log V nats. A D-dimensional latent carries at most D/2 log(1 + ||w||^2 SNR / D)
nats (Shannon's capacity, which random directions nearly reach). `evidence` is the share of log V that the latent
carries at t = 1/2, and `evidence_norm` solves that for ||w||, for any V and D. The default is enough to let neighbours
agree, and too little to be believed against them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadd_min.schedule import NoiseSchedule, per_token
from cadd_min.utils.errors import InputError

LONGEST = 1e18  # rows whose squares are still float32
TABLES = ("tied", "fixed", "ordered", "free")
FUSIONS = ("add", "concat", "reweight")
HINTS = ("linear", "raw")


def evidence_norm(vocab_size: int, schedule: NoiseSchedule, share: float, dim: int) -> float:
    """Solve dim/2 log(1 + ||w||^2 SNR(1/2) / dim) = share log V for ||w||: the length of the table's rows.

    With many dimensions the left side is ||w||^2 SNR / 2. Returns infinity where the length is beyond floats.
    """
    if dim == 0:
        return 0.0
    snr = float(schedule.snr(torch.tensor(0.5, dtype=torch.float64, device="cpu")))  # a model may be made on no device
    try:
        return math.sqrt(dim * math.expm1(2 * share * math.log(vocab_size) / dim) / snr)
    except OverflowError:
        return math.inf


def table_norm(norm: float, vocab_size: int, schedule: NoiseSchedule, share: float, dim: int) -> float:
    """Return `norm`, or `evidence_norm` where it is 0. Raises InputError for a length beyond LONGEST."""
    length = norm or evidence_norm(vocab_size, schedule, share, dim)
    if not length <= LONGEST:
        raise InputError(f"the latent's rows would have the length {length:.3g}: lower evidence or latent_norm")
    return length


def ordered_rows(count: int, dim: int) -> Tensor:
    """Make (count, dim) unit rows for tokens that are steps of a scale, like grey levels: near tokens get near rows.

    A row is (cos, sin) of pi u, then of 2 pi u, 3 pi u, ..., where u goes from 0 to 1 along the scale. An odd dimension
    ends with a cosine. In dimension 1 the rows are evenly spaced from -sqrt(3) to sqrt(3), without unit length.
    """
    u = torch.linspace(0, 1, count)[:, None]
    if dim == 1:
        return math.sqrt(3) * (2 * u - 1)
    angle = math.pi * u * torch.arange(1, (dim + 3) // 2)
    return F.normalize(torch.stack([angle.cos(), angle.sin()], -1).flatten(1)[:, :dim], dim=-1)


def log_likelihood(z_t: Tensor, t: Tensor, table: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Compute log N(z_t; signal w_v, noise^2 I) of every token v, up to a constant.

    For the Gaussian latent this is (sqrt(gamma_bar) z.w_v - gamma_bar ||w_v||^2 / 2) / (1 - gamma_bar). By Bayes' rule
    the likelihood is a factor of p(x_0 | x_t, z_t). The other factor is the token's prior given everything else.
    Args: z_t (B, L, D); t (B,); table (V, D). Returns: (B, L, V) nats.
    """
    signal, variance = per_token(schedule.signal(t), z_t), per_token(schedule.noise(t) ** 2, z_t)
    return (signal * (z_t @ table.T) - signal**2 * table.square().sum(-1) / 2) / variance


class Latent(nn.Module):
    """The latent table, and the fusion of a latent with its position's embedding.

    dim = 0 is a masked model: it runs the same code without a latent.
    table: where the directions of the rows come from.
        "tied"     the token embedding; a fixed random matrix maps it to dim where dim is not the embedding's width
        "fixed"    random directions that never change
        "ordered"  the points of a scale, for pixels
        "free"     the token embedding itself, trained: its rows grow until z_t gives x_0 away. Only for demonstration
    fusion: "add" (the paper's), "concat" or "reweight".
    hint: what of z_t the network reads.
        "linear"  the best linear guess of z_0, which is near zero where z_t is noise
        "raw"     z_t itself (the paper's)
    unit: the factor of the hint. For a pretrained embedding: the length of its rows over the length of z_0.
    """

    directions: Tensor
    mixing: Tensor

    def __init__(
        self,
        vocab_size: int,
        width: int,
        dim: int,
        norm: float,
        schedule: NoiseSchedule,
        *,
        table: str = "tied",
        fusion: str = "add",
        hint: str = "linear",
        unit: float = 1.0,
    ):
        super().__init__()
        self.kind, self.fusion, self.hint = table, fusion, hint
        self.dim, self.norm, self.schedule, self.unit = dim, norm, schedule, unit
        random = torch.Generator().manual_seed(0)
        if table == "fixed":
            directions = torch.randn(vocab_size + 1, dim, generator=random)
            self.register_buffer("directions", F.normalize(directions, dim=-1))
        if table == "ordered":
            self.register_buffer("directions", torch.cat([ordered_rows(vocab_size, dim), torch.zeros(1, dim)]))
        self.maps_width = table == "tied" and 0 < dim != width
        if self.maps_width:
            self.register_buffer("mixing", torch.randn(width, dim, generator=random) / math.sqrt(width))
        inputs = width + dim if fusion == "concat" else dim
        needs_projection = dim > 0 and (fusion == "concat" or dim != width)
        self.project = nn.Linear(inputs, width, bias=False) if needs_projection else nn.Identity()

    def table(self, embedding: Tensor) -> Tensor:
        """Make w, a row for each row of the token embedding (V, width). The mask's row is never used."""
        if self.dim == 0:
            return embedding.new_zeros(len(embedding), 0)
        if self.kind == "free":
            return embedding
        if self.kind in ("fixed", "ordered"):
            return self.norm * self.directions
        directions = embedding.detach() @ self.mixing if self.maps_width else embedding.detach()
        return self.norm * F.normalize(directions, dim=-1)

    def fuse(self, e: Tensor, z_t: Tensor, masked: Tensor, t: Tensor) -> Tensor:
        """Make the network's input z_tilde (B, L, width) from e = E[x_t] (B, L, width) and z_t (B, L, D).

        With fusion "add" z_tilde is E[x_t] + project(unit hint(z_t)) where masked. The paper's E[x_t] + z_t is hint
        "raw" with unit 1. Where not masked the latent is left out: there z_t says nothing that x_t does not.
        """
        if self.dim == 0:
            return e
        z = (self.unit * self._hint(z_t, t) * masked[..., None]).to(e.dtype)
        if self.fusion == "concat":
            return self.project(torch.cat([e, z], -1))
        z = self.project(z)
        if self.fusion == "reweight":  # the mask's embedding where z_t is noise, the latent where it is signal
            gamma_bar = per_token(self.schedule.gamma_bar(t), e) * masked[..., None]
            return (1 - gamma_bar) * e + gamma_bar * z
        return e + z

    def _hint(self, z_t: Tensor, t: Tensor) -> Tensor:
        if self.hint == "raw":
            return z_t
        signal, noise = self.schedule.signal(t), self.schedule.noise(t)
        variance = self.norm**2 / self.dim  # of z_0, per dimension
        return per_token(signal * variance / (signal**2 * variance + noise**2), z_t) * z_t
