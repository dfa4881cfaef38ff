"""Measures of agreement on numbers of which one sees what they must be."""

import math

import numpy as np
import pytest

from rest_jax.evaluation.agreement import agreement, kendall


def test_perfect_and_inverted_orders():
    labels = np.asarray([0.1, 0.4, 0.2, 0.9])
    groups = [0, 0, 1, 1]
    same = agreement(labels * 2, labels, groups=groups)
    assert same == pytest.approx({"pearson": 1, "spearman": 1, "kendall": 1, "pairwise_accuracy": 1, "pairs": 2})
    inverted = agreement(-labels, labels, groups=groups)
    assert inverted["kendall"] == pytest.approx(-1)
    assert inverted["pairwise_accuracy"] == 0


def test_pairs_are_of_one_source_with_different_labels_and_a_tie_counts_half():
    labels = np.asarray([0.0, 1.0, 1.0, 5.0])
    scores = np.asarray([0.3, 0.5, 0.3, -9.0])
    found = agreement(scores, labels, groups=["a", "a", "a", "b"])
    assert found["pairs"] == 2  # 0 against 1 twice; 1 against 1 is no pair, b is alone
    assert found["pairwise_accuracy"] == 0.75


def test_kendall_of_ties_is_tau_b():
    # 3 pairs: 2 in order, one tied in the scores; tau-b = 2 / sqrt(3 * 2)
    assert kendall(np.asarray([1.0, 1.0, 2.0]), np.asarray([1.0, 2.0, 3.0])) == pytest.approx(2 / math.sqrt(6))


def test_constant_scores_agree_with_nothing_and_no_pairs_give_no_accuracy():
    found = agreement(np.ones(3), np.arange(3.0), groups=[0, 1, 2])
    assert found["pearson"] == found["spearman"] == found["kendall"] == 0.0
    assert math.isnan(found["pairwise_accuracy"])
