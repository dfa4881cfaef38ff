"""Laws of the filters and of their schedules."""

import functools
import itertools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_jax import filters
from rest_jax.errors import UserError

SHAPE = (5, 9)
# Few values, so that ties are common; 0.1 and its like are not exact in binary.
# No subnormals: XLA takes them for zero on a CPU, NumPy does not. A reward that small is none.
REWARDS = hnp.arrays(
    np.float32,
    SHAPE,
    elements=st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.7, 1.0]) | st.floats(0, 1, width=32, allow_subnormal=False),
)
VALID = hnp.arrays(np.bool_, SHAPE)
ALL = [
    filters.Threshold(0.3),
    filters.Percentile(0),
    filters.Percentile(50),
    filters.Percentile(90.5),
    filters.Interpolation(0.0),
    filters.Interpolation(0.6),
    filters.TopK(1),
    filters.TopK(4),
    filters.Cap(filters.Threshold(0.1), 2),
    filters.AllOf((filters.TopK(3), filters.Threshold(0.2))),
]
each_filter = pytest.mark.parametrize("keep_filter", ALL, ids=filters.describe)


@functools.partial(jax.jit, static_argnums=0)
def filter_program(keep_filter: filters.Filter, rewards: jax.Array, valid: jax.Array) -> jax.Array:
    return keep_filter(rewards, valid)


def kept(keep_filter: filters.Filter, rewards: np.ndarray, valid: np.ndarray) -> np.ndarray:
    # The fixed filters are compiled once; those drawn by a test would be compiled for each example.
    apply = functools.partial(filter_program, keep_filter) if keep_filter in ALL else keep_filter
    return np.asarray(apply(rewards, valid))


@each_filter
@given(rewards=REWARDS, valid=VALID)
def test_neither_invalid_samples_nor_nan_are_kept_or_counted(keep_filter, rewards, valid):
    keep = kept(keep_filter, rewards, valid)
    assert keep.shape == SHAPE and keep.dtype == bool
    assert not (keep & ~valid).any()
    for hidden in (np.nan, 1.0, -np.inf):
        np.testing.assert_array_equal(keep, kept(keep_filter, np.where(valid, rewards, np.float32(hidden)), valid))
    np.testing.assert_array_equal(keep, kept(keep_filter, np.where(valid, rewards, np.nan), np.ones(SHAPE, bool)))


@each_filter
@given(rewards=REWARDS, valid=VALID)
def test_the_program_and_the_host_agree(keep_filter, rewards, valid):
    in_program = filter_program(keep_filter, rewards, valid)
    np.testing.assert_array_equal(np.asarray(keep_filter(rewards, valid)), np.asarray(in_program))


@each_filter
@given(rewards=REWARDS, valid=VALID, seed=st.integers(0, 2**16))
def test_the_order_of_sources_and_of_different_samples_does_not_matter(keep_filter, rewards, valid, seed):
    rng = np.random.default_rng(seed)
    sources = rng.permutation(SHAPE[0])
    np.testing.assert_array_equal(
        kept(keep_filter, rewards, valid)[sources], kept(keep_filter, rewards[sources], valid[sources])
    )
    # Of equal rewards the lower index wins, so samples may change places only where rewards differ.
    different = np.argsort(rng.random(SHAPE), axis=1).astype(np.float32) / SHAPE[1]
    samples = rng.permutation(SHAPE[1])
    np.testing.assert_array_equal(
        kept(keep_filter, different, valid)[:, samples], kept(keep_filter, different[:, samples], valid[:, samples])
    )


@each_filter
@given(rewards=REWARDS, valid=VALID)
def test_a_kept_sample_is_no_worse_than_a_dropped_one_of_its_source(keep_filter, rewards, valid):
    keep = kept(keep_filter, rewards, valid)
    for row, keep_row, valid_row in zip(rewards, keep, valid, strict=True):
        if keep_row.any() and (valid_row & ~keep_row).any():
            assert row[keep_row].min() >= row[valid_row & ~keep_row].max()


@given(rewards=REWARDS, valid=VALID, taus=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_threshold_is_strict_and_monotone(rewards, valid, taus):
    low, high = sorted(taus)
    loose, strict = (kept(filters.Threshold(tau), rewards, valid) for tau in (low, high))
    assert not (strict & ~loose).any()
    np.testing.assert_array_equal(loose, valid & (rewards > np.float32(low)))
    assert not kept(filters.Threshold(float(rewards[0, 0])), rewards, valid)[0, 0]


@given(rewards=REWARDS, valid=VALID, p=st.floats(0, 99) | st.sampled_from([0, 10, 25, 50, 75, 87.5, 90]))
def test_percentile_is_numpys(rewards, valid, p):
    keep = kept(filters.Percentile(p), rewards, valid)
    for row, valid_row, keep_row in zip(rewards, valid, keep, strict=True):
        own = np.sort(row[valid_row].astype(np.float64))
        if own.size:
            level = np.percentile(own, p)
            # Where numpy's own rounding decides, there is nothing to compare with.
            clear = np.abs(row - level) > 1e-9
            exact = np.isin(level, own) & (p in (0, 50))
            np.testing.assert_array_equal(keep_row[clear], (valid_row & (row > level))[clear])
            if exact:
                assert not keep_row[row == level].any()


@given(rewards=REWARDS, valid=VALID, gamma=st.floats(0, 0.99))
def test_interpolation_lies_between_mean_and_maximum(rewards, valid, gamma):
    keep = kept(filters.Interpolation(gamma), rewards, valid)
    for row, valid_row, keep_row in zip(rewards.astype(np.float64), valid, keep, strict=True):
        if valid_row.any():
            own = row[valid_row]
            level = gamma * own.max() + (1 - gamma) * own.mean()
            clear = np.abs(row - level) > 1e-6
            np.testing.assert_array_equal(keep_row[clear], (valid_row & (row > level))[clear])


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9])
def test_interpolation_keeps_none_of_equal_rewards(gamma):
    rewards = np.broadcast_to(np.linspace(0.01, 0.99, 50, dtype=np.float32)[:, None], (50, 7))
    valid = np.tri(7, dtype=bool)[np.arange(50) % 7]
    assert not kept(filters.Interpolation(gamma), rewards, valid).any()


@given(rewards=REWARDS, valid=VALID, k=st.integers(1, 12))
def test_top_k_keeps_k_and_prefers_the_lower_index(rewards, valid, k):
    keep = kept(filters.TopK(k), rewards, valid)
    worth = valid & (rewards > 0)  # 0 is the least, and what a guard gives
    np.testing.assert_array_equal(keep.sum(1), np.minimum(worth.sum(1), k))
    for row, worth_row, keep_row in zip(rewards, worth, keep, strict=True):
        order = sorted(np.flatnonzero(worth_row), key=lambda index: (-row[index], index))
        assert set(np.flatnonzero(keep_row)) == set(order[:k])


@each_filter
@given(rewards=REWARDS, valid=VALID, k=st.integers(1, 5))
def test_cap_keeps_the_best_of_what_its_filter_keeps(keep_filter, rewards, valid, k):
    inner, capped = kept(keep_filter, rewards, valid), kept(filters.Cap(keep_filter, k), rewards, valid)
    assert not (capped & ~inner).any()
    np.testing.assert_array_equal(capped.sum(1), np.minimum(inner.sum(1), k))


@given(rewards=REWARDS, valid=VALID)
def test_all_of_is_the_intersection(rewards, valid):
    parts = (filters.TopK(4), filters.Percentile(30), filters.Threshold(0.25))
    together = kept(filters.AllOf(parts), rewards, valid)
    np.testing.assert_array_equal(together, np.logical_and.reduce([kept(part, rewards, valid) for part in parts]))


@given(samples=hnp.arrays(np.int32, (3, 7, 4), elements=st.integers(0, 2)))
def test_distinct_marks_first_occurrences(samples):
    found = np.asarray(filters.distinct(samples))
    for rows, marks in zip(samples, found, strict=True):
        seen: set[tuple[int, ...]] = set()
        for row, mark in zip(map(tuple, rows.tolist()), marks, strict=True):
            assert mark == (row not in seen)
            seen.add(row)


def test_distinct_tells_apart_what_differs_in_one_place():
    samples = np.zeros((1, 65, 64), np.int32)
    samples[0, np.arange(1, 65), np.arange(64)] = 2**31 - 1
    assert np.asarray(filters.distinct(samples)).all()


STATISTICS = filters.RewardStatistics.of(np.linspace(0, 1, 1001))
SCHEDULES = [
    filters.ThresholdGrid([0.7, 0.8, 0.9]),
    filters.AboveMean(),
    filters.PercentileSchedule([50, 75, 90]),
    filters.InterpolationSchedule([0.0, 0.4, 0.8]),
    filters.TopKSchedule([8, 4, 1]),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@given(rewards=REWARDS, valid=VALID)
def test_each_improve_step_keeps_no_more_than_the_last(schedule, rewards, valid):
    steps = [kept(schedule(step, STATISTICS), rewards, valid) for step in (1, 2, 3)]
    for loose, strict in itertools.pairwise(steps):
        assert not (strict & ~loose).any()


@given(rewards=hnp.arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([0.0, 0.3, 0.5, 1.0])))
def test_above_mean_rises_from_above_the_mean(rewards):
    statistics = filters.RewardStatistics.of(rewards)
    taus = [filters.AboveMean()(step, statistics).tau for step in (1, 2, 3, 4)]
    assert np.float32(taus[0]) > np.float32(statistics.mean)
    assert all(np.float32(later) > np.float32(earlier) for earlier, later in itertools.pairwise(taus))


def test_above_mean_keeps_the_documented_share():
    kept_shares = [STATISTICS.share_above(filters.AboveMean(0.5)(step, STATISTICS).tau) for step in (1, 2, 3)]
    np.testing.assert_allclose(kept_shares, [0.25, 0.125, 0.0625], atol=2e-3)


def test_constant_stays():
    assert filters.Constant(filters.TopK(3))(7, STATISTICS) == filters.TopK(3)


def test_statistics_leave_out_invalid_samples_and_nan():
    statistics = filters.RewardStatistics.of([[0.5, np.nan], [0.1, 0.9]], [[True, True], [True, False]])
    np.testing.assert_allclose([statistics.mean, statistics.std, statistics.quantile(0.5)], [0.3, 0.2, 0.3])
    with pytest.raises(UserError, match="no valid sample"):
        filters.RewardStatistics.of([np.nan])


def test_a_filter_describes_itself():
    nested = filters.Cap(filters.AllOf((filters.Threshold(0.5), filters.TopK(4))), 3)
    assert filters.describe(nested) == "cap(all_of(threshold(tau=0.5), top_k(k=4)), k=3)"


def test_filters_can_be_static_arguments_of_a_program():
    for keep_filter in ALL:
        assert filter_program(keep_filter, jnp.zeros((2, 3)), jnp.ones((2, 3), bool)).shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: filters.Threshold(float("nan")), "Threshold.tau"),
        (lambda: filters.Percentile(100), "Percentile.p"),
        (lambda: filters.Percentile(-1), "Percentile.p"),
        (lambda: filters.Interpolation(1.0), "Interpolation.gamma"),
        (lambda: filters.TopK(0), "TopK.k"),
        (lambda: filters.Cap(filters.Threshold(0.0), 0), "Cap.k"),
        (lambda: filters.AllOf(()), "AllOf.filters"),
        (lambda: filters.ThresholdGrid([0.7, 0.7]), "ThresholdGrid.taus.*0.7, 0.7.*rising"),
        (lambda: filters.ThresholdGrid([]), "ThresholdGrid.taus"),
        (lambda: filters.PercentileSchedule([50, 120]), "Percentile.p"),
        (lambda: filters.InterpolationSchedule([0.5, 0.2]), "InterpolationSchedule.gammas"),
        (lambda: filters.TopKSchedule([2, 4]), r"TopKSchedule.ks is \(2, 4\).*falling"),
        (lambda: filters.AboveMean(1.0), "AboveMean.ratio"),
        (lambda: filters.check_schedule(filters.ThresholdGrid([0.5]), improve_steps=3), "has 1 steps.*3 Improve steps"),
        (lambda: filters.ThresholdGrid([0.5])(2, STATISTICS), "has 1 steps"),
        (lambda: filters.ThresholdGrid([0.5])(0, STATISTICS), "improve_step is 0"),
    ],
)
def test_bad_settings_name_the_field(make, field):
    with pytest.raises(UserError, match=field):
        make()


STORE_ALL = filters.Threshold(0.0)


@pytest.mark.parametrize(
    ("schedule", "grow_filter"),
    [
        (filters.AboveMean(), STORE_ALL),
        (filters.TopKSchedule((2, 1)), STORE_ALL),
        (filters.TopKSchedule((2, 1)), filters.TopK(2)),
        (filters.PercentileSchedule((50, 75)), filters.Percentile(50)),
        # A threshold that the rewards may all lie above, or that few pass.
        (filters.AboveMean(), filters.Threshold(0.8)),
        (filters.ThresholdGrid((0.95, 0.99)), filters.TopK(8)),
        (filters.Constant(filters.Threshold(1.5)), filters.TopK(1)),
    ],
)
def test_a_schedule_that_grows_filter_may_allow_is_not_refused(schedule, grow_filter):
    filters.check_nested(schedule, grow_filter=grow_filter, improve_steps=2, num_samples=16)


@pytest.mark.parametrize(
    ("schedule", "grow_filter", "step"),
    [
        (filters.AboveMean(), filters.TopK(2), 1),
        (filters.TopKSchedule((4, 2)), filters.TopK(2), 1),
        (filters.PercentileSchedule((50, 90)), filters.Percentile(75), 1),
        (filters.Constant(filters.Threshold(-1.0)), filters.Percentile(10), 1),
        (filters.ThresholdGrid((0.5, 0.6)), filters.TopK(2), 1),
    ],
)
def test_a_schedule_looser_than_grows_filter_is_refused_whatever_the_rewards(schedule, grow_filter, step):
    with pytest.raises(UserError, match=f"Improve step {step}.*GROW_FILTER.*Loosen GROW_FILTER"):
        filters.check_nested(schedule, grow_filter=grow_filter, improve_steps=2, num_samples=16)


def test_repeated_ngrams_are_counted_as_in_a_plain_loop():
    samples = np.random.default_rng(0).integers(1, 4, (5, 6, 20)).astype(np.int32)
    samples *= np.arange(20) < np.random.default_rng(1).integers(0, 21, (5, 6, 1))  # padding after the end

    def count(tokens: list[int], order: int) -> int:
        ngrams = [tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1)]
        return len(ngrams) - len(set(ngrams))

    for order in (2, 4):
        expected = [[count([t for t in row if t], order) for row in source] for source in samples.tolist()]
        np.testing.assert_array_equal(filters.repeated_ngrams(samples, order=order), expected)
    np.testing.assert_array_equal(filters.repeated_ngrams(samples[..., :3], order=4), np.zeros((5, 6)))
