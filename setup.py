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

        from cadd_min.kernels.build import extension, wants_cuda
    except ImportError as error:
        without(error)
        return {}

    class Build(BuildExtension):
        def run(self) -> None:
            inplace = self.inplace  # changed while it runs
            try:
                super().run()
            except Exception as error:  # whatever a compiler may do, the install goes on
                if os.environ.get("CADD_CUDA") == "1":
                    raise  # asked for by name: what comes out must have it
                if wants_cuda():
                    self.run_without_cuda(inplace, error)
                else:
                    without(error)

        def run_without_cuda(self, inplace: bool, why: Exception) -> None:
            print(f"warning: built without CUDA, the C++ kernels only: {why}", file=sys.stderr)
            os.environ["CADD_CUDA"] = "0"
            self.distribution.ext_modules = [extension()]
            again = Build(self.distribution)
            again.inplace, again.build_lib, again.build_temp = inplace, self.build_lib, self.build_temp
            again.ensure_finalized()
            again.run()

    return {"ext_modules": [extension()], "cmdclass": {"build_ext": Build}}


setup(**kernels())
