"""T5X's EncoderDecoderModel: the methods through which the rest of rest_jax speaks to any model."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from rest_jax.errors import UserError
from rest_jax.models.token_losses import smoothed_cross_entropy, target_statistics, token_log_probs

Array = jax.Array
Batch = Mapping[str, Array]
Params = Any

# An embedding with fewer rows than this past its vocabulary's ids is its own: UMT5 has 300 sentinels, then padding.
MAX_SPARE_ROWS = 1024
LOSS_NORMALIZING_NAMES = ("NUM_REAL_TARGET_TOKENS", "NUM_TOTAL_TARGET_TOKENS", "AVERAGE_PER_SEQUENCE")


class SizedVocabulary(Protocol):
    """What a model asks of a vocabulary; seqio's and rest_jax.data.vocabulary's both have it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_id(self) -> int: ...


# decode_fn(model, params, encoder_input_tokens [B, S], *, num_decodes, max_length, rng, **decoder_params)
#   -> tokens int32 [B, num_decodes, max_length], scores float32 [B, num_decodes], in any order.
DecodeFn = Callable[..., tuple[Array, Array]]


@dataclasses.dataclass(frozen=True)
class EncDecFeatureConverter:
    """Names of the batch features, as seqio.EncDecFeatureConverter makes them.

    A declaration only: rest_jax.data.batching builds the batches, and the core never imports seqio.
    """

    task_features: tuple[str, ...] = ("inputs", "targets")
    model_features: tuple[str, ...] = (
        "encoder_input_tokens",
        "decoder_input_tokens",
        "decoder_target_tokens",
        "decoder_loss_weights",
    )
    packing_features: tuple[str, ...] = (
        "encoder_segment_ids",
        "encoder_positions",
        "decoder_segment_ids",
        "decoder_positions",
    )


def _with_vocab_size(module: nn.Module, *vocabularies: SizedVocabulary | None) -> nn.Module:
    """The module with config.vocab_size filled in where it is None; anything else is returned as it is."""
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "vocab_size"):
        return module
    sizes = [vocabulary.vocab_size for vocabulary in vocabularies if vocabulary is not None]
    if config.vocab_size is None:
        if not sizes:
            raise UserError(
                "T5Config.vocab_size is not set and there is no vocabulary to take it from. Set VOCABULARY."
            )
        size = math.ceil(max(sizes) / config.vocab_multiple) * config.vocab_multiple
        return module.clone(config=dataclasses.replace(config, vocab_size=size))
    if sizes and max(sizes) > config.vocab_size:
        raise UserError(
            f"T5Config.vocab_size={config.vocab_size} is smaller than the vocabulary, which has {max(sizes)} pieces. "
            "Leave it None to take the vocabulary's size, or raise it to that at least; for a public checkpoint, set "
            "VOCABULARY to the checkpoint's own."
        )
    if sizes and config.vocab_size - max(sizes) >= max(MAX_SPARE_ROWS, getattr(config, "vocab_multiple", 0)):
        raise UserError(
            f"T5Config.vocab_size={config.vocab_size} is so much larger than the vocabulary, which has {max(sizes)} "
            "pieces, that the embedding must be another vocabulary's. Set VOCABULARY to the checkpoint's own, or "
            "vocab_size to None to take the vocabulary's size."
        )
    return module


class EncoderDecoderModel:
    """A translation model with T5X's methods. Holds no parameters: every method is a pure function of them.

    Args:
      module: a flax module with `__call__`, `encode` and `decode` (rest_jax.models.t5.Transformer, or T5X's). Where its
        `config.vocab_size` is None, the larger vocabulary's size rounded up to a multiple of `config.vocab_multiple` is
        filled in.
      input_vocabulary, output_vocabulary: anything with `vocab_size` and `eos_id`; None where the module's config has
        the size and EOS is 1.
      optimizer_def: kept for T5X's sake; training takes its optimiser from its own configuration.
      decode_fn: what predict_batch draws with; None: rest_jax.sampling.
      label_smoothing: in [0, 1).
      z_loss: factor of log_z**2 in the loss.
      loss_normalizing_factor: None, a number that the summed loss is divided by, or one of T5X's names:
        'NUM_REAL_TARGET_TOKENS', 'NUM_TOTAL_TARGET_TOKENS', 'AVERAGE_PER_SEQUENCE' (the mean over a sequence's tokens,
        summed over sequences; per row, or per segment where rows are packed).
    """

    FEATURE_CONVERTER_CLS = EncDecFeatureConverter

    def __init__(
        self,
        module: nn.Module,
        input_vocabulary: SizedVocabulary | None,
        output_vocabulary: SizedVocabulary | None,
        optimizer_def: Any = None,
        decode_fn: DecodeFn | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        loss_normalizing_factor: float | str | None = None,
    ) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise UserError(f"LABEL_SMOOTHING must be in [0, 1); got {label_smoothing!r}.")
        if z_loss < 0.0:
            raise UserError(f"Z_LOSS must not be negative; got {z_loss!r}.")
        if isinstance(loss_normalizing_factor, str) and loss_normalizing_factor not in LOSS_NORMALIZING_NAMES:
            raise UserError(
                f"LOSS_NORMALIZING_FACTOR={loss_normalizing_factor!r}: give None, a number or one of "
                f"{', '.join(map(repr, LOSS_NORMALIZING_NAMES))}."
            )
        if isinstance(loss_normalizing_factor, (int, float)) and not loss_normalizing_factor > 0.0:
            raise UserError(f"LOSS_NORMALIZING_FACTOR must be positive; got {loss_normalizing_factor!r}.")
        self.module: Any = _with_vocab_size(module, input_vocabulary, output_vocabulary)
        self.input_vocabulary = input_vocabulary
        self.output_vocabulary = output_vocabulary
        self.optimizer_def = optimizer_def
        self.decode_fn = decode_fn
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.loss_normalizing_factor = loss_normalizing_factor

    def get_initial_variables(
        self,
        rng: Array,
        input_shapes: Mapping[str, tuple[int, ...]],
        input_types: Mapping[str, Any] | None = None,
    ) -> dict[str, Params]:
        """Fresh parameters `{'params': tree}`, a function of `rng` alone: no parameter's shape depends on the lengths.

        Args:
          rng: key.
          input_shapes: shapes [batch, length] of the batch features; only their presence matters.
          input_types: dtypes of the features, int32 where not given.
        """
        names = ("encoder_input_tokens", "decoder_input_tokens")
        missing = [name for name in names if name not in input_shapes]
        if missing:
            raise UserError(f"input_shapes lacks {missing}; it has {sorted(input_shapes)}.")
        types = input_types or {}
        # One token is enough to lay out the tree, and cheap where the caller does not jit.
        source, target = (jnp.ones((1, 1), types.get(name, jnp.int32)) for name in names)
        variables = self.module.init(rng, source, target, target, enable_dropout=False)
        return {"params": variables["params"]}

    def compute_logits(
        self, params: Params, batch: Batch, dropout_rng: Array | None = None, mutable: Any = False
    ) -> Any:
        """Teacher-forced logits float32 [B, T, V]; `(logits, variables)` where `mutable` names collections.

        `dropout_rng=None` means deterministic. The batch may be packed.
        """
        return self.module.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            encoder_segment_ids=batch.get("encoder_segment_ids"),
            decoder_segment_ids=batch.get("decoder_segment_ids"),
            encoder_positions=batch.get("encoder_positions"),
            decoder_positions=batch.get("decoder_positions"),
            decode=False,
            enable_dropout=dropout_rng is not None,
            rngs=None if dropout_rng is None else {"dropout": dropout_rng},
            mutable=mutable,
        )

    def loss_fn(self, params: Params, batch: Batch, dropout_rng: Array | None) -> tuple[Array, dict[str, Array]]:
        """The summed loss of a batch and its metrics.

        Returns:
          The sum over tokens of weight * loss (label smoothing and z-loss included), and sums over tokens, all float32
          scalars: `loss` (that same number), `z_loss` (the part of it that is z-loss), `cross_entropy`
          (-log p(target), not smoothed, never normalised), `weight_sum`, `correct` (weight of tokens whose target has
          the largest logit; ties count).
        """
        logits = self.compute_logits(params, batch, dropout_rng)
        targets = batch["decoder_target_tokens"]
        weights = _loss_weights(batch)
        statistics = target_statistics(logits.astype(jnp.float32), targets)
        loss, z_loss = smoothed_cross_entropy(
            statistics, logits.shape[-1], label_smoothing=self.label_smoothing, z_loss=self.z_loss
        )
        scaled = _normalize(weights, batch, factor=self.loss_normalizing_factor)
        loss_sum = jnp.sum(loss * scaled)
        metrics = {
            "loss": loss_sum,
            "z_loss": jnp.sum(z_loss * scaled),
            "cross_entropy": jnp.sum((statistics.log_z - statistics.target_logit) * weights),
            "weight_sum": jnp.sum(weights),
            "correct": jnp.sum((statistics.target_logit >= statistics.max_logit) * weights),
        }
        return loss_sum, metrics

    def eval_fn(self, params: Params, batch: Batch) -> tuple[Array, dict[str, Array]]:
        """`loss_fn` without dropout."""
        return self.loss_fn(params, batch, None)

    def score_batch(self, params: Params, batch: Batch, return_intermediates: bool = False) -> Any:
        """Log-probability of each row's target, the sum over t of weight * log p(target). -> float32 [B].

        With `return_intermediates` also the module's sown 'intermediates'. Rows must not be packed: a packed row gets
        the sum over its segments.
        """
        if return_intermediates:
            logits, variables = self.compute_logits(params, batch, mutable=["intermediates"])
        else:
            logits, variables = self.compute_logits(params, batch), {}
        log_probs = token_log_probs(logits.astype(jnp.float32), batch["decoder_target_tokens"])
        scores = jnp.sum(log_probs * _loss_weights(batch), axis=-1)
        return (scores, variables.get("intermediates", {})) if return_intermediates else scores

    def predict_batch(self, params: Params, batch: Batch, rng: Array | None = None) -> Array:
        """The best decode of each row. -> int32 [B, T], T the length of the batch's decoder_input_tokens."""
        return self.predict_batch_with_aux(params, batch, rng=rng)[0]

    def predict_batch_with_aux(
        self,
        params: Params,
        batch: Batch,
        rng: Array | None = None,
        decoder_params: Mapping[str, Any] | None = None,
        return_all_decodes: bool | None = None,
        num_decodes: int | None = None,
        prompt_with_targets: bool = False,
    ) -> tuple[Array, dict[str, Array]]:
        """Decodes a batch.

        Args:
          params: parameters.
          batch: needs `encoder_input_tokens` [B, S] and `decoder_input_tokens` [B, T], whose length bounds the decodes.
          rng: key that samples depend on. None: greedy decoding.
          decoder_params: further keyword arguments of `decode_fn` (of rest_jax.sampling.decode: `processing`,
            `beam_size`, `beam_alpha`); `num_decodes` and `return_all_decodes` in it serve where the arguments of those
            names are None.
          return_all_decodes: all decodes of a row rather than the best.
          num_decodes: decodes per row, N.
          prompt_with_targets: not supported.

        Returns:
          `(decodes int32 [B, N, T] ascending by score, {'scores': float32 [B, N]})`, or without return_all_decodes the
          best one, `(decodes [B, T], {'scores': [B]})`. A score is the decode's log-probability.
        """
        if prompt_with_targets:
            raise UserError("prompt_with_targets is not supported: decoding starts from an empty target.")
        options = dict(decoder_params or {})
        given_num, given_all = options.pop("num_decodes", 1), options.pop("return_all_decodes", False)
        num_decodes = given_num if num_decodes is None else num_decodes
        return_all_decodes = given_all if return_all_decodes is None else return_all_decodes
        if num_decodes < 1:
            raise UserError(f"num_decodes must be at least 1; got {num_decodes!r}.")
        decodes, scores = (self.decode_fn or _decode)(
            self,
            params,
            batch["encoder_input_tokens"],
            num_decodes=num_decodes,
            max_length=batch["decoder_input_tokens"].shape[1],
            rng=rng,
            **options,
        )
        order = jnp.argsort(scores, axis=-1)
        decodes = jnp.take_along_axis(decodes, order[:, :, None], axis=1)
        scores = jnp.take_along_axis(scores, order, axis=1)
        if return_all_decodes:
            return decodes, {"scores": scores}
        return decodes[:, -1], {"scores": scores[:, -1]}


def _loss_weights(batch: Batch) -> Array:
    """float32 [B, T]; every real target token counts once where the batch has none."""
    weights = batch.get("decoder_loss_weights")
    return (batch["decoder_target_tokens"] > 0 if weights is None else weights).astype(jnp.float32)


def _normalize(weights: Array, batch: Batch, *, factor: float | str | None) -> Array:
    """Loss weights [B, T] divided by T5X's loss normalizing factor."""
    if factor is None:
        return weights
    if factor == "NUM_REAL_TARGET_TOKENS":
        return weights / jnp.maximum(jnp.sum(weights), 1.0)
    if factor == "NUM_TOTAL_TARGET_TOKENS":
        return weights / weights.size
    if factor == "AVERAGE_PER_SEQUENCE":
        segments = batch.get("decoder_segment_ids")
        if segments is None:
            totals = jnp.sum(weights, axis=1, keepdims=True)
        else:
            same = (segments[:, :, None] == segments[:, None, :]).astype(jnp.float32)
            totals = jnp.einsum("btu,bu->bt", same, weights)
        return weights / jnp.where(totals > 0.0, totals, 1.0)
    return weights / float(factor)


def _decode(
    model: EncoderDecoderModel,
    params: Params,
    encoder_input_tokens: Array,
    *,
    num_decodes: int,
    max_length: int,
    rng: Array | None,
    **options: Any,
) -> tuple[Array, Array]:
    # Sampling stands on models, so the import waits for the call.
    from rest_jax import sampling

    if rng is None and num_decodes > 1 and not options.get("beam_size"):
        raise UserError(
            f"num_decodes={num_decodes} without `rng`: greedy decoding has one result. Give a key to sample with, or "
            "decoder_params={'beam_size': ...} for beam search."
        )
    drawn = sampling.decode(
        model,
        params,
        encoder_input_tokens=encoder_input_tokens,
        source_ids=jnp.arange(encoder_input_tokens.shape[0], dtype=jnp.int32),
        num_samples=num_decodes,
        max_length=max_length,
        seed=0 if rng is None else jax.random.bits(rng, (), jnp.uint32),
        **{"processing": sampling.LogitProcessing(temperature=0.0 if rng is None else 1.0), **options},
    )
    return drawn.tokens, drawn.log_probs
