"""What Improve minimises: one file each, each a pure function of a batch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from rest_jax.objectives.bc import bc
from rest_jax.objectives.squared_error import squared_error

# objective(model, params, batch, dropout_rng) -> (loss summed over target tokens, metrics summed over target tokens).
# `metrics['weight_sum']` is the number of target tokens, by which the train step divides the gradient.
Objective = Callable[[Any, Any, Mapping[str, jax.Array], jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]

__all__ = ["Objective", "bc", "squared_error"]
