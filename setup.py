"""The project is described in pyproject.toml. Install it with: pip install --no-build-isolation -e .

That builds the fused kernels of csrc/ against the torch that is installed, with CUDA where nvcc and a CUDA build of
torch are (CADD_CUDA=auto|0|1). Where they cannot be built (no compiler, no torch in an isolated build, CADD_BUILD=0)
there is one warning, and the package runs its PyTorch reference.
"""

import os
import sys
from pathlib import Path

from setuptools import setup


def without(why: object) -> None:
    print(
        f"warning: cadd_min is installed without its fused kernels, the PyTorch reference runs: {why}", file=sys.stderr
    )


def kernels() -> dict:
    if os.environ.get("CADD_BUILD") == "0":
        return {}
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from torch.utils.cpp_extension import BuildExtension

        from cadd_min.build import extension
    except ImportError as error:
        without(error)
        return {}

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # whatever a compiler may do, the install goes on
                without(error)

    return {"ext_modules": [extension()], "cmdclass": {"build_ext": Build}}


setup(**kernels())
