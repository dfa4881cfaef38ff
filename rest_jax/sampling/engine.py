"""The slot loop: all samples of a chunk of sources through a fixed number of slots, in one compiled program.

A slot decodes one sample; when the sample ends, the slot takes the next one inside the loop, so that compute follows
the tokens that are really generated. Slots stand in groups. A group has a few *places*, each with the cross-attention
keys and values of one source, and its slots work on samples of these; when all samples of a source have ended, its
place takes the chunk's next source. With two places, slots whose source has no sample left go on with the other one.

A sample depends on its own random numbers, tokens and source alone: which slot decodes it, beside which others, and
when, changes nothing.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rest_jax.models import t5
from rest_jax.sampling import cache as cache_lib
from rest_jax.sampling import decoder
from rest_jax.sampling.decoder import CrossAttention
from rest_jax.sampling.processors import NEGATIVE_INFINITY, LogitProcessing, draw, legal_tokens
from rest_jax.sampling.samples import PAD_ID


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How the samples of one data shard go through its slots; changes how fast they are drawn, never which.

    Attributes:
      groups: groups of slots.
      slots_per_group: slots of each.
      places: sources that a group works on at a time.
      shrunk: fewer and fewer slots per group, to which the loop goes down when no sample waits any more and those that
        are left fit; each is one more compilation of the loop's body.
      cache_blocks: most blocks that the cache's columns lie in (`cache.py`).
      head_groups: groups of heads that lie side by side there; None where each head stands by itself.
    """

    groups: int
    slots_per_group: int
    places: int
    shrunk: tuple[int, ...] = ()
    cache_blocks: int = cache_lib.MAX_BLOCKS
    head_groups: int | None = None

    @property
    def slots(self) -> int:
        return self.groups * self.slots_per_group


class Sources(NamedTuple):
    """The chunk's sources, of one data shard."""

    cross: CrossAttention  # each source a group
    mask: jax.Array  # [batch, source_length] bool, False at padding; a row of padding is a filler
    keys: jax.Array  # [batch], one random key per source
    prefix: jax.Array  # [batch, prefix_length] int32, tokens that every sample starts with; 0 from where it is free


class _Places(NamedTuple):
    source: jax.Array  # [groups, places] int32: the source's row; `batch` where there is none
    next_sample: jax.Array  # [groups, places] int32: the first sample that no slot has taken; N where there is none
    cross: CrossAttention  # of the groups, places side by side


class _Slots(NamedTuple):
    place: jax.Array  # [groups, slots_per_group] int32
    sample: jax.Array  # int32; N where the slot is idle
    position: jax.Array  # int32
    last: jax.Array  # int32: the decoder's input at `position`


class _State(NamedTuple):
    slot_steps: jax.Array  # scalar int32
    next_source: jax.Array  # scalar int32: how many sources have had a place
    places: _Places
    slots: _Slots
    cache: cache_lib.Cache
    tokens: jax.Array  # [batch, num_samples, max_length] int32
    log_probs: jax.Array  # [batch, num_samples] float32


def draw_all(
    weights: decoder.Weights,
    config: t5.T5Config,
    *,
    sources: Sources,
    layout: Layout,
    num_samples: int,
    max_length: int,
    processing: LogitProcessing,
    vocab_size: int,
    eos_id: int,
    cache_dtype: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """N samples of each source.

    Args:
      weights: of `decoder.pack_weights`.
      config: the network's shape.
      sources: what is sampled.
      layout: slots, groups and places.
      num_samples: N.
      max_length: most tokens of a sample, prefix and EOS included.
      processing: temperature and truncation; temperature 0 is greedy and reads no random numbers.
      vocab_size: ids the vocabulary has; the embedding may be padded past it.
      eos_id: the token that ends a sample.
      cache_dtype: of the self-attention cache; None for the activations'.

    Returns:
      Tokens `[batch, num_samples, max_length]`, log-probabilities `[batch, num_samples]` of the tokens past the prefix,
      and the scalar number of slot-steps that were computed.
    """
    batch, _ = sources.mask.shape
    legal = legal_tokens(weights["embedding"].shape[0], vocab_size)
    # Long sources first: their samples are the longest, and none of them should start last. Fillers have no length.
    lengths = jnp.sum(sources.mask, axis=-1)
    order = jnp.argsort(-lengths, stable=True)
    num_sources = jnp.sum(lengths > 0, dtype=jnp.int32)

    def unfinished(state: _State, *, least: int) -> jax.Array:
        """Samples wait for a slot, or some group works on more than `least`."""
        waiting = (state.next_source < num_sources) | jnp.any(state.places.next_sample < num_samples)
        return waiting | jnp.any(jnp.sum(state.slots.sample < num_samples, axis=1) > least)

    def step(state: _State) -> _State:
        places, next_source = _take_sources(
            state.places,
            state.slots,
            sources=sources,
            order=order,
            num_sources=num_sources,
            next_source=state.next_source,
            num_samples=num_samples,
        )
        slots, places = _take_samples(state.slots, places, num_samples=num_samples)
        active = slots.sample < num_samples
        source = jnp.take_along_axis(places.source, slots.place, axis=1)  # [groups, slots_per_group]
        logits, cache = decoder.decode_position(
            weights,
            config,
            tokens=slots.last.ravel(),
            positions=slots.position.ravel(),
            filled=jnp.max(jnp.where(active, slots.position, 0)) + 1,
            cache=state.cache,
            cross=places.cross,
            cross_bias=_cross_bias(places.source, slots.place, sources.mask),
        )
        uniform = None
        if processing.temperature > 0:
            keys = sources.keys[source]
            keys = _fold_in(_fold_in(keys, slots.sample), slots.position)
            uniform = jax.vmap(jax.random.uniform)(keys.ravel())
        drawn, log_prob = draw(logits, uniform, processing=processing, legal=legal)
        token, log_prob = drawn.reshape(active.shape), log_prob.reshape(active.shape)
        if sources.prefix.shape[1]:
            forced = sources.prefix.at[source, slots.position].get(mode="fill", fill_value=PAD_ID)
            token, log_prob = jnp.where(forced > 0, forced, token), jnp.where(forced > 0, 0.0, log_prob)
        row = jnp.where(active, source, batch)  # past the end: dropped
        ended = (token == eos_id) | (slots.position + 1 == max_length)
        return _State(
            slot_steps=state.slot_steps + active.size,
            next_source=next_source,
            places=places,
            slots=_Slots(
                place=slots.place,
                sample=jnp.where(ended, num_samples, slots.sample),
                position=jnp.where(ended | ~active, 0, slots.position + 1),
                last=jnp.where(ended | ~active, PAD_ID, token),
            ),
            cache=cache,
            tokens=state.tokens.at[row, slots.sample, slots.position].set(token, mode="drop"),
            log_probs=state.log_probs.at[row, slots.sample].add(log_prob, mode="drop"),
        )

    shape = (layout.groups, layout.slots_per_group)
    zeros = jnp.zeros(shape, jnp.int32)
    nowhere = jnp.full((layout.groups, layout.places), batch, jnp.int32)
    state = _State(
        slot_steps=jnp.zeros((), jnp.int32),
        next_source=jnp.zeros((), jnp.int32),
        places=_Places(
            source=nowhere,
            next_sample=jnp.full_like(nowhere, num_samples),
            cross=_cross_of_places(sources.cross, nowhere),
        ),
        slots=_Slots(place=zeros, sample=jnp.full(shape, num_samples, jnp.int32), position=zeros, last=zeros),
        cache=decoder.empty_cache(
            config,
            max_length=max_length,
            slots=layout.slots,
            dtype=cache_dtype,
            max_blocks=layout.cache_blocks,
            head_groups=layout.head_groups,
        ),
        tokens=jnp.full((batch, num_samples, max_length), PAD_ID, jnp.int32),
        log_probs=jnp.zeros((batch, num_samples), jnp.float32),
    )
    for fewer in (*layout.shrunk, 0):
        state = jax.lax.while_loop(functools.partial(unfinished, least=fewer), step, state)
        if fewer:
            state = _shrink(state, fewer, num_samples=num_samples)
    return state.tokens, state.log_probs, state.slot_steps


def _shrink(state: _State, slots_per_group: int, *, num_samples: int) -> _State:
    """The same samples in fewer slots; no group works on more than there are."""
    groups, before = state.slots.sample.shape
    kept = jnp.argsort(state.slots.sample == num_samples, axis=1, stable=True)[:, :slots_per_group]
    rows = (kept + before * jnp.arange(groups)[:, None]).ravel()
    return state._replace(
        slots=jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, kept, axis=1), state.slots),
        cache=cache_lib.choose_slots(state.cache, rows),
    )


def _take_sources(
    places: _Places,
    slots: _Slots,
    *,
    sources: Sources,
    order: jax.Array,
    num_sources: jax.Array,
    next_source: jax.Array,
    num_samples: int,
) -> tuple[_Places, jax.Array]:
    """Gives the chunk's next sources, in `order` `[batch]`, to places whose samples have all ended.

    Returns:
      The places, and how many sources have had one.
    """
    groups, count = places.source.shape
    batch = len(order)
    working = (slots.place[:, :, None] == jnp.arange(count)) & (slots.sample < num_samples)[:, :, None]
    vacant = (places.next_sample == num_samples) & ~jnp.any(working, axis=1)  # [groups, places]
    # Group after group before place after place, so that few sources are spread over all groups.
    flat = vacant.T.ravel()
    candidate = next_source + jnp.cumsum(flat, dtype=jnp.int32) - 1
    takes = flat & (candidate < num_sources)
    taken = order[jnp.minimum(candidate, batch - 1)].astype(jnp.int32)
    takes, taken = (values.reshape(count, groups).T for values in (takes, taken))
    source = jnp.where(takes, taken, places.source)
    cross = jax.lax.cond(jnp.any(takes), lambda: _cross_of_places(sources.cross, source), lambda: places.cross)
    next_sample = jnp.where(takes, 0, places.next_sample)
    return _Places(source, next_sample, cross), next_source + jnp.sum(takes, dtype=jnp.int32)


def _take_samples(slots: _Slots, places: _Places, *, num_samples: int) -> tuple[_Slots, _Places]:
    """Gives each idle slot the next sample of one of its group's places, if there is one left."""
    place, sample, next_sample = slots.place, slots.sample, places.next_sample
    for number in range(next_sample.shape[1]):
        idle = sample == num_samples
        candidate = next_sample[:, number, None] + jnp.cumsum(idle, axis=1, dtype=jnp.int32) - 1
        takes = idle & (candidate < num_samples)
        place = jnp.where(takes, number, place)
        sample = jnp.where(takes, candidate, sample)
        next_sample = next_sample.at[:, number].add(jnp.sum(takes, axis=1, dtype=jnp.int32))
    return slots._replace(place=place, sample=sample), places._replace(next_sample=next_sample)


def _cross_of_places(cross: CrossAttention, source: jax.Array) -> CrossAttention:
    """Of the sources at `source` `[groups, places]`, places side by side: `[groups, H, places * source_length, K]`."""
    groups, count = source.shape

    def gather(leaf: jax.Array) -> jax.Array:  # [(layers,) batch, H, source_length, K]
        *layers, _, heads, length, size = leaf.shape
        chosen = jnp.take(leaf, source, axis=len(layers), mode="clip")  # [(layers,) groups, places, H, length, K]
        return jnp.moveaxis(chosen, -4, -3).reshape(*layers, groups, heads, count * length, size)

    return jax.tree.map(gather, cross)


def _cross_bias(source: jax.Array, place: jax.Array, mask: jax.Array) -> jax.Array:
    """`[groups, slots_per_group, places * source_length]`: each slot reads the real tokens of its own place."""
    own = place[:, :, None] == jnp.arange(source.shape[1])  # [groups, slots_per_group, places]
    real = jnp.take(mask, source, axis=0, mode="clip")  # [groups, places, source_length]
    bias = jnp.where(own[..., None] & real[:, None], 0.0, NEGATIVE_INFINITY)
    return bias.reshape(*place.shape, -1)


def _fold_in(keys: jax.Array, data: jax.Array) -> jax.Array:
    """Elementwise over two-dimensional arrays."""
    return jax.vmap(jax.vmap(jax.random.fold_in))(keys, data)
