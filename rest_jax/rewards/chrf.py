"""chrF (Popovic 2015) and chrF++ (Popovic 2017) of each sample against its source's reference, in the graph and exact.

They equal sacreBLEU's sentence scores of the decoded texts, divided by 100: character n-grams up to `char_order`, no
whitespace, word n-grams up to `word_order`, effective order, no smoothing. `ngrams.py` counts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rest_jax.errors import UserError
from rest_jax.rewards import characters, words
from rest_jax.rewards.base import Reward, RewardBatch, RewardVocabulary
from rest_jax.rewards.lexical import in_fitting_width, ngram_counts, score_in_passes
from rest_jax.rewards.ngrams import MAX_CHARACTER_ORDER, clipped_character_matches, clipped_word_matches


@dataclasses.dataclass(frozen=True)
class ChrF(Reward):
    """Sentence chrF of samples against the reference, in [0, 1]; chrF++ with `word_order=2`.

    A reference scores 1.0 against itself, so a threshold below 1 never drops D's own pairs: filter D by itself where
    its quality matters. A sample or reference without any character scores 0.

    Attributes:
      char_order: longest character n-gram.
      word_order: longest n-gram of words; 0 for chrF, 2 for chrF++.
      beta: weight of recall against precision.
    """

    char_order: int = 6
    word_order: int = 0
    beta: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.char_order <= MAX_CHARACTER_ORDER:
            raise UserError(f"ChrF.char_order is {self.char_order}; it must be 1 to {MAX_CHARACTER_ORDER}. chrF has 6.")
        if self.word_order < 0:
            raise UserError(f"ChrF.word_order is {self.word_order}; it must be 0 (chrF) or more. chrF++ has 2.")
        if not self.beta > 0:
            raise UserError(f"ChrF.beta is {self.beta}; it must be above 0.")

    @property
    def requires_reference(self) -> bool:
        return True

    @property
    def name(self) -> str:
        """chrf, or with words chrf++."""
        return "chrf++" if self.word_order else "chrf"

    @property
    def measures(self) -> frozenset[str]:
        return frozenset({"chrf"})

    def init(self, vocabulary: RewardVocabulary) -> characters.CharacterTable:
        return characters.character_table(vocabulary, whitespace="folded" if self.word_order else "dropped")

    def score(self, params: characters.CharacterTable, batch: RewardBatch) -> dict[str, jax.Array]:
        return {self.name: score_in_passes(params, batch["samples"], batch["references"], self._score)}

    def _score(self, table: characters.CharacterTable, texts: jax.Array) -> jax.Array:
        """`[sources, num_samples]` of tokens `[sources, num_samples + 1, length]`, the reference last."""
        matches, counts = in_fitting_width(table, texts, self._count)
        return f_score(matches=matches, in_sample=counts[..., :-1], in_reference=counts[..., -1:], beta=self.beta)

    def _count(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Clipped matches `[orders, sources, num_samples]` and n-grams `[orders, sources, num_samples + 1]`."""
        if not self.word_order:
            num_characters = jnp.sum(text != 0, axis=2, dtype=jnp.int32)
            return self._character_matches(text, num_characters), ngram_counts(num_characters, order=self.char_order)
        split = words.chrf_words(text.reshape(-1, text.shape[2]))
        codes, starts = (array.reshape(text.shape) for array in split)
        num_characters, num_words = (
            number.reshape(text.shape[:2]) for number in (split.num_characters, split.num_words)
        )
        return (
            jnp.concatenate(
                [
                    self._character_matches(codes, num_characters),
                    clipped_word_matches(codes, starts, word_order=self.word_order),
                ]
            ),
            jnp.concatenate(
                [
                    ngram_counts(num_characters, order=self.char_order),
                    ngram_counts(num_words, order=self.word_order),
                ]
            ),
        )

    def _character_matches(self, codes: jax.Array, num_characters: jax.Array) -> jax.Array:
        return clipped_character_matches(
            codes, longest_reference=jnp.max(num_characters[:, -1]), char_order=self.char_order
        )


def f_score(*, matches: jax.Array, in_sample: jax.Array, in_reference: jax.Array, beta: float) -> jax.Array:
    """chrF from clipped match counts, as sacreBLEU computes it.

    Precision and recall are averaged over the orders that both texts are long enough for, then combined.

    Args:
      matches: int32 `[orders, sources, num_samples]`.
      in_sample: int32 `[orders, sources, num_samples]`, n-grams.
      in_reference: int32 `[orders, sources, 1]`, n-grams.
      beta: weight of recall.

    Returns:
      float32 `[sources, num_samples]`, 0 where nothing matches.
    """
    precision = recall = jnp.zeros(matches.shape[1:], jnp.float32)
    orders = jnp.zeros(matches.shape[1:], jnp.int32)
    # A score must not depend on its batch, bit for bit. So the orders are added one by one, not by a reduction whose
    # order XLA chooses by shape; and the divisors are no broadcasts, which XLA may invert before it multiplies.
    for matched, sample, reference in zip(matches, in_sample, in_reference, strict=True):
        effective = (sample > 0) & (reference > 0)  # else nothing matched
        precision += matched / jnp.where(effective, sample, 1)
        recall += matched / jnp.where(effective, reference, 1)
        orders += effective
    precision, recall = precision / jnp.maximum(orders, 1), recall / jnp.maximum(orders, 1)
    factor = beta**2
    weighted = factor * precision + recall
    return jnp.where(weighted > 0, (1 + factor) * precision * recall / jnp.where(weighted > 0, weighted, 1.0), 0.0)
