"""The T5 decoder one position at a time, as pure functions of T5X's parameter tree.

Encoder output and cross-attention keys and values exist once per source and are shared by its N samples: attention over
the source is a matrix product over the sample axis, and nothing is repeated N times. `models/t5.py` is the same
network over whole sequences; a test holds the two together.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.models import t5
from rest_jax.sampling.processors import NEGATIVE_INFINITY

Params = Mapping[str, Any]


class CrossAttention(NamedTuple):
    """What the decoder reads of a source, per layer; `H` heads of `K`."""

    keys: list[jax.Array]  # [batch, H, K, source_length]
    values: list[jax.Array]  # [batch, H, source_length, K]
    bias: jax.Array  # [batch, 1, 1, source_length] float32, very negative at padding


class Cache(NamedTuple):
    """Self-attention keys and values so far, per layer."""

    keys: list[jax.Array]  # [batch, num_samples, H, max_length, K]
    values: list[jax.Array]


def cast_params(params: Params, dtype: str) -> Params:
    """Kernels in the activations' type, once rather than at every position; what is used in float32 stays that."""

    def cast(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        stays = names[-1] in ("scale", "rel_embedding", "embedding") or "logits_dense" in names
        return leaf if stays else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def cross_attention(
    params: Params, config: t5.T5Config, *, encoded: jax.Array, encoder_input_tokens: jax.Array
) -> CrossAttention:
    """Keys and values of the sources, once for all samples and positions.

    Args:
      params: the decoder's parameters, already cast.
      encoded: `[batch, source_length, emb_dim]`.
      encoder_input_tokens: `[batch, source_length]`, 0 is padding.
    """
    batch, length, _ = encoded.shape
    keys, values = [], []
    for layer in range(config.num_decoder_layers):
        attention = params["decoder"][f"layers_{layer}"]["encoder_decoder_attention"]
        # [batch, source_length, H * K] -> decode layout
        key = (encoded @ attention["key"]["kernel"]).reshape(batch, length, config.num_heads, config.head_dim)
        value = (encoded @ attention["value"]["kernel"]).reshape(batch, length, config.num_heads, config.head_dim)
        keys.append(key.transpose(0, 2, 3, 1))
        values.append(value.transpose(0, 2, 1, 3))
    bias = jnp.where(encoder_input_tokens > 0, 0.0, NEGATIVE_INFINITY)[:, None, None, :]
    return CrossAttention(keys=keys, values=values, bias=bias)


def empty_cache(config: t5.T5Config, *, max_length: int, batch: int, num_samples: int) -> Cache:
    shape = (batch, num_samples, config.num_heads, max_length, config.head_dim)
    zeros = [jnp.zeros(shape, config.dtype) for _ in range(config.num_decoder_layers)]
    return Cache(keys=zeros, values=list(zeros))


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
      tokens: `[batch, num_samples]` int32, the tokens at `position` of the decoder's input (0 at the start).
      position: scalar int32.
      cache: filled for positions before `position`.
      cross: of the sources.

    Returns:
      Logits `[batch, num_samples, vocab]` float32, and the cache with `position` filled.
    """
    decoder = params["decoder"]
    heads, size = config.num_heads, config.head_dim
    max_length = cache.keys[0].shape[3]
    embedding = params["token_embedder"]["embedding"]
    x = jnp.take(embedding, tokens, axis=0).astype(config.dtype)  # [batch, num_samples, emb_dim]

    bias = _self_attention_bias(decoder, config, position=position, max_length=max_length)  # [H, max_length]
    keys, values = [], []
    for layer in range(config.num_decoder_layers):
        block = decoder[f"layers_{layer}"]

        y = _norm(x, block["pre_self_attention_layer_norm"]["scale"])
        attention = block["self_attention"]
        query, key, value = (
            (y @ attention[name]["kernel"]).reshape(*tokens.shape, heads, size) for name in ("query", "key", "value")
        )
        key = jax.lax.dynamic_update_slice_in_dim(cache.keys[layer], key[..., None, :], position, axis=3)
        value = jax.lax.dynamic_update_slice_in_dim(cache.values[layer], value[..., None, :], position, axis=3)
        keys.append(key)
        values.append(value)
        scores = jnp.einsum("bnhk,bnhtk->bnht", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores + bias, axis=-1).astype(x.dtype)
        context = jnp.einsum("bnht,bnhtk->bnhk", weights, value)
        x = x + context.reshape(*tokens.shape, heads * size) @ attention["out"]["kernel"]

        y = _norm(x, block["pre_cross_attention_layer_norm"]["scale"])
        attention = block["encoder_decoder_attention"]
        query = (y @ attention["query"]["kernel"]).reshape(*tokens.shape, heads, size)
        scores = jnp.einsum(
            "bnhk,bhks->bhns", query, cross.keys[layer], preferred_element_type=jnp.float32
        )  # one matrix product per source and head, over its samples
        weights = jax.nn.softmax(scores + cross.bias, axis=-1).astype(x.dtype)
        context = jnp.einsum("bhns,bhsk->bnhk", weights, cross.values[layer])
        x = x + context.reshape(*tokens.shape, heads * size) @ attention["out"]["kernel"]

        y = _norm(x, block["pre_mlp_layer_norm"]["scale"])
        x = x + _mlp(block["mlp"], y, config.mlp_activations)

    x = _norm(x, decoder["decoder_norm"]["scale"])
    # Logits in float32 whatever the activations are, as in models/t5.py.
    x = x.astype(jnp.float32)
    if config.logits_via_embedding:
        logits = (x / math.sqrt(config.emb_dim)) @ embedding.astype(jnp.float32).T
    else:
        logits = x @ decoder["logits_dense"]["kernel"]
    return logits, Cache(keys=keys, values=values)


def _self_attention_bias(decoder: Params, config: t5.T5Config, *, position: jax.Array, max_length: int) -> jax.Array:
    """Relative-position bias of `position` against positions 0..max_length-1, `[H, max_length]`; later ones masked."""
    distances = np.arange(max_length)
    buckets = t5.relative_position_bucket(
        -distances,
        bidirectional=False,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
    )
    table = decoder["relpos_bias"]["rel_embedding"].astype(jnp.float32)  # [H, buckets]
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
