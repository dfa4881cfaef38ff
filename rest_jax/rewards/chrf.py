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
# Reference characters per turn of the loop.
_BLOCK = 32
# Samples scored at once on one device: what its cache holds, or what keeps it busy in bounded memory (50 KB a text at 2048
# characters).
_CPU_TEXTS = 640
_ACCELERATOR_TEXTS = 8192
# Texts are written into the first of these widths, and its doubles, that holds the longest; each is compiled once.
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
        num_sources, num_samples, _ = samples.shape
        passes = _number_of_passes(num_sources, num_samples=num_samples)

        def score_pass(batch: tuple[jax.Array, jax.Array]) -> jax.Array:
            return _score(params, *batch, char_order=self.char_order, beta=self.beta)

        # A pass takes every passes-th source, not neighbours, so that each has its share of every shard of the batch.
        scores = jax.lax.map(score_pass, (_deal(samples, passes), _deal(references, passes)))
        return {self.name: jnp.moveaxis(scores, 0, 1).reshape(num_sources, num_samples)}

    def combine(self, components: Mapping[str, jax.Array]) -> jax.Array:
        return components[self.name]


def _number_of_passes(num_sources: int, *, num_samples: int) -> int:
    """The fewest equal passes over the sources that keep a pass within `_CPU_TEXTS` or `_ACCELERATOR_TEXTS` per device."""
    texts = (_CPU_TEXTS if jax.default_backend() == "cpu" else _ACCELERATOR_TEXTS) * jax.device_count()
    fitting = (
        passes
        for passes in range(1, num_sources + 1)
        if num_sources % passes == 0 and num_sources // passes * num_samples <= texts
    )
    return next(fitting, num_sources)


def _deal(array: jax.Array, hands: int) -> jax.Array:
    """`[n, ...]` -> `[hands, n / hands, ...]`, as cards are dealt."""
    return jnp.moveaxis(array.reshape(array.shape[0] // hands, hands, *array.shape[1:]), 1, 0)


def _score(
    table: characters.CharacterTable, samples: jax.Array, references: jax.Array, *, char_order: int, beta: float
) -> jax.Array:
    """chrF `[sources, num_samples]` of tokens `[sources, num_samples, length]` against `[sources, reference_length]`."""
    num_sources, num_samples, length = samples.shape
    spelled_samples = characters.spell(table, samples.reshape(num_sources * num_samples, length))
    spelled_references = characters.spell(table, references)
    matches = _matches_in_fitting_width(
        table, spelled_samples, spelled_references, num_samples=num_samples, char_order=char_order
    )  # [char_order, sources * num_samples]
    scores = f_score(
        matches=matches,
        sample_characters=spelled_samples.num_characters,
        reference_characters=jnp.repeat(spelled_references.num_characters, num_samples),
        beta=beta,
    )
    return scores.reshape(num_sources, num_samples)


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


def _matches_in_fitting_width(
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
      samples: code points int32 `[sources * num_samples, width]`, 0 past the end.
      references: code points int32 `[sources, width]`, 0 past the end.
      reference_characters: int32 `[sources]`.
      num_samples: consecutive samples of one source.
      char_order: highest n.

    Returns:
      int32 `[char_order, sources * num_samples]`.
    """
    width = references.shape[1]
    sample_text = _bit_planes(samples, char_order=char_order)
    reference_text = _bit_planes(references, char_order=char_order)
    stride = _WORD_BITS - char_order + 1
    # Reference characters lie behind each other, texts beside each other: [width + _BLOCK + char_order - 1, sources].
    columns = jnp.pad(references.T, ((0, _BLOCK + char_order - 1), (0, 0)))
    word_start = stride * jnp.arange(sample_text.shape[1], dtype=jnp.int32)

    def block(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        position, matches = state
        codes = jax.lax.dynamic_slice_in_dim(columns, position, _BLOCK + char_order - 1)
        # Bits of the reference before each of the block's characters, [_BLOCK, words, 1]: the rank counts the others.
        before = _low_bits(position + jnp.arange(_BLOCK, dtype=jnp.int32)[:, None] - word_start)[:, :, None]
        ranks = _occurrences(reference_text, codes, ~before, char_order=char_order)
        counts = _occurrences(
            sample_text,
            jnp.repeat(codes, num_samples, axis=1),
            jnp.full_like(before, 0xFFFFFFFF),
            char_order=char_order,
        )
        found = []
        for rank, count in zip(ranks, counts, strict=True):
            rank = jnp.repeat(rank, num_samples, axis=1)  # 0 where the reference has no such n-gram: past its end
            found.append(jnp.sum((rank > 0) & (rank <= count), axis=0, dtype=jnp.int32))
        return position + _BLOCK, matches + jnp.stack(found)

    longest = jnp.max(reference_characters)
    start = (jnp.int32(0), jnp.zeros((char_order, samples.shape[0]), jnp.int32))
    return jax.lax.while_loop(lambda state: state[0] < longest, block, start)[1]


def _bit_planes(codes: jax.Array, *, char_order: int) -> jax.Array:
    """Code points `[texts, width]` -> uint32 `[CODE_BITS, words, texts]`: bit i of word w of plane b is bit b of the
    character `stride * w + i`. Texts are last, so that neighbouring lanes do the same work on different texts.

    A word starts `stride = 33 - char_order` characters after the one before and they overlap by char_order - 1, so that an
    n-gram that starts in the first `stride` bits lies in one word.
    """
    stride = _WORD_BITS - char_order + 1
    words = -(-codes.shape[1] // stride)
    place = jnp.arange(_WORD_BITS, dtype=jnp.int32)
    character = stride * jnp.arange(words, dtype=jnp.int32)[:, None] + place
    grouped = jnp.take(codes.T, character, axis=0, mode="fill", fill_value=0).astype(jnp.uint32)  # [words, 32, texts]
    shift = place.astype(jnp.uint32)[:, None]
    return jnp.stack(
        [jnp.sum(((grouped >> bit) & 1) << shift, axis=1, dtype=jnp.uint32) for bit in range(characters.CODE_BITS)]
    )


def _occurrences(planes: jax.Array, codes: jax.Array, mask: jax.Array, *, char_order: int) -> list[jax.Array]:
    """How often each text has the n-gram that starts at each of `codes`, for n = 1..char_order.

    Args:
      planes: uint32 `[CODE_BITS, words, texts]`.
      codes: int32 `[_BLOCK + char_order - 1, texts]`; 0, past the end, equals nothing.
      mask: uint32, broadcast to `[_BLOCK, words, texts]`: the places that count.

    Returns:
      char_order times int32 `[_BLOCK, texts]`.
    """
    first_bits = mask & _low_bits(jnp.int32(_WORD_BITS - char_order + 1))

    # Loops over characters, not one operation on all of them: a loop's result is an array, where XLA would fuse the
    # comparison into each of its uses and repeat it there.
    def equal_places(code: jax.Array) -> jax.Array:
        different = jnp.where(code == 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
        for bit in range(characters.CODE_BITS):
            different |= planes[bit] ^ (jnp.uint32(0) - ((code >> bit) & 1).astype(jnp.uint32))
        return ~different

    equal = jax.lax.map(equal_places, codes)  # [_BLOCK + char_order - 1, words, texts]

    def count(position: jax.Array) -> list[jax.Array]:
        window = jax.lax.dynamic_slice_in_dim(equal, position, char_order)
        rows, counts = first_bits[position], []
        for step in range(char_order):
            rows &= window[step] >> step
            counts.append(jnp.sum(jax.lax.population_count(rows), axis=0, dtype=jnp.uint32).astype(jnp.int32))
        return counts

    return jax.lax.map(count, jnp.arange(_BLOCK, dtype=jnp.int32))


def _low_bits(count: jax.Array) -> jax.Array:
    """Words with the lowest `count` bits set; all for 32 and more, none for 0 and less."""
    inside = jnp.clip(count, 0, _WORD_BITS - 1).astype(jnp.uint32)
    return jnp.where(count >= _WORD_BITS, jnp.uint32(0xFFFFFFFF), (jnp.uint32(1) << inside) - 1)
