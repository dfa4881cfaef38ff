"""The T5 decoder one position at a time, as pure functions of T5X's parameter tree.

Encoder output and cross-attention keys and values exist once per source and are shared by its N samples: attention over
the source is a matrix product over the sample axis, and nothing is repeated N times. `models/t5.py` is the same
network over whole sequences; a test holds the two together.

Layers stand in the program one after another or, on the tree of `scan_layers`, in a loop that is compiled once; then
what is kept per layer is one array with a layer axis in front.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.models import attention, t5
from rest_jax.sampling.processors import NEGATIVE_INFINITY

Params = Mapping[str, Any]
# One array per layer, or with `scan_layers` one of all: `[num_layers, ...]`.
Layers = list[jax.Array] | jax.Array


class CrossAttention(NamedTuple):
    """What the decoder reads of a source, per layer; `H` heads of `K`."""

    keys: Layers  # [batch, H, K, source_length]
    values: Layers  # [batch, H, source_length, K]
    bias: jax.Array  # [batch, 1, 1, source_length] float32, very negative at padding


class Cache(NamedTuple):
    """Self-attention keys and values so far, per layer."""

    keys: Layers  # [batch, num_samples, H, max_length, K]
    values: Layers


def cast_params(params: Params, dtype: str) -> Params:
    """The tree as the decoder reads it, made once rather than at every position.

    Kernels in the activations' type, what is used in float32 as it is; the layer axis of scanned decoder layers in
    front.
    """

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        if names[:2] == ["decoder", "decoder"]:
            leaf = jnp.moveaxis(leaf, t5.SCAN_AXIS, 0)
        stays = names[-1] in ("scale", "rel_embedding", "embedding") or "logits_dense" in names
        return leaf if stays else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def cross_attention(
    params: Params, config: t5.T5Config, *, encoded: jax.Array, encoder_input_tokens: jax.Array
) -> CrossAttention:
    """Keys and values of the sources, once for all samples and positions.

    Args:
      params: the whole tree, already cast.
      config: the network's shape.
      encoded: `[batch, source_length, emb_dim]`.
      encoder_input_tokens: `[batch, source_length]`, 0 is padding.
    """
    batch, length, _ = encoded.shape

    def project(block: Params) -> tuple[jax.Array, jax.Array]:
        kernels = block["encoder_decoder_attention"]
        # [batch, source_length, H * K] -> decode layout
        key = (encoded @ kernels["key"]["kernel"]).reshape(batch, length, config.num_heads, config.head_dim)
        value = (encoded @ kernels["value"]["kernel"]).reshape(batch, length, config.num_heads, config.head_dim)
        return key.transpose(0, 2, 3, 1), value.transpose(0, 2, 1, 3)

    keys: Layers
    values: Layers
    if config.scan_layers:
        keys, values = jax.lax.map(project, params["decoder"]["decoder"])
    else:
        blocks = [params["decoder"][f"layers_{layer}"] for layer in range(config.num_decoder_layers)]
        keys, values = map(list, zip(*map(project, blocks), strict=True))
    bias = jnp.where(encoder_input_tokens > 0, 0.0, NEGATIVE_INFINITY)[:, None, None, :]
    return CrossAttention(keys=keys, values=values, bias=bias)


def empty_cache(config: t5.T5Config, *, max_length: int, batch: int, num_samples: int) -> Cache:
    shape = (batch, num_samples, config.num_heads, max_length, config.head_dim)
    if config.scan_layers:
        stacked = jnp.zeros((config.num_decoder_layers, *shape), config.dtype)
        return Cache(keys=stacked, values=stacked)
    zeros = [jnp.zeros(shape, config.dtype) for _ in range(config.num_decoder_layers)]
    return Cache(keys=zeros, values=list(zeros))


def reorder_cache(cache: Cache, parents: jax.Array) -> Cache:
    """The cache of hypotheses that continue `parents` `[batch, num_samples]`, indices of the samples before."""

    def reorder(leaf: jax.Array) -> jax.Array:
        samples_axis = leaf.ndim - 4
        indices = jnp.expand_dims(parents, (*range(samples_axis - 1), *range(-3, 0)))
        return jnp.take_along_axis(leaf, indices, axis=samples_axis)

    return jax.tree.map(reorder, cache)


def decode_position(
    params: Params,
    config: t5.T5Config,
    *,
    tokens: jax.Array,
    position: jax.Array,
    cache: Cache,
    cross: CrossAttention,
) -> tuple[jax.Array, Cache]:
    """Logits for the token after `tokens`.

    Args:
      params: the whole tree, already cast.
      config: the network's shape.
      tokens: `[batch, num_samples]` int32, the tokens at `position` of the decoder's input (0 at the start).
      position: scalar int32.
      cache: filled for positions before `position`.
      cross: of the sources.

    Returns:
      Logits `[batch, num_samples, vocab]` float32, and the cache with `position` filled.
    """
    decoder = params["decoder"]
    embedding = params["token_embedder"]["embedding"]
    x = jnp.take(embedding, tokens, axis=0).astype(config.dtype)  # [batch, num_samples, emb_dim]
    run = _run_scanned_layers if config.scan_layers else _run_layers
    x, cache = run(decoder, config, x=x, position=position, cache=cache, cross=cross)
    x = _norm(x, decoder["decoder_norm"]["scale"])
    # Logits in float32 whatever the activations are, as in models/t5.py.
    x = x.astype(jnp.float32)
    if config.logits_via_embedding:
        logits = (x / math.sqrt(config.emb_dim)) @ embedding.astype(jnp.float32).T
    else:
        logits = x @ decoder["logits_dense"]["kernel"]
    return logits, cache


def _run_layers(
    decoder: Params,
    config: t5.T5Config,
    *,
    x: jax.Array,
    position: jax.Array,
    cache: Cache,
    cross: CrossAttention,
) -> tuple[jax.Array, Cache]:
    """`x` `[batch, num_samples, emb_dim]` through all layers, one after another in the program."""
    bias_of = functools.partial(
        _self_attention_bias, config=config, position=position, max_length=cache.keys[0].shape[-2]
    )
    bias = None if config.relative_bias_per_layer else bias_of(decoder)
    keys, values = [], []
    for layer in range(config.num_decoder_layers):
        block = decoder[f"layers_{layer}"]
        query, key, value = _project(block, x, config)
        keys.append(jax.lax.dynamic_update_slice_in_dim(cache.keys[layer], key, position, axis=3))
        values.append(jax.lax.dynamic_update_slice_in_dim(cache.values[layer], value, position, axis=3))
        x = _self_attention(
            block, x, query=query, keys=keys[-1], values=values[-1], bias=bias_of(block) if bias is None else bias
        )
        x = _cross_attention_and_mlp(
            block, x, config, keys=cross.keys[layer], values=cross.values[layer], bias=cross.bias
        )
    return x, Cache(keys=keys, values=values)


def _run_scanned_layers(
    decoder: Params,
    config: t5.T5Config,
    *,
    x: jax.Array,
    position: jax.Array,
    cache: Cache,
    cross: CrossAttention,
) -> tuple[jax.Array, Cache]:
    """As `_run_layers`, in a loop over layers whose caches are written in place."""
    assert isinstance(cache.keys, jax.Array)  # empty_cache makes one array of all layers
    bias_of = functools.partial(_self_attention_bias, config=config, position=position, max_length=cache.keys.shape[-2])
    bias = None if config.relative_bias_per_layer else bias_of(decoder)

    def run(carry: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], None]:
        x, keys, values = carry
        layer, block, cross_keys, cross_values = inputs
        query, key, value = _project(block, x, config)
        place = (layer, 0, 0, 0, position, 0)
        keys = jax.lax.dynamic_update_slice(keys, key[None], place)
        values = jax.lax.dynamic_update_slice(values, value[None], place)
        x = _self_attention(
            block, x, query=query, keys=keys[layer], values=values[layer], bias=bias_of(block) if bias is None else bias
        )
        x = _cross_attention_and_mlp(block, x, config, keys=cross_keys, values=cross_values, bias=cross.bias)
        return (x, keys, values), None

    layers = jnp.arange(config.num_decoder_layers)
    (x, keys, values), _ = jax.lax.scan(
        run, (x, cache.keys, cache.values), (layers, decoder["decoder"], cross.keys, cross.values)
    )
    return x, Cache(keys=keys, values=values)


def _project(block: Params, x: jax.Array, config: t5.T5Config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Query `[batch, num_samples, H, K]`, key and value `[batch, num_samples, H, 1, K]` of this position."""
    y = _norm(x, block["pre_self_attention_layer_norm"]["scale"])
    query, key, value = (
        (y @ block["self_attention"][name]["kernel"]).reshape(*x.shape[:2], config.num_heads, config.head_dim)
        for name in ("query", "key", "value")
    )
    return query, key[..., None, :], value[..., None, :]


def _self_attention(
    block: Params, x: jax.Array, *, query: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array
) -> jax.Array:
    """Adds what the positions so far say; keys and values `[batch, num_samples, H, max_length, K]`."""
    scores = jnp.einsum("bnhk,bnhtk->bnht", query, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores + bias, axis=-1).astype(x.dtype)
    context = jnp.einsum("bnht,bnhtk->bnhk", weights, values)
    return x + context.reshape(*x.shape[:2], -1) @ block["self_attention"]["out"]["kernel"]


def _cross_attention_and_mlp(
    block: Params, x: jax.Array, config: t5.T5Config, *, keys: jax.Array, values: jax.Array, bias: jax.Array
) -> jax.Array:
    """Adds what the source says, then the feed-forward layer; keys and values as in `CrossAttention`."""
    y = _norm(x, block["pre_cross_attention_layer_norm"]["scale"])
    kernels = block["encoder_decoder_attention"]
    query = (y @ kernels["query"]["kernel"]).reshape(*x.shape[:2], config.num_heads, config.head_dim)
    scores = jnp.einsum(
        "bnhk,bhks->bhns", query, keys, preferred_element_type=jnp.float32
    )  # one matrix product per source and head, over its samples
    weights = jax.nn.softmax(scores + bias, axis=-1).astype(x.dtype)
    context = jnp.einsum("bhns,bhsk->bnhk", weights, values)
    x = x + context.reshape(*x.shape[:2], -1) @ kernels["out"]["kernel"]

    y = _norm(x, block["pre_mlp_layer_norm"]["scale"])
    return x + _mlp(block["mlp"], y, config.mlp_activations)


def _self_attention_bias(owner: Params, *, config: t5.T5Config, position: jax.Array, max_length: int) -> jax.Array:
    """Relative-position bias of `position` against positions 0..max_length-1, `[H, max_length]`; later ones masked.

    `owner` is the decoder, or its layer where each has a table.
    """
    distances = np.arange(max_length)
    buckets = attention.relative_position_bucket(
        -distances,
        bidirectional=False,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
    )
    table = owner["relpos_bias"]["rel_embedding"].astype(jnp.float32)  # [H, buckets]
    by_distance = table[:, buckets]  # [H, max_length]
    distance = position - distances
    return jnp.where(distance >= 0, by_distance[:, jnp.maximum(distance, 0)], NEGATIVE_INFINITY)


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return t5.rms_norm(x, scale, dtype=x.dtype)


def _mlp(params: Params, x: jax.Array, activations: Sequence[str]) -> jax.Array:
    """The gated feed-forward layer, `[..., emb_dim] -> [..., emb_dim]`."""
    names = ["wi"] if len(activations) == 1 else [f"wi_{index}" for index in range(len(activations))]
    hidden = [t5.ACTIVATIONS[act](x @ params[name]["kernel"]) for act, name in zip(activations, names, strict=True)]
    return functools.reduce(jnp.multiply, hidden) @ params["wo"]["kernel"]
