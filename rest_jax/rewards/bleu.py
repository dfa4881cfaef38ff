"""Sentence BLEU (Papineni et al. 2002) of each sample against its source's reference, in the graph and exact.

It equals sacreBLEU's `sentence_bleu` of the decoded texts, divided by 100: tokenisation 13a, n-grams up to 4, smoothing
`exp` (method 3 of Chen and Cherry 2014), effective order. `words.py` tokenises, `ngrams.py` counts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rest_jax.errors import UserError
from rest_jax.rewards import characters, words
from rest_jax.rewards.base import Reward, RewardBatch, RewardVocabulary
from rest_jax.rewards.lexical import in_fitting_width, ngram_counts, score_in_passes
from rest_jax.rewards.ngrams import clipped_word_matches


@dataclasses.dataclass(frozen=True)
class BLEU(Reward):
    """Sentence BLEU of samples against the reference, in [0, 1].

    A reference scores 1.0 against itself (see `ChrF`). 13a splits at whitespace and Western punctuation, so it says
    little of languages that are written without spaces.

    Attributes:
      max_ngram_order: longest n-gram of words.
    """

    max_ngram_order: int = 4

    def __post_init__(self) -> None:
        if self.max_ngram_order < 1:
            raise UserError(f"BLEU.max_ngram_order is {self.max_ngram_order}; it must be at least 1. BLEU has 4.")

    @property
    def name(self) -> str:
        return "bleu"

    @property
    def requires_reference(self) -> bool:
        return True

    @property
    def measures(self) -> frozenset[str]:
        return frozenset({"bleu"})

    def init(self, vocabulary: RewardVocabulary) -> characters.CharacterTable:
        return characters.character_table(vocabulary, whitespace="folded")

    def score(self, params: characters.CharacterTable, batch: RewardBatch) -> dict[str, jax.Array]:
        return {self.name: score_in_passes(params, batch["samples"], batch["references"], self._score)}

    def _score(self, table: characters.CharacterTable, texts: jax.Array) -> jax.Array:
        """`[sources, num_samples]` of tokens `[sources, num_samples + 1, length]`, the reference last."""
        matches, num_tokens = in_fitting_width(table, texts, self._count)
        return sentence_bleu(matches=matches, sample_tokens=num_tokens[:, :-1], reference_tokens=num_tokens[:, -1:])

    def _count(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Clipped matches `[max_ngram_order, sources, num_samples]` and tokens `[sources, num_samples + 1]`."""
        split = words.tokens_13a(text.reshape(-1, text.shape[2]))
        codes, starts = (array.reshape(text.shape) for array in split)
        matches = clipped_word_matches(codes, starts, word_order=self.max_ngram_order)
        return matches, split.num_words.reshape(text.shape[:2])


def sentence_bleu(*, matches: jax.Array, sample_tokens: jax.Array, reference_tokens: jax.Array) -> jax.Array:
    """BLEU from clipped match counts.

        brevity penalty * (p_1 * ... * p_m) ^ (1 / m)

    with m the longest n-gram that the sample has, p_n its precision, and 1 / (2^k * n-grams) in the place of the k-th
    precision that is 0. Without any match it is 0.

    Args:
      matches: int32 `[max_ngram_order, sources, num_samples]`.
      sample_tokens: int32 `[sources, num_samples]`.
      reference_tokens: int32 `[sources, 1]`.

    Returns:
      float32 `[sources, num_samples]`.
    """
    log_sum = jnp.zeros(sample_tokens.shape, jnp.float32)
    orders = jnp.zeros(sample_tokens.shape, jnp.int32)
    halvings = jnp.zeros(sample_tokens.shape, jnp.int32)
    # Added one by one, so that a score does not depend on its batch's shape.
    for matched, total in zip(matches, ngram_counts(sample_tokens, order=len(matches)), strict=True):
        counts = total > 0
        halvings += counts & (matched == 0)
        smoothed = jnp.where(matched > 0, matched.astype(jnp.float32), jnp.exp2(-halvings.astype(jnp.float32)))
        log_sum += jnp.where(counts, jnp.log(smoothed / jnp.maximum(total, 1)), 0.0)
        orders += counts
    tokens = jnp.maximum(sample_tokens, 1)
    brevity = jnp.minimum(1.0 - reference_tokens / tokens, 0.0)
    score = jnp.exp(brevity + log_sum / jnp.maximum(orders, 1))
    return jnp.where(jnp.any(matches > 0, axis=0), score, 0.0)
