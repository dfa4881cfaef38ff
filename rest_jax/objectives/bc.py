"""Behavioural cloning, the objective of the paper's main results: minus the sum over t of log π(y_t | y_<t, x)."""

from collections.abc import Mapping
from typing import Any

import jax

from rest_jax.objectives.metrics import token_sums


def bc(
    model: Any, params: Any, batch: Mapping[str, jax.Array], dropout_rng: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The model's own loss (with its label smoothing and z-loss), summed over target tokens.

    Args:
      model: a model with T5X's `loss_fn`.
      params: its parameters.
      batch: features `[batch, length]`, packed or not.
      dropout_rng: key for dropout; None for none.

    Returns:
      The summed loss (scalar float32) and the model's metrics, summed over target tokens.
    """
    loss, metrics = model.loss_fn(params, batch, dropout_rng)
    return loss, token_sums(loss, metrics, batch)
