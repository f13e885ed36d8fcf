"""Which items of a data set are held out: an item's own content decides, unless its folder does.

So a corpus that grows keeps its split, and equal items are on the same side.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

ONE_IN = 20  # one item of this many is held out
TRAIN, TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")  # names of folders


def held_out(text: str) -> bool:
    """Tell whether the item with this text is held out. One text of ONE_IN is."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % ONE_IN == 0


def unlike(held_out: int, count: int) -> bool:
    """Tell whether the held-out share of `count` is under two fifths or over four times of 1 in ONE_IN.

    Few items, or items of very different sizes, may lie so.
    """
    return not 0.4 * count <= ONE_IN * held_out <= 4 * count


def sides(path: Path, files: list[Path]) -> dict[Path, list[Path]]:
    """Part the files of a folder by its own folders train and test, or val. Returns the files of these two.

    Without a pair of them all files are of the folder itself. Where there are test and val, test is taken.
    """
    tops = [file.relative_to(path).parts[0] for file in files if file.parent != path]
    by_name = {top.lower(): path / top for top in tops}
    found = [next((by_name[name] for name in names if name in by_name), None) for names in (TRAIN, TEST)]
    if None in found:
        return {path: files}
    return {folder: [file for file in files if folder in file.parents] for folder in found if folder}
