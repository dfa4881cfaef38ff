"""Losses against dense formulas in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.models.token_losses import smoothed_cross_entropy, target_statistics, token_log_probs


def dense_t5x_loss(logits: np.ndarray, targets: np.ndarray, smoothing: float, z_loss: float) -> np.ndarray:
    """T5X's definition, with the soft targets written out. [..., V], [...] -> [...]."""
    logits = logits.astype(np.float64)
    vocab = logits.shape[-1]
    confidence, low = 1.0 - smoothing, smoothing / (vocab - 1)
    soft = np.where(np.arange(vocab) == targets[..., None], confidence, low)
    log_z = np.log(np.sum(np.exp(logits), axis=-1))
    entropy = -(confidence * np.log(confidence) + (vocab - 1) * low * np.log(low + 1e-20))
    return -np.sum(soft * (logits - log_z[..., None]), axis=-1) - entropy + z_loss * log_z**2


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    z_loss=st.sampled_from([0.0, 1e-4, 1e-1]),
)
def test_smoothed_loss_is_the_dense_formula(seed, smoothing, z_loss):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (2, 3, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (2, 3)).astype(np.int32)
    loss, penalty = smoothed_cross_entropy(
        target_statistics(logits, targets), 11, label_smoothing=smoothing, z_loss=z_loss
    )
    np.testing.assert_allclose(loss, dense_t5x_loss(logits, targets, smoothing, z_loss), rtol=2e-5, atol=2e-5)
    log_z = np.log(np.sum(np.exp(logits.astype(np.float64)), axis=-1))
    np.testing.assert_allclose(penalty, z_loss * log_z**2, rtol=2e-5, atol=2e-6)


def test_a_perfect_prediction_costs_nothing_under_smoothing():
    smoothing, vocab = 0.1, 7
    probabilities = np.where(np.arange(vocab) == 3, 1 - smoothing, smoothing / (vocab - 1)).astype(np.float32)
    statistics = target_statistics(jnp.log(probabilities)[None], jnp.array([3]))
    loss, _ = smoothed_cross_entropy(statistics, vocab, label_smoothing=smoothing, z_loss=0.0)
    np.testing.assert_allclose(loss, 0.0, atol=1e-6)


def test_gradient_is_that_of_plain_autodiff():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4, 9)).astype(np.float32)
    targets = jnp.asarray(rng.integers(0, 9, 4))
    weights = jnp.asarray(rng.normal(size=(4, 3)).astype(np.float32))

    def ours(x):
        s = target_statistics(x, targets)
        return jnp.sum(weights[:, 0] * s.log_z**2 + weights[:, 1] * s.target_logit + weights[:, 2] * s.logit_sum)

    def plain(x):
        log_z, chosen = jax.nn.logsumexp(x, axis=-1), x[jnp.arange(4), targets]
        return jnp.sum(weights[:, 0] * log_z**2 + weights[:, 1] * chosen + weights[:, 2] * x.sum(-1))

    np.testing.assert_allclose(jax.grad(ours)(logits), jax.grad(plain)(logits), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_log_probs_of_large_logits_stay_finite_and_sum_to_one(offset):
    logits = jnp.array([0.0, 1.0, 2.0]) + offset
    log_probs = token_log_probs(jnp.broadcast_to(logits, (3, 3)), jnp.arange(3))
    np.testing.assert_allclose(np.exp(log_probs).sum(), 1.0, rtol=1e-3)
    assert np.isfinite(jax.grad(lambda x: token_log_probs(x, jnp.array(0)))(logits)).all()
