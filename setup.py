"""The project is described in pyproject.toml. Install it with: pip install --no-build-isolation -e .

The install builds the fused kernels of csrc/ against the installed torch. CUDA kernels are built where there are nvcc
and a CUDA build of torch (CADD_CUDA=auto|0|1). Without a compiler, in an isolated build without torch, or with
CADD_BUILD=0, the package runs its PyTorch reference. A build that fails prints one warning.
"""

import os
import sys
from pathlib import Path

from setuptools import setup


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def warn_without_kernels(why: object) -> None:
    warn(f"cadd_min is installed without its fused kernels, the PyTorch reference runs: {why}")


def kernels() -> dict:
    """Return the arguments of setup() that build the kernels, or none where the kernels cannot be built."""
    if os.environ.get("CADD_BUILD") == "0":
        return {}
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from torch.utils.cpp_extension import BuildExtension

        from cadd_min.kernels.build import extension, wants_cuda
    except ImportError as error:
        warn_without_kernels(error)
        return {}

    class Build(BuildExtension):
        """Build the kernels; where that fails, without CUDA; where that fails too, install without kernels."""

        def run(self) -> None:
            inplace = self.inplace  # changed while it runs
            try:
                super().run()
            except Exception as error:  # a compiler can fail in any way, and the install goes on
                if os.environ.get("CADD_CUDA") == "1":
                    raise  # the user asked for CUDA by name
                if wants_cuda():
                    self.run_without_cuda(inplace, error)
                else:
                    warn_without_kernels(error)

        def run_without_cuda(self, inplace: bool, why: Exception) -> None:
            warn(f"built without CUDA, the C++ kernels only: {why}")
            os.environ["CADD_CUDA"] = "0"
            self.distribution.ext_modules = [extension()]
            again = Build(self.distribution)
            again.inplace, again.build_lib, again.build_temp = inplace, self.build_lib, self.build_temp
            again.ensure_finalized()
            again.run()

    return {"ext_modules": [extension()], "cmdclass": {"build_ext": Build}}


setup(**kernels())
