"""The measures of images against closed forms, scipy, and samples that are wrong on purpose."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from cadd_min.data.images import Images, open_images
from cadd_min.evaluation import image_judge
from cadd_min.evaluation.image_judge import (
    class_entropies,
    frechet_distance,
    judged,
    open_judge,
    precision_recall,
    train_judge,
)
from cadd_min.utils.errors import InputError
from tests.toys import rng


def test_frechet_distance_is_that_of_two_gaussians():
    """Compare with scipy's matrix square root. The distance to itself is 0, and a shift by d adds |d|^2."""
    a = torch.randn(500, 8, generator=rng(0), dtype=torch.float64) @ torch.randn(8, 8, generator=rng(1)).double()
    b = torch.randn(400, 8, generator=rng(2), dtype=torch.float64) + 1
    cov_a, cov_b = np.cov(a.T.numpy()), np.cov(b.T.numpy())
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real
    )
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a + 3) == pytest.approx(8 * 9, rel=1e-6)
    flat = torch.cat([a, a[:, :1]], 1)  # a repeated feature makes the covariance singular
    assert frechet_distance(flat, flat) == pytest.approx(0, abs=1e-5)


def test_class_entropies_tell_variety_from_doubt():
    sure = 1000 * torch.eye(4).repeat(5, 1)
    assert class_entropies(sure) == pytest.approx((math.log(4), 0))
    assert class_entropies(torch.zeros(7, 4)) == pytest.approx((math.log(4), math.log(4)))
    assert class_entropies(sure[::4]) == pytest.approx((0, 0))  # only class 0


def test_precision_and_recall_tell_wrong_samples_from_missing_ones():
    real = torch.randn(400, 2, generator=rng(0)) + 8 * (torch.arange(400) % 2)[:, None]  # two far clusters
    same = torch.randn(400, 2, generator=rng(1)) + 8 * (torch.arange(400) % 2)[:, None]
    assert min(precision_recall(real, same)) > 0.9
    precision, recall = precision_recall(real, same[::2])  # one cluster missing
    assert precision > 0.85 and 0.3 < recall < 0.55
    spoilt = torch.cat([same[:200], torch.randn(200, 2, generator=rng(2)) + 100])  # half of the samples are far away
    precision, recall = precision_recall(real, spoilt)
    assert 0.4 < precision < 0.55 and recall > 0.85


@pytest.mark.slow
def test_the_judge_knows_digits_and_what_is_wrong_with_them(tmp_path):
    """Check the judge's accuracy, that the cache gives the same judge, and that worse images have a larger distance."""
    data = open_images("digits", tmp_path)
    net, accuracy = open_judge(data, tmp_path)
    assert accuracy > 0.97
    cached, cached_accuracy = open_judge(data, tmp_path)
    real, logits = judged(net, data.train)
    assert cached_accuracy == accuracy and torch.equal(judged(cached, data.train)[1], logits)
    noisy = (data.held_out + np.random.default_rng(0).integers(0, 120, data.held_out.shape)).clip(0, 255)
    flipped, noisy = data.held_out[:, :, ::-1], noisy.astype(np.uint8)
    distances = [frechet_distance(real, judged(net, x)[0]) for x in (data.held_out, noisy, flipped)]
    assert distances[0] < 10 < min(distances[1:])
    next(tmp_path.glob("judge-*.pt")).write_bytes(b"damaged")
    assert open_judge(data, tmp_path)[1] == accuracy  # trained again, with the same result


def test_each_data_set_has_its_own_judge(tmp_path, monkeypatch):
    """Check that the cache tells apart data sets of one name and shape by their images."""
    monkeypatch.setattr(image_judge, "train_judge", lambda data: (image_judge.Classifier(1, data.classes()), 0.5))
    for value in (0, 1):
        images = np.full((5, 4, 4, 1), value, np.uint8)
        open_judge(Images("mine", images, images, (np.arange(5), np.arange(5))), tmp_path)
    assert len(list(tmp_path.glob("judge-mine-*.pt"))) == 2


def test_a_judge_needs_labels():
    images = np.zeros((5, 4, 4, 1), np.uint8)
    with pytest.raises(InputError, match="no labels to train a judge on"):
        train_judge(Images("mine", images, images))
