"""Which items of a data set are held out: an item's own content decides.

So a corpus that grows keeps its split, and equal items are on the same side.
"""

from __future__ import annotations

import hashlib

ONE_IN = 20  # one item of this many is held out


def held_out(text: str) -> bool:
    """Tell whether the item with this text is held out. One text of ONE_IN is."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % ONE_IN == 0


def unlike(held_out: int, count: int) -> bool:
    """Tell whether the held-out share of `count` is under two fifths or over four times of 1 in ONE_IN.

    Few items, or items of very different sizes, may lie so.
    """
    return not 0.4 * count <= ONE_IN * held_out <= 4 * count
