"""The door to the two hot loops: which code runs them here, and why."""

from __future__ import annotations

from typing import NamedTuple


class Backend(NamedTuple):
    """name is "cuda", "cpp" or "torch"."""

    name: str
    why: str


def backend() -> Backend:
    """What runs forward noising and the reverse step."""
    return Backend("torch", "this version has the PyTorch reference only")


if __name__ == "__main__":
    print(": ".join(backend()))
