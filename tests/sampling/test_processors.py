"""Draws follow the exact distribution, and truncations keep the laws that they are named after."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rest_jax.errors import UserError
from rest_jax.sampling.processors import LANES, NEGATIVE_INFINITY, LogitProcessing, draw, legal_tokens

VOCAB = 150  # Three blocks of lanes, the last in part padding.
DRAWS, DRAWS_PER_CALL = 1_000_000, 10_000
BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))
PROCESSINGS = {
    "plain": LogitProcessing(),
    "temperature": LogitProcessing(temperature=0.8),
    "top_k": LogitProcessing(top_k=20),
    "top_p": LogitProcessing(top_p=0.9),
    "epsilon": LogitProcessing(epsilon=2e-3),
    "all": LogitProcessing(temperature=1.3, top_k=100, top_p=0.95, epsilon=1e-3),
}


def logits_with_masked_tokens(seed=0):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=VOCAB).astype(np.float32)
    return np.where(rng.random(VOCAB) < 0.2, np.float32(NEGATIVE_INFINITY), logits)


def draw_tokens(logits, uniform, processing=PROCESSINGS["plain"]):
    """Tokens alone, all of them legal; leading dimensions as they come."""
    rows = jnp.reshape(logits, (-1, logits.shape[-1]))
    legal = np.ones(rows.shape[-1], bool)
    return draw(rows, jnp.reshape(uniform, -1), processing=processing, legal=legal)[0].reshape(logits.shape[:-1])


def draw_order(vocab):
    """Tokens in the order in which they lie on the unit interval."""
    tokens = np.arange(vocab)
    return np.lexsort((tokens // LANES, tokens % LANES))


def softmax64(logits):
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def exact_distribution(logits, processing):
    """By the definitions, in float64, one token after the other in falling order of probability."""
    p = softmax64(np.asarray(logits, np.float64) / processing.temperature)
    order = np.argsort(-p, kind="stable")
    if processing.top_k:
        p[order[processing.top_k :]] = 0
        p /= p.sum()
    if processing.top_p < 1:
        reached = 0.0
        for token in order:
            if reached >= processing.top_p:
                p[token] = 0
            reached += p[token]
        p /= p.sum()
    if processing.epsilon:
        p[(p < processing.epsilon) & (p < p.max())] = 0
        p /= p.sum()
    return p


# 'all' goes through every step; the others are told apart by the long tests.
@pytest.mark.parametrize(
    "name", [name if name in ("plain", "all") else pytest.param(name, marks=pytest.mark.slow) for name in PROCESSINGS]
)
def test_a_million_draws_follow_the_exact_distribution(name):
    processing, logits = PROCESSINGS[name], logits_with_masked_tokens()
    probabilities = exact_distribution(logits, processing)

    @jax.jit
    def counts(key):
        uniform = jax.random.uniform(key, (DRAWS_PER_CALL,))
        tokens = draw_tokens(jnp.broadcast_to(logits, (DRAWS_PER_CALL, VOCAB)), uniform, processing)
        return jnp.zeros(VOCAB, jnp.int32).at[tokens].add(1)

    observed = sum(np.asarray(counts(key)) for key in jax.random.split(jax.random.key(1), DRAWS // DRAWS_PER_CALL))
    assert observed.sum() == DRAWS
    assert not observed[probabilities == 0].any()
    # The chi-squared law needs some counts in each cell: the rarest tokens share one.
    rare = probabilities * DRAWS < 10
    pool = lambda values: np.append(values[~rare], values[rare].sum())  # noqa: E731
    expected, found = pool(probabilities * DRAWS), pool(observed)
    if expected[-1] == 0:
        expected, found = expected[:-1], found[:-1]
    assert scipy.stats.chisquare(found, expected).pvalue > 1e-3


def test_the_chi_squared_test_sees_a_wrong_temperature():
    # Guards the test above: 2 % more temperature is far outside of what it accepts.
    logits = logits_with_masked_tokens()
    expected, wrong = (exact_distribution(logits, LogitProcessing(temperature=t)) for t in (0.8, 0.816))
    used = expected * DRAWS >= 10
    statistic = (DRAWS * (wrong - expected) ** 2 / np.where(used, expected, 1))[used].sum()
    assert scipy.stats.chi2.sf(statistic, used.sum() - 1) < 1e-6


@pytest.mark.parametrize("vocab", [1, 5, 128, 129, VOCAB])
def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_possible_token(vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(50, vocab)).astype(np.float32)
    masked = rng.random(logits.shape) < 0.6
    masked[:, rng.integers(vocab)] = False
    logits[masked] = NEGATIVE_INFINITY
    order = draw_order(vocab)
    first = order[np.argmax(~masked[:, order], axis=1)]
    last = order[::-1][np.argmax(~masked[:, order[::-1]], axis=1)]
    np.testing.assert_array_equal(draw_tokens(logits, jnp.zeros(50)), first)
    np.testing.assert_array_equal(draw_tokens(logits, jnp.full(50, BELOW_ONE)), last)


def around(values):
    """`values` in [0, 1] and their neighbours in float32, two on either side; [5, ...]."""
    shifted = [np.asarray(values, np.float32) + shift * np.float32(2**-24) for shift in (-2, -1, 0, 1, 2)]
    return np.clip(np.stack(shifted), 0, BELOW_ONE).astype(np.float32)


def test_no_impossible_token_is_drawn_where_the_rounding_of_a_long_sum_could_choose_it():
    # One lane of 500 blocks, half of them impossible, and numbers at their edges: a parallel cumulative sum of that
    # length is not monotone, so comparing with it alone draws tokens of probability zero here.
    rng = np.random.default_rng(0)
    logits = np.full((4, 500, LANES), NEGATIVE_INFINITY, np.float32)
    logits[:, :, 5] = np.where(rng.random((4, 500)) < 0.5, 2 * rng.normal(size=(4, 500)), NEGATIVE_INFINITY)
    possible = logits[:, :, 5] > NEGATIVE_INFINITY
    sums = np.cumsum(np.exp(logits[:, :, 5] - logits.max((1, 2))[:, None]), axis=1, dtype=np.float64)
    uniforms = around(sums / sums[:, -1:]).transpose(0, 2, 1).reshape(-1, 4)  # [numbers, 4]
    drawn = jax.jit(lambda u: jax.lax.map(lambda row: draw_tokens(logits.reshape(4, -1), row), u))(uniforms)
    assert (np.asarray(drawn) % LANES == 5).all()
    assert possible[np.arange(4), np.asarray(drawn) // LANES].all()


# No subnormals: XLA takes them for zero on a CPU, NumPy does not.
finite_logits = hypothesis.extra.numpy.arrays(
    np.float32,
    st.tuples(st.just(4), st.sampled_from([1, 2, 7, 128, 200])),
    elements=st.floats(-30, 30, width=32, allow_subnormal=False) | st.just(np.float32(NEGATIVE_INFINITY)),
).filter(lambda logits: (logits.max(axis=1) > NEGATIVE_INFINITY).all())


@hypothesis.given(finite_logits, st.lists(st.floats(0, float(BELOW_ONE), width=32), min_size=4, max_size=4))
def test_a_draw_inverts_the_cumulative_distribution(logits, uniform):
    tokens = np.asarray(draw_tokens(logits, jnp.asarray(uniform, jnp.float32)))
    p = softmax64(logits)
    order = draw_order(logits.shape[1])
    ends = np.empty_like(p)
    ends[:, order] = np.cumsum(p[:, order], axis=1)
    ends = ends[np.arange(4), tokens]
    probability = p[np.arange(4), tokens]
    # A weight that float32's exp rounds to zero is impossible as well; none above its smallest number is.
    assert (probability > 0).all()
    # 200 terms of at most 1 added in float32, each sum half a unit in the last place (6e-8) off.
    slack = 1e-5
    assert (ends - probability <= np.asarray(uniform) + slack).all()
    assert (np.asarray(uniform) <= ends + slack).all()


@hypothesis.given(finite_logits, st.integers(1, 210))
def test_top_k_keeps_the_k_most_probable_and_their_ties(logits, k):
    processed = np.asarray(LogitProcessing(top_k=k)(logits))
    for row, after in zip(logits, processed, strict=True):
        kth = np.sort(row)[::-1][min(k, len(row)) - 1]
        np.testing.assert_array_equal(after, np.where(row >= kth, row, np.float32(NEGATIVE_INFINITY)))


@pytest.mark.slow
@hypothesis.given(finite_logits, st.floats(0.01, 0.999))
def test_top_p_keeps_a_set_that_reaches_p_and_is_minimal(logits, p):
    processed = np.asarray(LogitProcessing(top_p=p)(logits))
    probabilities = softmax64(logits)
    slack = 1e-5  # of the cumulative sum in float32, as above
    for row, after, q in zip(logits, processed, probabilities, strict=True):
        kept = (after > NEGATIVE_INFINITY) & (q > 0)
        np.testing.assert_array_equal(after[kept], row[kept])
        assert q[kept].sum() >= p - slack
        # Without its least probable tokens, which may be tied in float32, it would not reach p; nothing dropped beats
        # what stays.
        assert q[kept & (q > q[kept].min() * (1 + 1e-6))].sum() < p + slack
        assert kept[row > row[kept].min()].all()


@hypothesis.given(finite_logits, st.floats(0, 0.99))
def test_epsilon_keeps_what_is_probable_enough_and_never_drops_the_most_probable(logits, epsilon):
    processed = np.asarray(LogitProcessing(epsilon=epsilon)(logits))
    q = softmax64(logits)
    kept = processed > NEGATIVE_INFINITY
    assert kept[logits == logits.max(axis=1, keepdims=True)].all()
    if epsilon:
        lesser = q < q.max(axis=1, keepdims=True) * (1 - 1e-5)  # what float32 tells from the most probable
        assert (q[kept & lesser] >= epsilon * (1 - 1e-5)).all()
        assert (q[~kept & (logits > NEGATIVE_INFINITY)] <= epsilon * (1 + 1e-5)).all()


@pytest.mark.slow
@hypothesis.given(finite_logits, st.sampled_from(sorted(PROCESSINGS)))
def test_every_processing_keeps_the_most_probable_token_and_no_masked_one(logits, name):
    processed = np.asarray(PROCESSINGS[name](logits))
    for row, after in zip(logits, processed, strict=True):
        assert np.argmax(after) == np.argmax(row)
        assert softmax64(after)[row == np.float32(NEGATIVE_INFINITY)].sum() == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1)]
    + [("epsilon", 1.0), ("epsilon", -1e-9)],
)
def test_illegal_settings_are_named(field, value):
    with pytest.raises(UserError, match=rf"LogitProcessing\.{field}"):
        LogitProcessing(**{field: value})


def test_padding_and_ids_past_the_vocabulary_are_not_legal():
    np.testing.assert_array_equal(legal_tokens(6, 4), [False, True, True, True, False, False])
