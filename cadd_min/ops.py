"""The door to the two hot loops, forward noising and the reverse step: which code runs them here, and why.

    python -m cadd_min.ops            what is active, and how to change it
    CADD_BACKEND=torch|cpp|cuda       ask for a backend: an error, not a fallback, where it is missing

The fused kernels are in csrc/, the reference in forward.py and reverse.py. Both draw from Philox (kernels/philox.py) by
(seed, offset, position). So a seed gives the same noise whichever runs, and the same tokens unless rounding decides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cadd_min.forward import noised
from cadd_min.kernels import philox
from cadd_min.kernels.register import INSTALL, Backend, Operators
from cadd_min.reverse import COLD, ZHATS, Decoding, in_all_latents, reverse_rows, token_probs
from cadd_min.schedule import NoiseSchedule
from cadd_min.utils.cli import Parser, run
from cadd_min.utils.errors import choose

# ------------------------------------------------------------------------------------------------ the reference


def _forward_noising(
    x_0: Tensor, ids: Tensor, table: Tensor, coefficients: Tensor, seed: Tensor, mask_id: int
) -> tuple[Tensor, Tensor]:
    position = torch.arange(x_0.numel(), device=x_0.device).view(x_0.shape)
    u, _ = philox.choices(seed, position)
    eps = philox.normals(seed, position, table.shape[1]).to(table.dtype)
    alpha, signal, noise = coefficients.unbind(1)
    x_t, z_t = noised(x_0, table[ids], alpha, signal, noise, u, eps, mask_id)
    return z_t, x_t


def _reverse_step(
    logits: Tensor,
    rows: Tensor,
    z_t: Tensor,
    table: Tensor,
    coefficients: Tensor,
    seed: Tensor,
    mask_id: int,
    zhat: int,
    temperature: float,
    top_p: float,
) -> tuple[Tensor, Tensor]:
    everywhere = in_all_latents(rows, *z_t.shape[:2])  # (K, N)
    u = (*philox.choices(seed, rows), philox.hat_choice(seed, everywhere))
    eps = philox.normals(seed, everywhere, z_t.shape[2]).to(z_t.dtype)
    p = token_probs(logits, mask_id, temperature, top_p)
    return reverse_rows(p, z_t.index_select(1, rows), table, coefficients, mask_id, ZHATS[zhat], u, eps)


REFERENCE: dict[str, Callable[..., Any]] = {"forward_noising": _forward_noising, "reverse_step": _reverse_step}
_operators = Operators(REFERENCE)
compiled = _operators.compiled


def backend() -> Backend:
    """Return what runs forward noising and the reverse step, and why.

    Raises InputError if it is not what CADD_BACKEND asks for.
    """
    return _operators.check()


# ------------------------------------------------------------------------------------------------ the two loops


def draw_seed(generator: torch.Generator | None, device: torch.device | str | None = None) -> Tensor:
    """Draw a seed (2,) int64 from a generator, or torch's own: a number, and the offset 0."""
    own = device if generator is None else generator.device
    seed = torch.randint(2**62, (2,), generator=generator, device=own)
    seed[1].zero_()  # a plain 0 would have to travel to the GPU, which waits for it
    return seed if device is None else seed.to(device)


def forward_noising(
    x_0: Tensor, ids: Tensor, table: Tensor, t: Tensor, schedule: NoiseSchedule, mask_id: int, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw (x_t, z_t) ~ q(x_t, z_t | x_0) with z_0 = table[ids], in one pass.    (Prop. 1)

    Args: x_0 (B, L) int64 tokens; ids (B, L): the rows of table (V, D) that are their z_0, x_0 itself unless hints are
    wrong; t (B,); seed (2,) int64, a seed and an offset.
    Returns: x_t (B, L), z_t (B, L, D) of table's dtype, with a gradient to it.
    """
    backend()
    coefficients = torch.stack([schedule.alpha(t), schedule.signal(t), schedule.noise(t)], -1).double()  # (B, 3)
    z_t, x_t = torch.ops.cadd_min.forward_noising(
        x_0.contiguous(), ids.contiguous(), table.contiguous(), coefficients, seed, mask_id
    )
    return x_t, z_t


def reverse_step(
    logits: Tensor,
    rows: Tensor,
    z_t: Tensor,
    table: Tensor,
    coefficients: Tensor,
    mask_id: int,
    seed: Tensor,
    decoding: Decoding = Decoding(),  # noqa: B008
) -> tuple[Tensor, Tensor]:
    """Make one reverse step of N masked positions, with z0_hat for z_0.    (Prop. 2)

    The reference runs for float64 tensors and temperatures up to COLD, else the active backend.
    In PyTorch the step is `reverse.token_probs`, then `reverse.reverse_rows`.
    Args: logits (K, N, V) of the masked positions; rows (N,) int64, their places among the P = B L positions; z_t
    (K, P, D); table (V, D); coefficients (4,), or (4, N) for each position: see `reverse.step_coefficients`; seed
    (2,) int64, its offset the step's own.
    Returns: x_s (N,), mask_id where a position stays masked; z_s (K, N, D).
    """
    backend()
    zhat = ZHATS.index(choose("zhat", decoding.zhat, ZHATS))
    arguments = (rows, z_t, table, coefficients.contiguous(), seed, mask_id, zhat, decoding.temperature, decoding.top_p)
    # the kernels compute in float32, and divide by the temperature
    wide = torch.float64 in (logits.dtype, z_t.dtype, table.dtype)
    with torch.autocast(logits.device.type, enabled=False):
        if wide or decoding.temperature <= COLD:
            return _reverse_step(logits, *arguments)
        z, w = z_t.float().contiguous(), table.float().contiguous()
        x_s, z_s = torch.ops.cadd_min.reverse_step(logits.contiguous(), rows.contiguous(), z, w, *arguments[3:])
    return x_s, z_s.to(z_t.dtype)


def main() -> None:
    """Print which backend computes here and why, and whether the kernels pass their self-test."""
    Parser(__doc__).parse_args()
    print(": ".join(backend()))
    if compiled is not None:
        print(f"self-test {'passed' if compiled.self_test() else 'FAILED: build again with ' + INSTALL}")


if __name__ == "__main__":
    run(main)
