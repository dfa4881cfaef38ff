"""Texts of any lengths through a network, some at a time, the short ones in narrow arrays."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rest_jax.partitioning import num_trace_shards, over_batch_axes

# Widths that a group's array may have, as sixteenths of the widest, but no less than 32 tokens: each is one more branch
# to compile.
_SIXTEENTHS = (1, 2, 4, 6, 8, 12, 16)
_NARROWEST = 32


def score_rows(score: Callable[[jax.Array], jax.Array], inputs: jax.Array, *, rows_per_step: int) -> jax.Array:
    """Scores of inputs, computed in groups of like length, each as wide as its longest row needs.

    Memory is that of one group. Every data shard sorts and scores its own rows; none leaves its device.

    Args:
      score: int32 `[rows, width]`, padded with 0, to float32 `[rows]`. A row's score must not depend on the other rows.
      inputs: int32 `[rows, length]`, padded with 0.
      rows_per_step: rows that go through the network together on each data shard.

    Returns:
      float32 `[rows]`.
    """
    rows, length = inputs.shape
    shards = num_trace_shards()
    per_shard = -(-rows // shards)
    per_step = min(rows_per_step, per_shard)
    fillers = -per_shard % per_step
    # [rows, length] -> [shards, per_shard + fillers, length]
    sharded = jnp.pad(inputs, ((0, shards * per_shard - rows), (0, 0))).reshape(shards, per_shard, length)
    sharded = over_batch_axes(jnp.pad(sharded, ((0, 0), (0, fillers), (0, 0))))
    order = jnp.argsort(_lengths(sharded), axis=1, stable=True)
    in_order = jnp.take_along_axis(sharded, order[:, :, None], axis=1)
    # [groups, shards, per_step, length], the longest last
    groups = jnp.moveaxis(in_order.reshape(shards, -1, per_step, length), 1, 0)
    groups = over_batch_axes(groups, axis=1)
    steps = (-(-length * sixteenths // 16) for sixteenths in _SIXTEENTHS)
    widths = sorted({width for width in steps if width >= min(_NARROWEST, length)})

    def score_group(group: jax.Array) -> jax.Array:
        tokens = over_batch_axes(group.reshape(shards * per_step, length))
        narrower = jnp.sum(jnp.max(_lengths(tokens)) > jnp.asarray(widths[:-1], jnp.int32))
        branches = [lambda tokens, width=width: score(tokens[:, :width]) for width in widths]
        return jax.lax.switch(narrower, branches, tokens).reshape(shards, per_step)

    # [groups, shards, per_step] -> [shards, groups * per_step] -> [rows]
    scores = jnp.moveaxis(jax.lax.map(score_group, groups), 0, 1).reshape(shards, -1)
    back = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(scores, back, axis=1)[:, :per_shard].reshape(-1)[:rows]


def _lengths(tokens: jax.Array) -> jax.Array:
    return jnp.sum(tokens > 0, axis=-1, dtype=jnp.int32)
