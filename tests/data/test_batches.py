"""The order of the data: each epoch is a permutation of every sequence, pair or image, and each is another one."""

import itertools
import math

import numpy as np
import pytest
import torch

from cadd_min.data.batches import EpochShuffle, ImageBatches, PairBatches, TextBatches
from cadd_min.data.pixels import Pixels
from cadd_min.utils.errors import InputError
from tests.toys import ALPHA

SIZES = [1, 4, 9, 18]  # of a micro-batch: dividing 36 items or not


def text(size: int, seed: int):
    """Number the tokens of a stream. A sequence's number is where it begins."""
    return TextBatches(np.arange(379, dtype=np.uint16), 10, size, seed), lambda batch: batch.x_0[:, 0].tolist()


def pairs(size: int, seed: int):
    ids = np.arange(36)[:, None] * np.ones((1, 5), np.int64)
    return PairBatches(ids, np.arange(36) % 6, size, seed), lambda batch: batch.x_0[:, 0].tolist()


def images(size: int, seed: int):
    """Number 36 images by the level of their right column. The left column is brighter, so that a mirror shows."""
    levels = np.arange(36, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 1), np.uint8)
    levels[:, :, 0] += 100
    batches = ImageBatches(levels, np.arange(36), Pixels((2, 3, 1)), size, seed, flip=True)
    return batches, lambda batch: batch.x_0.view(-1, 2, 3)[:, 0, 1].tolist()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("make", [text, pairs, images])
def test_an_epoch_is_a_permutation_and_the_next_is_another(make, size):
    """Check six epochs of 36 items, that a batch depends on seed and index alone, and that another seed differs."""
    batches, numbers = make(size, seed=3)
    drawn = [n for index in range(6 * 36 // size) for n in numbers(batches(index))]
    epochs = [drawn[start : start + 36] for start in range(0, len(drawn), 36)]
    for epoch in epochs:
        begins = min(epoch) if make is text else 0
        assert [n - begins for n in sorted(epoch)] == list(range(0, 360, 10) if make is text else range(36))
    assert all(a != b for a, b in itertools.combinations([np.argsort(epoch).tolist() for epoch in epochs], 2))
    again, other = make(size, seed=3), make(size, seed=4)
    for index in (5 * 36 // size, 1, 0):
        assert torch.equal(again[0](index).x_0, batches(index).x_0)
    assert [n for index in range(36 // size) for n in numbers(other[0](index))] != epochs[0]


def test_each_epoch_cuts_the_text_at_another_place_and_no_sequence_is_torn():
    """Check that shifts lie from 0 to the slack, 379 - 36 * 10 = 19, and that over 200 epochs every shift occurs.

    A shift is missing with probability 20 (19 / 20)^200 = 7e-4. The seed is fixed.
    """
    batches, numbers = text(36, seed=0)
    shifts = [min(numbers(batches(epoch))) for epoch in range(200)]
    assert set(shifts) == set(range(20))
    rows = batches(7).x_0
    assert rows.shape == (36, 10) and rows.dtype == torch.int64 and (rows.diff(dim=1) == 1).all()
    with pytest.raises(InputError, match=r"the corpus has 9 tokens: fewer than one sequence of --length 10"):
        TextBatches(np.arange(9), 10, 1)
    assert TextBatches(np.arange(10), 10, 1)(3).x_0.tolist() == [list(range(10))]  # one sequence is all there is


def test_the_first_item_of_an_epoch_is_any_of_them():
    """Compare the items that 4,000 epochs begin and end with by chi-square: no place of the order is favoured."""
    from scipy import stats

    shuffle = EpochShuffle(7, seed=1)
    assert shuffle.epoch(0)[0].dtype == np.uint32  # of a corpus of a hundred million sequences the order takes 400 MB
    for place in (0, 6):
        counts = np.bincount([shuffle(epoch * 7 + place)[0] for epoch in range(4000)], minlength=7)
        assert stats.chisquare(counts).pvalue > ALPHA


def test_the_response_is_free_and_the_prompt_is_given():
    batches, numbers = pairs(9, seed=2)
    batch = batches(1)
    for number, free in zip(numbers(batch), batch.free):
        assert free.tolist() == [place >= number % 6 for place in range(5)]
    assert batch.label is None


def test_labels_stay_with_their_images_and_half_are_mirrored():
    """Count the mirrored of 720 images: half of them, to four standard deviations, and never by the epoch's order."""
    batches, numbers = images(12, seed=1)
    mirrored = []
    for index in range(60):
        batch = batches(index)
        assert batch.label.tolist() == numbers(batch) and batch.free is None and batch.label.dtype == torch.int64
        views = batch.x_0.view(12, 2, 3)
        mirrored += (views[:, 0, 2] >= 100).tolist()
        assert torch.equal(torch.minimum(views[:, :, 0], views[:, :, 2]), views[:, :, 1])  # no column is lost
    assert abs(sum(mirrored) - 360) < 4 * math.sqrt(720) / 2
    expected = [np.random.default_rng((1, index, 1)).random(12) < 0.5 for index in range(60)]
    assert mirrored == np.concatenate(expected).tolist()  # a run that goes on mirrors the same images
    plain = ImageBatches(batches.images, None, batches.pixels, 4)
    assert plain(3).label is None and (plain(3).x_0.view(4, 2, 3)[:, :, 0] >= 100).all()
    assert (batches.images[:, :, 0] >= 100).all()  # the images themselves are not mirrored
