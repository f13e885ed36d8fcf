"""An existing language model as the denoiser p(x_0 | x_t, z_t): attention to both sides, hints at masked positions.

CADD changes no layer. It needs a model that takes embeddings and whose logits are a linear map of its last layer.
Attention is opened to both sides. Where a token is masked, the latent's hint is added to the embedding of the mask.
With the latent off, the untuned logits are the pretrained model's under the same attention, bit for bit.

How long is the latent? The rows of the table have the directions of the pretrained embedding. Their length is set from
`evidence`, as in every model of this project (see latent.py). The hint that the network reads is scaled to the
length of the network's own embeddings, which is measured. So the hint of a nearly certain token looks like that token.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadd_min.data.hf_tokenizer import HFTokenizer
from cadd_min.latent import HINTS, Latent, table_norm
from cadd_min.model import Denoiser, Model, ModelConfig
from cadd_min.schedule import DISCRETE, NoiseSchedule
from cadd_min.upgrade import lora
from cadd_min.upgrade.families import AUTOREGRESSIVE, MASKED, Source, auto_class, check_depth
from cadd_min.utils.cli import option
from cadd_min.utils.errors import InputError, choose, first_line

MODELS = ("cadd", "mdlm")


@dataclass(frozen=True)
class UpgradeConfig:
    """Everything that shapes an upgraded model but its weights. It travels in the checkpoint."""

    base: str  # the pretrained model's configuration, JSON
    vocab_size: int  # rows of its embedding, the mask's among them
    mask_id: int
    length: int  # tokens in a sequence
    shift: bool  # the logits at position i are of token i + 1
    masked_lm: bool  # whether the library opens it as a masked language model; else as a causal one
    unit: float  # length of a token's embedding in the pretrained model
    unused: int = 0  # rows at the end of the embedding that belong to no token: none of them is ever drawn
    mask_shift: bool = False  # whether the mask's embedding is trained under LoRA, by a vector that is added to it
    model: str = option("cadd", "cadd, or mdlm: the same without the latent")
    discrete: str = option("linear", "schedule of the masks, alpha_t: linear, power2, power4, power8 or cosine")
    continuous: str = option("capped", "schedule of the latent: linear, cosine, capped, or flow (matching)")
    latent_norm: float = option(0.0, "length of the latent table's rows; 0: from --evidence")
    evidence: float = option(0.1, "share of log V nats that the latent alone tells at half time")
    hint: str = option("linear", "what of z_t the network reads: linear (the best linear estimate of z_0) or raw")
    lora: int = option(0, "rank of LoRA, whose matrices alone are trained; 0: train the whole model")
    freeze_embedding: bool = option(False, "do not train the token embedding")
    anneal: int = option(0, "steps in which attention is opened to the right token by token; 0: at once")

    image, classes, rows = None, 0, False  # a model of running text, without labels

    def __post_init__(self) -> None:
        choose("model", self.model, MODELS)
        choose("hint", self.hint, HINTS)
        for name, least in (("length", 1), ("lora", 0), ("anneal", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("evidence", "latent_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if not 0 <= self.mask_id < self.vocab_size:
            raise InputError(f"mask_id must be one of {self.vocab_size} tokens, not {self.mask_id}")
        choose("discrete", self.discrete, [name for name in DISCRETE if name != "all-at-once"])
        self.schedule()

    def schedule(self) -> NoiseSchedule:
        """Return the noise schedule of this model."""
        return NoiseSchedule(self.discrete, self.continuous)


class Upgraded(Model):
    """A pretrained network as the denoiser. Labels are ignored.

    V counts the mask, whose logit is never read. D is the embedding's width, or 0 for a masked model. The network, a
    PreTrainedModel, is changed: its head moves to `self.head`, so that the network returns the head's input.
    """

    config: UpgradeConfig
    backbone: Any  # the PreTrainedModel

    def __init__(self, config: UpgradeConfig, network: Any):
        super().__init__()
        self.config, self.schedule, self.mask_id = config, config.schedule(), config.mask_id
        self.head = network.get_output_embeddings()
        self.head_place = next(name for name, module in network.named_modules() if module is self.head)
        lora.put(network, self.head_place, nn.Identity())
        network.config.use_cache = False
        self.backbone = network
        width = self.embedding.weight.shape[1]
        dim = 0 if config.model == "mdlm" else width
        norm = table_norm(config.latent_norm, config.vocab_size, self.schedule, config.evidence, dim)
        self.latent = Latent(
            config.vocab_size,
            width,
            dim,
            norm,
            self.schedule,
            hint=config.hint,
            unit=config.unit / norm if norm else 1.0,
        )
        self.mask_shift = nn.Parameter(torch.zeros(width)) if config.mask_shift else None
        self.ahead: int | None = None  # tokens to the right that attention may look at; None: all
        look_both_ways(network)

    @property
    def embedding(self) -> nn.Embedding:
        """Return the network's token embedding."""
        return self.backbone.get_input_embeddings()

    def table(self) -> Tensor:
        return self.latent.table(self.embedding.weight)

    def features(self, x_t: Tensor, z_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        embedded, masked = self.embedding(x_t), x_t == self.mask_id
        if self.mask_shift is not None:
            embedded = embedded + masked[..., None] * self.mask_shift
        z_tilde = self.latent.fuse(embedded, z_t, masked, t)
        h = self.backbone(inputs_embeds=z_tilde, attention_mask=self._window(x_t)).logits  # (B, L, width)
        if self.config.shift:  # no position predicts the first token, which gets the second token's features
            h = torch.cat([h[:, :1], h[:, :-1]], 1)
        return h if self.head.bias is None else torch.cat([h, torch.ones_like(h[..., :1])], -1)  # (B, L, F)

    def head_matrix(self) -> Tensor:
        weight, bias = self.head.weight, self.head.bias
        return weight if bias is None else torch.cat([weight, bias[:, None]], -1)

    def logits(self, features: Tensor) -> Tensor:
        logits = F.linear(features[..., : self.head.weight.shape[1]], self.head.weight, self.head.bias)
        logits[..., self.config.vocab_size - self.config.unused :] = -torch.inf
        return logits

    def at_step(self, step: int) -> None:
        """Open the attention to the right, from no token to all tokens in config.anneal steps.

        DiffuLLaMA (Gong et al. 2024) also shows later tokens step by step, but chooses them at random.
        """
        opening = step < self.config.anneal
        self.ahead = self.config.length * step // self.config.anneal if opening else None

    def _window(self, x: Tensor) -> Tensor | None:
        """Make the attention mask (1, 1, L, L) bool of tokens x (B, L) while attention is opened; None: no mask."""
        if self.ahead is None or self.ahead >= x.shape[1]:
            return None
        position = torch.arange(x.shape[1], device=x.device)
        return (position <= position[:, None] + self.ahead)[None, None]

    def blocks(self) -> list[nn.Module]:
        lists = [module for module in self.backbone.modules() if isinstance(module, nn.ModuleList)]
        layers: nn.ModuleList = max(lists, key=len)
        return list(layers)


def look_both_ways(network: Any) -> None:
    """Make attention bidirectional, in the library's configuration and in each layer.

    Without an attention mask, the layer's own attribute decides.
    """
    network.config.is_causal = False
    for module in network.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


def upgrade(
    source: Source, length: int, *, shift: bool | None = None, unit: float | None = None, **options: Any
) -> Upgraded:
    """Make a denoiser of sequences of `length` tokens from a pretrained model. Its network is changed in place.

    Args: shift: whether the logits at position i are of token i + 1; None: as in the model's family. unit: length of a
    token's embedding; None: measured. options: those of `UpgradeConfig`.
    Raises InputError for a model that takes no embeddings, cannot look to the right, or has fewer than `length`
    positions. A model whose logits are not a linear map of its last layer is refused as well.
    """
    network, name = source.network, source.name
    if "inputs_embeds" not in inspect.signature(network.forward).parameters:
        raise InputError(f"--from {name}: the model must take inputs_embeds, and a {type(network).__name__} does not")
    if length > (most := longest(network)):
        raise InputError(f"length must be at most {most}, what {name} was made for, not {length}")
    if options.get("anneal") and source.family != AUTOREGRESSIVE:
        raise InputError(f"anneal opens the attention of an autoregressive model, and {name} looks both ways already")
    window = getattr(network.config, "sliding_window", None)
    if options.get("anneal") and isinstance(window, int) and window < length:
        raise InputError(f"anneal would open the windows of {window} tokens of {name}: leave it out")
    config = UpgradeConfig(
        base=network.config.to_json_string(use_diff=False),
        vocab_size=len(network.get_input_embeddings().weight),
        mask_id=source.tokenizer.mask_id,
        length=length,
        shift=source.family.shift if shift is None else shift,
        masked_lm=source.family == MASKED,
        unit=unit or _median_norm(network.get_input_embeddings()),
        unused=source.tokenizer.unused,
        mask_shift=source.new_mask and bool(options.get("lora")),
        **options,
    )
    look_both_ways(network)
    try:
        return trainable(_tried(config, network, name))
    except InputError:
        raise
    except Exception as error:  # each architecture fails in its own way
        why = first_line(error)
        raise InputError(f"--from {name}: a {type(network).__name__} cannot be upgraded: {why}") from None


@torch.no_grad()
def _tried(config: UpgradeConfig, network: Any, name: str) -> Upgraded:
    """Make the model, and try it on four tokens: its logits must be the network's, and it must look to the right.

    Raises InputError where it fails.
    """
    probe = network.get_input_embeddings()(torch.arange(min(4, config.length))[None])
    expected = network(inputs_embeds=probe).logits
    model = Upgraded(config, network)
    tokens = config.vocab_size - config.unused
    if not torch.equal(model.logits(network(inputs_embeds=probe).logits)[..., :tokens], expected[..., :tokens]):
        raise InputError(f"--from {name}: its logits are more than a linear map of its last layer")
    probe = torch.cat([probe[:, :-1], -probe[:, -1:]], 1)
    changed = model.logits(network(inputs_embeds=probe).logits)
    if config.length > 1 and torch.equal(changed[:, 0, :tokens], expected[:, 0, :tokens]):
        raise InputError(f"--from {name}: a {type(network).__name__} cannot be made to look to the right")
    if config.anneal:
        model.ahead = 0
        network(inputs_embeds=probe, attention_mask=model._window(probe[..., 0]))
        model.ahead = None
    return model


def longest(network: Any) -> float:
    """Return for how many tokens the network has positions; infinite where it does not say.

    Some rows of a position embedding belong to no token (RoBERTa), and do not count.
    """
    most = getattr(network.config, "max_position_embeddings", None) or 0
    if not isinstance(most, int) or most < 1:
        return math.inf
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            most = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return most


def build(config: UpgradeConfig) -> Upgraded:
    """Build the model of a configuration, with random weights. Raises InputError."""
    from transformers import AutoConfig

    values = json.loads(config.base)
    check_depth(values)
    family = MASKED if config.masked_lm else AUTOREGRESSIVE
    base = AutoConfig.for_model(values.pop("model_type"), **values)
    return trainable(Upgraded(config, auto_class(family).from_config(base)))


def trainable(model: Upgraded) -> Upgraded:
    """Mark which parameters are trained, and return the same model.

    These are all parameters, with freeze_embedding all but the embedding, and with LoRA (Hu et al. 2022) only its new
    matrices. Raises InputError where LoRA's package is missing.
    """
    config = model.config
    if config.lora:
        lora.inject(model.backbone, config.lora)
        model.head.requires_grad_(False)
    elif config.freeze_embedding:
        model.embedding.requires_grad_(False)
    return model


def merged(model: Upgraded) -> Any:
    """Return the library's network with its head back in place and LoRA merged. Do not use `model` afterwards."""
    network = model.backbone
    if model.config.lora:
        lora.merge(network)
    if model.mask_shift is not None:
        _move_mask(model)
    lora.put(network, model.head_place, model.head)
    return network


@torch.no_grad()
def _move_mask(model: Upgraded) -> None:
    """Add the trained shift to the mask's row. Gemma's embedding multiplies its rows, so the shift is divided."""
    row, mask = model.embedding.weight[model.mask_id], torch.tensor([model.mask_id], device=model.device)
    scale = model.embedding(mask)[0].norm() / row.norm()
    row += (model.mask_shift / scale).to(row.dtype)
    model.mask_shift = None


def source_of(model: Upgraded, tokenizer: HFTokenizer, name: str) -> Source:
    """Return a tuned network as a source, to be upgraded again as if from a folder. Do not use `model` afterwards."""
    network = merged(model).requires_grad_(True)
    return Source(name, network, tokenizer, MASKED if model.config.masked_lm else AUTOREGRESSIVE)


def kept(config: UpgradeConfig | ModelConfig) -> dict[str, Any]:
    """Return the settings that a model keeps when it is tuned again, unless the command line says otherwise.

    anneal becomes 0, as attention is open after the first tuning. A masked model of this project has no latent, so it
    keeps no settings of the latent.
    """
    if isinstance(config, UpgradeConfig):
        return {**dataclasses.asdict(config), "anneal": 0}
    latent = ("continuous", "latent_norm", "evidence", "hint") if config.model == "cadd" else ()
    return {name: getattr(config, name) for name in ("length", "discrete", *latent)}


def upgrade_own(model: Denoiser, options: dict[str, Any]) -> Denoiser:
    """Make a model of this project (such as MDLM's public weights) anew with other options and the same weights.

    options: all options of `UpgradeConfig`. Raises InputError for a model that is no masked model of text, and for
    options that only the library's models have.
    """
    choose("model", options["model"], MODELS)
    for name in ("lora", "anneal"):
        if options[name]:
            raise InputError(f"{name} is for models of the Hugging Face library, and --from is one of this project")
    if model.config.model not in MODELS or model.config.image is not None:
        raise InputError(f"--from must be a masked model of text, not {model.config.model}")
    if model.config.rows:
        raise InputError("--from must be a model of running text, and this model is one of lines")
    changes = {name: options[name] for name in ("model", "discrete", "continuous", "latent_norm", "evidence", "hint")}
    config = dataclasses.replace(model.config, **changes)
    if model.config.model == "mdlm" and config.model == "cadd":  # the latent is new: scale its hint to the embedding
        hint_unit = _median_norm(model.embedding) / Denoiser(config).latent.norm
        config = dataclasses.replace(config, latent_dim=0, hint_unit=hint_unit)
    new = Denoiser(config)
    mismatch = new.load_state_dict(model.state_dict(), strict=False)
    if not all(key.startswith("latent.") for key in (*mismatch.missing_keys, *mismatch.unexpected_keys)):
        raise InputError(f"--from has other weights than its configuration says: {mismatch}")
    new.embedding.requires_grad_(not options["freeze_embedding"])
    return new


@torch.no_grad()
def _median_norm(embedding: nn.Embedding) -> float:
    """Return the median length of a token's embedding. The module is called, as Gemma's multiplies its rows."""
    return float(embedding(torch.arange(len(embedding.weight))).norm(dim=-1).median())
