"""The denoiser p(x_0 | x_t, z_t): token embedding, latent, backbone, head; and the models that it can be.

CADD joins two models. Without its latent it is the masked diffusion model (`mdlm`: dim 0). With every token masked at
once it is the continuous model (`cdm`: discrete schedule "all-at-once"). One word changes, and no code. The baselines
share the network alone: their losses and chains are in baselines/.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadd_min.dit import Block, PatchSize, Size
from cadd_min.latent import FUSIONS, HINTS, TABLES, Latent, ordered_rows, table_norm
from cadd_min.schedule import NoiseSchedule, per_token
from cadd_min.unet import UNetSize
from cadd_min.utils.cli import option
from cadd_min.utils.errors import InputError, choose

BASELINES = ("ar", "udm", "sedd")  # for text: autoregressive, uniform-state diffusion, score entropy
MODELS = ("cadd", "mdlm", "cdm", *BASELINES)
SIZES = {cls.__name__: cls for cls in (Size, PatchSize, UNetSize)}
ALPHABET = 127  # tokens: more have too many pairs
LARGEST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the model. It travels in the checkpoint."""

    vocab_size: int  # tokens, the mask not counted: its id is vocab_size
    length: int  # tokens in a sequence; H W C of an image
    size: Size | PatchSize | UNetSize  # the kind of backbone, and its size
    image: tuple[int, int, int] | None = None  # (H, W, C) where the tokens are the values of pixels
    classes: int = 0  # labels that the model is conditioned on; 0: none
    hint_unit: float = 1.0  # length of the hint that the network reads, where z_0 has length 1
    head_bias: bool = False  # of models of text
    rows: bool = False  # a sequence is one line, padded with EOT: the network has absolute positions
    neighbours: bool = False  # the embeddings of the pairs of tokens around a position are added to its own
    model: str = option(
        "cadd",
        "cadd, mdlm (no latent), cdm (everything masked, only latents); baselines for text: ar (autoregressive), "
        "udm (uniform-state diffusion), sedd (score entropy)",
    )
    discrete: str = option("linear", "schedule of the masks, alpha_t: linear, power2, power4, power8 or cosine")
    continuous: str = option("auto", "schedule of the latent: linear, cosine, capped, flow; auto: capped, cdm linear")
    latent_dim: int = option(0, "dimension of the latent; 0: the width of a token's embedding")
    latent_norm: float = option(0.0, "length of the latent table's rows; 0: from --evidence")
    evidence: float = option(0.1, "share of log V nats that the latent alone tells at half time")
    latent_table: str = option(
        "tied", "directions of the table: tied to the token embedding, fixed, ordered (pixels), or free (leaks)"
    )
    fusion: str = option("add", "how the latent joins the mask's embedding: add, concat or reweight")
    hint: str = option("linear", "what of z_t the network reads: linear (the best linear estimate of z_0) or raw")
    bayes_head: bool = option(False, "add the latent's own log-likelihood to the logits")

    def __post_init__(self) -> None:
        choose("model", self.model, MODELS)
        if self.model in BASELINES and not (self.image is None and isinstance(self.size, Size)):
            raise InputError(f"model {self.model} is for text, not for images")
        self._check_latent()
        self._check_shape()
        self.schedule()

    def _check_latent(self) -> None:
        for name, allowed in (("latent_table", TABLES), ("fusion", FUSIONS), ("hint", HINTS)):
            choose(name, getattr(self, name), allowed)
        if not 0 < self.evidence < math.inf:
            raise InputError(f"evidence must be greater than 0, not {self.evidence}")
        if not 0 <= self.latent_norm < math.inf or self.latent_dim < 0:
            raise InputError(f"latent_norm and latent_dim must be 0 or more, not {self.latent_norm}, {self.latent_dim}")
        if self.latent_table == "free" and self.latent_dim not in (0, self.size.embed):
            raise InputError(f"latent dim {self.latent_dim}: a free table has the width {self.size.embed}")
        if self.bayes_head and (self.latent_table == "free" or (self.latent_table, self.latent_dim) == ("ordered", 1)):
            raise InputError("bayes_head needs rows of one length: not a free table, nor an ordered one of dimension 1")

    def _check_shape(self) -> None:
        if isinstance(self.size, Size) != (self.image is None) or min(self.image or (1,)) < 1 or self.classes < 0:
            raise InputError(
                f"a model of images has their height, width and colours and a backbone for images, and 0 classes or "
                f"more, not {self.image}, {type(self.size).__name__}, {self.classes}"
            )
        if self.image is not None and self.length != math.prod(self.image):
            raise InputError(
                f"images of {self.image} have {math.prod(self.image)} values, not the length {self.length}"
            )
        if (self.rows or self.neighbours) and self.image is not None:
            raise InputError("rows and neighbours are of text, and this model is of images")
        if self.neighbours and self.vocab_size > ALPHABET:
            raise InputError(f"neighbours are for alphabets of at most {ALPHABET} tokens, not {self.vocab_size}")
        if self.vocab_size < 2 or self.length < 1:
            raise InputError(f"a model needs 2 tokens and length 1 at least, not {self.vocab_size}, {self.length}")

    def schedule(self) -> NoiseSchedule:
        """Return the noise schedule. "auto" is capped, but linear for a cdm, whose latent alone tells the token."""
        cdm = self.model == "cdm"
        continuous = self.continuous if self.continuous != "auto" else "linear" if cdm else "capped"
        return NoiseSchedule("all-at-once" if cdm else self.discrete, continuous)


class Neighbours(nn.Module):
    """Embed the pairs of tokens around each position. The mask is a token too, and stands beyond both ends.

    Each pair of tokens at each of `places` has a row, so the network need not learn first to join two characters. There
    are (V + 1)^2 rows for each of the places, so neighbours are for alphabets. A causal network sees none to its right.
    """

    def __init__(self, vocab_size: int, width: int, causal: bool = False):
        super().__init__()
        self.tokens = vocab_size + 1
        self.places = ((-1, 0), (-2, -1)) if causal else ((-1, 1), (-2, -1), (1, 2))
        self.table = nn.Embedding(len(self.places) * self.tokens**2, width)
        nn.init.zeros_(self.table.weight)

    def forward(self, x_t: Tensor) -> Tensor:
        """Sum the embeddings of the pairs around each token of x_t (B, L): (B, L, width)."""
        length, padded = x_t.shape[1], F.pad(x_t, (2, 2), value=self.tokens - 1)
        at = {i: padded[:, 2 + i : 2 + i + length] for i in range(-2, 3)}
        rows = [(k * self.tokens + at[i]) * self.tokens + at[j] for k, (i, j) in enumerate(self.places)]
        return self.table(torch.stack(rows)).sum(0)


class Model(nn.Module, ABC):
    """What training, sampling and evaluation ask of a model. Two classes answer: `Denoiser`, and upgrade's `Upgraded`.

    Called, it maps x_t (B, L), z_t (B, L, D), t (B,) and a label (B,) or None to logits (B, L, V).
    """

    config: Any  # its fields model, length, vocab_size, classes, image and rows are those of ModelConfig
    schedule: NoiseSchedule
    mask_id: int
    latent: Latent
    backbone: nn.Module

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @abstractmethod
    def table(self) -> Tensor:
        """Return the latent table w: D columns, and a row for each row of the token embedding, the mask's included."""

    @abstractmethod
    def features(self, x_t: Tensor, z_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Compute the features (B, L, F): logits are features @ head_matrix().T. No label means any class."""

    @abstractmethod
    def head_matrix(self) -> Tensor:
        """Return the head, (V, F)."""

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """List the backbone's transformer blocks: FSDP2 shards the weights block by block."""

    def at_step(self, step: int) -> None:
        """Prepare for training step `step`. Only a model that changes while it is trained does anything here."""

    def logits(self, features: Tensor) -> Tensor:
        """Map features (..., F) to logits (..., V)."""
        return features @ self.head_matrix().T

    def logits_at(self, x_t: Tensor, z_t: Tensor, t: Tensor, rows: Tensor, label: Tensor | None = None) -> Tensor:
        """Compute the logits (N, V) at the flat positions `rows` (N,): with a large V the head is half of the work."""
        return self.logits(self.features(x_t, z_t, t, label).flatten(0, 1)[rows])

    def forward(self, x_t: Tensor, z_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Compute the logits (B, L, V) at every position."""
        return self.logits(self.features(x_t, z_t, t, label))


class Denoiser(Model):
    """The model that is trained here from scratch. Its logits (B, L, V) do not count the mask."""

    config: ModelConfig

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.schedule, self.mask_id = config, config.schedule(), config.vocab_size
        width = config.size.embed
        self.latent = self._make_latent(width)
        self.embedding = nn.Embedding(config.vocab_size + 1, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # rows of length about 1
        if config.image is not None:  # the values of a pixel are steps of one scale
            self.embedding.weight.data[:-1] = ordered_rows(config.vocab_size, width)
        causal = config.model == "ar"
        self.neighbours = Neighbours(config.vocab_size, width, causal) if config.neighbours else None
        if isinstance(config.size, Size):
            self.backbone = config.size.build((config.length,), config.classes, causal, config.rows)
        else:
            self.backbone = config.size.build(config.image or (config.length,), config.classes)
        self.head = nn.Linear(width, config.vocab_size, bias=config.head_bias)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def _make_latent(self, width: int) -> Latent:
        config = self.config
        dim = 0 if config.model in ("mdlm", *BASELINES) else config.latent_dim or width
        return Latent(
            config.vocab_size,
            width,
            dim,
            table_norm(config.latent_norm, config.vocab_size, self.schedule, config.evidence, dim),
            self.schedule,
            table=config.latent_table,
            fusion=config.fusion,
            hint=config.hint,
            unit=config.hint_unit,
        )

    def table(self) -> Tensor:
        return self.latent.table(self.embedding.weight)

    def blocks(self) -> list[nn.Module]:
        return [module for module in self.backbone.modules() if isinstance(module, Block)]

    def features(self, x_t: Tensor, z_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        e = self.embedding(x_t)  # (B, L, width)
        z_tilde = self.latent.fuse(e, z_t, x_t == self.mask_id, t)
        if self.neighbours is not None:
            z_tilde = z_tilde + self.neighbours(x_t)
        h = self.backbone(math.sqrt(self.config.size.embed) * z_tilde, t, label)  # entries of about 1 (Vaswani et al.)
        columns = [h]
        if self.config.bayes_head and self.latent.dim:
            columns.append(self._natural_parameter(z_t, t).to(h.dtype))
        if self.config.head_bias:  # a bias is a column of ones, so that logits are a product wherever they are made
            columns.append(torch.ones_like(h[..., :1]))
        return torch.cat(columns, -1) if len(columns) > 1 else h

    def _natural_parameter(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Compute signal / noise^2 z_t, (B, L, D): times w_v, it is log N(z_t; signal w_v, noise^2 I) up to a constant.

        All rows w_v are equally long, so the log-likelihood is linear in w_v. noise^2 is held above 1e-4.
        """
        signal, noise = self.schedule.signal(t), self.schedule.noise(t)
        return per_token(signal / (noise**2).clamp(min=1e-4), z_t) * z_t

    def head_matrix(self) -> Tensor:
        columns = [self.head.weight]
        if self.config.bayes_head and self.latent.dim:
            columns.append(self.table()[:-1])
        if self.config.head_bias:
            columns.append(self.head.bias[:, None])
        return torch.cat(columns, -1) if len(columns) > 1 else self.head.weight


class Guided:
    """The denoiser of given classes under classifier-free guidance (Ho & Salimans 2022).

    logits = any + guidance (given - any). `given`: logits for the class of each sequence, label (B,). `any`: logits for
    "any class". Guidance 0 is the unconditional model, 1 the conditional model, and more exaggerates the class.
    """

    def __init__(self, model: Model, label: Tensor, guidance: float = 1.0):
        if not 0 <= guidance <= LARGEST:
            raise InputError(f"--guidance must be 0 or more, and not beyond float32, not {guidance}")
        self.model, self.label, self.guidance = model, label, guidance

    def logits_at(self, x_t: Tensor, z_t: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        """Compute logits (N, V) at the flat positions `rows` (N,), or (B, L, V) without them.

        With K latents folded into the batch, B is K times the number of labels.
        """
        label = self.label.repeat(len(x_t) // len(self.label))

        def logits(label: Tensor | None) -> Tensor:
            if rows is None:
                return self.model(x_t, z_t, t, label)
            return self.model.logits_at(x_t, z_t, t, rows, label)

        if self.guidance == 0:
            return logits(None)
        given = logits(label)
        return given if self.guidance == 1 else logits(None).lerp(given, self.guidance)

    def __call__(self, x_t: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        return self.logits_at(x_t, z_t, t)
