"""The tokenizer of a pretrained model, with the methods and the plain JSON `spec` of the tokenizers in tokenizer.py."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from cadd_min.data.tokenizer import MASK_TEXT, Tokenizer, begun, byte_of
from cadd_min.utils.errors import InputError, first_line

ANCHORS = ("\n", "a", ".", "0")  # texts of which one shares no token with the text after it
BYTE = re.compile("<0x([0-9A-F]{2})>")  # a token of one byte
MESSAGE = "\ue000message\ue001"  # stands for the message in a template: no text has these characters
TEMPLATE_SECONDS = 10.0  # a chat template is a program, and may loop
INSTALL = "pip install 'transformers>=5.5' tokenizers jinja2"


class HFTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face library `tokenizers`.

    Args: json: the content of its tokenizer.json; rows: of the model's embedding, which may have more rows than there
    are tokens; mask_id, end_id: any ids below `rows`; chat_template: Jinja, or "" for no template; special: the special
    tokens that a template may name, {"bos_token": "<s>", ...}.
    Raises InputError where an id is not below `rows`, where json is damaged, or where the library is missing.
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
        self._mask_id, self._end_id, self._counts = mask_id, end_id, dict[int, int]()
        highest = max(self.tokens.get_vocab(with_added_tokens=True).values(), default=-1)
        if not 0 <= max(highest, mask_id, end_id) < rows or min(mask_id, end_id) < 0:
            raise InputError(
                f"the tokenizer has token {max(highest, mask_id, end_id)}, and the model's embedding {rows} rows: they "
                "do not belong together"
            )

    @property
    def unused(self) -> int:
        """Return how many rows at the end of the model's embedding belong to no token."""
        highest = max(self.tokens.get_vocab(with_added_tokens=True).values())
        return self.vocab_size - 1 - max(highest, self._mask_id, self._end_id)

    @property
    def eot_id(self) -> int:
        """Return the id of the end of a document."""
        return self._end_id

    @property
    def mask_id(self) -> int:
        """Return the id of the mask, which may be inside the vocabulary."""
        return self._mask_id

    @functools.cached_property
    def end_ids(self) -> frozenset[int]:  # type: ignore[override]
        """Return the ids of all special tokens but the mask and the unknown: a turn may end with a token of its own."""
        others = {self._mask_id, self.tokens.token_to_id(self.special.get("unk_token", ""))}
        return frozenset({*self._special} - others | {self._end_id})

    @functools.cached_property
    def _special(self) -> dict[int, str]:
        """Return the special tokens by their ids."""
        return {n: token.content for n, token in self.tokens.get_added_tokens_decoder().items() if token.special}

    def spec(self) -> dict[str, Any]:
        """Return the plain values from which `from_spec` rebuilds this tokenizer, tokenizer.json among them."""
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
        """Rebuild a tokenizer from its `spec`. Raises InputError where the spec is damaged."""
        types = {"json": str, "rows": int, "mask_id": int, "end_id": int, "chat_template": str, "special": dict}
        for name, kind in types.items():
            if type(spec.get(name)) is not kind:
                raise InputError(f"a tokenizer of kind hf is damaged: its {name} is missing or malformed")
        return cls(**{name: spec[name] for name in types})

    def encode_batch(self, texts: list[str], threads: int = 0) -> list[list[int]]:
        """Return the ids of each text. The package chooses how many threads to use."""
        return self._encode(texts, special=False)

    def decode_inside(self, ids: list[int]) -> str:
        """Return the text of ids that other tokens precede: some tokenizers drop the first space of a text."""
        return self.decode([*self._anchor, *ids])[len(self.decode(self._anchor)) :]

    @functools.cached_property
    def _anchor(self) -> list[int]:
        """Return the ids of the first of ANCHORS that this tokenizer keeps."""
        return next((ids for ids in map(self.encode, ANCHORS) if self.decode(ids).strip(" ")), [])

    def encode_inside(self, text: str) -> list[int]:
        """Return the ids of a text that another text precedes: some tokenizers put a space before a text.

        The text is encoded behind a text that shares no token with it.
        """
        for anchor in ANCHORS:
            before, both = self.encode(anchor), self.encode(anchor + text)
            ids = both[len(before) :]
            if both == [*before, *ids] and self.decode(both) == self.decode(before) + text:
                return ids
        return self.encode(text)

    def encode_chat(self, message: str) -> list[int]:
        """Return the ids of a conversation that opens with the user's message, up to where the answer begins.

        These are the ids that the library's own `apply_chat_template` gives. A message that spells a special token is
        ordinary text, though, and is encoded apart from the template. Raises InputError where the tokenizer has no chat
        template, or the template fails.
        """
        if not any(text in message for text in self._special.values()):
            return self._encode([self._chat(message)], special=True)[0]
        around = self._chat(MESSAGE).split(MESSAGE)
        if len(around) != 2:  # the template repeats, changes or drops the message
            return self._encode([self._chat(message)], special=True)[0]
        before, after = self._encode(around, special=True)
        return [*before, *self.encode_inside(message), *after]

    def _encode(self, texts: list[str], special: bool) -> list[list[int]]:
        """Return the ids of each text. Raises InputError where the tokenizer cannot encode a text.

        special: encode the text of a special token as that token (in a template), not as ordinary characters.
        """
        self.tokens.encode_special_tokens = not special
        valid = [text.encode("utf-8", "replace").decode() for text in texts]  # a lone surrogate is no character
        try:
            return [encoding.ids for encoding in self.tokens.encode_batch(valid, add_special_tokens=False)]
        except Exception as error:  # the library raises plain Exceptions, for example where [UNK] is not a token
            why = first_line(error)
            raise InputError(f"the model's tokenizer.json cannot make tokens of a text: {why}") from None

    def _chat(self, message: str) -> str:
        """Write one message of the user as the chat template does. Raises InputError."""
        if not self.chat_template:
            raise InputError("--chat needs a tokenizer with a chat template, and this model's has none")
        turns = [{"role": "user", "content": message}]
        try:
            with seconds(TEMPLATE_SECONDS):
                return self.library.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # Jinja and the template may raise anything
            why = first_line(error)
            raise InputError(f"--chat: the tokenizer's chat template fails: {why}") from None

    @functools.cached_property
    def library(self) -> Any:
        """Return the same tokenizer as an object of the library `transformers`."""
        from transformers import PreTrainedTokenizerFast

        template = {"chat_template": self.chat_template} if self.chat_template else {}
        return PreTrainedTokenizerFast(tokenizer_object=self.tokens, **template, **self.special)

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids. A mask is shown as [mask], and other special tokens as they are written."""
        return self._decode(ids).replace(self.tokens.id_to_token(self._mask_id) or MASK_TEXT, MASK_TEXT)

    def _characters(self, token: int) -> int:
        if token not in self._counts:
            self._counts[token] = self._count(token)
        return self._counts[token]

    def _count(self, token: int) -> int:
        """Count the characters that begin in a token. A special token has none, and the unknown token one."""
        text = self.tokens.id_to_token(token)
        if text is None or token in self.end_ids or token == self._mask_id:
            return 0
        if '"ByteLevel"' in self._decoder and all(c in byte_of() for c in text):
            return begun(bytes(byte_of()[c] for c in text))
        if (byte := BYTE.fullmatch(text)) and '"ByteFallback"' in self._decoder:
            return begun(bytes.fromhex(byte[1]))
        return 1 if token in self._special else len(self.decode_inside([token]))

    @functools.cached_property
    def _decoder(self) -> str:
        return json.dumps(json.loads(self.json).get("decoder"))

    def _decode(self, ids: list[int]) -> str:
        return self.tokens.decode(ids, skip_special_tokens=False)


@contextlib.contextmanager
def seconds(most: float) -> Iterator[None]:
    """Raise TimeoutError where the work inside takes longer. Only the first thread has a limit, and not on Windows."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it takes longer than {most:g} seconds")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, most)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def prompt_ids(tokenizer: Tokenizer, chat: bool) -> Callable[[str], list[int]]:
    """Return the function from a prompt to its ids: the tokenizer's `encode`, or with `chat` its chat template.

    Raises InputError where `chat` is set and the tokenizer is not of a pretrained model.
    """
    if not chat:
        return tokenizer.encode
    if not isinstance(tokenizer, HFTokenizer):
        raise InputError("--chat is for models with a chat template, which only pretrained models have")
    return tokenizer.encode_chat
