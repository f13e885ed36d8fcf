"""The denoiser p(x_0 | x_t, z_t): token embedding, latent, backbone, head; and the models it can be.

CADD joins the other two. Take its latent away and the masked diffusion model is left (`mdlm`: dim 0); mask every token
at once and the continuous one is left (`cdm`: discrete schedule "gone"). One word changes, no code does. The
baselines share the network, not the process: what they train and how they sample is in `cadd_min.baselines`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cadd_min.dit import Block, PatchSize, Size
from cadd_min.latent import FUSIONS, HINTS, TABLES, Latent, ordered_rows, table_norm
from cadd_min.schedule import NoiseSchedule, per_token
from cadd_min.unet import UNetSize
from cadd_min.utils.cli import option
from cadd_min.utils.errors import InputError, choose

BASELINES = ("ar", "udm", "sedd")  # for text; autoregressive, uniform-state diffusion, score entropy
MODELS = ("cadd", "mdlm", "cdm", *BASELINES)
SIZES = {cls.__name__: cls for cls in (Size, PatchSize, UNetSize)}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the model; it travels in the checkpoint."""

    vocab_size: int  # tokens, the mask not counted: its id is vocab_size
    length: int  # tokens in a sequence; of an image H W C
    size: Size | PatchSize | UNetSize  # of the backbone, and which it is
    image: tuple[int, int, int] | None = None  # (H, W, C) where the tokens are the values of pixels
    classes: int = 0  # labels that the model is conditioned on; 0: none
    hint_unit: float = 1.0  # how long the network's hint of z_0 is, against z_0
    model: str = option(
        "cadd",
        "cadd, mdlm (no latent), cdm (everything masked, only latents); baselines for text: ar (autoregressive), "
        "udm (uniform-state diffusion), sedd (score entropy)",
    )
    discrete: str = option("linear", "schedule of the masks, alpha_t: linear or cosine")
    continuous: str = option("auto", "schedule of the latent: linear, cosine, capped, flow; auto: capped, cdm linear")
    latent_dim: int = option(0, "dimension of the latent; 0: the network's width")
    latent_norm: float = option(0.0, "length of the latent table's rows; 0: from --evidence")
    evidence: float = option(0.1, "share of log V nats that the latent alone tells at half time")
    latent_table: str = option("tied", "directions of the table: tied to the token embedding, fixed, or free (leaks)")
    fusion: str = option("add", "how the latent joins the mask's embedding: add, concat or reweight")
    hint: str = option("linear", "what of z_t the network reads: raw, linear (shrunk) or posterior (E[w | z_t])")
    bayes_head: bool = option(False, "add the latent's own log-likelihood to the logits")
    head_bias: bool = option(False, "give every token a logit of its own, whatever the features")

    def __post_init__(self) -> None:
        choose("model", self.model, MODELS)
        if self.model in BASELINES and not (self.image is None and isinstance(self.size, Size)):
            raise InputError(f"model {self.model} is for text, not for images")
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
        if isinstance(self.size, Size) != (self.image is None) or min(self.image or (1,)) < 1 or self.classes < 0:
            raise InputError(
                f"a model of images has their height, width and colours and a backbone for images, and 0 classes or "
                f"more, not {self.image}, {type(self.size).__name__}, {self.classes}"
            )
        if self.image is not None and self.length != math.prod(self.image):
            raise InputError(
                f"images of {self.image} have {math.prod(self.image)} values, not the length {self.length}"
            )
        if self.vocab_size < 2 or self.length < 1:
            raise InputError(f"a model needs 2 tokens and length 1 at least, not {self.vocab_size}, {self.length}")
        self.schedule()

    def schedule(self) -> NoiseSchedule:
        """The noise schedule of this model. A continuous model's latent must end by telling its token."""
        cdm = self.model == "cdm"
        continuous = self.continuous if self.continuous != "auto" else "linear" if cdm else "capped"
        return NoiseSchedule("gone" if cdm else self.discrete, continuous)


class Denoiser(nn.Module):
    """(x_t (B, L), z_t (B, L, D), t (B,)) -> logits (B, L, V) over the tokens; the mask is not among them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.schedule, self.mask_id = config, config.schedule(), config.vocab_size
        width = config.size.embed
        dim = 0 if config.model in ("mdlm", *BASELINES) else config.latent_dim or width
        norm = table_norm(config.latent_norm, config.vocab_size, self.schedule, config.evidence, dim)
        self.latent = Latent(
            config.vocab_size,
            width,
            dim,
            norm,
            self.schedule,
            table=config.latent_table,
            fusion=config.fusion,
            hint=config.hint,
            unit=config.hint_unit,
        )
        self.embedding = nn.Embedding(config.vocab_size + 1, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)  # rows of length about 1
        if config.image is not None:  # the values of a pixel are steps of one scale
            self.embedding.weight.data[:-1] = ordered_rows(config.vocab_size, width)
        self.backbone = (
            config.size.build((config.length,), config.classes, causal=True)
            if config.model == "ar" and isinstance(config.size, Size)
            else config.size.build(config.image or (config.length,), config.classes)
        )
        self.head = nn.Linear(width, config.vocab_size, bias=config.head_bias)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)

    def table(self) -> Tensor:
        """The latent table w (V + 1, D)."""
        return self.latent.table(self.embedding.weight)

    def blocks(self) -> list[nn.Module]:
        """The backbone's transformer blocks: what FSDP2 shares out one by one."""
        return [module for module in self.backbone.modules() if isinstance(module, Block)]

    def features(self, x_t: Tensor, z_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, L, F) with logits = features @ head_matrix().T. Without a label (B,) for any class."""
        z_tilde = self.latent.fuse(self.embedding(x_t), z_t, x_t == self.mask_id, t, self.embedding.weight)
        # entries of about 1, as in Vaswani et al.
        h = self.backbone(math.sqrt(self.config.size.embed) * z_tilde, t, label)
        columns = [h]
        if self.config.bayes_head and self.latent.dim:
            # log N(z_t; signal w_v, noise^2 I) is linear in w_v (all rows are equally long): two more sets of columns
            signal, noise = self.schedule.signal(t), self.schedule.noise(t)
            evidence = per_token(signal / (noise**2).clamp(min=1e-4), z_t) * z_t
            columns.append(evidence.to(h.dtype))
        if self.config.head_bias:  # as a column, it needs no place of its own wherever logits are made
            columns.append(torch.ones_like(h[..., :1]))
        return torch.cat(columns, -1) if len(columns) > 1 else h

    def head_matrix(self) -> Tensor:
        """(V, F)."""
        columns = [self.head.weight]
        if self.config.bayes_head and self.latent.dim:
            columns.append(self.table()[:-1])
        if self.config.head_bias:
            columns.append(self.head.bias[:, None])
        return torch.cat(columns, -1) if len(columns) > 1 else self.head.weight

    def logits_at(self, x_t: Tensor, z_t: Tensor, t: Tensor, rows: Tensor, label: Tensor | None = None) -> Tensor:
        """(N, V) logits at the flat positions `rows` (N,) only: at a large V the head costs as much as the backbone."""
        return self.features(x_t, z_t, t, label).flatten(0, 1)[rows] @ self.head_matrix().T

    def forward(self, x_t: Tensor, z_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.features(x_t, z_t, t, label) @ self.head_matrix().T
