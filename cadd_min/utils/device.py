"""Devices, processes, dtypes, and generators that a seed and a number name."""

from __future__ import annotations

import os
import time

import numpy as np
import torch

from cadd_min.utils.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def torch_device(name: str) -> torch.device:
    """Return the device of that name. Raises InputError where this machine has no such device."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"--device must be a device of this machine, like cpu or cuda, not {name!r}") from None
    return device


def launched() -> bool:
    """Tell whether torchrun has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def default_device() -> str:
    """Return "cuda" where a GPU is visible, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Return the context in which a network runs in a dtype, "float32" or "bfloat16"."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def best_dtype(device: torch.device) -> str:
    """Return the faster dtype: on a GPU by its generation, on a CPU by measuring a matrix product in both.

    A GPU has fast "bfloat16" from compute capability 8.0 on. A CPU has it where the product takes under 0.8 of the
    time of float32.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(512, 512, device=device, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - start)
        return min(times)

    return "bfloat16" if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else "float32"


def seed_torch(seed: int) -> None:
    """Seed torch's own generators, which initial weights are drawn from."""
    torch.manual_seed(seed)


def seeded(seed: int, index: int, device: torch.device | str = "cpu", *, use: int = 0) -> torch.Generator:
    """Return the generator that (seed, index, use) name. `index` counts micro-batches, steps or batches of samples.

    The numbers are hashed, because torch's CPU generator reads only the low 32 bits of its seed.
    """
    state = np.random.SeedSequence((seed, index, use)).generate_state(1, np.uint32)
    return torch.Generator(device).manual_seed(int(state[0]))
