"""What turns data into tokens and back: a tokenizer for text, pixels for images. One protocol, and one door.

A `spec` is plain JSON that rebuilds its codec without a download. Checkpoints and token folders carry the spec.
"""

from __future__ import annotations

from typing import Any, Protocol

from cadd_min.data.hf_tokenizer import HFTokenizer
from cadd_min.data.pixels import Pixels
from cadd_min.data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from cadd_min.utils.errors import InputError


class Codec(Protocol):
    """What training and checkpoints ask of a tokenizer or of pixels."""

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens of the model that the codec belongs to."""
        ...

    def spec(self) -> dict[str, Any]:
        """Return the plain values from which `from_spec` rebuilds the codec."""
        ...


KINDS: dict[str, Any] = {cls.kind: cls for cls in (BPETokenizer, CharTokenizer, HFTokenizer)}


def from_spec(spec: dict[str, Any]) -> Codec:
    """Rebuild a codec from its `spec`. Raises InputError where the spec is damaged, or of no known kind."""
    return Pixels.from_spec(spec) if spec.get("kind") == Pixels.kind else tokenizer_from_spec(spec)


def tokenizer_from_spec(spec: dict[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from its `spec`. Raises InputError where the spec is damaged, or of no known kind."""
    kind = spec.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"tokenizer kind must be bpe, chars or hf, not {kind!r}")
    return KINDS[kind].from_spec(spec)
