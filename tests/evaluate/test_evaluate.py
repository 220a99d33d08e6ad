"""Metrics and statistics against values worked out by hand."""

import numpy as np
import pytest
import torch

from medtut.errors import MedtutError
from medtut.evaluate import interval, paired_comparison, tissue_dice


def test_dice_by_hand_and_background_is_left_out():
    label = torch.tensor([[[0, 1, 1, 2]]])
    prediction = torch.tensor([[[0, 1, 0, 2]]])
    # Class 1: 2 * 1 / (1 + 2); class 2: perfect; background does not appear.
    np.testing.assert_allclose(tissue_dice(prediction, label, 3), [[2 / 3, 1.0]])


def test_dice_of_absent_class_is_nan_and_of_an_invented_one_zero():
    empty = torch.zeros(1, 1, 4, dtype=torch.long)
    assert np.isnan(tissue_dice(empty, empty, 2)).all()
    invented = torch.tensor([[[0, 1, 0, 0]]])
    np.testing.assert_allclose(tissue_dice(invented, empty, 2), [[0.0]])


def test_dice_refuses_other_shapes():
    with pytest.raises(MedtutError, match="same shape"):
        tissue_dice(torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 3).long(), 2)


def test_interval_contains_the_mean_and_narrows_with_cases():
    rng = np.random.default_rng(0)
    few, many = rng.normal(0.5, 0.1, (5, 8)), rng.normal(0.5, 0.1, (5, 200))
    low, high = interval(few)
    assert low < few.mean() < high
    assert interval(many)[1] - interval(many)[0] < (high - low) / 2


def test_interval_counts_the_seeds_spread():
    # All cases agree, seeds do not: an interval over cases alone would be empty.
    scores = np.repeat([[0.2], [0.4], [0.6], [0.8], [1.0]], 4, axis=1)
    low, high = interval(scores)
    # A mean of five draws with a spread of 0.28 has a standard error of 0.13.
    assert high - low == pytest.approx(2 * 1.96 * 0.283 / 5**0.5, rel=0.15)


def test_paired_comparison_sees_a_difference_and_none():
    rng = np.random.default_rng(1)
    hard = rng.normal(0.5, 0.2, (1, 30))  # shared difficulty of the cases
    a = hard + rng.normal(0, 0.02, (5, 30))
    better = paired_comparison(a + 0.05, a)
    assert better.difference == pytest.approx(0.05)
    assert better.low > 0.04
    assert better.p_value < 0.001
    null = paired_comparison(a, hard + rng.normal(0, 0.02, (5, 30)))
    assert null.low < 0 < null.high
    assert null.p_value > 0.05


def test_paired_comparison_refuses_few_seeds_and_unequal_tables():
    with pytest.raises(MedtutError, match="at least 5"):
        paired_comparison(np.ones((1, 9)), np.zeros((1, 9)))
    with pytest.raises(MedtutError, match="share seeds and cases"):
        paired_comparison(np.ones((5, 9)), np.zeros((5, 8)))
