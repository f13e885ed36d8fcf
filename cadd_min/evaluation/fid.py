"""FID, Inception Score, precision and recall as the literature reports them, computed by the package torch-fidelity."""

from __future__ import annotations

import pickle

import numpy as np
import torch
from torch import Tensor

from cadd_min.utils.errors import InputError, described, first_line

EXTRACTOR = "inception-v3-compat"  # for precision and recall too, as in Dhariwal & Nichol 2021


class _Coloured(torch.utils.data.Dataset):
    """Images (N, H, W, 1 or 3) uint8 as torch-fidelity's data set: (3, H, W) uint8 each."""

    def __init__(self, images: np.ndarray):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Tensor:
        image = torch.from_numpy(np.ascontiguousarray(self.images[i])).permute(2, 0, 1)
        return image.expand(3, -1, -1).contiguous()


def inception_metrics(
    samples: np.ndarray, real: np.ndarray, device: torch.device, weights: str | None = None
) -> dict[str, float]:
    """Measure samples (N, H, W, C) uint8 against real images (M, H, W, C) uint8, by torch-fidelity.

    Returns FID, IS and its deviation over splits, precision and recall. weights: as `check_inception` has checked it.
    Raises InputError where the library fails.
    """
    import torch_fidelity

    try:
        metrics = torch_fidelity.calculate_metrics(
            input1=_Coloured(samples),
            input2=_Coloured(real),
            cuda=device.type == "cuda",
            fid=True,
            isc=True,
            prc=True,
            isc_splits=min(10, len(samples)),
            prc_neighborhood=3,
            feature_extractor=EXTRACTOR,
            feature_extractor_weights_path=weights,
            verbose=False,
            save_cpu_ram=True,
        )
    except Exception as error:  # of too few samples, for example: the library raises many types
        raise InputError(f"torch-fidelity fails on these images ({described(error)})") from None
    return {
        "FID": metrics["frechet_inception_distance"],
        "IS": metrics["inception_score_mean"],
        "IS ±": metrics["inception_score_std"],
        "precision": metrics["precision"],
        "recall": metrics["recall"],
    }


def check_inception(weights: str | None = None) -> None:
    """Open Inception with its weights, as `inception_metrics` will, before anything is sampled.

    weights: a file, or None to download them. Raises InputError where the package is missing or the weights cannot be
    loaded.
    """
    try:
        from torch_fidelity.utils import create_feature_extractor
    except (ImportError, RuntimeError) as error:
        raise InputError(
            f"fid needs torch-fidelity ({error}): pip install torch-fidelity; without it, `evaluate.py frechet` "
            "compares models in the features of a small classifier, which is not FID"
        ) from None
    try:
        if weights is not None:  # the library unpickles any object, so a file with more than tensors is refused here
            torch.load(weights, map_location="cpu", weights_only=True)
        create_feature_extractor(EXTRACTOR, ["2048"], False, feature_extractor_weights_path=weights, verbose=False)
    except pickle.UnpicklingError:
        raise InputError(f"--inception-weights {weights} holds other things than tensors: it is not read") from None
    except (OSError, RuntimeError, ValueError, EOFError) as error:  # no network, no such file, other weights
        reason = first_line(error)
        raise InputError(
            f"fid needs Inception's weights, which torch-fidelity could not load ({reason}): give their file with "
            "--inception-weights, or use `evaluate.py frechet`, which needs none and is not FID"
        ) from None
