"""The T5 decoder one position at a time, as pure functions of T5X's parameter tree.

A slot decodes one sample; slots stand in groups, and a group's slots share the cross-attention keys and values of the
few sources that they work on: attention over the source is a matrix product over the group's slots, and nothing is
repeated per sample. `models/t5.py` is the same network over whole sequences; a test holds the two together.

Layers stand in the program one after another or, on the tree of `scan_layers`, in a loop that is compiled once; then
what is kept per layer is one array with a layer axis in front.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.models import attention, t5
from rest_jax.sampling import cache as cache_lib
from rest_jax.sampling.cache import Cache, KeysValues
from rest_jax.sampling.processors import NEGATIVE_INFINITY

Params = Mapping[str, Any]
Weights = dict[str, Any]
# One array per layer, or with `scan_layers` one of all: `[num_layers, ...]`.
Layers = list[jax.Array] | jax.Array


class CrossAttention(NamedTuple):
    """What the decoder reads of sources, per layer; `H` heads of `K`."""

    keys: Layers  # [groups, H, source_columns, K]
    values: Layers  # [groups, H, source_columns, K]


def pack_weights(params: Params, config: t5.T5Config) -> Weights:
    """The tree as the loop reads it, made once rather than at every position.

    Kernels `[in, count, out]` in the activations' type, those that are applied to the same input side by side; what is
    used in float32 as it is.
    """
    decoder = params["decoder"]
    axis = 1 if config.scan_layers else 0  # of a kernel's inputs

    def kernel(*kernels: jax.Array) -> jax.Array:  # [in, out] each
        return jnp.stack([k.astype(config.dtype) for k in kernels], axis=axis + 1)

    def block(tree: Params) -> Weights:
        cross, mlp, own = tree["encoder_decoder_attention"], tree["mlp"], tree["self_attention"]
        names = sorted(name for name in mlp if name.startswith("wi"))
        packed = {
            "self_norm": tree["pre_self_attention_layer_norm"]["scale"],
            "self_in": kernel(*(own[name]["kernel"] for name in ("query", "key", "value"))),
            "self_out": kernel(own["out"]["kernel"]),
            "cross_norm": tree["pre_cross_attention_layer_norm"]["scale"],
            "cross_in": kernel(cross["query"]["kernel"]),
            "cross_out": kernel(cross["out"]["kernel"]),
            "mlp_norm": tree["pre_mlp_layer_norm"]["scale"],
            "mlp_in": kernel(*(mlp[name]["kernel"] for name in names)),
            "mlp_out": kernel(mlp["wo"]["kernel"]),
        }
        if config.relative_bias_per_layer:
            packed["bias"] = tree["relpos_bias"]["rel_embedding"]
        return packed

    layers: Any
    if config.scan_layers:
        layers = block(jax.tree.map(lambda leaf: jnp.moveaxis(leaf, t5.SCAN_AXIS, 0), decoder["decoder"]))
    else:
        layers = [block(decoder[f"layers_{layer}"]) for layer in range(config.num_decoder_layers)]
    embedding = params["token_embedder"]["embedding"]
    # Logits in float32 whatever the activations are, as in models/t5.py.
    if config.logits_via_embedding:
        logits = embedding.astype(jnp.float32).T / math.sqrt(config.emb_dim)
    else:
        logits = decoder["logits_dense"]["kernel"]
    weights = {
        "embedding": embedding,
        "layers": layers,
        "norm": decoder["decoder_norm"]["scale"],
        "logits": logits[:, None],
    }
    if not config.relative_bias_per_layer:
        weights["bias"] = decoder["relpos_bias"]["rel_embedding"]
    return weights


def _project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x` `[slots, in]` by a kernel of `pack_weights`: `[slots, count, out]`, in `x`'s type."""
    return jnp.einsum("si,ico->sco", x, kernel)


def cross_attention(params: Params, config: t5.T5Config, *, encoded: jax.Array) -> CrossAttention:
    """Keys and values of the sources, once for all samples and positions: each source a group.

    Args:
      params: T5X's tree.
      config: the network's shape.
      encoded: `[batch, source_length, emb_dim]`.
    """

    def project(block: Params) -> tuple[jax.Array, jax.Array]:
        def one(name: str) -> jax.Array:  # [batch, source_length, H * K] -> decode layout
            projected = encoded @ block["encoder_decoder_attention"][name]["kernel"].astype(config.dtype)
            return projected.reshape(*encoded.shape[:2], config.num_heads, config.head_dim).transpose(0, 2, 1, 3)

        return one("key"), one("value")

    decoder = params["decoder"]
    if config.scan_layers:
        stacked = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, t5.SCAN_AXIS, 0), decoder["decoder"])
        return CrossAttention(*jax.lax.map(project, stacked))
    pairs = [project(decoder[f"layers_{layer}"]) for layer in range(config.num_decoder_layers)]
    return CrossAttention(*map(list, zip(*pairs, strict=True)))


def empty_cache(
    config: t5.T5Config,
    *,
    max_length: int,
    slots: int,
    dtype: str | None = None,
    max_blocks: int = cache_lib.MAX_BLOCKS,
    head_groups: int | None = None,
) -> Cache:
    """Nothing yet; `dtype` None is the activations'."""
    return cache_lib.empty(
        layers=config.num_decoder_layers,
        scanned=config.scan_layers,
        slots=slots,
        heads=config.num_heads,
        head_dim=config.head_dim,
        max_length=max_length,
        dtype=dtype or config.dtype,
        max_blocks=max_blocks,
        head_groups=head_groups,
    )


def decode_position(
    weights: Weights,
    config: t5.T5Config,
    *,
    tokens: jax.Array,
    positions: jax.Array,
    filled: jax.Array,
    cache: Cache,
    cross: CrossAttention,
    cross_bias: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Logits for the token after `tokens`.

    Args:
      weights: of `pack_weights`.
      config: the network's shape.
      tokens: `[slots]` int32, the tokens at `positions` of each slot's decoder input (0 at the start); a group's slots
        stand together.
      positions: `[slots]` int32.
      filled: scalar int32, more than the positions of all slots that count.
      cache: filled for positions before `positions`.
      cross: of the groups' sources.
      cross_bias: `[groups, slots per group, source_columns]` float32, very negative at what a slot may not read.

    Returns:
      Logits `[slots, vocab]` float32, and the cache with `positions` filled.
    """
    x = jnp.take(weights["embedding"], tokens, axis=0).astype(config.dtype)  # [slots, emb_dim]

    columns = cache_lib.columns_of(cache)

    def bias_of(owner: Weights) -> jax.Array:
        return _self_attention_bias(owner["bias"], config=config, positions=positions, columns=columns)

    shared_bias = None if config.relative_bias_per_layer else bias_of(weights)

    def run(
        block: Weights, x: jax.Array, cache: KeysValues, keys: jax.Array, values: jax.Array, layer: jax.Array | None
    ) -> tuple[jax.Array, KeysValues]:
        bias = bias_of(block) if shared_bias is None else shared_bias
        projected = _project(_norm(x, block["self_norm"]), block["self_in"])
        query, key, value = jnp.unstack(projected.reshape(len(x), 3, config.num_heads, config.head_dim), axis=1)
        cache = cache_lib.write(cache, key, value, positions=positions, layer=layer)
        own = cache if layer is None else jax.tree.map(lambda leaf: leaf[layer], cache)
        context = cache_lib.attend(query, own, bias=bias, filled=filled)
        x = x + _project(context.reshape(len(x), -1), block["self_out"])[:, 0]

        query = _project(_norm(x, block["cross_norm"]), block["cross_in"]).reshape(query.shape)
        context = _read_sources(query, keys=keys, values=values, bias=cross_bias)
        x = x + _project(context.reshape(len(x), -1), block["cross_out"])[:, 0]

        hidden = _project(_norm(x, block["mlp_norm"]), block["mlp_in"])  # [slots, count, mlp_dim]
        parts = [t5.ACTIVATIONS[name](hidden[:, number]) for number, name in enumerate(config.mlp_activations)]
        return x + _project(functools.reduce(jnp.multiply, parts), block["mlp_out"])[:, 0], cache

    if config.scan_layers:

        def scanned(carry: tuple[Any, Any], inputs: tuple[Any, ...]) -> tuple[tuple[Any, Any], None]:
            layer, block, keys, values = inputs
            return run(block, carry[0], carry[1], keys, values, layer), None

        layers = (jnp.arange(config.num_decoder_layers), weights["layers"], cross.keys, cross.values)
        (x, cache), _ = jax.lax.scan(scanned, (x, cache), layers)
    else:
        assert isinstance(cache, list)  # empty_cache makes one for each layer
        written = []
        for block, own, keys, values in zip(weights["layers"], cache, cross.keys, cross.values, strict=True):
            x, own = run(block, x, own, keys, values, None)
            written.append(own)
        cache = written
    x = _norm(x, weights["norm"]).astype(jnp.float32)
    return _project(x, weights["logits"])[:, 0], cache


def _read_sources(query: jax.Array, *, keys: jax.Array, values: jax.Array, bias: jax.Array) -> jax.Array:
    """`[slots, H, K]` of the same; keys and values as in `CrossAttention`, bias as in `decode_position`.

    One matrix product per group and head, over the group's slots.
    """
    groups, per_group, _ = bias.shape
    query = query.reshape(groups, per_group, *query.shape[1:])
    scores = jnp.einsum("gnhk,ghsk->ghns", query, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores + bias[:, None], axis=-1).astype(query.dtype)
    context = jnp.einsum("ghns,ghsk->gnhk", weights, values)
    return context.reshape(groups * per_group, *context.shape[2:])


def _self_attention_bias(table: jax.Array, *, config: t5.T5Config, positions: jax.Array, columns: int) -> jax.Array:
    """Relative-position bias of each slot's position against its columns, `[slots, H, columns]`; later ones masked.

    `table` `[H, buckets]` is the decoder's, or its layer's where each has one.
    """
    distances = np.arange(columns)
    buckets = attention.relative_position_bucket(
        -distances,
        bidirectional=False,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
    )
    by_distance = table.astype(jnp.float32)[:, buckets].T  # [columns, H]
    distance = positions[:, None] - distances  # [slots, columns]
    bias = jnp.where(distance[..., None] >= 0, by_distance[jnp.maximum(distance, 0)], NEGATIVE_INFINITY)
    return bias.transpose(0, 2, 1)


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`t5.rms_norm` of `[slots, emb_dim]`; its sum runs over lanes first, which vectorises."""
    y = x.astype(jnp.float32)
    lanes = math.gcd(y.shape[1], 32)
    squares = jnp.sum(jnp.square(y).reshape(len(y), -1, lanes), axis=1)
    inverse_rms = jax.lax.rsqrt(jnp.sum(squares, axis=1, keepdims=True) / y.shape[1] + t5.NORM_EPSILON)
    return (y * inverse_rms * scale).astype(x.dtype)
