"""Self-attention keys and values of slots that stand at different positions.

Column t of a slot holds what its sample's position t said, whenever that was: what is summed, and in which order, is
then a function of the sample alone. Columns lie in blocks, arrays of their own, and attention reads the blocks that
some slot has reached; a later column's weight is exactly zero, so that reading more of them changes no bit.

`[slots, G, C, H / G * K]` each: a position is written with one scatter, in place, whose pieces are contiguous. With
G = H groups each head stands by itself. With fewer, a group's heads lie side by side, and their queries are the blocks
on the diagonal of a matrix: H / G times the products, but on a TPU's matrix units, and without padding 64 columns to
128.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

CACHE_TYPES = ("float32", "bfloat16", "float16", "int8")
# More blocks follow the filled part more closely, each for a write per layer and position.
MAX_BLOCKS = 4
_BLOCK_MULTIPLE = 16
_INT8_MAX = 127.0


class Blocks(NamedTuple):
    """Keys or values of one layer; with `scan_layers` of all, `num_layers` in front of each shape."""

    columns: tuple[jax.Array, ...]  # [slots, G, C, H / G * K] each
    scales: tuple[jax.Array, ...]  # [slots, H, C] float32 each, by which int8 columns are multiplied; else empty


class KeysValues(NamedTuple):
    keys: Blocks
    values: Blocks


# One per layer, or with `scan_layers` one of all.
Cache = list[KeysValues] | KeysValues


def block_length(max_length: int, *, max_blocks: int = MAX_BLOCKS) -> int:
    """Columns of a block, C: the fewest whole multiples of 16 that make at most so many blocks."""
    return _BLOCK_MULTIPLE * math.ceil(max_length / (_BLOCK_MULTIPLE * max_blocks))


def num_columns(max_length: int, *, max_blocks: int = MAX_BLOCKS) -> int:
    """Columns of all blocks."""
    length = block_length(max_length, max_blocks=max_blocks)
    return length * math.ceil(max_length / length)


def columns_of(cache: Cache) -> int:
    """`num_columns` of the cache as it is."""
    first = cache if isinstance(cache, KeysValues) else cache[0]
    return sum(block.shape[-2] for block in first.keys.columns)


def empty(
    *,
    layers: int,
    scanned: bool,
    slots: int,
    heads: int,
    head_dim: int,
    max_length: int,
    dtype: str,
    max_blocks: int = MAX_BLOCKS,
    head_groups: int | None = None,
) -> Cache:
    """A cache for `max_length` positions of `slots` samples, in `dtype` (one of CACHE_TYPES); no groups: each head."""
    groups = head_groups or heads
    front = (*((layers,) if scanned else ()), slots)

    def blocks() -> Blocks:
        length = block_length(max_length, max_blocks=max_blocks)
        shape = (*front, groups, length, heads // groups * head_dim)
        count = math.ceil(max_length / length)
        columns = tuple(jnp.zeros(shape, dtype) for _ in range(count))
        scales = tuple(jnp.zeros((*front, heads, length)) for _ in range(count)) if dtype == "int8" else ()
        return Blocks(columns, scales)

    if scanned:
        return KeysValues(blocks(), blocks())
    return [KeysValues(blocks(), blocks()) for _ in range(layers)]


def write(
    cache: KeysValues, key: jax.Array, value: jax.Array, *, positions: jax.Array, layer: jax.Array | None = None
) -> KeysValues:
    """The cache of one layer, or of all with `layer`, with key and value `[slots, H, K]` at `positions` `[slots]`."""
    return KeysValues(
        _write(cache.keys, key, positions=positions, layer=layer),
        _write(cache.values, value, positions=positions, layer=layer),
    )


def _write(blocks: Blocks, new: jax.Array, *, positions: jax.Array, layer: jax.Array | None) -> Blocks:
    rows = jnp.arange(len(positions))
    scale = None
    if blocks.scales:
        scale = jnp.max(jnp.abs(new), axis=-1).astype(jnp.float32) / _INT8_MAX  # [slots, H]
        new = jnp.round(new / jnp.maximum(scale, 1e-30)[..., None])

    def put(block: jax.Array, values: jax.Array, number: int) -> jax.Array:
        column = positions - number * block_size
        column = jnp.where(column >= 0, column, block_size)  # a negative one would count from the end
        place = (rows, slice(None), column) if layer is None else (layer, rows, slice(None), column)
        return block.at[place].set(values.astype(block.dtype), mode="drop", unique_indices=True)

    block_size = blocks.columns[0].shape[-2]
    new = new.reshape(len(new), blocks.columns[0].shape[-3], -1)
    columns = tuple(put(block, new, number) for number, block in enumerate(blocks.columns))
    scales = () if scale is None else tuple(put(block, scale, number) for number, block in enumerate(blocks.scales))
    return Blocks(columns, scales)


def attend(query: jax.Array, cache: KeysValues, *, bias: jax.Array, filled: jax.Array) -> jax.Array:
    """What each slot's query reads of its own columns.

    Args:
      query: `[slots, H, K]`.
      cache: of one layer.
      bias: `[slots, H, columns]` float32, very negative at columns past the slot's position.
      filled: scalar int32, a bound on the columns that any slot has filled; at least 1.

    Returns:
      `[slots, H, K]` in the query's type.
    """
    keys, values = cache
    count, size = len(keys.columns), keys.columns[0].shape[-2]

    def first(blocks: int, query: jax.Array, keys: Blocks, values: Blocks, bias: jax.Array) -> jax.Array:
        scores = jnp.concatenate([_scores(query, keys, number) for number in range(blocks)], axis=-1)
        weights = jax.nn.softmax(scores + bias[..., : blocks * size], axis=-1)
        parts = jnp.split(weights, blocks, axis=-1)
        context = [_context(part, values, number, dtype=query.dtype) for number, part in enumerate(parts)]
        return functools.reduce(jnp.add, context)

    branches = [lambda *operands, blocks=blocks: first(blocks, *operands) for blocks in range(1, count + 1)]
    return jax.lax.switch((filled - 1) // size, branches, query, keys, values, bias)


def _scores(query: jax.Array, keys: Blocks, number: int) -> jax.Array:
    """`[slots, H, C]` float32."""
    columns = keys.columns[number]
    columns = columns.astype(query.dtype) if keys.scales else columns
    query = query.astype(columns.dtype)
    slots, heads, size = query.shape
    groups = columns.shape[1]
    if groups == heads:
        scores = jnp.einsum("shk,shck->shc", query, columns, preferred_element_type=jnp.float32)
    else:
        # [slots, G, H / G, K] -> [slots, G, H / G * K, H / G]: a head's query in its own rows and column
        one = jnp.eye(heads // groups, dtype=query.dtype)
        diagonal = query.reshape(slots, groups, -1, size)[..., None] * one[:, None, :]
        diagonal = diagonal.reshape(slots, groups, -1, heads // groups)
        scores = jnp.einsum("sgcj,sgjp->sgpc", columns, diagonal, preferred_element_type=jnp.float32)
        scores = scores.reshape(slots, heads, -1)
    return scores * keys.scales[number] if keys.scales else scores


def _context(weights: jax.Array, values: Blocks, number: int, *, dtype: jnp.dtype) -> jax.Array:
    """`[slots, H, K]`."""
    columns = values.columns[number]
    if values.scales:
        weights, columns = weights * values.scales[number], columns.astype(dtype)
    weights = weights.astype(columns.dtype)
    slots, heads, _ = weights.shape
    groups = columns.shape[1]
    if groups == heads:
        return jnp.einsum("shc,shck->shk", weights, columns, preferred_element_type=jnp.float32).astype(dtype)
    share = heads // groups
    weights = weights.reshape(slots, groups, share, -1)
    # What each head reads of every head's values; its own lie on the diagonal.
    mixed = jnp.einsum("sgpc,sgcj->sgpj", weights, columns, preferred_element_type=jnp.float32)
    mixed = mixed.reshape(slots, groups, share, share, -1)
    own = jnp.sum(mixed * jnp.eye(share)[:, :, None], axis=3)
    return own.reshape(slots, heads, -1).astype(dtype)


def choose_slots(cache: Cache, chosen: jax.Array) -> Cache:
    """The cache of the slots that stand at `chosen` `[slots]`."""
    axis = 1 if isinstance(cache, KeysValues) else 0
    return jax.tree.map(lambda leaf: jnp.take(leaf, chosen, axis=axis), cache)
