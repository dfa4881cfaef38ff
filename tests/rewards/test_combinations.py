"""Combinations against plain formulas, what they refuse, and rewards that see nothing but their own sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata

from rest_jax.data.vocabulary import ByteVocabulary
from rest_jax.errors import UserError
from rest_jax.rewards import guards
from rest_jax.rewards.base import Reward, check_comparable, check_reward, leaves
from rest_jax.rewards.bleu import BLEU
from rest_jax.rewards.chrf import ChrF
from rest_jax.rewards.combinations import Affine, Guarded, MeanOfRanks, Min, Quantile, WeightedSum

CHRF, PLUS, BLEU_4 = ChrF(), ChrF(word_order=2), BLEU()
SHORT, COPY = guards.NotEmpty(), guards.NotCopied()
BYTES = ByteVocabulary()
COMPONENTS = {
    name: jnp.asarray(np.random.default_rng(seed).random((5, 4)), jnp.float32)
    for seed, name in enumerate(("chrf", "chrf++", "bleu"))
} | {SHORT.name: jnp.ones((5, 4)).at[0, 1].set(0.0), COPY.name: jnp.ones((5, 4)).at[3].set(0.0)}
VALUES = {name: np.asarray(values, np.float64) for name, values in COMPONENTS.items()}


class Raw(Reward):
    """An error from 0 to 25, for German alone."""

    name, range, languages = "raw", (0.0, 25.0), ("de",)

    def init(self, vocabulary):
        return None

    def score(self, params, batch):
        return {"raw": 25.0 * jnp.ones(batch["samples"].shape[:2])}


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (WeightedSum((CHRF, BLEU_4), (0.25, 0.75)), 0.25 * VALUES["chrf"] + 0.75 * VALUES["bleu"]),
        (Min((CHRF, PLUS, BLEU_4)), np.minimum(np.minimum(VALUES["chrf"], VALUES["chrf++"]), VALUES["bleu"])),
        (
            MeanOfRanks((CHRF, BLEU_4)),
            (rankdata(VALUES["chrf"], axis=1) + rankdata(VALUES["bleu"], axis=1) - 2) / 6,
        ),
        (Guarded(CHRF, (SHORT, COPY)), VALUES["chrf"] * VALUES[SHORT.name] * VALUES[COPY.name]),
        (Affine(BLEU_4, scale=-2.0, offset=1.5), np.clip(1.5 - 2 * VALUES["bleu"], 0, 1)),
        (Quantile(BLEU_4, knots=(0.2, 0.3, 0.8)), np.interp(VALUES["bleu"], [0.2, 0.3, 0.8], [0, 0.5, 1])),
        (
            WeightedSum((Guarded(Min((CHRF, BLEU_4)), (SHORT,)), Affine(BLEU_4, 0.5)), (0.5, 0.5)),
            0.5 * np.minimum(VALUES["chrf"], VALUES["bleu"]) * VALUES[SHORT.name] + 0.25 * VALUES["bleu"],
        ),
    ],
    ids=lambda value: getattr(value, "name", "values"),
)
def test_totals_are_the_formulas(reward, expected):
    np.testing.assert_allclose(jax.jit(reward.combine)(COMPONENTS), expected, atol=1e-6)


@given(values=st.lists(st.sampled_from([0.1, 0.2, 0.3, float("nan")]), min_size=1, max_size=6))
def test_ranks_are_the_share_of_the_others_that_are_beaten(values):
    found = np.asarray(MeanOfRanks((BLEU_4,)).combine({"bleu": jnp.asarray([values])}))[0]
    for i, value in enumerate(values):
        others = [other for j, other in enumerate(values) if j != i]
        beaten = sum(1.0 * (value > other) + 0.5 * (value == other) for other in others)
        expected = np.nan if np.isnan(value) else beaten / len(others) if others else 1.0
        np.testing.assert_allclose(found[i], expected, atol=1e-6)


def test_a_failed_guard_gives_zero_even_where_the_reward_has_no_value():
    components = {"bleu": jnp.asarray([[jnp.nan, jnp.nan]]), SHORT.name: jnp.asarray([[0.0, 1.0]])}
    np.testing.assert_array_equal(Guarded(BLEU_4, (SHORT,)).combine(components), [[0.0, np.nan]])


def test_parts_are_scored_once_and_each_under_its_name():
    reward = Guarded(WeightedSum((Min((CHRF, BLEU_4)), CHRF), (0.5, 0.5)), (SHORT,))
    assert list(leaves(reward)) == ["chrf", "bleu", SHORT.name]
    params = reward.init(BYTES)
    assert sorted(params) == sorted(leaves(reward))
    tokens = jnp.asarray([[*BYTES.encode("a b c d e"), 1]])
    components = reward.score(params, {"samples": tokens[:, None], "references": tokens, "sources": tokens})
    assert {name: value.tolist() for name, value in components.items()} == dict.fromkeys(leaves(reward), [[1.0]])
    assert reward.combine(components).tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("reward", "match"),
    [
        (WeightedSum((CHRF, BLEU_4), (1.0, 1.0)), r"from 0 to 2.*\[0, 1\]"),
        (WeightedSum((CHRF, BLEU_4), (1.0, -0.5)), "from -0.5 to 1"),
        (Raw(), "from 0 to 25"),
        (Min((ChrF(char_order=3), CHRF)), "two different rewards named 'chrf'"),
    ],
)
def test_what_a_run_can_not_have_is_refused_before_compilation(reward, match):
    with pytest.raises(UserError, match=match):
        check_reward(reward, has_references=True, languages=("en", "de"))


def test_what_a_combination_wraps_is_checked():
    within = Affine(Raw(), scale=-1 / 25, offset=1.0)
    check_reward(within, has_references=False, languages=("en", "de"))
    with pytest.raises(UserError, match="'raw'.*de.*translates into 'fr'"):
        check_reward(within, has_references=False, languages=("en", "fr"))
    with pytest.raises(UserError, match="LANGUAGES"):
        check_reward(within, has_references=False)
    with pytest.raises(UserError, match="'chrf'.*reference"):
        check_reward(Min((within, CHRF)), has_references=False, languages=("en", "de"))
    check_comparable(within)
    with pytest.raises(UserError, match="rescore"):
        check_comparable(WeightedSum((MeanOfRanks((CHRF,)), BLEU_4), (0.5, 0.5)))
    check_reward(WeightedSum((CHRF, PLUS, BLEU_4), (0.1, 0.2, 0.7)), has_references=True)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: WeightedSum((CHRF, BLEU_4), (1.0,)), "WeightedSum.weights"),
        (lambda: Min(()), "Min.rewards"),
        (lambda: MeanOfRanks(()), "MeanOfRanks.rewards"),
        (lambda: Guarded(CHRF, ()), "Guarded.guards"),
        (lambda: Affine(CHRF, scale=0.0), "Affine.scale"),
        (lambda: Affine(CHRF, scale=float("nan")), "Affine.scale"),
        (lambda: Quantile(CHRF, knots=(0.1,)), "Quantile.knots"),
        (lambda: Quantile(CHRF, knots=(0.1, 0.1)), "Quantile.knots"),
    ],
)
def test_bad_settings_name_the_field(make, match):
    with pytest.raises(UserError, match=match):
        make()
