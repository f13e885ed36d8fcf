"""Count the broken rules of the sudoku grids that a model writes or completes.

A grid has 27 units: rows, columns and boxes. A unit is broken if it does not have every digit once.

    right      grids without a broken unit
    broken     broken units of a grid, of 27
    different  of the right grids: the number of different grids, divided by the number of grids
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cadd_min.data.sudoku import CELLS, broken, decode, of_sudoku
from cadd_min.evaluation.bound import Models
from cadd_min.evaluation.held_out import cut
from cadd_min.evaluation.text import common, kinds, percent, short_names
from cadd_min.sampling import generate
from cadd_min.utils.errors import InputError


def sudoku(models: Models, args: argparse.Namespace) -> str:
    """Count the broken rules of each model's grids. Returns a Markdown table.

    With --clues N a model completes held-out grids with N given cells, and with 0 it writes grids of its own. Raises
    InputError for models of other data.
    """
    first, tokenizer, content = common(models)
    if not (first.config.rows and of_sudoku(content["settings"].get("dataset"), tokenizer)):
        raise InputError("sudoku is for models of lines, trained by train_text.py --dataset sudoku")
    if not all(0 <= clues < CELLS for clues in args.clues):
        raise InputError(f"--clues must be from 0 to {CELLS - 1}, not {args.clues}")
    grids = cut(first, tokenizer, content, args, args.num, ": clues are taken from them")
    lines = ["| grids | clues | right | broken units | different, of the right |", "|---|---|---|---|---|"]
    names = short_names(models)
    lines.append(row("held-out grids", "", decode(grids.numpy(), tokenizer)))
    for path, (model, _, _) in models.items():
        for clues in args.clues:
            prompts = given(grids, clues, model.mask_id, args.seed).split(args.batch_size)
            parts = [
                generate.samples(
                    model, generate.sampling(args), len(p), seed=args.seed, dtype=args.dtype, index=i, prompt=p
                )
                for i, p in enumerate(tqdm(prompts, desc="sampling", unit="batch", leave=False))
            ]
            name = f"{model.config.model} ({names[path]})"
            lines.append(row(name, str(clues), decode(torch.cat(parts).cpu().numpy(), tokenizer)))
    caption = f"{args.num} grids each, ± the standard error, {generate.describe(args, kinds(models))}"
    return "\n".join([*lines, "", caption])


def given(x_0: Tensor, clues: int, mask_id: int, seed: int) -> Tensor:
    """Mask all but `clues` random cells of grids (N, L), and what follows the cells."""
    noise = torch.rand(len(x_0), CELLS, generator=torch.Generator().manual_seed(seed))
    ranks = torch.full_like(x_0, CELLS)
    ranks[:, :CELLS] = noise.argsort(1).argsort(1)
    return torch.where(ranks < clues, x_0, mask_id)


def row(name: str, clues: str, grids: np.ndarray) -> str:
    """Write a row of the table for grids (N, 81)."""
    errors = broken(grids)
    right = grids[errors == 0]
    different = f"{len(np.unique(right, axis=0)) / len(right):.1%}" if len(right) else ""
    share, spread = percent(len(right), len(grids)), errors.std() / len(errors) ** 0.5
    return f"| {name} | {clues} | {share} | {errors.mean():.2f} ± {spread:.2f} | {different} |"
