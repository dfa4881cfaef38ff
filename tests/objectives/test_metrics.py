"""A loss's metrics as sums over tokens, from T5X's objects as from our own."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.objectives.metrics import token_sums

BATCH = {
    "decoder_target_tokens": jnp.asarray([[5, 6, 1, 0], [7, 1, 0, 0]]),
    "decoder_loss_weights": jnp.asarray([[1.0, 1.0, 0.5, 0.0], [0.5, 1.0, 0.0, 0.0]]),
}
# Of clu's `Accuracy` and T5X's `AveragePerStep`: four of the five tokens whose weight is not 0 are right.
T5X = {
    "accuracy": SimpleNamespace(total=jnp.asarray(4.0), count=jnp.asarray(5)),
    "z_loss": SimpleNamespace(total=jnp.asarray(0.25), steps=1),
    "timing/seconds": SimpleNamespace(duration=None),
}


def test_our_own_metrics_stay_as_they_are() -> None:
    sums = {"loss": jnp.asarray(2.0), "weight_sum": jnp.asarray(4.0), "correct": jnp.asarray(3.0)}
    assert token_sums(jnp.asarray(2.0), sums, BATCH) == sums


def test_t5x_metrics_become_sums_by_the_batchs_weights() -> None:
    found = jax.jit(lambda loss: token_sums(loss, T5X, BATCH))(3.0)
    expected = {"loss": 3.0, "z_loss": 0.25, "cross_entropy": 2.75, "weight_sum": 4.0, "correct": 4 / 5 * 4.0}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


def test_without_weights_every_real_token_counts_once() -> None:
    batch = {"decoder_target_tokens": BATCH["decoder_target_tokens"]}
    assert token_sums(jnp.asarray(3.0), T5X, batch)["weight_sum"] == 5
