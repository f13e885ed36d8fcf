"""What sample.py does with a model of text: prompts with gaps, and the text of a step in a terminal."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from cadd_min.baselines.dispatch import draw
from cadd_min.data import sudoku
from cadd_min.data.hf_tokenizer import prompt_ids
from cadd_min.data.tokenizer import EOT, CharTokenizer, Tokenizer
from cadd_min.model import Model
from cadd_min.orders import Sampling
from cadd_min.sampler import Step
from cadd_min.sampling.generate import Watch, together
from cadd_min.sampling.text_film import TextFilm, check_gif
from cadd_min.utils.errors import InputError

GAP = re.compile(r"(?<!\\)\[([0-9]+)\]")
EMPTY = re.compile(r"[.0](?![0-9]*\])")  # cells of a puzzle, but no 0 of a gap like [10]
ESCAPED = re.compile(r"\\(\[[0-9]+\])")
DIM, BRIGHT, RESET = "\x1b[2m", "\x1b[1;92m", "\x1b[0m"


def parse_prompt(prompt: str, tokenizer: Tokenizer, length: int, chat: bool = False) -> Tensor:
    """Encode a prompt with gaps as ids (length,), like "The[8] of the union".

    The sampler keeps the prompt's text and fills the rest: [n] is a gap of n masks, and masks fill up the length.
    Written \\[n] it is text. chat: the whole prompt is a message under the tokenizer's chat template, and has no gaps.
    Raises InputError for a prompt longer than `length` tokens.
    """
    ids = prompt_ids(tokenizer, True)(prompt) if chat else []
    prompt = "" if chat else prompt
    for i, part in enumerate(GAP.split(prompt)):
        gap = int(part[:9]) if i % 2 else 0
        if gap > length:
            raise InputError(f"--prompt has a gap of {part} tokens: the model's length is {length}")
        encode = tokenizer.encode_inside if i else tokenizer.encode
        ids += [tokenizer.mask_id] * gap if i % 2 else encode(ESCAPED.sub(r"\1", part))
    if len(ids) > length:
        raise InputError(f"--prompt has {len(ids)} tokens, gaps included: the model's length is {length}")
    return torch.tensor(ids + [tokenizer.mask_id] * (length - len(ids)))


def lone_spaces(prompt: str, tokenizer: Tokenizer) -> list[str]:
    """List the gaps that follow a space which is a token of its own, where a word's token begins with its space.

    No word follows such a space in the text that the model has learned.
    """
    if tokenizer.kind == CharTokenizer.kind or len(tokenizer.encode_inside(" a")) > 1:
        return []
    parts = GAP.split(prompt)
    return [f"[{gap}]" for text, gap in zip(parts[::2], parts[1::2]) if text.endswith(" ")]


def frame(x: Tensor, fresh: Tensor, tokenizer: Tokenizer) -> str:
    """Write one sequence (L,) for a terminal: masked positions dim, tokens of this step (L,) bool bright."""
    parts = []
    for token, new in zip(x.tolist(), fresh.tolist()):
        text = f"{DIM}·{RESET} " if token == tokenizer.mask_id else tokenizer.decode([token])
        parts.append(f"{BRIGHT}{text}{RESET}" if new else text)
    return "".join(parts)


def first_line(ids: list[int], tokenizer: Tokenizer) -> str:
    """Return the text before the first EOT: of a sample that is one line, all of its text."""
    return tokenizer.documents(ids)[0]


class TextTask:
    """What sample.py does with a model of text. Raises InputError for options that are for models of images."""

    zhat, num = "hard", 1

    def __init__(self, model: Model, tokenizer: Tokenizer, args: argparse.Namespace, dataset: str | None = None):
        self.model, self.tokenizer, self.args, self.dataset = model, tokenizer, args, dataset
        for name in ("out", "classes", "guidance", "inpaint", "mask"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name} is for models of images, and --ckpt {args.ckpt} is one of text")
        self.film: TextFilm | None = None
        if args.gif is not None:
            check_gif(args.gif)

    def denoiser(self, count: int) -> Model:
        """Return the model: text has no guidance."""
        return self.model

    def prompt(self, count: int) -> Tensor | None:
        """Return the prompt for all samples (count, L), or None without --prompt."""
        if not self.args.prompt:
            if self.args.chat:
                raise InputError("--chat needs a --prompt")
            return None
        if sudoku.of_sudoku(self.dataset, self.tokenizer):
            return self._puzzle(self.args.prompt).expand(count, -1)
        ids = parse_prompt(self.args.prompt, self.tokenizer, self.model.config.length, self.args.chat)
        if not self.args.chat and (gaps := lone_spaces(self.args.prompt, self.tokenizer)):
            where = ", ".join(gaps)
            print(f"note: leave out the space before {where}: a word's token begins with its space", file=sys.stderr)
        return ids.expand(count, -1)

    def _puzzle(self, prompt: str) -> Tensor:
        """Encode a puzzle (L,), with a dot, a 0 or a gap for empty cells. Raises InputError without a solution."""
        prompt = EMPTY.sub("[1]", prompt)
        ids = parse_prompt(prompt, self.tokenizer, self.model.config.length)
        if (ids[sudoku.CELLS :] != self.tokenizer.mask_id).any():
            raise InputError(f"--prompt has more than the {sudoku.CELLS} cells of a sudoku")
        if note := sudoku.check_clues(sudoku.decode(ids[None].numpy(), self.tokenizer)[0]):
            print(f"note: {note}", file=sys.stderr)
        return ids

    def callback(self, steps: int) -> Callable[[Step], None] | None:
        """Return a callback that serves --watch and --gif, or None without either."""
        end = "↵" if self.model.config.rows else EOT  # a line has many
        draw = lambda step: frame(step.x[0], step.fresh[0], self.tokenizer).replace(EOT, end)
        watch = Watch(self.tokenizer.mask_id, steps, draw) if self.args.watch else None
        self.film = TextFilm(self.model, self.tokenizer, steps) if self.args.gif else None
        return together(watch, self.film)

    def show(self, x: Tensor, zhat: str = "") -> None:
        """Print the samples (B, L), and write the GIF of the first where --gif is given.

        zhat: the estimate of z_0 where there are several. It stands above the samples.
        """
        if zhat:
            print(f"--- {zhat}\n")
        if self.model.config.rows:
            self._show_lines(x)
        else:
            for row in x.tolist():
                while row[-2:] == [self.tokenizer.eot_id] * 2:  # an answer is filled up with ends of text
                    row.pop()
                print(self.tokenizer.decode(row), end="\n\n")
        if self.film is not None:
            print(f"its path in {self.film.save(self.args.gif)}")

    def _show_lines(self, x: Tensor) -> None:
        """Print the lines of samples (B, L): the text before each first EOT. Say how many have no EOT."""
        print(*(first_line(row, self.tokenizer) for row in x.tolist()), sep="\n", end="\n\n")
        endless = int((x != self.tokenizer.eot_id).all(1).sum())
        if endless:
            print(f"note: {endless} of {len(x)} lines have no end within {x.shape[1]} tokens", file=sys.stderr)

    def settings(self) -> str:
        """Return what follows the sampler's settings: nothing for text."""
        return ""


def preview(model: Model, tokenizer: Tokenizer, steps: int = 64) -> str:
    """Draw one sample of a model in training, as a single line."""
    row = draw(model, 1, Sampling(steps), generator=torch.Generator().manual_seed(0))[0].tolist()
    return " ".join((first_line(row, tokenizer) if model.config.rows else tokenizer.decode(row)).split())
