"""Beam search on the incremental decoder, with GNMT's length penalty (Wu et al. 2016, arXiv 1609.08144, eq. 14)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rest_jax.models import t5
from rest_jax.sampling import cache as cache_lib
from rest_jax.sampling import decoder
from rest_jax.sampling.engine import Sources
from rest_jax.sampling.processors import NEGATIVE_INFINITY, legal_tokens
from rest_jax.sampling.samples import PAD_ID

# A log-probability or score below it has a masked token in it; no product of real ones comes near.
IMPOSSIBLE = NEGATIVE_INFINITY / 1e6


class _Beams(NamedTuple):
    position: jax.Array  # scalar int32
    live_tokens: jax.Array  # [batch, beam, max_length] int32
    live_log_probs: jax.Array  # [batch, beam] float32
    ended_tokens: jax.Array  # [batch, beam, max_length] int32
    ended_log_probs: jax.Array  # [batch, beam] float32
    ended_scores: jax.Array  # [batch, beam] float32, length-penalised; very negative where there is none yet
    cache: cache_lib.Cache


def length_penalty(length: jax.Array | int, alpha: float) -> jax.Array:
    """((5 + length) / 6) ** alpha, by which a log-probability is divided."""
    return ((5.0 + jnp.asarray(length, jnp.float32)) / 6.0) ** alpha


def beam_decode(
    weights: decoder.Weights,
    config: t5.T5Config,
    *,
    sources: Sources,
    beam_size: int,
    num_best: int,
    alpha: float,
    max_length: int,
    vocab_size: int,
    eos_id: int,
    cache_dtype: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The `num_best` translations with the highest length-penalised log-probability that a beam finds.

    A hypothesis ends when EOS makes it one of the `beam_size` best extensions of its position, so that a beam of 1
    without length penalty is greedy. The search of a source ends when no live hypothesis can still beat its worst ended
    one. Hypotheses that `max_length` cuts stand behind all that ended by themselves. Where a tiny vocabulary has fewer
    hypotheses than `num_best`, the places left are empty, at a log-probability of -1e30.

    Args:
      weights: of `decoder.pack_weights`.
      config: the network's shape.
      sources: what is translated; their keys are not used.
      beam_size: hypotheses kept per source.
      num_best: at most `beam_size`.
      alpha: of the length penalty; 0 for none.
      max_length: most tokens, incl. EOS.
      vocab_size: ids the vocabulary has.
      eos_id: the token that ends a hypothesis.
      cache_dtype: of the self-attention cache; None for the activations'.

    Returns:
      Tokens `[batch, num_best, max_length]`, best first; log-probabilities `[batch, num_best]`, not length-penalised
      and without the prefix's; and the scalar number of slot-steps that were computed.
    """
    batch = sources.mask.shape[0]
    embedding_size = weights["embedding"].shape[0]
    legal = legal_tokens(embedding_size, vocab_size)
    real = jnp.any(sources.mask, axis=-1)
    # Each source a group, whose slots are its hypotheses.
    cross_bias = jnp.where(sources.mask, 0.0, NEGATIVE_INFINITY)[:, None, :]
    cross_bias = jnp.broadcast_to(cross_bias, (batch, beam_size, cross_bias.shape[-1]))
    best_possible_penalty = length_penalty(max_length, alpha)

    def unfinished(beams: _Beams) -> jax.Array:
        # Log-probabilities only fall, so dividing by the largest penalty bounds what a live hypothesis can reach.
        reachable = jnp.max(beams.live_log_probs, axis=1) / best_possible_penalty
        open_rows = real & (reachable > jnp.min(beams.ended_scores, axis=1))
        return (beams.position < max_length) & jnp.any(open_rows)

    def step(beams: _Beams) -> _Beams:
        previous = jnp.where(
            beams.position == 0,
            PAD_ID,
            jax.lax.dynamic_index_in_dim(beams.live_tokens, jnp.maximum(beams.position - 1, 0), 2, keepdims=False),
        )
        logits, cache = decoder.decode_position(
            weights,
            config,
            tokens=previous.ravel(),
            positions=jnp.full(batch * beam_size, beams.position),
            filled=beams.position + 1,
            cache=beams.cache,
            cross=sources.cross,
            cross_bias=cross_bias,
        )
        logits = logits.reshape(batch, beam_size, -1)
        log_probs = jnp.where(legal, jax.nn.log_softmax(logits, axis=-1), NEGATIVE_INFINITY)
        if sources.prefix.shape[1]:
            forced = jax.lax.dynamic_index_in_dim(sources.prefix, beams.position, 1, keepdims=False)[:, None, None]
            free = (beams.position >= sources.prefix.shape[1]) | (forced == PAD_ID)
            only = jnp.where(jnp.arange(embedding_size) == forced, 0.0, NEGATIVE_INFINITY)
            log_probs = jnp.where(free, log_probs, only)
        candidates = beams.live_log_probs[:, :, None] + log_probs  # [batch, beam, vocab]
        # 2 * beam candidates hold at least `beam` that do not end: each beam has one EOS.
        top, flat = jax.lax.top_k(candidates.reshape(batch, -1), 2 * beam_size)  # [batch, 2 * beam]
        parents, tokens = flat // embedding_size, (flat % embedding_size).astype(jnp.int32)
        extended = jnp.take_along_axis(beams.live_tokens, parents[:, :, None], axis=1)
        extended = jax.lax.dynamic_update_slice_in_dim(extended, tokens[:, :, None], beams.position, axis=2)
        ends = tokens == eos_id

        among_best = jnp.arange(2 * beam_size) < beam_size
        accepted = ends & among_best & (top > IMPOSSIBLE)
        scores = jnp.where(accepted, top / length_penalty(beams.position + 1, alpha), NEGATIVE_INFINITY)
        scores = jnp.concatenate([beams.ended_scores, scores], axis=1)
        ended_scores, chosen = jax.lax.top_k(scores, beam_size)
        ended_tokens = _choose(jnp.concatenate([beams.ended_tokens, extended], axis=1), chosen)
        ended_log_probs = _choose(jnp.concatenate([beams.ended_log_probs, top], axis=1), chosen)

        live_log_probs, chosen = jax.lax.top_k(jnp.where(ends, NEGATIVE_INFINITY, top), beam_size)
        parents = _choose(parents, chosen)
        return _Beams(
            position=beams.position + 1,
            live_tokens=_choose(extended, chosen),
            live_log_probs=live_log_probs,
            ended_tokens=ended_tokens,
            ended_log_probs=ended_log_probs,
            ended_scores=ended_scores,
            cache=cache_lib.choose_slots(cache, (parents + beam_size * jnp.arange(batch)[:, None]).ravel()),
        )

    empty = jnp.full((batch, beam_size, max_length), PAD_ID, jnp.int32)
    nothing = jnp.full((batch, beam_size), NEGATIVE_INFINITY, jnp.float32)
    end = jax.lax.while_loop(
        unfinished,
        step,
        _Beams(
            position=jnp.zeros((), jnp.int32),
            live_tokens=empty,
            # One live hypothesis at first, so that the beam does not fill with copies.
            live_log_probs=nothing.at[:, 0].set(0.0),
            ended_tokens=empty,
            ended_log_probs=nothing,
            ended_scores=nothing,
            cache=decoder.empty_cache(config, max_length=max_length, slots=batch * beam_size, dtype=cache_dtype),
        ),
    )
    # Where fewer than num_best ended, live ones fill up, behind them.
    has_ended = end.ended_scores > IMPOSSIBLE
    cut_scores = end.live_log_probs / best_possible_penalty + NEGATIVE_INFINITY / 4
    order = jnp.concatenate([jnp.where(has_ended, end.ended_scores, 2 * NEGATIVE_INFINITY), cut_scores], axis=1)
    _, chosen = jax.lax.top_k(order, num_best)
    tokens = _choose(jnp.concatenate([end.ended_tokens, end.live_tokens], axis=1), chosen)
    log_probs = _choose(jnp.concatenate([end.ended_log_probs, end.live_log_probs], axis=1), chosen)
    possible = log_probs > IMPOSSIBLE
    tokens = jnp.where((real[:, None] & possible)[:, :, None], tokens, PAD_ID)
    log_probs = jnp.where(real[:, None], jnp.where(possible, log_probs, NEGATIVE_INFINITY), 0.0)
    return tokens, log_probs, end.position * (batch * beam_size)


def _choose(values: jax.Array, chosen: jax.Array) -> jax.Array:
    """`[batch, many, ...]`, `[batch, few]` -> `[batch, few, ...]`."""
    return jnp.take_along_axis(values, chosen.reshape(*chosen.shape, *(1,) * (values.ndim - 2)), axis=1)
