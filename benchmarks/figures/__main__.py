"""Draw the figures of docs/ into docs/figures/, from the tables and records in docs/ alone.

make figures                              all of them
python -m benchmarks.figures clocks dial  some of them
"""

from __future__ import annotations

import argparse

from benchmarks.figures import curves, process, style
from cadd_min.utils.cli import as_path, run
from cadd_min.utils.errors import choose

FIGURES = {
    "forward": process.forward,
    "reverse": process.reverse,
    "clocks": curves.clocks,
    "leak": curves.leak,
    "dial": curves.dial,
    "errors": curves.errors,
    "budget": curves.budget,
    "schedules": curves.schedules,
    "frontier": curves.frontier,
    "frechet": curves.frechet,
    "speed": curves.speed,
    "speedrun": curves.speedrun,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"figures: {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--out", type=as_path, default=style.DOCS / "figures", help="folder of the figures")
    args = parser.parse_args()
    for name in args.names:
        choose("names", name, FIGURES)
    for name in args.names or FIGURES:
        print(style.save(FIGURES[name](), args.out / f"{name}.svg"), flush=True)


if __name__ == "__main__":
    run(main)
