import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_jax.evaluation.best_of_n import best_of_n_curve, distinct_samples

rewards_of_a_source = st.lists(st.floats(0, 1, allow_nan=False), min_size=1, max_size=7)


@given(rewards_of_a_source)
def test_equals_the_mean_over_all_subsets(rewards):
    curve = best_of_n_curve([rewards])
    for n in range(1, len(rewards) + 1):
        subsets = [max(subset) for subset in itertools.combinations(rewards, n)]
        np.testing.assert_allclose(curve[n - 1], np.mean(subsets), atol=1e-12)


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**31))
def test_begins_at_the_mean_ends_at_the_maximum_and_never_falls(sources, samples, seed):
    rewards = np.random.default_rng(seed).random((sources, samples))
    curve = best_of_n_curve(rewards)
    np.testing.assert_allclose(curve[0], rewards.mean(), rtol=1e-12)
    np.testing.assert_allclose(curve[-1], rewards.max(axis=1).mean(), rtol=1e-12)
    assert (np.diff(curve) >= -1e-12).all()


def test_a_thousand_samples_do_not_overflow():
    # Uniform rewards: the expected largest of n is n / (n + 1).
    rewards = np.random.default_rng(0).random((400, 1000))
    n = np.arange(1, 1001)
    np.testing.assert_allclose(best_of_n_curve(rewards), n / (n + 1), atol=2e-3)
    np.testing.assert_allclose(best_of_n_curve(np.ones((1, 1000))), np.ones(1000), rtol=1e-9)


@pytest.mark.parametrize("rewards", [[0.1, 0.2], np.zeros((0, 3)), [[0.1, np.nan]]])
def test_refuses_what_is_no_matrix_of_rewards(rewards):
    with pytest.raises(ValueError, match="rewards"):
        best_of_n_curve(rewards)


def test_distinct_counts_within_a_source_only():
    assert distinct_samples([[(1, 2), (1, 2), (3,)], [(1, 2)]]) == 3
    assert distinct_samples([]) == 0
