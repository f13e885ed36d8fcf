"""Laws that a small network nearly learns, each with a judge that counts errors. The latent is judged on them.

    chain       a sparse Markov chain of 64 states, L = 32; an error is an impossible transition
    topics      one of eight chains for each sequence, L = 32
    brackets    balanced brackets of eight kinds, L = 32; an error is a bracket without its partner
    sudoku      full grids, L = 81; an error is a unit, of 27, without every digit
    molecules   a file of SMILES, one a line; an error is a line that RDKit does not read
    digits      8x8 images of 17 levels, L = 64; the error is the Fréchet distance to the training images

A sampler that writes only what it is sure of has few errors and little variety. Compare errors at equal variety:

    chain, topics, brackets   the entropy of pairs, bits
    sudoku                    the entropy of a cell's digit, mean over cells, bits
    molecules                 the share of the valid samples that are different. FD, the Fréchet distance of descriptors
                              to held-out molecules, sees more: hundreds of them can differ and be of one kind
    digits                    the entropy of the classes, nats
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.brackets import Brackets
from benchmarks.sources import Source
from cadd_min.data import corpus, sudoku, tokenizer
from cadd_min.data.batches import ImageBatches, RowBatches
from cadd_min.data.images import open_images
from cadd_min.data.token_folder import prepare
from cadd_min.dit import PRESETS
from cadd_min.evaluation.image_judge import judged, measures, open_judge
from cadd_min.evaluation.molecules import Reference, canonical, rdkit
from cadd_min.model import Denoiser, ModelConfig
from cadd_min.objective import Batch
from cadd_min.training.counts import fast_start, start_at_counts
from cadd_min.unet import UNET_PRESETS
from cadd_min.utils.device import seed_torch, seeded
from cadd_min.utils.errors import InputError, choose
from train_image import DEFAULTS

TASKS = ("chain", "topics", "brackets", "sudoku", "molecules", "digits")
DESCRIBED = 4_000  # held-out molecules, at most, to which samples are compared
MOLECULE = 32  # tokens of a molecule with its end, at most: longer lines are left out
OWN = (
    "model",
    "vocab_size",
    "length",
    "size",
    "image",
    "classes",
    "rows",
    "neighbours",
    "head_bias",
)  # of a task's models


class Task(ABC):
    """A law with a judge. T: the sampling steps at which its models are compared."""

    vocab_size: int
    length: int
    batch_size = 64
    T: tuple[int, ...] = (2, 4, 8, 16)
    counts = True  # an error is a mean over samples: errors can be parted
    presets: Mapping[str, Any] = PRESETS
    settings: Mapping[str, Any] = MappingProxyType({})  # of models and training, where not the project's own
    notes: tuple[str, ...] = ()  # of data that is left out

    @abstractmethod
    def data(self, batch_size: int, seed: int) -> Callable[[int], Batch]:
        """Return the micro-batches of a training run."""

    @abstractmethod
    def real(self, count: int, seed: int) -> Tensor:
        """Return true sequences (count, L) that no training has seen, or all of these where there are fewer."""

    @abstractmethod
    def score(self, x: Tensor) -> dict[str, float]:
        """Compute the error and the variety of samples (N, L)."""

    def config(self, preset: str, **options: Any) -> ModelConfig:
        """Describe a model of this task. Raises InputError."""
        size = self.presets[choose("--preset", preset, self.presets)]
        return ModelConfig(self.vocab_size, self.length, size, **options)

    def build(self, preset: str, seed: int, **options: Any) -> Denoiser:
        """Make an untrained model."""
        seed_torch(seed)
        return Denoiser(self.config(preset, **options))


class Chain(Task):
    """Sequences of a source with an exact denoiser: of one of `topics` Markov chains, or without topics brackets.

    Each seed has other chains. The law of the brackets is always the same.
    """

    def __init__(self, seed: int, topics: int = 1):
        self.source: Source | Brackets = Source(topics=topics, seed=seed) if topics else Brackets()
        self.vocab_size, self.length = self.source.states, self.source.length

    def data(self, batch_size: int, seed: int) -> Callable[[int], Batch]:
        return lambda index: Batch(self.source.draw(batch_size, seeded(seed + 1000, index)))

    def real(self, count: int, seed: int) -> Tensor:
        return self.source.draw(count, seeded(seed, 99))

    def score(self, x: Tensor) -> dict[str, float]:
        found = self.source.score(x)
        return {"error": found["bad"], "variety": found["entropy"]}


class Sudoku(Task):
    """Full grids without end."""

    vocab_size, length, batch_size, T = 9, 81, 32, (2, 4, 8, 16, 32)

    def __init__(self, seed: int):
        self.pool = sudoku.full_grids(sudoku.POOL, np.random.default_rng(seed))

    def _draw(self, count: int, rng: np.random.Generator) -> Tensor:
        return torch.from_numpy(sudoku.changed(self.pool[rng.integers(len(self.pool), size=count)], rng) - 1)

    def data(self, batch_size: int, seed: int) -> Callable[[int], Batch]:
        return lambda index: Batch(self._draw(batch_size, np.random.default_rng((seed, 1, index))))

    def real(self, count: int, seed: int) -> Tensor:
        return self._draw(count, np.random.default_rng((seed, 2)))

    def score(self, x: Tensor) -> dict[str, float]:
        grids = x.cpu().numpy() + 1
        errors = sudoku.broken(grids)
        shares = torch.nn.functional.one_hot(x.cpu(), self.vocab_size).double().mean(0)  # (L, V)
        variety = float(torch.special.entr(shares).sum(-1).mean()) / math.log(2)
        return {"error": float(errors.mean()) / 27, "right": float((errors == 0).mean()), "variety": variety}

    def config(self, preset: str, **options: Any) -> ModelConfig:
        return super().config(preset, rows=True, **options)


class Molecules(Task):
    """The lines of a file of SMILES, with the start that train_text.py gives a new model.

    A hash of each line decides whether the line is held out. `notes` count the lines that are too long.
    """

    batch_size, length = 32, MOLECULE

    def __init__(self, path: Path | None, cache: Path):
        rdkit()
        if path is None or not path.is_file():
            raise InputError(f"--tasks molecules needs --molecules, a file with one molecule a line, not {path}")
        source = corpus.open_corpus(str(path), cache, lines=True)
        self.tokens = prepare(source, tokenizer.chars(corpus.alphabet(source)), cache)
        self.codec, self.name = self.tokens.tokenizer(), path.name
        self.vocab_size = self.codec.vocab_size
        self.notes = tuple(note for side in ("train", "val") if (note := self._rows(side, 1, 0).note))
        true = filter(None, map(canonical, self._lines(self.real(DESCRIBED, 0))))
        self.reference = Reference(list(true), [])

    def _rows(self, side: str, count: int, seed: int) -> RowBatches:
        tokens = self.tokens.split(side, whole=True)
        return RowBatches(tokens, self.length, count, self.codec.eot_id, seed, f"{self.name}, {side}")

    def data(self, batch_size: int, seed: int) -> RowBatches:
        return self._rows("train", batch_size, seed)

    def real(self, count: int, seed: int) -> Tensor:
        rows = self._rows("val", count, seed)
        return rows(0).x_0[: rows.per_epoch]

    def _lines(self, x: Tensor) -> list[str]:
        return [self.codec.documents(row)[0] for row in x.tolist()]

    def score(self, x: Tensor) -> dict[str, float]:
        found = self.reference.measure(self._lines(x))
        variety = {"variety": found["different"] / found["valid"]} if found["valid"] else {}
        return {"error": 1 - found["valid"] / found["lines"]} | variety | {k: v for k, v in found.items() if k == "FD"}

    def config(self, preset: str, **options: Any) -> ModelConfig:
        return fast_start(super().config(preset, rows=True, **options))

    def build(self, preset: str, seed: int, **options: Any) -> Denoiser:
        model = super().build(preset, seed, **options)
        return start_at_counts(model, self._rows("train", self.batch_size, seed)) if model.config.head_bias else model


class Digits(Task):
    """Images of digits, with the settings of train_image.py. Fewer images are held out than are mostly sampled.

    A Fréchet distance depends on the number of samples and is no mean, so it is not parted.
    """

    T = (4, 8, 16, 64)
    counts = False
    presets = UNET_PRESETS

    def __init__(self, cache: Path):
        self.images = open_images("digits", cache, None)
        self.pixels, self.batch_size = self.images.pixels(), DEFAULTS["batch_size"]
        self.vocab_size, self.length = self.pixels.levels, self.pixels.length
        other = ("steps", "batch_size", "eval_every", "sample_every")
        self.settings = {name: value for name, value in DEFAULTS.items() if name not in other}
        self.judge, _ = open_judge(self.images, cache)
        self.features, _ = judged(self.judge, self.images.train)

    def data(self, batch_size: int, seed: int) -> Callable[[int], Batch]:
        return ImageBatches(self.images.train, None, self.pixels, batch_size, seed, self.images.flip)

    def real(self, count: int, seed: int) -> Tensor:
        return self.pixels.encode(self.images.held_out)[:count]

    def score(self, x: Tensor) -> dict[str, float]:
        found = measures(self.judge, self.features, self.pixels.decode(x))
        return {"error": found["FD"], "variety": found["variety"]}

    def config(self, preset: str, **options: Any) -> ModelConfig:
        return super().config(preset, image=self.pixels.shape, **options)


def open_task(name: str, seed: int, cache: Path, molecules: Path | None = None) -> Task:
    """Open one of TASKS. The chains and the grids are drawn anew from each seed. Raises InputError."""
    makers: dict[str, Callable[[], Task]] = {
        "chain": lambda: Chain(seed),
        "topics": lambda: Chain(seed, topics=8),
        "brackets": lambda: Chain(seed, topics=0),
        "sudoku": lambda: Sudoku(seed),
        "molecules": lambda: Molecules(molecules, cache),
        "digits": lambda: Digits(cache),
    }
    return makers[choose("--tasks", name, TASKS)]()
