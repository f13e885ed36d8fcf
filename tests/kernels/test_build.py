"""Builds of the kernels on any machine: CUDA compiles without a GPU, and a failed build does not fail an install."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from cadd_min.kernels.build import CUDA_FLAGS

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
@pytest.mark.parametrize("name", sorted(f.name for f in CSRC.glob("*.cu")))
def test_cuda_sources_compile(name, tmp_path):
    """Compile for sm_80 and sm_90 as setup.py does, with warnings as errors.

    Neither a GPU nor a CUDA build of torch is needed.
    """
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    command = [
        "nvcc",
        "-std=c++17",
        "-Werror",
        "all-warnings",
        *cpp_extension.COMMON_NVCC_FLAGS,
        *CUDA_FLAGS,
        *targets,
        "-c",
        str(CSRC / name),
        "-o",
        str(tmp_path / "x.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_install_without_a_compiler_goes_on(tmp_path):
    """Check that setup.py warns once, builds nothing and exits with 0 where the compiler fails."""
    environment = {**os.environ, "CXX": "/bin/false", "CC": "/bin/false", "MAX_JOBS": "1"}
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path / "t"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("without its fused kernels") == 1
    assert not list(tmp_path.rglob("*.so"))


def test_cuda_asked_for_where_it_cannot_be_is_an_error():
    """Check that CADD_CUDA=1 with a torch built without CUDA is an error, and not an install without kernels."""
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    code = "from cadd_min.kernels.build import wants_cuda; wants_cuda()"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "CADD_CUDA": "1"}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "CADD_CUDA=1" in done.stderr
