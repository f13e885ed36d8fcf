"""Shared by the tests: seeds, one p-value for every statistical test, small models."""

from __future__ import annotations

import pytest
import torch

from cadd_min.dit import Size
from cadd_min.model import Denoiser, ModelConfig

ALPHA = 1e-4  # a correct implementation fails a statistical check at one seed in 10,000; the seeds are fixed
NANO = Size(layers=2, width=32, heads=2, cond=32)


@pytest.fixture(autouse=True)
def _one_thread_per_test() -> None:
    """Two cores and small tensors: threads cost more than they give."""
    torch.set_num_threads(1)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nano(model: str = "cadd", vocab_size: int = 11, length: int = 12, seed: int = 0, **options: object) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(ModelConfig(vocab_size, length, NANO, model=model, **options))  # type: ignore[arg-type]
