"""An existing language model as the denoiser p(x_0 | x_t, z_t): z_t joins its input at masked positions, nothing else.

The paper's claim is that CADD changes no architecture. So any model that takes embeddings and returns logits will do:
where a token is masked, the embedding of the mask gets the hint of the latent on top; where it is not, and with the
latent off, the model computes what it always did, bit for bit.

How long is the latent? The table's directions are those of the pretrained embedding, and their length is set as
everywhere (see latent.py: a share of log V told at half time). What the network reads is brought to the length of its
own embeddings, measured, so that the hint of a token that is nearly sure looks like that token.
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
from cadd_min.latent import Latent, table_norm
from cadd_min.model import Denoiser, Model, ModelConfig
from cadd_min.schedule import NoiseSchedule
from cadd_min.upgrade.families import AUTOREGRESSIVE, MASKED, Source, auto_class, check_depth
from cadd_min.utils.cli import option
from cadd_min.utils.errors import InputError, choose, first_line

MODELS = ("cadd", "mdlm")
HINTS = ("linear", "raw")
LORA = "pip install peft"


@dataclass(frozen=True)
class UpgradeConfig:
    """Everything that shapes an upgraded model but its weights; it travels in the checkpoint."""

    base: str  # the pretrained model's configuration, JSON
    vocab_size: int  # rows of its embedding, the mask's among them
    mask_id: int
    length: int  # tokens in a sequence
    shift: bool  # the logits at place i are of token i + 1
    masked_lm: bool  # of the library's two kinds of model with a language model's head
    unit: float  # length of an embedding, as it was found
    model: str = option("cadd", "cadd, or mdlm: the same without the latent")
    discrete: str = option("linear", "schedule of the masks, alpha_t: linear or cosine")
    continuous: str = option("capped", "schedule of the latent: linear, cosine, capped, or flow (matching)")
    latent_norm: float = option(0.0, "length of the latent table's rows; 0: from --evidence")
    evidence: float = option(0.1, "share of log V nats that the latent alone tells at half time")
    hint: str = option("linear", "what of z_t the network reads: linear (shrunk by what it is worth) or raw")
    lora: int = option(0, "train only matrices of this rank beside the model's own (LoRA); 0: the whole model")
    freeze_embedding: bool = option(False, "keep the token embedding as it is")
    anneal: int = option(0, "steps of training in which attention is opened to the right, by and by")

    image, classes = None, 0  # a model of text, without labels

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
        choose("discrete", self.discrete, ("linear", "cosine"))
        self.schedule()

    def schedule(self) -> NoiseSchedule:
        """The noise schedule of this model."""
        return NoiseSchedule(self.discrete, self.continuous)


class Upgraded(Model):
    """A pretrained network as the denoiser. Labels are ignored.

    V counts the mask, whose logit is never read. D is the embedding's width, or 0 for a masked model. network: a
    PreTrainedModel, which is changed: its head leaves it, so that the network returns the head's input.
    """

    config: UpgradeConfig
    backbone: Any  # the PreTrainedModel

    def __init__(self, config: UpgradeConfig, network: Any):
        super().__init__()
        self.config, self.schedule, self.mask_id = config, config.schedule(), config.mask_id
        self.head = network.get_output_embeddings()
        self.head_place = next(name for name, module in network.named_modules() if module is self.head)
        _put(network, self.head_place, nn.Identity())
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
        self.ahead: int | None = None  # tokens to the right that attention may look at; None: all
        look_both_ways(network)

    @property
    def embedding(self) -> nn.Embedding:
        """The network's token embedding."""
        return self.backbone.get_input_embeddings()

    def table(self) -> Tensor:
        return self.latent.table(self.embedding.weight)

    def features(self, x_t: Tensor, z_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        z_tilde = self.latent.fuse(self.embedding(x_t), z_t, x_t == self.mask_id, t, self.embedding.weight)
        h = self.backbone(inputs_embeds=z_tilde, attention_mask=self._window(x_t)).logits
        if self.config.shift:  # the first place has no logits of its own
            h = torch.cat([h[:, :1], h[:, :-1]], 1)
        return h if self.head.bias is None else torch.cat([h, torch.ones_like(h[..., :1])], -1)

    def head_matrix(self) -> Tensor:
        weight, bias = self.head.weight, self.head.bias
        return weight if bias is None else torch.cat([weight, bias[:, None]], -1)

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features[..., : self.head.weight.shape[1]], self.head.weight, self.head.bias)

    def at_step(self, step: int) -> None:
        """Open the attention to the right: from no token to all tokens in config.anneal steps.

        DiffuLLaMA (Gong et al. 2024) also shows the future step by step, but at random.
        """
        opening = step < self.config.anneal
        self.ahead = self.config.length * step // self.config.anneal if opening else None

    def _window(self, x: Tensor) -> Tensor | None:
        """(1, 1, L, L) bool, where attention may look, while it is being opened; None: everywhere."""
        if self.ahead is None or self.ahead >= x.shape[1]:
            return None
        place = torch.arange(x.shape[1], device=x.device)
        return (place <= place[:, None] + self.ahead)[None, None]

    def blocks(self) -> list[nn.Module]:
        lists = [module for module in self.backbone.modules() if isinstance(module, nn.ModuleList)]
        longest: nn.ModuleList = max(lists, key=len)
        return list(longest)


def look_both_ways(network: Any) -> None:
    """Let attention be bidirectional: said to the library, and to each layer, which decides where there is no mask."""
    network.config.is_causal = False
    for module in network.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False


def upgrade(
    source: Source, length: int, *, shift: bool | None = None, unit: float | None = None, **how: Any
) -> Upgraded:
    """The source as a denoiser of sequences of `length`.

    shift: whether its logits at place i are of token i + 1, if not as in its family; unit: what is else measured; how:
    the options of `UpgradeConfig`. Raises InputError for a model that takes no embeddings, looks one way, is too short,
    or does more than a linear map with its last layer.
    """
    network, name = source.network, source.name
    if "inputs_embeds" not in inspect.signature(network.forward).parameters:
        raise InputError(f"--from {name}: the model must take inputs_embeds, and a {type(network).__name__} does not")
    if length > (most := longest(network)):
        raise InputError(f"length must be at most {most}, what {name} was made for, not {length}")
    if how.get("anneal") and source.family != AUTOREGRESSIVE:
        raise InputError(f"anneal opens the attention of an autoregressive model, and {name} looks both ways already")
    config = UpgradeConfig(
        base=network.config.to_json_string(use_diff=False),
        vocab_size=len(network.get_input_embeddings().weight),
        mask_id=source.tokenizer.mask_id,
        length=length,
        shift=source.family.shift if shift is None else shift,
        masked_lm=source.family == MASKED,
        unit=unit or _length(network.get_input_embeddings()),
        **how,
    )
    look_both_ways(network)
    try:
        return trainable(_tried(config, network, name))
    except InputError:
        raise
    except Exception as error:  # a network of another make fails in its own way
        why = first_line(error)
        raise InputError(f"--from {name}: a {type(network).__name__} cannot be upgraded: {why}") from None


@torch.no_grad()
def _tried(config: UpgradeConfig, network: Any, name: str) -> Upgraded:
    """The model, after a look at what it does with four tokens. Raises InputError."""
    probe = network.get_input_embeddings()(torch.arange(min(4, config.length))[None])
    expected = network(inputs_embeds=probe).logits
    model = Upgraded(config, network)
    if not torch.equal(model.logits(network(inputs_embeds=probe).logits), expected):
        raise InputError(f"--from {name}: its logits are more than a linear map of its last layer")
    probe = torch.cat([probe[:, :-1], -probe[:, -1:]], 1)
    if config.length > 1 and torch.equal(model.logits(network(inputs_embeds=probe).logits)[:, 0], expected[:, 0]):
        raise InputError(f"--from {name}: a {type(network).__name__} cannot be made to look to the right")
    if config.anneal:
        model.ahead = 0
        network(inputs_embeds=probe, attention_mask=model._window(probe[..., 0]))
        model.ahead = None
    return model


def longest(network: Any) -> float:
    """Tokens that it has positions for; some of the embeddings of positions are of no token (RoBERTa)."""
    most = getattr(network.config, "max_position_embeddings", None) or 0
    if not isinstance(most, int) or most < 1:
        return math.inf
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            most = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return most


def build(config: UpgradeConfig) -> Upgraded:
    """The model of this configuration, with random weights."""
    from transformers import AutoConfig

    values = json.loads(config.base)
    check_depth(values)
    family = MASKED if config.masked_lm else AUTOREGRESSIVE
    base = AutoConfig.for_model(values.pop("model_type"), **values)
    return trainable(Upgraded(config, auto_class(family).from_config(base)))


def trainable(model: Upgraded) -> Upgraded:
    """The same model, its parameters marked by what is to be trained: all, or with LoRA (Hu et al. 2022) new ones."""
    config = model.config
    if config.lora:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise InputError(f"--lora needs peft: {LORA}") from None
        lora = LoraConfig(r=config.lora, lora_alpha=2 * config.lora, target_modules="all-linear")
        model.head.requires_grad_(False)
        inject_adapter_in_model(lora, model.backbone)
    elif config.freeze_embedding:
        model.embedding.requires_grad_(False)
    return model


def merged(model: Upgraded) -> Any:
    """The network as the library has it, its head in its place and LoRA's matrices added in. Changes the model."""
    network = model.backbone
    if model.config.lora:
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in list(network.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge()
                _put(network, name, module.get_base_layer())
        del network.peft_config  # or peft warns when the network gets matrices anew
    _put(network, model.head_place, model.head)
    return network


def source_of(model: Upgraded, tokenizer: HFTokenizer, name: str) -> Source:
    """The network with all that it has learned, to be upgraded anew, as if from its folder. Changes the model."""
    network = merged(model).requires_grad_(True)
    return Source(name, network, tokenizer, MASKED if model.config.masked_lm else AUTOREGRESSIVE)


def kept(config: UpgradeConfig | ModelConfig) -> dict[str, Any]:
    """The settings that a model keeps when it is tuned again, unless others are asked for.

    Attention that was being opened is open by then; a masked model of this project has no latent, and so none of it.
    """
    if isinstance(config, UpgradeConfig):
        return {**dataclasses.asdict(config), "anneal": 0}
    latent = ("continuous", "latent_norm", "evidence", "hint") if config.model == "cadd" else ()
    return {name: getattr(config, name) for name in ("length", "discrete", *latent)}


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Let `module` be what `root` has under that name."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)


def upgrade_own(model: Denoiser, how: dict[str, Any]) -> Denoiser:
    """A model of this project, such as one of MDLM's weights, with these options of `UpgradeConfig`.

    Raises InputError for one that is no masked model of text, or options that only others have.
    """
    choose("model", how["model"], MODELS)
    for name in ("lora", "anneal"):
        if how[name]:
            raise InputError(f"{name} is for models of the Hugging Face library, and --from is one of this project")
    if model.config.model not in MODELS or model.config.image is not None:
        raise InputError(f"--from must be a masked model of text, not {model.config.model}")
    shape = {name: how[name] for name in ("model", "discrete", "continuous", "latent_norm", "evidence", "hint")}
    config = dataclasses.replace(model.config, **shape)
    if model.config.model == "mdlm" and config.model == "cadd":
        config = dataclasses.replace(
            config, latent_dim=0, hint_unit=_length(model.embedding) / Denoiser(config).latent.norm
        )
    new = Denoiser(config)
    kept_not = new.load_state_dict(model.state_dict(), strict=False)
    if not all(key.startswith("latent.") for key in (*kept_not.missing_keys, *kept_not.unexpected_keys)):
        raise InputError(f"--from has other weights than its configuration says: {kept_not}")
    new.embedding.requires_grad_(not how["freeze_embedding"])
    return new


@torch.no_grad()
def _length(embedding: nn.Embedding) -> float:
    """Of a token's embedding: the median. Asked of the module: Gemma's multiplies its rows."""
    return float(embedding(torch.arange(len(embedding.weight))).norm(dim=-1).median())
