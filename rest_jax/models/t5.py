"""The T5 family as one flax.linen module whose parameter tree is T5X's, name for name.

Facts (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020, arXiv 2002.05202): RMS norm without mean or bias, attention
logits that are not scaled (the query initialiser carries the 1/sqrt(head_dim)), one table of relative position biases
per stack, gated feed-forward layers, dropout broadcast over length. Who differs in what, by T5Config: T5 1.0 (relu,
logits by the embedding), mT5, ByT5 and MADLAD-400 (sizes alone), UMT5 (Chung et al. 2023: a table per layer).

Shape names in the comments: B batch, S source length, T target length, D emb_dim, H heads, K head_dim, F mlp_dim,
V vocabulary.

There is no decoding cache here: rest_jax.sampling decodes with pure functions on the same parameter tree.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.errors import UserError
from rest_jax.models.attention import attend, attention_bias, pair_mask, relative_position_bias, repeat_over_batch

Array = jax.Array
Initializer = Callable[..., Array]

NORM_EPSILON = 1e-6
ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

REMAT_POLICIES = ("none", "minimal", "full")

# Scanned layers: what their parameters' paths hold, and where the parameters have their layer axis (T5X's
# param_scan_axis).
SCANNED_STACK = r"(?:^|/)(?:encoder/encoder|decoder/decoder)/"
SCAN_AXIS = 1

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

    `vocab_size=None` stands for the vocabulary's size rounded up to a multiple of `vocab_multiple`, which
    EncoderDecoderModel fills in; public T5 checkpoints need 32128. `dtype` is that of the activations; parameters and
    logits are float32. `logits_via_embedding=True` with `mlp_activations=('relu',)` is T5 1.0;
    `relative_bias_per_layer=True` is UMT5: every layer has its own table of relative position biases.

    `scan_layers=True` compiles one layer per stack however many there are, on a tree of its own (`layer_stacking`
    converts). `remat_policy` says what a layer's backward pass computes anew instead of keeping: 'none' keeps all,
    'minimal' keeps the results of matrix products with a kernel, 'full' keeps the layer's input alone.
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
    vocab_multiple: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "mlp_activations", tuple(self.mlp_activations))
        counts = ("emb_dim", "num_heads", "num_encoder_layers", "num_decoder_layers", "head_dim", "mlp_dim")
        for name in (*counts, "vocab_multiple"):
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


def narrow_kernels(shapes: Any, config: "T5Config") -> Any:
    """The tree of shapes with the layers' kernels in the activations' type.

    Wherever they are used they are cast to it, so outputs stay what they are, and with bfloat16 a policy that samples
    takes half the memory. Not for training, which adds small steps to them.
    """

    def narrow(path: Any, leaf: Any) -> Any:
        names = [key.key for key in path]
        # Logits are in float32 whatever the activations are.
        is_layers = names[-1] == "kernel" and "logits_dense" not in names
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(config.dtype) if is_layers else leaf.dtype)

    return jax.tree_util.tree_map_with_path(narrow, shapes)


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
    """The table of one stack, or of one layer of UMT5."""

    config: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, mask_bias: Array) -> Array:
        """Adds the bias of every pair of positions. [B, 1, T, S] -> [B, H, T, S]."""
        config = self.config
        shape = (config.num_heads, config.relative_attention_num_buckets)
        table = self.param("rel_embedding", _variance_scaling("uniform", mode="fan_avg"), shape, jnp.float32)
        bias = relative_position_bias(
            table,
            *mask_bias.shape[2:],
            bidirectional=self.bidirectional,
            max_distance=config.relative_attention_max_distance,
        )
        return repeat_over_batch(bias, mask_bias.shape[0]) + mask_bias


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each with a norm before and a residual around it."""

    config: T5Config
    enable_dropout: bool

    @nn.compact
    def __call__(self, x: Array, bias: Array) -> Array:
        config, dtype, enable_dropout = self.config, jnp.dtype(self.config.dtype), self.enable_dropout
        if config.relative_bias_per_layer:
            bias = RelativePositionBias(config, bidirectional=True, name="relpos_bias")(bias)
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
    enable_dropout: bool

    @nn.compact
    def __call__(self, x: Array, encoded: Array, bias: Array, cross_bias: Array) -> Array:
        config, dtype, enable_dropout = self.config, jnp.dtype(self.config.dtype), self.enable_dropout
        if config.relative_bias_per_layer:
            bias = RelativePositionBias(config, bidirectional=False, name="relpos_bias")(bias)
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


# What a layer's backward pass finds kept: T5X's policies by name.
_KEPT_BY_POLICY: Mapping[str, Callable[..., bool] | None] = {
    "minimal": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": None,
}


def _apply_layers(
    layer_class: type[nn.Module],
    x: Array,
    *inputs: Array,
    config: T5Config,
    num_layers: int,
    enable_dropout: bool,
    scanned_name: str,
) -> Array:
    """`x` through the layers of a stack, each of which also reads `inputs`. Called inside the stack's module.

    The layers are the modules `layers_0`, `layers_1`, ..., or with `scan_layers` one module `scanned_name` whose
    parameters have a layer axis at SCAN_AXIS.
    """
    if config.remat_policy != "none":
        # Inside a scan nothing is common to two layers that the compiler could find.
        kept = _KEPT_BY_POLICY[config.remat_policy]
        layer_class = nn.remat(layer_class, policy=kept, prevent_cse=not config.scan_layers)
    if not config.scan_layers:
        for index in range(num_layers):
            x = layer_class(config, enable_dropout, name=f"layers_{index}")(x, *inputs)
        return x
    scan = nn.scan(
        lambda layer, carry, *inputs: (layer(carry, *inputs), None),
        variable_axes={"params": SCAN_AXIS},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=num_layers,
    )
    return scan(layer_class(config, enable_dropout, name=scanned_name), x, *inputs)[0]


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
        bias = attention_bias(mask)
        if not config.relative_bias_per_layer:
            bias = RelativePositionBias(config, bidirectional=True, name="relpos_bias")(bias)
        x = Dropout(config.dropout_rate)(x, enable_dropout)
        x = _apply_layers(
            EncoderLayer,
            x,
            bias,
            config=config,
            num_layers=config.num_encoder_layers,
            enable_dropout=enable_dropout,
            scanned_name="encoder",
        )
        x = LayerNorm(jnp.dtype(config.dtype), name="encoder_norm")(x)
        return Dropout(config.dropout_rate)(x, enable_dropout)


class Decoder(nn.Module):
    """Embedded target prefix and encodings -> final states [B, T, D], or float32 logits [B, T, V] of T5 1.1."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, encoded: Array, mask: Array, cross_mask: Array, enable_dropout: bool) -> Array:
        config = self.config
        bias = attention_bias(mask)
        if not config.relative_bias_per_layer:
            bias = RelativePositionBias(config, bidirectional=False, name="relpos_bias")(bias)
        x = Dropout(config.dropout_rate)(x, enable_dropout)
        x = _apply_layers(
            DecoderLayer,
            x,
            encoded,
            bias,
            attention_bias(cross_mask),
            config=config,
            num_layers=config.num_decoder_layers,
            enable_dropout=enable_dropout,
            scanned_name="decoder",
        )
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
