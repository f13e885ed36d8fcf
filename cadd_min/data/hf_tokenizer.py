"""The tokenizer of a pretrained model, as this project's others: plain JSON in, plain JSON out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from cadd_min.data.tokenizer import MASK_TEXT, Tokenizer
from cadd_min.utils.errors import InputError, first_line

MESSAGE = "\ue000message\ue001"  # stands for a message in a template: characters that no text has
INSTALL = "pip install 'transformers>=5' tokenizers jinja2"


class HFTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face library `tokenizers`.

    json: its tokenizer.json; rows: of the model's embedding, which may have more than there are tokens; mask_id and
    end_id: any of them; chat_template: Jinja, or "" where there is none; special: the texts a template may name,
    {"bos_token": "<s>", ...}. Raises InputError where a number is beyond the rows.
    """

    kind = "hf"

    def __init__(
        self,
        json: str,
        rows: int,
        mask_id: int,
        end_id: int,
        chat_template: str = "",
        special: dict[str, str] | None = None,
    ):
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise InputError(f"the tokenizer of a pretrained model needs its library: {INSTALL}") from None
        try:
            self.tokens = Fast.from_str(json)
        except Exception as error:  # the library raises plain Exceptions
            raise InputError(f"a tokenizer of kind hf is damaged: {first_line(error)}") from None
        self.json, self.vocab_size, self.chat_template, self.special = json, rows, chat_template, special or {}
        self._mask_id, self._end_id = mask_id, end_id
        highest = max(self.tokens.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= max(highest, mask_id, end_id) < rows or min(mask_id, end_id) < 0:
            raise InputError(
                f"the tokenizer has token {max(highest, mask_id, end_id)}, and the model's embedding {rows} rows: they "
                "do not belong together"
            )

    @property
    def eot_id(self) -> int:
        return self._end_id

    @property
    def mask_id(self) -> int:
        return self._mask_id

    def spec(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "json": self.json,
            "rows": self.vocab_size,
            "mask_id": self._mask_id,
            "end_id": self._end_id,
            "chat_template": self.chat_template,
            "special": self.special,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> HFTokenizer:
        """Rebuild a tokenizer from its `spec`. Raises InputError where it is damaged."""
        types = {"json": str, "rows": int, "mask_id": int, "end_id": int, "chat_template": str, "special": dict}
        for name, kind in types.items():
            if type(spec.get(name)) is not kind:
                raise InputError(f"a tokenizer of kind hf is damaged: its {name} is missing or malformed")
        return cls(**{name: spec[name] for name in types})

    def encode_batch(self, texts: list[str], threads: int = 0) -> list[list[int]]:
        return self._encode(texts, special=False)

    def encode_chat(self, message: str) -> list[int]:
        """Ids of a conversation's first message by the user, up to where the answer begins.

        The template's special tokens are such, and the message's text is text, whatever it says.
        """
        around = self._chat(MESSAGE).split(MESSAGE)
        if len(around) != 2:  # a template that does something else with it
            return self._encode([self._chat(message)], special=True)[0]
        before, after = self._encode(around, special=True)
        return [*before, *self.encode(message), *after]

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        """special: whether the text of a special token is that token, as in a template, or ordinary characters."""
        self.tokens.encode_special_tokens = not special
        known = [text.encode("utf-8", "replace").decode() for text in texts]  # half a character is not
        try:
            return [found.ids for found in self.tokens.encode_batch(known, add_special_tokens=False)]
        except Exception as error:  # the library raises plain Exceptions, as where its [UNK] is none of its tokens
            why = first_line(error)
            raise InputError(f"the model's tokenizer.json cannot make tokens of a text: {why}") from None

    def _chat(self, message: str) -> str:
        if not self.chat_template:
            raise InputError("--chat needs a tokenizer with a chat template, and this model's has none")
        turns = [{"role": "user", "content": message}]
        try:
            return self.library.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever Jinja raises, or the template itself
            why = first_line(error)
            raise InputError(f"--chat: the tokenizer's chat template fails: {why}") from None

    @functools.cached_property
    def library(self) -> Any:
        """The same as a tokenizer of the library `transformers`."""
        from transformers import PreTrainedTokenizerFast

        more = {"chat_template": self.chat_template} if self.chat_template else {}
        return PreTrainedTokenizerFast(tokenizer_object=self.tokens, **more, **self.special)

    def decode(self, ids: list[int]) -> str:
        """Text of ids; masks are shown as [mask], other special tokens as they are written."""
        return self._decode(ids).replace(self.tokens.id_to_token(self._mask_id) or MASK_TEXT, MASK_TEXT)

    def _decode(self, ids: list[int]) -> str:
        return self.tokens.decode(ids, skip_special_tokens=False)


def prompt_ids(tokenizer: Tokenizer, chat: bool) -> Callable[[str], list[int]]:
    """What makes ids of a prompt: the tokenizer, or its chat template. Raises InputError where there is none."""
    if not chat:
        return tokenizer.encode
    if not isinstance(tokenizer, HFTokenizer):
        raise InputError("--chat is for models with a chat template: those that others have trained")
    return tokenizer.encode_chat
