"""Measure the SMILES that a model writes beside held-out molecules: valid, different, new, and close to the data.

    valid      lines that RDKit reads as a molecule
    different  of the valid lines: the number of different molecules, divided by the number of lines
    new        of the different molecules: not in the training set
    held-out   of the different molecules: in the held-out set, which the model has not seen
    FD         Fréchet distance of DESCRIPTORS to the training set's, of the valid lines. It is not FCD

Molecules are compared by their canonical SMILES, so two ways of writing one molecule are the same. QM9 has nearly all
molecules of its kind, so a new molecule is likely wrong: there "held-out" is the better measure. "different" falls and
FD is more certain with more valid lines, so compare both at similar shares of valid lines.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from cadd_min.data.token_folder import TokenView
from cadd_min.data.tokenizer import Tokenizer
from cadd_min.evaluation.bound import Models
from cadd_min.evaluation.held_out import cut, data_folder
from cadd_min.evaluation.image_judge import frechet_distance
from cadd_min.evaluation.text import REAL, common, kinds, percent, short_names
from cadd_min.sampling import generate
from cadd_min.utils.errors import InputError
from cadd_min.utils.files import atomic_write, check_writable

DESCRIPTORS = (  # names of rdkit.Chem.Descriptors
    "MolWt", "HeavyAtomCount", "NumHeteroatoms", "MolLogP", "TPSA", "NumHDonors", "NumHAcceptors", "NumRotatableBonds",
    "RingCount", "NumAromaticRings", "FractionCSP3", "BertzCT",
)  # fmt: skip
DESCRIBED = 10_000  # molecules of the training set, at most, with which samples are compared
LEAST = 100  # valid lines, without which there is no FD
SHARES = {
    "valid": "lines",
    "different": "valid",
    "new": "different",
    "held-out": "different",
}  # of what each is a share


def rdkit() -> Any:
    """Import RDKit without its messages about lines. Raises InputError where RDKit is missing."""
    try:
        from rdkit import Chem, RDLogger
        from rdkit.Chem import Descriptors  # noqa: F401
    except ImportError:
        raise InputError("molecules are read by RDKit: pip install rdkit") from None
    RDLogger.DisableLog("rdApp.*")  # type: ignore[attr-defined]
    return Chem


def canonical(line: str) -> str | None:
    """Return the canonical SMILES of a line, or None where the line is not one molecule and nothing else.

    RDKit itself ignores what follows a space.
    """
    molecule = rdkit().MolFromSmiles(line) if len(line.split()) == 1 and line == line.strip() else None
    smiles = None if molecule is None else rdkit().MolToSmiles(molecule)
    return smiles if smiles and rdkit().MolFromSmiles(smiles) is not None else None


def descriptors(smiles: Iterable[str]) -> Tensor:
    """Compute DESCRIPTORS of valid molecules, (N, 12) float64."""
    chem = rdkit()
    functions = [getattr(chem.Descriptors, name) for name in DESCRIPTORS]
    rows = [[float(f(molecule)) for f in functions] for molecule in map(chem.MolFromSmiles, smiles)]
    return torch.tensor(rows, dtype=torch.float64).view(-1, len(DESCRIPTORS))


class Reference:
    """Hold the molecules of a data set, by which samples are measured. Raises InputError without two molecules."""

    def __init__(self, train: list[str], held_out: list[str]):
        if len(train) < 2:
            raise InputError(f"the training set has {len(train)} molecules that RDKit reads: 2 are needed")
        self.train, self.held_out = set(train), set(held_out)
        features = descriptors(train[:: -(-len(train) // DESCRIBED)])
        spread = features.std(0)
        self.mean, self.scale = features.mean(0), torch.where(spread > 0, spread, 1)
        self.features = (features - self.mean) / self.scale

    def measure(self, lines: list[str]) -> dict[str, float]:
        """Count the lines, and those that are valid, different, new and held-out. Add FD for LEAST valid lines."""
        valid = [smiles for smiles in map(canonical, lines) if smiles is not None]
        different = set(valid)
        row: dict[str, float] = {
            "lines": len(lines),
            "valid": len(valid),
            "different": len(different),
            "new": len(different - self.train),
            "held-out": len(different & self.held_out),
        }
        if len(valid) >= LEAST:
            row["FD"] = frechet_distance(self.features, (descriptors(valid) - self.mean) / self.scale)
        return row


def data_lines(tokens: TokenView, tokenizer: Tokenizer, block: int = 1 << 20) -> Iterable[str]:
    """Yield the lines of a stream of tokens, each of which ends with EOT."""
    rest: list[int] = []
    for start in range(0, len(tokens), block):
        ids = rest + tokens[start : start + block].tolist()
        end = len(ids) - ids[::-1].index(tokenizer.eot_id) if tokenizer.eot_id in ids else 0
        yield from tokenizer.documents(ids[:end])[:-1]
        rest = ids[end:]


def known(tokens: TokenView, tokenizer: Tokenizer, cache: Path) -> list[str]:
    """Return the canonical SMILES of a data set's molecules, in its order. They are kept in the folder `cache`.

    Lines that RDKit does not read are counted on stdout.
    """
    name = f"{tokens.folder.digest()} {tokenizer.fingerprint()} {tokens.start} {tokens.end}"
    key = hashlib.sha256(name.encode()).hexdigest()[:12]
    path = cache / f"canonical-{key}-rdkit{importlib.metadata.version('rdkit')}.txt"
    if not path.exists():
        lines = tqdm(data_lines(tokens, tokenizer), desc="reading molecules", unit=" molecules", leave=False)
        found = [smiles or "" for smiles in map(canonical, lines)]
        with atomic_write(path) as part:
            part.write_text("".join(f"{smiles}\n" for smiles in found))
    found = path.read_text().splitlines()
    if broken := found.count(""):
        print(f"note: {broken:,} of the data's {len(found):,} lines are not molecules for RDKit, and are left out")
    return [smiles for smiles in found if smiles]


def molecules(models: Models, args: argparse.Namespace) -> str:
    """Measure samples of each model beside held-out molecules. Returns a Markdown table.

    With --out the table is printed first, and the first valid molecules of the first model are drawn. Raises InputError
    for models of running text.
    """
    rdkit()
    if args.out:
        check_picture(args.out)
    first, tokenizer, content = common(models)
    if not first.config.rows:
        raise InputError("molecules is for models of lines: train with --lines, each molecule a line")
    real = cut(first, tokenizer, content, args, args.num, ": they stand beside the samples")
    folder = data_folder(content, tokenizer, args, lines=True)
    reference = Reference(*(known(folder.split(side, whole=True), tokenizer, args.cache) for side in ("train", "val")))
    text = lambda ids: [tokenizer.documents(row)[0] for row in ids.tolist()]
    rows, names, valid = {REAL: reference.measure(text(real))}, short_names(models), []
    for path, (model, _, _) in models.items():
        ids = generate.many(
            model, generate.sampling(args), args.num, seed=args.seed, dtype=args.dtype, batch_size=args.batch_size
        )
        rows[f"{model.config.model} ({names[path]})"] = reference.measure(text(ids))
        if model is first:
            valid = [line for line in text(ids) if canonical(line)]
    caption = f"{args.num} samples each, ± the standard error, {generate.describe(args, kinds(models))}"
    found = f"{table(rows)}\n\n{caption}"
    if not args.out:
        return found
    print(found)
    draw(valid, args.out)
    return f"molecules in {args.out}"


def table(rows: dict[str, dict[str, float]]) -> str:
    """Write rows as Markdown. A share of nothing is left empty."""
    lines = ["| molecules | " + " | ".join([*SHARES, "FD"]) + " |", "|---" * (2 + len(SHARES)) + "|"]
    for name, row in rows.items():
        cells = [percent(int(row[column]), int(row[whole])) for column, whole in SHARES.items()]
        lines.append(f"| {name} | " + " | ".join([*cells, f"{row['FD']:.2f}" if "FD" in row else ""]) + " |")
    return "\n".join(lines)


def check_picture(path: Path) -> None:
    """Raise InputError where `draw` could not write to a --out."""
    if path.suffix != ".svg":
        raise InputError(f"--out must be an .svg file, not {path}")
    check_writable(path, "--out")


def draw(smiles: list[str], path: Path, count: int = 20) -> None:
    """Draw the first molecules to an .svg, five in a row. Raises InputError where there is no molecule."""
    from rdkit.Chem import Draw

    if not smiles:
        raise InputError(f"--out {path}: there is no valid molecule to draw")
    chosen = [rdkit().MolFromSmiles(line) for line in smiles[:count]]
    picture = Draw.MolsToGridImage(chosen, molsPerRow=5, subImgSize=(180, 140), useSVG=True)
    with atomic_write(path) as part:
        part.write_text(getattr(picture, "data", picture))
