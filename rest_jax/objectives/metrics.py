"""Metrics of a loss as sums over target tokens, whoever's model computed it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def token_sums(loss: jax.Array, metrics: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """What `EncoderDecoderModel.loss_fn` gives beside the loss, from its metrics or from T5X's.

    T5X's are objects of the clu library, of which `total` and `count` are read. Its accuracy counts a token whose
    weight is not 0 as one token, so it is taken for a share, and the weights are added up here.

    Args:
      loss: the summed loss.
      metrics: sums by name, or T5X's.
      batch: features `[batch, length]`.

    Returns:
      `loss`, `z_loss`, `cross_entropy`, `weight_sum`, `correct`: scalars float32. T5X's cross-entropy is that of the
      loss: label smoothing and LOSS_NORMALIZING_FACTOR are in it.
    """
    if "weight_sum" in metrics:
        return dict(metrics)
    weights = batch.get("decoder_loss_weights")
    weight_sum = jnp.sum(batch["decoder_target_tokens"] > 0 if weights is None else weights, dtype=jnp.float32)
    accuracy = metrics["accuracy"]
    z_loss = jnp.asarray(metrics["z_loss"].total if "z_loss" in metrics else 0.0, jnp.float32)
    return {
        "loss": jnp.asarray(loss, jnp.float32),
        "z_loss": z_loss,
        "cross_entropy": loss - z_loss,
        "weight_sum": weight_sum,
        "correct": accuracy.total / jnp.maximum(accuracy.count, 1) * weight_sum,
    }
