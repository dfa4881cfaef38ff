"""What an Improve step trains on: which samples, how many references, at which learning rate."""

import dataclasses

import numpy as np
import pytest

from rest_jax import filters
from rest_jax.data.batching import BatchPlan
from rest_jax.data.store import ChunkRows, ChunkSources, ScoredStore, StoreWriter
from rest_jax.data.token_dataset import TokenDataset, TokenRow, write_token_dataset
from rest_jax.errors import UserError
from rest_jax.improve import Improving, choose_filter, describe, select, selection_report
from rest_jax.training import Training

DATA_SIZE, SAMPLES = 30, 6
SAMPLED = np.arange(3, DATA_SIZE, 3)  # Grow saw nine of the thirty sources.
TRAINING = Training(steps=5, batch_size=4, learning_rate=1e-3)


def sample_tokens(source_id, sample):
    return [10 + sample, 50 + source_id, 1]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "train"
    rows = [TokenRow([50 + i, 1], [5, 50 + i, 1], f"source {i}", f"target {i}") for i in range(DATA_SIZE)]
    write_token_dataset(directory, rows, info={})
    return TokenDataset.open(directory)


@pytest.fixture(scope="module")
def rewards():
    return np.random.default_rng(0).uniform(0.05, 0.9, (len(SAMPLED), SAMPLES)).astype(np.float32)


@pytest.fixture(scope="module")
def reference_rewards():
    return np.where(np.arange(len(SAMPLED)) % 3 == 0, 0.2, 1.0).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory, rewards, reference_rewards):
    """A Grow step that kept rewards above 0.2; each source's last sample repeats an earlier one."""
    valid = np.ones_like(rewards, bool)
    valid[:, -1] = False
    row, sample = np.nonzero(valid & (rewards > 0.2))
    directory = tmp_path_factory.mktemp("grow")
    writer = StoreWriter(directory, process_index=0)
    writer.write(
        0,
        ChunkRows(
            source_ids=SAMPLED[row], sample_ids=sample, inputs=[[50 + SAMPLED[r], 1] for r in row],
            targets=[sample_tokens(SAMPLED[r], s) for r, s in zip(row, sample, strict=True)],
            log_probs=np.zeros(len(row)), rewards={"chrf": rewards[row, sample]}, total_rewards=rewards[row, sample],
            hit_eos=np.ones(len(row), bool), policy_step=1,
        ),
        ChunkSources(
            source_ids=SAMPLED, rewards=rewards, valid=valid, reference_rewards=reference_rewards,
            components={"chrf": rewards}, reference_components={"chrf": reference_rewards},
        ),
        {},
    )  # fmt: skip
    writer.finish({})
    return ScoredStore.open(directory)


def improving(**changes):
    return dataclasses.replace(Improving(training=TRAINING, schedule=filters.ThresholdGrid((0.4, 0.6, 0.8))), **changes)


def kept(rewards, tau):
    return {(SAMPLED[r], s) for r, s in zip(*np.nonzero(rewards[:, :-1] > tau), strict=True)}


@pytest.mark.parametrize(("step", "tau"), [(1, 0.4), (2, 0.6), (3, 0.8)])
def test_samples_above_the_steps_threshold_and_no_others_are_trained_on(store, references, rewards, step, tau):
    selection = select(
        improving=improving(reference_fraction=0.0), store=store, references=references, improve_step=step
    )
    (samples,) = selection.mixture.parts
    expected = kept(rewards, tau)
    assert set(zip(samples.source_ids.tolist(), samples.sample_ids.tolist(), strict=True)) == expected
    assert selection.mixture.examples_per_epoch == (len(expected),)
    assert (selection.report["pairs"], selection.report["tau"]) == (len(expected), tau)
    assert selection.report["references"] == 0
    mean = np.mean([rewards[np.flatnonzero(SAMPLED == source)[0], s] for source, s in expected])
    np.testing.assert_allclose(selection.report["mean_reward"], mean, rtol=1e-6)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.9])
def test_references_are_their_share_of_an_epoch(store, references, rewards, fraction):
    selection = select(
        improving=improving(reference_fraction=fraction), store=store, references=references, improve_step=1
    )
    samples, of_data = selection.mixture.examples_per_epoch
    assert samples == len(kept(rewards, 0.4))
    assert of_data == selection.report["references"] == round(samples * fraction / (1 - fraction))
    assert selection.mixture.parts[1] is references  # no filter: all of D, sampled by Grow or not
    # The batches hold them in that proportion.
    plan = BatchPlan(selection.mixture, batch_size=8, source_length=4, target_length=4, pack=False, seed=0)
    rows = np.concatenate([plan.batch(step)["decoder_target_tokens"] for step in range(plan.steps_in_epoch(0))])
    first = rows[rows[:, 0] > 0, 0]
    assert (np.count_nonzero(first == 5), np.count_nonzero(first >= 10)) == (of_data, samples)


def test_the_reference_filter_judges_references_by_their_own_reward(store, references, reference_rewards):
    settings = improving(reference_filter=filters.Threshold(0.5))
    pool = select(improving=settings, store=store, references=references, improve_step=1).mixture.parts[1]
    expected = SAMPLED[reference_rewards > 0.5]
    np.testing.assert_array_equal(pool.source_ids, expected)
    for row, source in enumerate(expected):
        np.testing.assert_array_equal(pool.targets(row), [5, 50 + source, 1])
        np.testing.assert_array_equal(pool.inputs(row), [50 + source, 1])
    np.testing.assert_array_equal(pool.target_lengths, np.full(len(expected), 3))
    np.testing.assert_array_equal(pool.source_lengths, np.full(len(expected), 2))


def test_a_reference_filter_that_passes_nothing_is_named(store, references):
    settings = improving(reference_filter=filters.Threshold(1.0))
    with pytest.raises(UserError, match="reference_filter.*none of 9 references.*reference_fraction = 0"):
        select(improving=settings, store=store, references=references, improve_step=1)


def test_learning_rates_fall_from_step_to_step(store, references):
    settings = improving(learning_rate_decay=0.5)
    rates = [
        select(improving=settings, store=store, references=references, improve_step=i).training.learning_rate
        for i in (1, 2, 3)
    ]
    np.testing.assert_allclose(rates, [1e-3, 5e-4, 2.5e-4])
    one = select(improving=settings, store=store, references=references, improve_step=1).training
    assert dataclasses.replace(one, learning_rate=TRAINING.learning_rate) == TRAINING


def test_a_filter_that_passes_nothing_says_how_far_the_rewards_reach(store, references, rewards):
    settings = improving(schedule=filters.ThresholdGrid((0.95,)))
    with pytest.raises(UserError) as error:  # when Grow ends, rather than when that step is reached
        selection_report(improving=settings, store=store, improve_step=1)
    valid = rewards[:, :-1]
    for text in ("threshold(tau=0.95) passes none of 45", f"{valid.min():.3f} to {valid.max():.3f}", "TopKSchedule"):
        assert text in str(error.value)


def test_a_filter_looser_than_grows_is_refused(store, references):
    with pytest.raises(UserError, match="Grow's filter dropped"):
        select(
            improving=improving(schedule=filters.ThresholdGrid((0.1,))),
            store=store,
            references=references,
            improve_step=1,
        )


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_the_default_thresholds_lie_above_the_mean_of_the_samples_and_each_keeps_half(store, rewards, fraction):
    settings = improving(schedule=filters.AboveMean(), reference_fraction=fraction)
    samples = rewards[:, :-1]
    reports = [selection_report(improving=settings, store=store, improve_step=i) for i in (1, 2, 3, 4)]
    taus = [report["tau"] for report in reports]
    assert taus[0] > samples.mean()
    assert taus == sorted(set(taus))
    # References, with rewards of 1.0, do not take the samples' places.
    above = np.count_nonzero(samples > samples.mean())
    np.testing.assert_allclose([report["pairs"] for report in reports], above / 2.0 ** np.arange(1, 5), atol=1)
    assert [choose_filter(improving=settings, store=store, improve_step=i).tau for i in (1, 2, 3, 4)] == taus


def test_the_log_line_says_what_is_trained_on(store):
    report = selection_report(improving=improving(), store=store, improve_step=2)
    line = describe(report)
    assert line.startswith("threshold(tau=0.6): ")
    assert f"{report['pairs']} pairs of {report['sources']} sources" in line
    assert line.endswith("learning rate 0.0005")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"learning_rate_decay": 0.0}, "learning_rate_decay is 0"),
        ({"learning_rate_decay": 1.5}, "learning_rate_decay is 1.5"),
        ({"reference_fraction": 1.0}, "reference_fraction is 1"),
        ({"reference_fraction": -0.1}, "reference_fraction is -0.1"),
    ],
)
def test_impossible_settings_are_named(changes, match):
    with pytest.raises(UserError, match=match):
        improving(**changes)
