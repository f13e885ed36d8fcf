"""Small models, laws and data that several tests share, and the one failure rate of every statistical test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cadd_min.checkpoints import file as checkpoint
from cadd_min.dit import PatchSize, Size
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.objective import Batch
from cadd_min.orders import Sampling
from cadd_min.sampler import reverse_chain
from cadd_min.schedule import NoiseSchedule
from cadd_min.training.trainer import TrainConfig, Trainer
from cadd_min.unet import UNetSize
from cadd_min.utils.device import seeded

ROOT = Path(__file__).parent.parent
ALPHA = 1e-4  # a correct implementation fails a statistical check at one seed in 10,000; the seeds are fixed
NANO = Size(layers=2, width=32, heads=2, cond=32)
PATCHES = PatchSize(layers=1, width=8, heads=2, embed=6, patch=2, cond=8)
UNET = UNetSize(embed=4, channels=4, mults=(1,), blocks=1, attention=(), cond=8)
TINY = "--preset nano --length 16 --vocab-size 300 --batch-size 4 --steps 4 --eval-every 2 --sample-every 4"

LAW = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)  # of independent tokens; its mask is MASK
MASK = 3
# p(x^1, x^2) of two dependent tokens out of three, far from independent
JOINT = torch.tensor([[0.30, 0.02, 0.08], [0.05, 0.25, 0.02], [0.03, 0.05, 0.20]], dtype=torch.float64)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------ models and runs

Net = TypeVar("Net", bound=torch.nn.Module)


def nano(model: str = "cadd", vocab_size: int = 11, length: int = 12, seed: int = 0, **options: Any) -> Denoiser:
    """Make an untrained model of text."""
    torch.manual_seed(seed)
    return Denoiser(ModelConfig(vocab_size, length, NANO, model=model, **options))


def images(size, shape=(8, 8, 1), levels=17, classes=0, seed=0, **options) -> Denoiser:
    """Make an untrained model of images."""
    torch.manual_seed(seed)
    length = shape[0] * shape[1] * shape[2]
    return Denoiser(ModelConfig(levels, length, size, shape, classes, latent_table="ordered", **options))


def randomized(net: Net, std: float, **stds: float) -> Net:
    """Draw all weights from N(0, std^2), or the part that a keyword names with its own std. Returns the network.

    A new network is an identity under a head of zeros, and tests nothing.
    """
    for i, (name, weight) in enumerate(net.named_parameters()):
        torch.nn.init.normal_(weight, std=stds.get(name.split(".")[0], std), generator=rng(i))
    return net


def save_untrained(path: Path, config: ModelConfig, spec: dict[str, object], **settings: object) -> Path:
    """Save a checkpoint of a model that has learned nothing, for text or images by its codec's spec."""
    state = {"ema": Denoiser(config).state_dict(), "step": 1}
    content = {"model_config": checkpoint.model_dict(config), "tokenizer": spec, "trainer": state, "settings": settings}
    checkpoint.save(path, content)
    return path


def batch(index: int) -> Batch:
    """Make a micro-batch of random tokens for `nano`: a pure function of its index."""
    return Batch(torch.randint(11, (8, 12), generator=seeded(1, index)))


def trainer(model: str = "cadd", data=batch, options: dict | None = None, **config) -> Trainer:
    """Make a trainer of `nano` in float32."""
    return Trainer(
        nano(model, **(options or {})), data, TrainConfig(**({"batch_size": 8, "dtype": "float32"} | config))
    )


def same(a: Trainer, b: Trainer) -> bool:
    """Compare weights and averages, bit for bit."""
    pairs = zip((*a.model.parameters(), *a.ema.parameters()), (*b.model.parameters(), *b.ema.parameters()))
    return all(torch.equal(p, q) for p, q in pairs)


# ------------------------------------------------------------------------------------------------ laws


def chain(
    denoiser: Any,
    shape: tuple[int, int],
    table: Tensor,
    schedule: NoiseSchedule,
    mask_id: int,
    *,
    prompt: Tensor | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[..., Any] | None = None,
    **settings: Any,
) -> Tensor:
    """Run the reverse chain with the fields of `Sampling` as keywords."""
    how = Sampling(**settings)
    some = {"prompt": prompt, "generator": generator, "callback": callback}
    return reverse_chain(denoiser, shape, table, schedule, mask_id, how, **some)  # type: ignore[arg-type]


def told_by_latent(z_t, t, w, schedule: NoiseSchedule) -> Tensor:
    """Compute log p(z_t | x_0 = v) of a masked token up to a constant, (B, L, V), for latents w (V, D)."""
    signal, variance = schedule.signal(t.double())[:, None, None], schedule.noise(t.double())[:, None, None] ** 2
    return -((z_t.double()[..., None, :] - signal[..., None] * w.double()) ** 2).sum(-1) / (2 * variance)


def oracle(table: Tensor, schedule: NoiseSchedule, law: Tensor = LAW):
    """Make the exact p(x_0 | x_t = m, z_t) of independent tokens with this law, by Bayes' rule.

    The mask's logit is huge.
    """

    def denoise(x_t, z_t, t):
        log_p = law.log() + told_by_latent(z_t, t, table[: len(law)], schedule)
        return torch.cat([log_p, torch.full((*x_t.shape, 1), 1e4)], -1).to(table.dtype)

    return denoise


def toy(norm: float = 1.5, dim: int = 4) -> Tensor:
    """Make a latent table of four rows of one length."""
    rows = torch.randn(4, dim, generator=rng(0), dtype=torch.float64)
    return norm * rows / rows.norm(dim=-1, keepdim=True) if dim else rows


def pairs(count: int, seed: int = 0) -> Tensor:
    """Draw pairs of tokens (count, 2) from JOINT."""
    index = torch.multinomial(JOINT.flatten(), count, replacement=True, generator=rng(seed))
    return torch.stack([index // 3, index % 3], 1)
