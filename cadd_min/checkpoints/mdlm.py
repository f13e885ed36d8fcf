"""Weights of the public MDLM (Sahoo et al. 2024) as this project's, and this project's as MDLM's.

Both networks are a DiT. In this file `theirs` holds tensors under MDLM's names, and `ours` under this project's. The
networks differ only in where a number is kept:
- MDLM's LayerNorm has weights w, this project's has none. A scale of w (1 + scale) - 1 has the same effect.
- MDLM's embedding is the network's input as it is. This project multiplies its embedding by sqrt(width).
- MDLM's head has a logit for the mask, which is set to -inf before it is used. This project's head has none.
- MDLM does not see the time: its sigma is 0. A first matrix of zeros makes this project's time embedding constant, too.
- MDLM's queries, keys and values have no bias. `hide_bias` says where this project's biases go.

Tested on a network that is built from MDLM's description with its names and shapes, and not on the released file.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadd_min.checkpoints import folder
from cadd_min.checkpoints.file import check_shapes
from cadd_min.dit import DiT, Size
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.utils.errors import InputError

PREFIX = "backbone."
EMBEDDING = "vocab_embed.embedding"
WAVES = 256  # cosines, then sines, of the time: the input of its embedding; at time 0 the cosines are 1, the sines 0
BLOCK = {  # ours: theirs
    "qkv.weight": "attn_qkv.weight",
    "out.weight": "attn_out.weight",
    "ada.weight": "adaLN_modulation.weight",
    "ada.bias": "adaLN_modulation.bias",
    **{f"mlp.{layer}.{part}": f"mlp.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")},
}


def names(layers: int) -> dict[str, str]:
    """Map this project's names to MDLM's, for all tensors that are the same up to a fold or a row."""
    return {
        "embedding.weight": EMBEDDING,
        **{f"backbone.time.mlp.{n}.{part}": f"sigma_map.mlp.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")},
        **{f"backbone.blocks.{n}.{own}": f"blocks.{n}.{name}" for n in range(layers) for own, name in BLOCK.items()},
        **{f"backbone.ada.{part}": f"output_layer.adaLN_modulation.{part}" for part in ("weight", "bias")},
        **{f"head.{part}": f"output_layer.linear.{part}" for part in ("weight", "bias")},
    }


def shapes(size: Size, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of MDLM by its name. `vocab_size` does not count the mask."""
    width, cond, rows = size.width, size.cond, vocab_size + 1
    block = {
        "norm1.weight": (width,),
        "attn_qkv.weight": (3 * width, width),
        "attn_out.weight": (width, width),
        "norm2.weight": (width,),
        "mlp.0.weight": (4 * width, width),
        "mlp.0.bias": (4 * width,),
        "mlp.2.weight": (width, 4 * width),
        "mlp.2.bias": (width,),
        "adaLN_modulation.weight": (6 * width, cond),
        "adaLN_modulation.bias": (6 * width,),
    }
    return {
        EMBEDDING: (rows, width),
        "sigma_map.mlp.0.weight": (cond, WAVES),
        "sigma_map.mlp.0.bias": (cond,),
        "sigma_map.mlp.2.weight": (cond, cond),
        "sigma_map.mlp.2.bias": (cond,),
        "rotary_emb.inv_freq": (width // size.heads // 2,),
        **{f"blocks.{n}.{name}": shape for n in range(size.layers) for name, shape in block.items()},
        "output_layer.norm_final.weight": (width,),
        "output_layer.linear.weight": (rows, width),
        "output_layer.linear.bias": (rows,),
        "output_layer.adaLN_modulation.weight": (2 * width, cond),
        "output_layer.adaLN_modulation.bias": (2 * width,),
    }


def frequencies(size: Size) -> Tensor:
    """Return the frequencies of the rotary positions, (head_dim / 2,)."""
    head_dim = size.width // size.heads
    return 10000 ** (-torch.arange(0, head_dim, 2) / head_dim)


def size_of(state: dict[str, Any]) -> tuple[Size, int]:
    """Return the network's size and the vocabulary's, without the mask, of a state dict of MDLM.

    Raises InputError where a tensor that tells the size is missing or has another number of dimensions.
    """
    for key, dims in ((EMBEDDING, 2), ("sigma_map.mlp.0.bias", 1), ("rotary_emb.inv_freq", 1)):
        value = state.get(key)
        if not isinstance(value, Tensor) or value.dim() != dims or 0 in value.shape:
            raise InputError(f"{key} is missing, or not of {dims} dimensions")
    rows, width = state[EMBEDDING].shape
    cond, half = len(state["sigma_map.mlp.0.bias"]), len(state["rotary_emb.inv_freq"])
    layers = {int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", key) for key in state) if match}
    return Size(len(layers), width, max(1, width // (2 * half)), cond), rows - 1


def without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """Remove what all names begin with: "backbone." of MDLM, "module." of DistributedDataParallel, and so on.

    The name of the embedding tells the prefix. Raises InputError where several embeddings have different prefixes.
    """
    found = [key.removesuffix(EMBEDDING) for key in state if f".{key}".endswith(f".{EMBEDDING}")]
    if len(found) > 1:
        raise InputError(f"there are {len(found)} networks, below {' and '.join(map(repr, found))}: one is expected")
    return {key.removeprefix(found[0]): value for key, value in state.items()} if found else state


@torch.no_grad()
def from_mdlm(state: dict[str, Any], length: int = 1024) -> Denoiser:
    """Make this project's masked model, of `length` tokens, that computes what MDLM computes with the weights `state`.

    All names in `state` may have a prefix, such as "backbone.", "module." or "_orig_mod.". Raises InputError that names
    the first tensor that is missing, misshapen or left over.
    """
    state = without_prefix(state)
    size, vocab_size = size_of(state)
    check_shapes(state, shapes(size, vocab_size))
    if not torch.allclose(state["rotary_emb.inv_freq"].float(), frequencies(size), rtol=1e-2):
        raise InputError("rotary_emb.inv_freq has other frequencies than 10000^(-2i / head_dim)")
    theirs = {name: value.double() for name, value in state.items()}
    ours = {own: theirs[name].clone() for own, name in names(size.layers).items()}
    ours["embedding.weight"] /= math.sqrt(size.width)
    first = ours["backbone.time.mlp.0.weight"]  # (cond, WAVES)
    ours["backbone.time.mlp.0.bias"] += first[:, : WAVES // 2].sum(1)  # at time 0 the cosines are 1, the sines 0
    first.zero_()
    for n in range(size.layers):  # a block's modulation has six chunks, 1 and 4 are its two scales
        fold(ours, f"backbone.blocks.{n}.ada", 1, theirs[f"blocks.{n}.norm1.weight"])
        fold(ours, f"backbone.blocks.{n}.ada", 4, theirs[f"blocks.{n}.norm2.weight"])
        ours[f"backbone.blocks.{n}.qkv.bias"] = torch.zeros(3 * size.width)
    fold(ours, "backbone.ada", 1, theirs["output_layer.norm_final.weight"])
    for part in ("weight", "bias"):
        ours[f"head.{part}"] = ours[f"head.{part}"][:-1]  # without the mask's row
    model = Denoiser(ModelConfig(vocab_size, length, size, model="mdlm", head_bias=True))
    model.load_state_dict(ours)
    return model.eval()


def fold(ours: dict[str, Tensor], ada: str, chunk: int, norm: Tensor) -> None:
    """Fold a LayerNorm's weights `norm` (width,) into the scale after it, in place.

    The scale is chunk number `chunk` of the output of the linear layer `ada`.
    """
    rows = slice(chunk * len(norm), (chunk + 1) * len(norm))
    ours[f"{ada}.weight"][rows] *= norm[:, None]
    ours[f"{ada}.bias"][rows] = norm * (1 + ours[f"{ada}.bias"][rows]) - 1


@torch.no_grad()
def to_mdlm(model: Denoiser, t: float | None = None) -> dict[str, Tensor]:
    """Make a state dict of MDLM, float32 with the prefix "backbone.", that computes what `model` computes at time `t`.

    MDLM does not see the time. A model trained in this project does, so it is taken at one t in [0, 1]. A model that
    ignores the time, like a model made by `from_mdlm`, needs no t. Raises InputError for a model without such a form.
    """
    size, backbone = model.config.size, model.backbone
    if model.config.model != "mdlm" or not isinstance(size, Size) or not isinstance(backbone, DiT):
        raise InputError(f"only a masked model of text has MDLM's form, and this is {model.config.model}")
    if model.config.classes:
        raise InputError("MDLM's form has no classes, and this model has")
    if model.config.rows:
        raise InputError("MDLM's form has no absolute positions, and this model of lines has")
    if model.config.neighbours:
        raise InputError("MDLM's form has no pairs of neighbours, and this model of characters has")
    ours = {name: value.to(torch.float64, copy=True) for name, value in model.state_dict().items()}
    first = ours["backbone.time.mlp.0.weight"]
    if first.any():
        if t is None or not 0 <= t <= 1:
            raise InputError(f"--time must say at which t from 0 to 1 to take a model that looks at the time, not {t}")
        angle = t * backbone.time.frequency.double()
        ours["backbone.time.mlp.0.bias"] += first @ torch.cat([angle.cos(), angle.sin()])
        first.zero_()
    inner = nn.functional.silu(ours["backbone.time.mlp.0.bias"])
    c = nn.functional.silu(ours["backbone.time.mlp.2.weight"] @ inner + ours["backbone.time.mlp.2.bias"])  # (cond,)
    for n in range(size.layers):
        hide_bias(ours, f"backbone.blocks.{n}.", c)
    ours["embedding.weight"] = ours["embedding.weight"] * math.sqrt(size.width)
    ours["head.weight"] = nn.functional.pad(ours["head.weight"], (0, 0, 0, 1))  # (V + 1, width)
    ours["head.bias"] = nn.functional.pad(ours.get("head.bias", torch.zeros(model.mask_id)), (0, 1))
    theirs = {name: ours[own] for own, name in names(size.layers).items()}
    theirs["rotary_emb.inv_freq"] = frequencies(size)
    for name, shape in shapes(size, model.mask_id).items():
        if "norm" in name:
            theirs[name] = torch.ones(shape)
    return {PREFIX + name: value.float().contiguous() for name, value in theirs.items()}


def hide_bias(ours: dict[str, Tensor], block: str, c: Tensor) -> None:
    """Rewrite a block's queries, keys and values, in place, so that they need no bias at the conditioning c (cond,).

    The output n of a LayerNorm sums to zero. At a constant c the block computes M ((1 + scale) n + shift) + bias. Let
    S be M with its columns multiplied by 1 + scale. Make the new scale 0, and the new shift the same d everywhere.
    Then add a vector a to every column of S. Since 1^T n = 0, the block computes

        (S + a 1^T) (n + d 1) = S n + d S 1 + width d a

    which is the old output for a = (M shift + bias - d S 1) / (width d).
    """
    weight, bias = ours[block + "qkv.weight"], ours.pop(block + "qkv.bias")
    if not bias.any():
        return
    width = weight.shape[1]
    ada, constant = ours[block + "ada.weight"], ours[block + "ada.bias"]
    shift, scale = (ada @ c + constant)[: 2 * width].chunk(2)
    d, scaled = 1 / math.sqrt(width), weight * (1 + scale)
    a = (weight @ shift + bias - d * scaled.sum(1)) / (width * d)
    ours[block + "qkv.weight"] = scaled + a[:, None]
    ada[: 2 * width], constant[:width], constant[width : 2 * width] = 0, d, 0


def read(path: Path) -> dict[str, Any]:
    """Read the tensors of a .safetensors file, of a folder's model.safetensors, or of a file of torch.

    Nothing in the file is executed. Raises InputError.
    """
    path = path / folder.WEIGHTS if path.is_dir() else path
    if path.suffix == ".safetensors":
        return folder.read_weights(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises exceptions of many types on a damaged archive
        raise InputError(f"{path} is no file of tensors alone, or it is damaged") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{path} holds no state dict")
    return state
