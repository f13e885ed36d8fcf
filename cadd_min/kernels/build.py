"""What the kernels are compiled from, and how: one description for setup.py and for a source checkout.

torch.utils.cpp_extension needs setuptools, so it is imported only to build.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

CSRC = Path(__file__).parents[2] / "csrc"
# No fast-math: it lets the compiler ignore NaN and infinity and reorder sums, and the kernels rely on all three.
FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
# PyTorch forbids half types to convert by a plain cast. Each kernel does so in one place.
CUDA_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]
CUDA_ARCHITECTURES = "8.0;9.0+PTX"  # unless TORCH_CUDA_ARCH_LIST says otherwise: no GPU needs to be visible


def wants_cuda() -> bool:
    """Tell whether to build for CUDA. CADD_CUDA=auto builds where nvcc and a CUDA build of torch are found.

    CADD_CUDA=0 never builds for CUDA, CADD_CUDA=1 always. Raises RuntimeError if 1 is impossible, or for other values.
    """
    asked = os.environ.get("CADD_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        raise RuntimeError(f"CADD_CUDA must be auto, 0 or 1, not {asked!r}")
    from torch.utils.cpp_extension import CUDA_HOME

    can = torch.version.cuda is not None and CUDA_HOME is not None
    if asked == "1" and not can:
        raise RuntimeError(f"CADD_CUDA=1: torch {torch.__version__} and CUDA_HOME={CUDA_HOME} cannot")
    return can and asked != "0"


def sources() -> list[str]:
    """List the C++ files, and the CUDA files where they are wanted, relative to the project's root."""
    endings = ("*.cpp", "*.cu") if wants_cuda() else ("*.cpp",)
    return sorted(str(f.relative_to(CSRC.parent)) for ending in endings for f in CSRC.glob(ending))


def arguments() -> dict[str, Any]:
    """Return the arguments of each compiler, "cxx" and "nvcc"."""
    extra = os.environ.get("CADD_CXXFLAGS", "").split()
    flags: dict[str, Any] = {"cxx": FLAGS + extra}
    if wants_cuda():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        architectures = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", ",").replace(" ", ",")
        flags["cxx"] += ["-DCADD_CUDA", f"-DCADD_ARCHITECTURES={architectures}"]
        flags["nvcc"] = [*CUDA_FLAGS, "-DCADD_CUDA"]
    return flags


def links() -> list[str]:
    """Return the arguments of the linker."""
    return ["-fopenmp", *os.environ.get("CADD_CXXFLAGS", "").split()]


def extension() -> Any:
    """Describe the extension for setup.py. It is optional unless CADD_CUDA=1: without it the reference runs."""
    from torch.utils import cpp_extension

    kind = cpp_extension.CUDAExtension if wants_cuda() else cpp_extension.CppExtension
    made = kind("cadd_min._C", sources(), extra_compile_args=arguments(), extra_link_args=links())
    made.optional = os.environ.get("CADD_CUDA") != "1"
    return made


def just_in_time() -> ModuleType:
    """Compile with ninja, or reuse what was compiled before, and load the module.

    For a source checkout that is not installed. Raises RuntimeError where the sources are missing.
    """
    from torch.utils import cpp_extension

    if not CSRC.is_dir():
        raise RuntimeError("there is no csrc folder beside the package")
    flags = arguments()
    return cpp_extension.load(
        "cadd_min_C",
        [str(CSRC.parent / source) for source in sources()],
        extra_cflags=flags["cxx"],
        extra_cuda_cflags=flags.get("nvcc", []),
        extra_ldflags=links(),
        with_cuda=wants_cuda(),
    )
