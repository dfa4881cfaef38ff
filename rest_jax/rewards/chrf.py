"""chrF (Popovic 2015) of each sample against its source's reference, in the graph and exact.

It equals sacreBLEU's sentence chrF (character n-grams up to `char_order`, no whitespace, no word n-grams, effective order,
no smoothing), divided by 100, of the decoded texts.

n-grams are neither hashed nor sorted. Let r_j be the reference's characters and bit i of the word row E_j say whether
character i of the sample is r_j. Then the sample's occurrences of the n-gram that starts at r_j are

    M_1[j] = E_j,    M_n[j] = E_j & (M_{n-1}[j + 1] >> 1)

and with rank_n[j] = how many of r_j, r_{j+1}, ... start the same n-gram, the clipped number of matches is

    sum over distinct n-grams of min(count in sample, count in reference) = sum over j of [rank_n[j] <= popcount(M_n[j])].

The ranks come from the same recurrence run on the reference itself. So a pair of texts of 150 characters costs 150 steps
over 5 words of 32 bits for each order, for all samples at once, in memory for one step.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rest_jax.errors import UserError
from rest_jax.rewards import characters
from rest_jax.rewards.base import RewardBatch, RewardVocabulary

_WORD_BITS = 32
# Texts are written into the smallest of these shapes, times 4, 16, ..., that holds the longest: each is one compilation.
_FEWEST_CHARACTERS = 128


@dataclasses.dataclass(frozen=True)
class ChrF:
    """Sentence chrF of samples against the reference, in [0, 1].

    A reference scores 1.0 against itself, so a threshold never drops D's own pairs: filter D by itself where its quality
    matters. A sample or reference without any character scores 0.

    Attributes:
      char_order: longest character n-gram.
      beta: weight of recall against precision.
    """

    char_order: int = 6
    beta: float = 2.0
    name: str = dataclasses.field(default="chrf", init=False)
    requires_reference: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.char_order < 1:
            raise UserError(f"ChrF.char_order is {self.char_order}; it must be at least 1.")
        if not self.beta > 0:
            raise UserError(f"ChrF.beta is {self.beta}; it must be above 0.")

    def init(self, vocabulary: RewardVocabulary) -> characters.CharacterTable:
        return characters.character_table(vocabulary)

    def score(self, params: characters.CharacterTable, batch: RewardBatch) -> dict[str, jax.Array]:
        samples, references = batch["samples"], batch["references"]
        num_sources, num_samples, length = samples.shape
        spelled_samples = characters.spell(params, samples.reshape(num_sources * num_samples, length))
        spelled_references = characters.spell(params, references)
        matches = _matches_in_fitting_shape(
            params, spelled_samples, spelled_references, num_samples=num_samples, char_order=self.char_order
        )  # [char_order, sources * samples]
        scores = f_score(
            matches=matches,
            sample_characters=spelled_samples.num_characters,
            reference_characters=jnp.repeat(spelled_references.num_characters, num_samples),
            beta=self.beta,
        )
        return {self.name: scores.reshape(num_sources, num_samples)}

    def combine(self, components: Mapping[str, jax.Array]) -> jax.Array:
        return components[self.name]


def f_score(
    *, matches: jax.Array, sample_characters: jax.Array, reference_characters: jax.Array, beta: float
) -> jax.Array:
    """chrF from clipped match counts, as sacreBLEU computes it: precision and recall are averaged over the orders that both
    texts are long enough for, then combined.

    Args:
      matches: int32 `[char_order, pairs]`.
      sample_characters, reference_characters: int32 `[pairs]`.
      beta: weight of recall.

    Returns:
      float32 `[pairs]`, 0 where nothing matches.
    """
    order = jnp.arange(matches.shape[0], dtype=jnp.int32)[:, None]
    in_sample = jnp.maximum(sample_characters - order, 0)  # [char_order, pairs] n-grams
    in_reference = jnp.maximum(reference_characters - order, 0)
    effective = (in_sample > 0) & (in_reference > 0)
    orders = jnp.maximum(jnp.sum(effective, axis=0), 1)
    precision = jnp.sum(jnp.where(effective, matches / jnp.maximum(in_sample, 1), 0.0), axis=0) / orders
    recall = jnp.sum(jnp.where(effective, matches / jnp.maximum(in_reference, 1), 0.0), axis=0) / orders
    factor = beta**2
    weighted = factor * precision + recall
    return jnp.where(weighted > 0, (1 + factor) * precision * recall / jnp.where(weighted > 0, weighted, 1.0), 0.0)


def _matches_in_fitting_shape(
    table: characters.CharacterTable,
    samples: characters.Spelling,
    references: characters.Spelling,
    *,
    num_samples: int,
    char_order: int,
) -> jax.Array:
    """`clipped_matches` over character arrays as wide as the longest text asks for, chosen at run time.

    Tokens bound the characters only loosely (a piece may have 16), and cost is quadratic in the width.
    """
    longest_piece = table.codes.shape[1]
    bound = longest_piece * max(samples.ends.shape[1], references.ends.shape[1])
    widths = [_FEWEST_CHARACTERS]
    while widths[-1] < bound:
        widths.append(2 * widths[-1])

    def matches(width: int) -> jax.Array:
        return clipped_matches(
            samples=characters.characters(table, samples, max_characters=width),
            references=characters.characters(table, references, max_characters=width),
            reference_characters=references.num_characters,
            num_samples=num_samples,
            char_order=char_order,
        )

    longest = jnp.maximum(jnp.max(samples.num_characters), jnp.max(references.num_characters))
    fitting = jnp.sum(longest > jnp.asarray(widths[:-1], jnp.int32))
    return jax.lax.switch(fitting, [functools.partial(matches, width) for width in widths])


def clipped_matches(
    *,
    samples: jax.Array,
    references: jax.Array,
    reference_characters: jax.Array,
    num_samples: int,
    char_order: int,
) -> jax.Array:
    """For n = 1..char_order: the sum over distinct n-grams of min(count in sample, count in reference).

    Args:
      samples: code points int32 `[sources * num_samples, width]`, 0 past the end; width a multiple of 32.
      references: code points int32 `[sources, width]`, 0 past the end.
      reference_characters: int32 `[sources]`.
      num_samples: consecutive samples of one source.
      char_order: highest n.

    Returns:
      int32 `[char_order, sources * num_samples]`.
    """
    width = references.shape[1]
    sample_text, reference_text = _bit_planes(samples), _bit_planes(references)
    columns = references.T  # [width, sources]

    class Loop(NamedTuple):
        position: jax.Array  # the next reference character, backwards
        in_samples: jax.Array  # M_1 .. M_{char_order - 1} of the character after it [char_order - 1, words, pairs]
        in_reference: jax.Array  # the same for the reference in itself [char_order - 1, words, sources]
        matches: jax.Array  # [char_order, pairs]

    def step(loop: Loop) -> Loop:
        code = jax.lax.dynamic_index_in_dim(columns, loop.position, keepdims=False)  # [sources]
        in_samples = _extend(loop.in_samples, _equal_characters(sample_text, jnp.repeat(code, num_samples)))
        in_reference = _extend(loop.in_reference, _equal_characters(reference_text, code))
        # Bits of the reference from this character on.
        word_start = _WORD_BITS * jnp.arange(width // _WORD_BITS, dtype=jnp.int32)
        ahead = _low_bits(loop.position - word_start) ^ jnp.uint32(0xFFFFFFFF)
        rank = _count(in_reference & ahead[:, None])  # [char_order, sources], 0 where no n-gram starts
        count = _count(in_samples)
        rank = jnp.repeat(rank, num_samples, axis=1)
        return Loop(
            position=loop.position - 1,
            in_samples=in_samples[:-1],
            in_reference=in_reference[:-1],
            matches=loop.matches + ((rank > 0) & (rank <= count)),
        )

    start = Loop(
        position=jnp.max(reference_characters) - 1,
        in_samples=jnp.zeros((char_order - 1, *sample_text.shape[1:]), jnp.uint32),
        in_reference=jnp.zeros((char_order - 1, *reference_text.shape[1:]), jnp.uint32),
        matches=jnp.zeros((char_order, samples.shape[0]), jnp.int32),
    )
    return jax.lax.while_loop(lambda loop: loop.position >= 0, step, start).matches


def _bit_planes(codes: jax.Array) -> jax.Array:
    """Code points `[texts, width]` -> uint32 `[CODE_BITS, width / 32, texts]`: bit i of word w of plane b is bit b of
    character 32 w + i. Texts are last, so that neighbouring lanes do the same work on different texts."""
    texts, width = codes.shape
    grouped = codes.T.reshape(width // _WORD_BITS, _WORD_BITS, texts).astype(jnp.uint32)
    place = jnp.arange(_WORD_BITS, dtype=jnp.uint32)[:, None]
    planes = [jnp.sum(((grouped >> bit) & 1) << place, axis=1, dtype=jnp.uint32) for bit in range(characters.CODE_BITS)]
    return jnp.stack(planes)


def _equal_characters(planes: jax.Array, code: jax.Array) -> jax.Array:
    """Which characters of each text are `code [texts]`: bits `[words, texts]`. Code 0, past the end, equals nothing."""
    different = jnp.where(code == 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
    for bit in range(characters.CODE_BITS):
        different |= planes[bit] ^ (jnp.uint32(0) - ((code >> bit) & 1).astype(jnp.uint32))
    return ~different


def _extend(shorter: jax.Array, equal: jax.Array) -> jax.Array:
    """M_1 .. M_{n-1} of the next reference character, and E of this one -> M_1 .. M_n of this one.

    Args:
      shorter: uint32 `[n - 1, words, texts]`.
      equal: uint32 `[words, texts]`.
    """
    next_word = jnp.pad(shorter[:, 1:], ((0, 0), (0, 1), (0, 0)))
    shifted = (shorter >> 1) | (next_word << (_WORD_BITS - 1))
    return jnp.concatenate([equal[None], equal & shifted])


def _count(rows: jax.Array) -> jax.Array:
    """Bits set: uint32 `[orders, words, texts]` -> int32 `[orders, texts]`."""
    return jnp.sum(jax.lax.population_count(rows), axis=1, dtype=jnp.uint32).astype(jnp.int32)


def _low_bits(count: jax.Array) -> jax.Array:
    """Words with the lowest `count` bits set; all for 32 and more, none for 0 and less."""
    inside = jnp.clip(count, 0, _WORD_BITS - 1).astype(jnp.uint32)
    return jnp.where(count >= _WORD_BITS, jnp.uint32(0xFFFFFFFF), (jnp.uint32(1) << inside) - 1)
