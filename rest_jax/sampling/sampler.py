"""N samples per source, all positions in one compiled loop."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rest_jax.data.vocabulary import eos_id_of
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.sampling import decoder, t5x_model
from rest_jax.sampling.beam import beam_decode
from rest_jax.sampling.processors import NEGATIVE_INFINITY, LogitProcessing, draw, legal_tokens
from rest_jax.sampling.samples import PAD_ID, Samples


class _Loop(NamedTuple):
    position: jax.Array  # scalar int32
    last: jax.Array  # [batch, num_samples] int32: the decoder's input at `position`
    tokens: jax.Array  # [max_length, batch, num_samples] int32
    log_probs: jax.Array  # [batch, num_samples] float32
    ended: jax.Array  # [batch, num_samples] bool
    cache: decoder.Cache


def sample_keys(
    *, seed: jax.Array | int, stream: jax.Array | int, source_ids: jax.Array, num_samples: int
) -> jax.Array:
    """One key for each (seed, stream, source, sample): draws depend on nothing else (not on batch, slot or device).

    Args:
      seed: scalar, the run's seed.
      stream: scalar; the Grow step, or another number for draws that must not repeat a Grow step's.
      source_ids: `[batch]` integers below 2^32.

    Returns:
      Keys `[batch, num_samples]`.
    """
    base = jax.random.fold_in(jax.random.key(seed), stream)
    per_source = jax.vmap(jax.random.fold_in, (None, 0))(base, source_ids.astype(jnp.uint32))
    return jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_samples)))(per_source)


def decode(
    model: Any,
    params: Mapping[str, Any],
    *,
    encoder_input_tokens: jax.Array,
    source_ids: jax.Array,
    num_samples: int,
    max_length: int,
    processing: LogitProcessing,
    beam_size: int = 0,
    beam_alpha: float = 0.6,
    seed: jax.Array | int = 0,
    stream: jax.Array | int = 0,
) -> Samples:
    """N translations of each source; the encoder runs once per source, not once per sample.

    Padding (id 0) and ids past the vocabulary are never produced.

    Args:
      model: an `EncoderDecoderModel` around our T5, or one of T5X's (see `t5x_model.decode`). A sample ends with its
        output vocabulary's `eos_id`.
      params: T5X's tree.
      encoder_input_tokens: `[batch, source_length]`. A row of padding alone is a filler: it costs no extra steps.
      source_ids: `[batch]`, see `sample_keys`.
      num_samples: N.
      max_length: most tokens of a sample, incl. EOS.
      processing: temperature and truncation; temperature 0 is greedy and reads no random numbers.
      beam_size: 0 samples; otherwise the N best of a beam of this size, best first, and `processing` is not used.
      beam_alpha: length penalty of the beam.
      seed, stream: see `sample_keys`.

    Returns:
      Samples `[batch, num_samples, max_length]`.
    """
    if not isinstance(model, EncoderDecoderModel):
        return t5x_model.decode(
            model,
            params,
            encoder_input_tokens=encoder_input_tokens,
            source_ids=source_ids,
            num_samples=num_samples,
            max_length=max_length,
            processing=processing,
            beam_size=beam_size,
            beam_alpha=beam_alpha,
            seed=seed,
            stream=stream,
        )
    config = model.module.config
    encoded = model.module.apply(
        {"params": params}, encoder_input_tokens, enable_dropout=False, method=model.module.encode
    )
    vocabulary = model.output_vocabulary
    vocab_size = config.vocab_size if vocabulary is None else vocabulary.vocab_size
    eos_id = eos_id_of(vocabulary)
    if beam_size:
        return beam_decode(
            params,
            config,
            encoded=encoded,
            encoder_input_tokens=encoder_input_tokens,
            beam_size=beam_size,
            num_best=num_samples,
            alpha=beam_alpha,
            max_length=max_length,
            vocab_size=vocab_size,
            eos_id=eos_id,
        )
    return decode_samples(
        params,
        config,
        encoded=encoded,
        encoder_input_tokens=encoder_input_tokens,
        keys=sample_keys(seed=seed, stream=stream, source_ids=source_ids, num_samples=num_samples),
        max_length=max_length,
        processing=processing,
        vocab_size=vocab_size,
        eos_id=eos_id,
    )


def decode_samples(
    params: Mapping[str, Any],
    config: t5.T5Config,
    *,
    encoded: jax.Array,
    encoder_input_tokens: jax.Array,
    keys: jax.Array,
    max_length: int,
    processing: LogitProcessing,
    vocab_size: int,
    eos_id: int,
) -> Samples:
    """Draws from encoded sources `[batch, source_length, emb_dim]` with keys `[batch, num_samples]`, see `decode`.

    The loop ends when every sample has ended. `vocab_size` is how many ids the vocabulary has; the embedding may be
    padded past it. `eos_id` is the token that ends a sample.
    """
    batch, num_samples = keys.shape
    params = decoder.cast_params(params, config.dtype)
    cross = decoder.cross_attention(params, config, encoded=encoded, encoder_input_tokens=encoder_input_tokens)
    legal = legal_tokens(params["token_embedder"]["embedding"].shape[0], vocab_size)

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.position < max_length) & ~jnp.all(loop.ended)

    def step(loop: _Loop) -> _Loop:
        logits, cache = decoder.decode_position(
            params, config, tokens=loop.last, position=loop.position, cache=loop.cache, cross=cross
        )
        allowed = jnp.where(legal, logits, NEGATIVE_INFINITY)
        if processing.temperature == 0:
            token = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
        else:
            step_keys = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))(keys, loop.position)
            uniform = jax.vmap(jax.vmap(jax.random.uniform))(step_keys)
            token = draw(processing(allowed), uniform)
        log_prob = jnp.take_along_axis(logits, token[..., None], -1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
        token = jnp.where(loop.ended, PAD_ID, token)
        return _Loop(
            position=loop.position + 1,
            last=token,
            tokens=jax.lax.dynamic_update_slice_in_dim(loop.tokens, token[None], loop.position, axis=0),
            log_probs=loop.log_probs + jnp.where(loop.ended, 0.0, log_prob),
            ended=loop.ended | (token == eos_id),
            cache=cache,
        )

    filler = ~jnp.any(encoder_input_tokens > 0, axis=-1)  # [batch]
    end = jax.lax.while_loop(
        unfinished,
        step,
        _Loop(
            position=jnp.zeros((), jnp.int32),
            last=jnp.full((batch, num_samples), PAD_ID, jnp.int32),
            tokens=jnp.full((max_length, batch, num_samples), PAD_ID, jnp.int32),
            log_probs=jnp.zeros((batch, num_samples), jnp.float32),
            ended=jnp.broadcast_to(filler[:, None], (batch, num_samples)),
            cache=decoder.empty_cache(config, max_length=max_length, batch=batch, num_samples=num_samples),
        ),
    )
    tokens = end.tokens.transpose(1, 2, 0)  # [batch, num_samples, max_length]
    return Samples.of(tokens, end.log_probs, eos_id=eos_id)
