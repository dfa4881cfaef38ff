"""What the lexical rewards share: texts as characters, in bounded memory and in arrays of fitting width."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rest_jax.rewards import characters

# Samples scored at once on one device: what its cache holds, or what keeps it busy in bounded memory (50 KB a text of
# 2048 characters).
_CPU_TEXTS = 640
_ACCELERATOR_TEXTS = 8192
# Texts are written into the first of these widths that holds the longest, or into one that holds all; each is compiled.
_WIDTHS = (128, 256, 512)


def score_in_passes(
    table: characters.CharacterTable,
    samples: jax.Array,
    others: jax.Array,
    score: Callable[[characters.CharacterTable, jax.Array], jax.Array],
) -> jax.Array:
    """Scores texts in as many passes over the sources as a device's memory asks for.

    Args:
      table: of the vocabulary.
      samples: int32 `[batch, num_samples, target_length]`.
      others: int32 `[batch, other_length]`, what each source's samples are compared with: references, or sources.
      score: (table, tokens int32 `[sources, num_samples + 1, length]`, the other text being the last of its source)
        -> scores `[sources, num_samples]`.

    Returns:
      float32 `[batch, num_samples]`.
    """
    num_sources, num_samples, _ = samples.shape
    passes = number_of_passes(num_sources, num_samples=num_samples)

    def score_pass(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        samples, others = batch
        length = max(samples.shape[2], others.shape[1])
        return score(table, jnp.concatenate([_pad_to(samples, length), _pad_to(others[:, None], length)], axis=1))

    # A pass takes every passes-th source, not neighbours, so that each has its share of every shard of the batch.
    scores = jax.lax.map(score_pass, (deal(samples, passes), deal(others, passes)))
    return jnp.moveaxis(scores, 0, 1).reshape(num_sources, num_samples)


def in_fitting_width(table: characters.CharacterTable, texts: jax.Array, count: Callable[[jax.Array], Any]) -> Any:
    """`count` of the texts' characters, in arrays as wide as the longest text asks for, chosen at run time.

    Tokens bound the characters only loosely (a piece may have 16), and cost is quadratic in the width.

    Args:
      table: of the vocabulary.
      texts: token ids int32 `[sources, texts, length]`.
      count: code points `[sources, texts, width]`, 0 past the end -> arrays whose shapes do not depend on the width.
    """
    spelling = characters.spell(table, texts.reshape(-1, texts.shape[2]))

    def in_width(width: int) -> Any:
        codes = characters.characters(table, spelling, max_characters=width)
        return count(codes.reshape(*texts.shape[:2], width))

    bound = table.codes.shape[1] * texts.shape[2]
    widths = [*(width for width in _WIDTHS if width < bound), bound]
    fitting = jnp.sum(jnp.max(spelling.num_characters) > jnp.asarray(widths[:-1], jnp.int32))
    return jax.lax.switch(fitting, [functools.partial(in_width, width) for width in widths])


def ngram_counts(length: jax.Array, *, order: int) -> jax.Array:
    """How many n-grams texts of `length [sources, texts]` units have: int32 `[order, sources, texts]`, n from 1 on."""
    return jnp.stack([jnp.maximum(length - shorter, 0) for shorter in range(order)])


def number_of_passes(num_sources: int, *, num_samples: int) -> int:
    """The fewest equal passes over the sources that keep each within the texts that a device scores at once."""
    texts = (_CPU_TEXTS if jax.default_backend() == "cpu" else _ACCELERATOR_TEXTS) * jax.device_count()
    fitting = (
        passes
        for passes in range(1, num_sources + 1)
        if num_sources % passes == 0 and num_sources // passes * num_samples <= texts
    )
    return next(fitting, num_sources)


def deal(array: jax.Array, hands: int) -> jax.Array:
    """`[n, ...]` -> `[hands, n / hands, ...]`, as cards are dealt."""
    return jnp.moveaxis(array.reshape(array.shape[0] // hands, hands, *array.shape[1:]), 1, 0)


def _pad_to(tokens: jax.Array, length: int) -> jax.Array:
    return jnp.pad(tokens, ((0, 0), (0, 0), (0, length - tokens.shape[2])))
