"""Decoding with a model of T5X's own, by its own methods: what `sampler.decode` is for ours.

T5X is never imported here: whoever bound one of its models in gin has imported it.

What T5X does by default, and does not do here (docs/t5x.md):
  - `temperature_sample` draws greedily (`topk=1`), and its scores are then all 0.
  - Without a key the same samples are drawn each time.
  - Padding, and rows of the embedding that the vocabulary has no ids for, may be drawn.
  - Samples are sorted by their score, and a beam's scores are length-penalised.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rest_jax.data.vocabulary import eos_id_of
from rest_jax.errors import UserError
from rest_jax.sampling.processors import LogitProcessing, legal_tokens
from rest_jax.sampling.samples import PAD_ID, Samples, log_probabilities

Params = Any
# T5X's own for "impossible": its beam search tells unfinished hypotheses by scores of this size.
_NEGATIVE_INFINITY = -1.0e7


def decode(
    model: Any,
    params: Params,
    *,
    encoder_input_tokens: jax.Array,
    source_ids: jax.Array,
    num_samples: int,
    max_length: int,
    processing: LogitProcessing,
    beam_size: int,
    beam_alpha: float,
    seed: jax.Array | int,
    stream: jax.Array | int,
    prefix_tokens: jax.Array | None = None,
) -> Samples:
    """N translations of each source by `predict_batch_with_aux`, with log-probabilities by `score_batch`.

    The arguments and the result are `sampler.decode`'s, but for one thing: T5X draws from one key a call, so a sample
    depends on (seed, stream, the chunk's source ids) rather than on its own source's id.

    Raises:
      UserError: `model` is not T5X's, or `processing` or `prefix_tokens` asks for what T5X's sampler lacks.
    """
    if prefix_tokens is not None:
        raise UserError(
            "prefix_tokens are given, which T5X's encoder-decoder models cannot be made to start with: leave them out, "
            "or bind rest_jax's own model as MODEL (gin/models)."
        )
    decoders = _t5x_decoding(model)
    options: dict[str, Any]
    if beam_size:
        decoder, num_decodes, options = decoders.beam_search, beam_size, {"alpha": beam_alpha}
    else:
        decoder, num_decodes, options = decoders.temperature_sample, num_samples, _sampling_options(processing)
    key = chunk_key(seed=seed, stream=stream, source_ids=source_ids)
    draw_key, order_key = jax.random.split(key)
    batch = encoder_input_tokens.shape[0]
    tokens, _ = _with_decoder(model, decoder).predict_batch_with_aux(
        params,
        {
            "encoder_input_tokens": encoder_input_tokens,
            "decoder_input_tokens": jnp.zeros((batch, max_length), jnp.int32),
        },
        rng=draw_key,
        decoder_params=options,
        return_all_decodes=True,
        num_decodes=num_decodes,
    )
    # Ascending by score: a beam's best come last; of samples, the place must say nothing about the score.
    if beam_size:
        tokens = tokens[:, ::-1][:, :num_samples]
    else:
        order = jnp.argsort(jax.random.uniform(order_key, tokens.shape[:2]), axis=1)
        tokens = jnp.take_along_axis(tokens, order[:, :, None], axis=1)
    real = jnp.any(encoder_input_tokens > 0, axis=-1)
    tokens = jnp.where(real[:, None, None], tokens, PAD_ID).astype(jnp.int32)
    log_probs = log_probabilities(model, params, encoder_input_tokens=encoder_input_tokens, tokens=tokens)
    unknown = jnp.zeros(batch, jnp.int32)
    return Samples.of(tokens, log_probs, eos_id=eos_id_of(model.output_vocabulary), slot_steps=unknown)


def chunk_key(*, seed: jax.Array | int, stream: jax.Array | int, source_ids: jax.Array) -> jax.Array:
    """One key for (seed, stream, the set of a chunk's source ids `[batch]`)."""
    base = jax.random.fold_in(jax.random.key(seed), stream)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(base, source_ids.astype(jnp.uint32))
    return jax.random.wrap_key_data(jnp.sum(jax.random.key_data(keys), axis=0, dtype=jnp.uint32))


def _t5x_decoding(model: Any) -> Any:
    """The module t5x.decoding, which a T5X model has loaded."""
    module = sys.modules.get("t5x.decoding")
    if module is None or not hasattr(model, "_decode_fn"):
        raise UserError(
            f"MODEL is a {type(model).__module__}.{type(model).__qualname__}; it must be rest_jax's "
            "EncoderDecoderModel or one of T5X's (t5x.models.EncoderDecoderModel, or a class made from it)."
        )
    return module


def _sampling_options(processing: LogitProcessing) -> dict[str, Any]:
    """Arguments of T5X's `temperature_sample`."""
    if processing.epsilon:
        raise UserError(
            f"LogitProcessing.epsilon is {processing.epsilon}, which T5X's sampler does not have: set it to 0, or bind "
            "rest_jax's own model as MODEL (gin/models)."
        )
    if processing.top_k and processing.top_p < 1:
        raise UserError(
            f"LogitProcessing has top_k {processing.top_k} and top_p {processing.top_p}; T5X's sampler takes one of "
            "them: set TOP_K to 0 or top_p to 1."
        )
    return {
        "temperature": processing.temperature,
        "topk": processing.top_k,
        "topp": 0.0 if processing.top_p == 1 else processing.top_p,
        "rescale_log_probs": False,
    }


def _with_decoder(model: Any, decoder: Callable[..., Any]) -> Any:
    """The model with another decode function, which gets no illegal token to choose.

    T5X takes it in the constructor alone, where a gin file has mostly bound none, which means beam search.
    """
    vocab_size = model.output_vocabulary.vocab_size

    def decode_fn(*, tokens_to_logits: Callable[..., Any], **options: Any) -> Any:
        def legal_logits(state: Any) -> tuple[jax.Array, Mapping[str, Any]]:
            logits, cache = tokens_to_logits(state)  # [batch * num_decodes, embedding rows]
            return jnp.where(legal_tokens(logits.shape[-1], vocab_size), logits, _NEGATIVE_INFINITY), cache

        return decoder(tokens_to_logits=legal_logits, **options)

    changed = copy.copy(model)
    changed._decode_fn = decode_fn
    return changed
