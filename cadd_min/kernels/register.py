"""The two operators torch.ops.cadd_min.forward_noising and .reverse_step: by the compiled kernels, or by a reference.

ops.py hands in the reference, two functions of the same arguments. PyTorch also needs to know an operator's output
shapes without running it (fakes, for torch.compile) and its gradient (autograd): both are here, for every backend.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cadd_min.kernels import build
from cadd_min.utils.errors import InputError, choose

BACKENDS = ("auto", "torch", "cpp", "cuda")
INSTALL = "pip install --no-build-isolation --no-deps -e ."
SCHEMAS = (
    "forward_noising(Tensor x_0, Tensor ids, Tensor table, Tensor coefficients, Tensor seed, int mask_id) "
    "-> (Tensor, Tensor)",
    "reverse_step(Tensor logits, Tensor rows, Tensor z_t, Tensor table, Tensor coefficients, Tensor seed, int mask_id, "
    "int zhat, float temperature, float top_p) -> (Tensor, Tensor)",
)


class Backend(NamedTuple):
    """What runs the two loops, "cuda", "cpp" or "torch", and why."""

    name: str
    why: str


class Operators:
    """The registered operators: the compiled module, or None where the reference runs, and the backend's name.

    A backend that CADD_BACKEND names may be missing. `check` raises that error when a loop is about to run.
    """

    def __init__(self, reference: dict[str, Callable[..., Any]]):
        self._failure: InputError | None = None
        self.compiled: ModuleType | None = None
        try:
            self.compiled, self.backend = load()
            check_gpu(self.compiled, self.backend)
        except InputError as error:
            self.backend, self._failure = Backend("torch", "what CADD_BACKEND asks for is missing"), error
        self._library = register(None if self.compiled is not None else reference)

    def check(self) -> Backend:
        """Return the backend. Raises InputError if it is not what CADD_BACKEND asks for."""
        if self._failure is not None:
            raise self._failure
        return self.backend


def load() -> tuple[ModuleType | None, Backend]:
    """Load the compiled kernels that CADD_BACKEND asks for. Returns None where the reference is to run.

    Raises InputError where CADD_BACKEND names a backend that cannot be loaded, nor built.
    """
    asked = choose("CADD_BACKEND", os.environ.get("CADD_BACKEND", "auto"), BACKENDS)
    if asked == "torch":
        return None, Backend("torch", "CADD_BACKEND=torch asks for the PyTorch reference")
    try:
        module = importlib.import_module("cadd_min._C")
    except ImportError as error:
        why = f"the compiled kernels cannot be loaded ({error})"
        if asked == "auto":
            return None, Backend("torch", f"{why}; build them with: {INSTALL}")
        try:  # a source checkout that is not installed: compile with ninja
            module = build.just_in_time()
        except Exception as failure:
            raise InputError(
                f"CADD_BACKEND={asked}: {why}, nor built ({failure}); build them with: {INSTALL}"
            ) from None
    gpu = bool(module.cuda_architectures) and torch.cuda.is_available()
    built = f"compiled by {module.compiler}, {module.vector_code}, CUDA for {module.cuda_architectures or 'none'}"
    return module, Backend("cuda" if gpu and asked != "cpp" else "cpp", built)


def check_gpu(module: ModuleType | None, backend: Backend) -> None:
    """Raise InputError where CADD_BACKEND asks for CUDA and the kernels that are loaded have no GPU.

    The kernels have registered the operators by then, so the reference cannot.
    """
    if module is not None and os.environ.get("CADD_BACKEND") == "cuda" and backend.name != "cuda":
        missing = "no GPU is visible" if module.cuda_architectures else f"built without CUDA; CADD_CUDA=1 {INSTALL}"
        raise InputError(f"CADD_BACKEND=cuda: {missing}")


def register(reference: dict[str, Callable[..., Any]] | None) -> torch.library.Library | None:
    """Define the operators by the reference, if it is given, and register fakes and autograd for every backend.

    The library that is returned must be kept: its operators go with it.
    """
    library = None
    if reference is not None:
        library = torch.library.Library("cadd_min", "DEF")
        for schema in SCHEMAS:
            library.define(schema)
            name = schema.partition("(")[0]
            library.impl(name, reference[name], "CompositeExplicitAutograd")
    torch.library.register_fake("cadd_min::forward_noising", _fake_noising, lib=library)
    torch.library.register_fake("cadd_min::reverse_step", _fake_reverse, lib=library)
    torch.library.register_autograd(
        "cadd_min::forward_noising", _noising_backward, setup_context=_noising_setup, lib=library
    )
    return library


def _fake_noising(x_0: Tensor, ids: Tensor, table: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return table.new_empty(*x_0.shape, table.shape[1]), torch.empty_like(x_0)


def _fake_reverse(logits: Tensor, rows: Tensor, z_t: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), z_t.new_empty(z_t.shape[0], rows.shape[0], z_t.shape[2])


def _noising_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, ids, table, coefficients, _, mask_id = inputs
    ctx.save_for_backward(ids, coefficients, output[1])
    ctx.mask_id, ctx.rows = mask_id, len(table)
    ctx.mark_non_differentiable(output[1])


def _noising_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    """Give the table its gradient: signal_t grad where masked, grad elsewhere, summed by row."""
    ids, coefficients, x_t = ctx.saved_tensors
    factor = torch.where(x_t == ctx.mask_id, coefficients[:, 1:2], 1).to(grad)  # (B, L)
    summed = grad.new_zeros(ctx.rows, grad.shape[-1])
    # index_put_ sorts before it adds, so the sum has the same order at every call on a GPU
    summed.index_put_((ids.flatten(),), (factor[..., None] * grad).flatten(0, 1), accumulate=True)
    return None, None, summed, None, None, None
