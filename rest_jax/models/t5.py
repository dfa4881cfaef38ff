"""T5 1.0 / 1.1 as a flax.linen module whose parameter tree is T5X's, name for name.

Facts (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202): RMS norm without mean or bias, attention
logits that are not scaled (the query initialiser carries the 1/sqrt(head_dim)), one table of relative position biases
per stack, gated feed-forward layers, dropout broadcast over length.

Shape names in the comments: B batch, S source length, T target length, D emb_dim, H heads, K head_dim, F mlp_dim,
V vocabulary.

There is no decoding cache here: rest_jax.sampling decodes with pure functions on the same parameter tree.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.errors import UserError

Array = jax.Array
Initializer = Callable[..., Array]

NORM_EPSILON = 1e-6
# Added to the attention logits of pairs that must not see each other. Finite, so that a row with nothing to see
# (padding) becomes uniform rather than NaN.
MASKED_BIAS = -1e10

ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

REMAT_POLICIES = ("none", "minimal", "full")

# Logical axis names of every parameter: (regex that the END of the 'a/b/c' path must match, axis names).
PARAM_LOGICAL_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"token_embedder/embedding", ("vocab", "embed")),
    (r"relpos_bias/rel_embedding", ("heads", "relpos_buckets")),
    (r"(attention|self_attention|encoder_decoder_attention)/(query|key|value)/kernel", ("embed", "joined_kv")),
    (r"(attention|self_attention|encoder_decoder_attention)/out/kernel", ("joined_kv", "embed")),
    (r"mlp/wi(_\d+)?/kernel", ("embed", "mlp")),
    (r"mlp/wo/kernel", ("mlp", "embed")),
    (r"(layer_norm|encoder_norm|decoder_norm)/scale", ("embed",)),
    (r"logits_dense/kernel", ("embed", "vocab")),
)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and numerics of a T5.

    `vocab_size=None` stands for "the vocabulary's size rounded up to a multiple of 128", which EncoderDecoderModel
    fills in; public T5 checkpoints need 32128. `dtype` is that of the activations; parameters and logits are float32.
    `logits_via_embedding=True` with `mlp_activations=('relu',)` is T5 1.0; `relative_bias_per_layer=True` is UMT5, where
    every layer has its own table of relative position biases. `scan_layers=True` compiles one layer per stack whatever
    the depth, on T5X's scalable_t5 tree (see `layer_stacking`). `remat_policy` says what a layer's backward pass
    computes anew in place of keeping: 'none', 'minimal' (all but the matrix products) or 'full' (everything).
    """

    vocab_size: int | None
    emb_dim: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    head_dim: int
    mlp_dim: int
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    dtype: str = "float32"
    logits_via_embedding: bool = False
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    relative_bias_per_layer: bool = False
    scan_layers: bool = False
    remat_policy: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        for name in ("emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers", "head_dim", "mlp_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"T5Config.{name} must be a whole number of at least 1; got {value!r}.")
        if not isinstance(self.dropout_rate, (int, float)) or not 0.0 <= self.dropout_rate < 1.0:
            raise UserError(f"T5Config.dropout_rate must be in [0, 1); got {self.dropout_rate!r}. Set DROPOUT_RATE.")
        unknown = [name for name in self.mlp_activations if name not in ACTIVATIONS]
        if unknown or not self.mlp_activations:
            raise UserError(
                f"T5Config.mlp_activations={self.mlp_activations!r}: give one or more of {sorted(ACTIVATIONS)}, "
                "e.g. ('gelu', 'linear') for T5 1.1."
            )
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"T5Config.dtype must be 'float32', 'bfloat16' or 'float16'; got {self.dtype!r}.")
        for name in ("logits_via_embedding", "relative_bias_per_layer", "scan_layers"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"T5Config.{name} must be True or False; got {getattr(self, name)!r}.")
        if self.remat_policy not in REMAT_POLICIES:
            raise UserError(
                f"T5Config.remat_policy must be one of {', '.join(map(repr, REMAT_POLICIES))}; "
                f"got {self.remat_policy!r}."
            )


def rms_norm(x: Array, scale: Array, *, dtype: Any) -> Array:
    """x / rms(x) * scale over the last axis, computed in float32 (Zhang & Sennrich 2019). [..., D], [D] -> [..., D]."""
    x = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + NORM_EPSILON)
    return (x * inverse_rms * scale).astype(dtype)


def relative_position_bucket(
    relative_position: np.ndarray, *, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> np.ndarray:
    """Bucket of each offset (key position - query position).

    Half of the buckets are exact small offsets, the other half grow logarithmically up to max_distance, beyond which
    all share the last one. Bidirectional: the first half of all buckets serves keys at or before the query, the second
    half keys after it. Otherwise keys after the query fall in bucket 0. Runs on the host in numpy: lengths are static.
    """
    offset = np.asarray(relative_position, np.int32)
    first = np.zeros_like(offset)
    if bidirectional:
        num_buckets //= 2
        first = np.where(offset > 0, num_buckets, 0).astype(np.int32)
        distance = np.abs(offset)
    else:
        distance = np.maximum(-offset, 0)
    num_exact = num_buckets // 2
    # float32 like the original, so that offsets on a bucket's edge fall on the same side.
    log_ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(num_exact) + np.finfo(np.float32).eps)
    log_ratio = log_ratio / np.log(np.float32(max_distance / num_exact))
    logarithmic = num_exact + (log_ratio * (num_buckets - num_exact)).astype(np.int32)
    logarithmic = np.minimum(logarithmic, num_buckets - 1)
    return first + np.where(distance < num_exact, distance, logarithmic).astype(np.int32)


def relative_position_bias(
    rel_embedding: Array, query_length: int, key_length: int, *, bidirectional: bool, max_distance: int
) -> Array:
    """Bias of every (query, key) pair of positions. [H, num_buckets] -> [1, H, query_length, key_length]."""
    num_heads, num_buckets = rel_embedding.shape
    # The bias depends on key - query alone: look up one value per offset and lay the diagonals out by reshaping, so
    # that the gradient is a sum over a skewed view rather than a scatter of query_length * key_length elements.
    # Entry m of `offsets` is the offset with key - query = m (mod period).
    period = query_length + key_length
    offsets = np.arange(period)
    offsets = np.where(offsets < key_length, offsets, offsets - period)
    buckets = relative_position_bucket(
        offsets, bidirectional=bidirectional, num_buckets=num_buckets, max_distance=max_distance
    )
    # [H, num_buckets] -> [H, period]
    by_offset = jnp.take(rel_embedding, buckets, axis=1)
    # Each row of length period - 1 of the repeated table starts one entry earlier (mod period) than the row above.
    tiled = jnp.broadcast_to(by_offset[:, None, :], (num_heads, query_length, period)).reshape(num_heads, -1)
    skewed = tiled[:, : query_length * (period - 1)].reshape(num_heads, query_length, period - 1)
    return skewed[None, :, :, :key_length]


def attention_bias(mask: Array) -> Array:
    """[B, 1, T, S] bool, True = may attend -> float32 to add to the attention logits."""
    return jnp.where(mask, 0.0, MASKED_BIAS).astype(jnp.float32)


def pair_mask(
    query_valid: Array, key_valid: Array, query_segment_ids: Array | None, key_segment_ids: Array | None
) -> Array:
    """Pairs that are both real tokens and, in packed rows, of one segment. [B, T], [B, S] -> bool [B, 1, T, S]."""
    mask = query_valid[:, :, None] & key_valid[:, None, :]
    if query_segment_ids is not None and key_segment_ids is not None:
        mask &= query_segment_ids[:, :, None] == key_segment_ids[:, None, :]
    return mask[:, None, :, :]


def attend(query: Array, key: Array, value: Array, bias: Array) -> Array:
    """softmax(query · key + bias) · value, the softmax in float32 whatever the activations are.

    [B, T, H, K], [B, S, H, K], [B, S, H, K], bias [B or 1, H or 1, T, S] -> [B, T, H, K]
    """
    logits = jnp.einsum("bqhk,bshk->bhqs", query, key, preferred_element_type=jnp.float32) + bias
    # Divided by the sum after the product with the values: T*K divisions in place of T*S, in the gradient as well, and
    # no normalised copy of the [B, H, T, S] weights.
    weights = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    sums = jnp.sum(weights, axis=-1).swapaxes(1, 2)[..., None]
    outputs = jnp.einsum("bhqs,bshk->bqhk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (outputs / sums).astype(value.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeat_over_batch(x: Array, batch_size: int) -> Array:
    """[1, ...] -> [batch_size, ...]. The gradient sums over the batch by a matrix product, 5 times faster on CPU."""
    return jnp.broadcast_to(x, (batch_size, *x.shape[1:]))


def _repeat_forward(x: Array, batch_size: int) -> tuple[Array, None]:
    return repeat_over_batch(x, batch_size), None


def _repeat_backward(batch_size: int, _: None, cotangent: Array) -> tuple[Array]:
    ones = jnp.ones((1, batch_size), cotangent.dtype)
    return (jnp.tensordot(ones, cotangent, axes=1, precision=jax.lax.Precision.HIGHEST),)


repeat_over_batch.defvjp(_repeat_forward, _repeat_backward)


def _variance_scaling(
    distribution: Literal["normal", "truncated_normal", "uniform"], *, mode: Literal["fan_in", "fan_avg"] = "fan_in"
) -> Initializer:
    return nn.initializers.variance_scaling(1.0, mode, distribution)


def _query_init(head_dim: int) -> Initializer:
    # The scale that T5 leaves out of the attention logits.
    init = _variance_scaling("normal")
    return lambda key, shape, dtype=jnp.float32: init(key, shape, dtype) / math.sqrt(head_dim)


class Dense(nn.Module):
    """x @ kernel, no bias. [..., in] -> [..., features]."""

    features: int
    kernel_init: Initializer
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        # In two dimensions, where the CPU compiler needs no transposed copy for the kernel's gradient (half the time).
        flat = jnp.dot(x.reshape(-1, x.shape[-1]).astype(self.dtype), kernel.astype(self.dtype))
        return flat.reshape(*x.shape[:-1], self.features)


class LayerNorm(nn.Module):
    """T5's RMS norm."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return rms_norm(x, scale, dtype=self.dtype)


class Dropout(nn.Module):
    """Dropout with one mask per row for all positions. [B, L, D] -> [B, L, D]."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, enable_dropout: bool) -> Array:
        if not enable_dropout or self.rate == 0.0:
            return x
        return x * _dropout_mask(self.make_rng("dropout"), self.rate, (x.shape[0], 1, x.shape[-1]), x.dtype)


def _dropout_mask(rng: Array, rate: float, shape: tuple[int, ...], dtype: Any) -> Array:
    """0 with probability rate, else 1 / (1 - rate)."""
    return jax.random.bernoulli(rng, 1.0 - rate, shape).astype(dtype) / jnp.asarray(1.0 - rate, dtype)


class Attention(nn.Module):
    """Multi-head attention without logit scaling."""

    config: T5Config

    @nn.compact
    def __call__(self, inputs_q: Array, inputs_kv: Array, bias: Array, enable_dropout: bool) -> Array:
        """[B, T, D], [B, S, D], bias [B or 1, H or 1, T, S] -> [B, T, D]."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        joined = config.num_heads * config.head_dim
        kv_init = _variance_scaling("normal")
        # [B, L, D] -> [B, L, H, K]
        query = Dense(joined, _query_init(config.head_dim), dtype, name="query")(inputs_q)
        key = Dense(joined, kv_init, dtype, name="key")(inputs_kv)
        value = Dense(joined, kv_init, dtype, name="value")(inputs_kv)
        query, key, value = (x.reshape(*x.shape[:2], -1, config.head_dim) for x in (query, key, value))
        if enable_dropout and config.dropout_rate > 0.0:
            # Dropout of attention weights, one mask for all queries: their mask depends on (row, head, key) only, so
            # it scales the values instead, S*H*K products in place of T*S*H.
            mask_shape = (value.shape[0], value.shape[1], config.num_heads, 1)
            value = value * _dropout_mask(self.make_rng("dropout"), config.dropout_rate, mask_shape, value.dtype)
        outputs = attend(query, key, value, bias).reshape(*query.shape[:2], joined)
        return Dense(inputs_q.shape[-1], kv_init, dtype, name="out")(outputs)


class Mlp(nn.Module):
    """Feed-forward layer: the product of one projection per activation, then back. [B, L, D] -> [B, L, D]."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, enable_dropout: bool) -> Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        init = _variance_scaling("truncated_normal")
        gated = None
        for index, activation in enumerate(config.mlp_activations):
            name = "wi" if len(config.mlp_activations) == 1 else f"wi_{index}"
            hidden = ACTIVATIONS[activation](Dense(config.mlp_dim, init, dtype, name=name)(x))
            gated = hidden if gated is None else gated * hidden
        assert gated is not None  # T5Config refuses an empty mlp_activations
        gated = nn.with_logical_constraint(gated, ("batch", "length", "mlp"))
        gated = Dropout(config.dropout_rate)(gated, enable_dropout)
        return Dense(x.shape[-1], init, dtype, name="wo")(gated)


class RelativePositionBias(nn.Module):
    """The table of one stack."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, query_length: int, key_length: int) -> Array:
        shape = (self.config.num_heads, self.config.relative_attention_num_buckets)
        table = self.param("rel_embedding", _variance_scaling("uniform", mode="fan_avg"), shape, jnp.float32)
        return relative_position_bias(
            table,
            query_length,
            key_length,
            bidirectional=self.bidirectional,
            max_distance=self.config.relative_attention_max_distance,
        )


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a norm before and a residual around it."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, bias: Array, enable_dropout: bool) -> Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        y = LayerNorm(dtype, name="pre_attention_layer_norm")(x)
        y = Attention(config, name="attention")(y, y, bias, enable_dropout)
        x = x + Dropout(config.dropout_rate)(y, enable_dropout)
        y = LayerNorm(dtype, name="pre_mlp_layer_norm")(x)
        y = Mlp(config, name="mlp")(y, enable_dropout)
        return x + Dropout(config.dropout_rate)(y, enable_dropout)


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a norm before and a residual around it."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, encoded: Array, bias: Array, cross_bias: Array, enable_dropout: bool) -> Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        y = LayerNorm(dtype, name="pre_self_attention_layer_norm")(x)
        y = Attention(config, name="self_attention")(y, y, bias, enable_dropout)
        x = x + Dropout(config.dropout_rate)(y, enable_dropout)
        y = LayerNorm(dtype, name="pre_cross_attention_layer_norm")(x)
        y = Attention(config, name="encoder_decoder_attention")(y, encoded, cross_bias, enable_dropout)
        x = x + Dropout(config.dropout_rate)(y, enable_dropout)
        y = LayerNorm(dtype, name="pre_mlp_layer_norm")(x)
        y = Mlp(config, name="mlp")(y, enable_dropout)
        return x + Dropout(config.dropout_rate)(y, enable_dropout)


class TokenEmbedder(nn.Module):
    """The table shared by both stacks, and by the logits of T5 1.0."""

    config: T5Config

    def setup(self) -> None:
        if self.config.vocab_size is None:
            raise UserError(
                "T5Config.vocab_size is None: build the model through EncoderDecoderModel, which takes it from the "
                "vocabulary, or give a number (public T5 checkpoints: 32128)."
            )
        shape = (self.config.vocab_size, self.config.emb_dim)
        self.embedding = self.param("embedding", nn.initializers.normal(stddev=1.0), shape, jnp.float32)

    def __call__(self, tokens: Array) -> Array:
        """int [B, L] -> [B, L, D]."""
        return jnp.take(self.embedding, tokens, axis=0, mode="clip").astype(self.config.dtype)

    def attend(self, x: Array) -> Array:
        """[B, T, D] -> logits [B, T, V]: x E^T / sqrt(D)."""
        x = x.astype(jnp.float32) / math.sqrt(self.config.emb_dim)
        return jnp.einsum("btd,vd->btv", x, self.embedding)


class Encoder(nn.Module):
    """Embedded source -> encodings, dropout included. [B, S, D], bool [B, 1, S, S] -> [B, S, D]."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, mask: Array, enable_dropout: bool) -> Array:
        config = self.config
        length = x.shape[1]
        bias = RelativePositionBias(config, bidirectional=True, name="relpos_bias")(length, length)
        bias = repeat_over_batch(bias, x.shape[0]) + attention_bias(mask)
        x = Dropout(config.dropout_rate)(x, enable_dropout)
        for index in range(config.num_encoder_layers):
            x = EncoderLayer(config, name=f"layers_{index}")(x, bias, enable_dropout)
        x = LayerNorm(jnp.dtype(config.dtype), name="encoder_norm")(x)
        return Dropout(config.dropout_rate)(x, enable_dropout)


class Decoder(nn.Module):
    """Embedded target prefix and encodings -> final states [B, T, D], or float32 logits [B, T, V] of T5 1.1."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, encoded: Array, mask: Array, cross_mask: Array, enable_dropout: bool) -> Array:
        config = self.config
        length = x.shape[1]
        bias = RelativePositionBias(config, bidirectional=False, name="relpos_bias")(length, length)
        bias = repeat_over_batch(bias, x.shape[0]) + attention_bias(mask)
        cross_bias = attention_bias(cross_mask)
        x = Dropout(config.dropout_rate)(x, enable_dropout)
        for index in range(config.num_decoder_layers):
            x = DecoderLayer(config, name=f"layers_{index}")(x, encoded, bias, cross_bias, enable_dropout)
        x = LayerNorm(jnp.dtype(config.dtype), name="decoder_norm")(x)
        x = Dropout(config.dropout_rate)(x, enable_dropout)
        if config.logits_via_embedding:
            return x
        init = _variance_scaling("truncated_normal")
        return Dense(config.vocab_size or 0, init, jnp.float32, name="logits_dense")(x)


class Transformer(nn.Module):
    """Encoder-decoder with T5X's methods `__call__`, `encode` and `decode`."""

    config: T5Config

    def setup(self) -> None:
        self.token_embedder = TokenEmbedder(self.config)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(
        self, encoder_input_tokens: Array, encoder_segment_ids: Array | None = None, enable_dropout: bool = True
    ) -> Array:
        """int [B, S] -> encodings [B, S, D]."""
        valid = encoder_input_tokens > 0
        mask = pair_mask(valid, valid, encoder_segment_ids, encoder_segment_ids)
        return self.encoder(self.token_embedder(encoder_input_tokens), mask, enable_dropout)

    def decode(
        self,
        encoded: Array,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        decoder_positions: Array | None = None,
        enable_dropout: bool = True,
        decode: bool = False,
    ) -> Array:
        """Teacher-forced logits float32 [B, T, V] given encodings [B, S, D].

        `decoder_positions` is accepted for T5X's sake: relative biases need no absolute positions.
        """
        del decoder_positions
        if decode:
            raise NotImplementedError("Transformer has no decoding cache: decode with rest_jax.sampling.")
        target_valid, source_valid = decoder_target_tokens > 0, encoder_input_tokens > 0
        mask = pair_mask(target_valid, target_valid, decoder_segment_ids, decoder_segment_ids)
        length = decoder_input_tokens.shape[1]
        mask &= np.tril(np.ones((length, length), bool))
        cross_mask = pair_mask(target_valid, source_valid, decoder_segment_ids, encoder_segment_ids)
        y = self.decoder(self.token_embedder(decoder_input_tokens), encoded, mask, cross_mask, enable_dropout)
        logits = self.token_embedder.attend(y) if self.config.logits_via_embedding else y
        return nn.with_logical_constraint(logits, ("batch", "length", "vocab"))

    def __call__(
        self,
        encoder_input_tokens: Array,
        decoder_input_tokens: Array,
        decoder_target_tokens: Array,
        encoder_segment_ids: Array | None = None,
        decoder_segment_ids: Array | None = None,
        encoder_positions: Array | None = None,
        decoder_positions: Array | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
    ) -> Array:
        """Teacher-forced logits. int [B, S], [B, T], [B, T] -> float32 [B, T, V]."""
        del encoder_positions
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout)
        return self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            decoder_positions,
            enable_dropout,
            decode,
        )
