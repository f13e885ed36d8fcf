"""LoRA (Hu et al. 2022) in a network of the Hugging Face library, by the package peft: put in, and merged again."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from cadd_min.utils.errors import InputError

INSTALL = "pip install peft"


def check_installed() -> None:
    """Raise InputError where peft is missing."""
    if importlib.util.find_spec("peft") is None:
        raise InputError(f"--lora needs peft: {INSTALL}")


def inject(network: Any, rank: int) -> None:
    """Give every linear layer of a network two trained matrices of this rank, in place. All else is frozen.

    Raises InputError where peft is missing.
    """
    check_installed()
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"), network)


def merge(network: Any) -> None:
    """Add the trained matrices to the layers' own, in place, and put the layers back."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            put(network, name, module.get_base_layer())
    del network.peft_config  # or peft warns when the network gets new matrices


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module of `root` with this dotted name by `module`."""
    parent, _, last = name.rpartition(".")
    setattr(root.get_submodule(parent), last, module)
