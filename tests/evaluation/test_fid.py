"""torch-fidelity: the error without the package, and that no file of weights is unpickled."""

import importlib.util
import pickle

import pytest
import torch

from cadd_min.evaluation.fid import check_inception
from cadd_min.utils.errors import InputError

INSTALLED = importlib.util.find_spec("torch_fidelity") is not None


@pytest.mark.skipif(INSTALLED, reason="torch-fidelity is installed")
def test_without_the_library_it_says_what_to_install():
    with pytest.raises(InputError, match=r"pip install torch-fidelity; .*`evaluate.py frechet`.* which is not FID"):
        check_inception()


@pytest.mark.skipif(not INSTALLED, reason="needs torch-fidelity: pip install -e '.[fid]'")
def test_weights_that_are_no_weights_are_one_sentence(tmp_path):
    """Check files with a code-running pickle, with other tensors, and no file. The pickle must not run."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (tmp_path / "bomb.pth").write_bytes(pickle.dumps(Bomb()))
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    for name, message in (("bomb", "other things than tensors"), ("other", "Missing|Error"), ("none", "No such file")):
        with pytest.raises(InputError, match=message):
            check_inception(str(tmp_path / f"{name}.pth"))
    assert not (tmp_path / "exploded").exists()
