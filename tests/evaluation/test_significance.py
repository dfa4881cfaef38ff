import numpy as np
import pytest

from rest_jax.evaluation.metrics import corpus_scores
from rest_jax.evaluation.significance import paired_bootstrap, paired_bootstrap_corpus

REFERENCES = [f"sentence number {i} tells of {word} and {i * 7} more" for i in range(40) for word in ("cats", "dogs")]
GOOD = [reference.replace("tells", "told") for reference in REFERENCES]
POOR = [" ".join(reference.split()[::-1]) for reference in REFERENCES]


def test_interval_agrees_with_the_normal_one():
    difference = np.random.default_rng(0).normal(0.1, 1.0, 900)
    result = paired_bootstrap(difference, np.zeros(900), num_resamples=4000, seed=1)
    half = 1.96 * difference.std() / np.sqrt(900)
    assert result.difference == pytest.approx(difference.mean())
    assert result.low == pytest.approx(difference.mean() - half, abs=0.006)
    assert result.high == pytest.approx(difference.mean() + half, abs=0.006)


def test_pairing_removes_what_both_share():
    generator = np.random.default_rng(0)
    difficulty = generator.normal(0, 1, 300)
    b = difficulty + generator.normal(0, 0.01, 300)
    result = paired_bootstrap(difficulty + 0.01, b)
    assert result.significant
    assert result.high - result.low < 0.01


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        result = paired_bootstrap(generator.exponential(1.0, 150), np.ones(150), num_resamples=400, seed=seed)
        hits += result.low <= 0 <= result.high
    # 200 draws at 95 % have a standard deviation of 3; the exponential's skew costs about one point more.
    assert 180 <= hits <= 199


def test_equal_systems_are_not_different():
    a = np.random.default_rng(0).random(50)
    result = paired_bootstrap(a, a)
    assert (result.difference, result.low, result.high, result.p_value) == (0, 0, 0, 1)
    assert not result.significant


def test_swapping_the_systems_changes_the_sign():
    a, b = np.random.default_rng(0).random((2, 60))
    one, other = paired_bootstrap(a, b, seed=3), paired_bootstrap(b, a, seed=3)
    assert one.low == pytest.approx(-other.high)
    assert one.p_value == other.p_value


def test_depends_on_the_seed_alone_and_never_claims_zero():
    a, b = np.random.default_rng(0).random((2, 60))
    assert paired_bootstrap(a, b, seed=5) == paired_bootstrap(a, b, seed=5)
    assert paired_bootstrap(a, b, seed=5) != paired_bootstrap(a, b, seed=6)
    assert paired_bootstrap(a + 10, b, num_resamples=99).p_value == pytest.approx(0.02)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[1.0]])])
def test_refuses_other_shapes(a, b):
    with pytest.raises(ValueError, match="same sources"):
        paired_bootstrap(a, b)


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter"])
def test_corpus_difference_is_sacrebleus(metric):
    result = paired_bootstrap_corpus(GOOD, POOR, REFERENCES, metric=metric, num_resamples=50)
    expected = corpus_scores(GOOD, REFERENCES)[metric] - corpus_scores(POOR, REFERENCES)[metric]
    assert result.difference == pytest.approx(expected, abs=1e-9)
    assert result.low <= result.difference <= result.high
    assert result.significant


def test_corpus_refuses_unaligned():
    with pytest.raises(ValueError, match="aligned"):
        paired_bootstrap_corpus(GOOD, POOR[:-1], REFERENCES, metric="bleu")
