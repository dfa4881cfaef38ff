"""Guards against samples that fool a reward: True or False for each sample, in the graph.

A guard is a reward of 1.0 (passed) or 0.0, for `combinations.Guarded`, which sets the reward of a sample that fails one
to 0; `stats.json` of a Grow step counts the failures by the guard's name. So the reward itself says what is bad, to
filters, to the choice of checkpoints and to evaluation alike. Grow's REFUSE_UNFINISHED and MAX_REPEATED_NGRAMS are no
part of the reward: what they refuse is not trained on whatever its reward, and counts for no threshold.
"""

import dataclasses
import unicodedata
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.errors import UserError
from rest_jax.filters import repeated_ngrams
from rest_jax.rewards import characters
from rest_jax.rewards.base import Reward, RewardBatch, RewardVocabulary
from rest_jax.rewards.lexical import in_fitting_width, ngram_counts, score_in_passes
from rest_jax.rewards.ngrams import MAX_CHARACTER_ORDER, clipped_character_matches

GUARD_PREFIX = "guard/"


@dataclasses.dataclass(frozen=True)
class NotEmpty(Reward):
    """The sample has a character that is no whitespace."""

    @property
    def name(self) -> str:
        return f"{GUARD_PREFIX}not_empty"

    def init(self, vocabulary: RewardVocabulary) -> characters.CharacterTable:
        return characters.character_table(vocabulary)

    def score(self, params: characters.CharacterTable, batch: RewardBatch) -> dict[str, jax.Array]:
        return {self.name: _passed(_num_characters(params, batch["samples"]) > 0)}


@dataclasses.dataclass(frozen=True)
class Finished(Reward):
    """The sample ends in EOS: the length limit did not cut it."""

    @property
    def name(self) -> str:
        return f"{GUARD_PREFIX}finished"

    def init(self, vocabulary: RewardVocabulary) -> jax.Array:
        return jnp.asarray(vocabulary.eos_id, jnp.int32)

    def score(self, params: jax.Array, batch: RewardBatch) -> dict[str, jax.Array]:
        return {self.name: _passed(jnp.any(batch["samples"] == params, axis=-1))}


@dataclasses.dataclass(frozen=True)
class LengthRatio(Reward):
    """low <= characters of the sample / characters of the source <= high, without whitespace.

    A prefix that the task puts before its sources counts as source. With a source without characters it is passed.

    Attributes:
      low, high: the band of the language pair; e.g. the 0.1 % and 99.9 % quantiles of D.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise UserError(f"LengthRatio.low is {self.low}, high {self.high}; 0 <= low < high is legal.")

    @property
    def name(self) -> str:
        return f"{GUARD_PREFIX}length_ratio"

    def init(self, vocabulary: RewardVocabulary) -> characters.CharacterTable:
        return characters.character_table(vocabulary)

    def score(self, params: characters.CharacterTable, batch: RewardBatch) -> dict[str, jax.Array]:
        sample = _num_characters(params, batch["samples"])
        source = _num_characters(params, batch["sources"][:, None])
        in_band = (sample >= self.low * source) & (sample <= self.high * source)
        return {self.name: _passed(in_band | (source == 0))}


@dataclasses.dataclass(frozen=True)
class NotRepetitive(Reward):
    """At most `allowed` more n-grams of tokens repeat in the sample than in its source (`filters.repeated_ngrams`)."""

    order: int = 4
    allowed: int = 2

    def __post_init__(self) -> None:
        if self.order < 1 or self.allowed < 0:
            raise UserError(
                f"NotRepetitive.order is {self.order}, allowed {self.allowed}; at least 1 and at least 0 are legal."
            )

    @property
    def name(self) -> str:
        return f"{GUARD_PREFIX}not_repetitive"

    def init(self, vocabulary: RewardVocabulary) -> None:
        return None

    def score(self, params: None, batch: RewardBatch) -> dict[str, jax.Array]:
        sample = repeated_ngrams(batch["samples"], order=self.order)
        source = repeated_ngrams(batch["sources"][:, None], order=self.order)
        return {self.name: _passed(sample - source <= self.allowed)}


@dataclasses.dataclass(frozen=True)
class NotCopied(Reward):
    """At most `share` of the sample's character n-grams stand in its source, each as often as there.

    A sample shorter than the n-gram is passed: names and numbers are right to copy.
    """

    order: int = 8
    share: float = 0.8

    def __post_init__(self) -> None:
        if not 1 <= self.order <= MAX_CHARACTER_ORDER or not 0 < self.share < 1:
            raise UserError(
                f"NotCopied.order is {self.order}, share {self.share}; 1 to {MAX_CHARACTER_ORDER}, and a number "
                "between 0 and 1, are legal."
            )

    @property
    def name(self) -> str:
        return f"{GUARD_PREFIX}not_copied"

    def init(self, vocabulary: RewardVocabulary) -> characters.CharacterTable:
        return characters.character_table(vocabulary)

    def score(self, params: characters.CharacterTable, batch: RewardBatch) -> dict[str, jax.Array]:
        return {self.name: score_in_passes(params, batch["samples"], batch["sources"], self._score)}

    def _score(self, table: characters.CharacterTable, texts: jax.Array) -> jax.Array:
        matches, in_sample = in_fitting_width(table, texts, self._count)
        return _passed(matches <= self.share * in_sample)

    def _count(self, text: jax.Array) -> tuple[jax.Array, jax.Array]:
        length = jnp.sum(text != 0, axis=2, dtype=jnp.int32)
        matches = clipped_character_matches(text, longest_reference=jnp.max(length[:, -1]), char_order=self.order)
        return matches[-1], ngram_counts(length[:, :-1], order=self.order)[-1]


class ScriptParams(NamedTuple):
    """`table`: of the vocabulary; `letters`: int8 `[0x110000]`, 1 for a letter of the scripts, 2 for another letter."""

    table: characters.CharacterTable
    letters: jax.Array


@dataclasses.dataclass(frozen=True)
class Script(Reward):
    """At least `share` of the sample's letters are of `scripts`; a sample without letters is passed.

    Attributes:
      scripts: as the names of Unicode's letters begin, e.g. ('LATIN',), ('CYRILLIC',), ('CJK',) for Chinese,
        ('CJK', 'HIRAGANA', 'KATAKANA') for Japanese.
      share: the least.
    """

    scripts: tuple[str, ...]
    share: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.scripts, str) or not self.scripts:
            raise UserError(f"Script.scripts is {self.scripts!r}; it must be a tuple like ('LATIN',).")
        object.__setattr__(self, "scripts", tuple(self.scripts))
        if not 0 < self.share <= 1:
            raise UserError(f"Script.share is {self.share}; it must be above 0 and at most 1.")

    @property
    def name(self) -> str:
        return f"{GUARD_PREFIX}script"

    def init(self, vocabulary: RewardVocabulary) -> ScriptParams:
        names = {code: unicodedata.name(chr(code), "") for code in range(0x110000) if chr(code).isalpha()}
        letters = np.zeros(0x110000, np.int8)
        for code, name in names.items():
            letters[code] = 1 if name.startswith(self.scripts) else 2
        for script in self.scripts:
            if not any(name.startswith(script) for name in names.values()):
                raise UserError(
                    f"Script.scripts: no letter's Unicode name begins with {script!r}; e.g. 'LATIN' is legal."
                )
        return ScriptParams(characters.character_table(vocabulary), jnp.asarray(letters))

    def score(self, params: ScriptParams, batch: RewardBatch) -> dict[str, jax.Array]:
        def count(text: jax.Array) -> tuple[jax.Array, jax.Array]:
            kind = params.letters[text]
            return jnp.sum(kind == 1, axis=2, dtype=jnp.int32), jnp.sum(kind > 0, axis=2, dtype=jnp.int32)

        of_scripts, letters = in_fitting_width(params.table, batch["samples"], count)
        return {self.name: _passed(of_scripts >= self.share * letters)}


def _passed(passed: jax.Array) -> jax.Array:
    return passed.astype(jnp.float32)


def _num_characters(table: characters.CharacterTable, tokens: jax.Array) -> jax.Array:
    """int32 `[sources, texts]` of tokens `[sources, texts, length]`."""
    return characters.spell(table, tokens.reshape(-1, tokens.shape[2])).num_characters.reshape(tokens.shape[:2])
