"""chrF (Popovic 2015) of each sample against its source's reference, in the graph and exact.

It equals sacreBLEU's sentence chrF of the decoded texts, divided by 100: character n-grams up to `char_order`, no
whitespace, no word n-grams, effective order, no smoothing.

n-grams are neither hashed nor sorted. Let r_j be the reference's characters and bit i of the row E[j] say whether
character i of the sample is r_j. The sample's occurrences of the n-gram that starts at r_j are then the bits of

    M_n[j] = E[j] & (E[j + 1] >> 1) & ... & (E[j + n - 1] >> (n - 1))

and with rank_n[j] = how many of r_j, r_{j+1}, ... start the same n-gram, the clipped number of matches is

    sum over distinct n-grams of min(count in sample, in reference) = sum over j of [rank_n[j] <= popcount(M_n[j])]

The rank is the same popcount with the reference in the place of the sample, over the places from j on. E[j] itself
comes from the bit planes of the code points: 21 exclusive-ors of words that hold 32 characters each.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from rest_jax.errors import UserError
from rest_jax.partitioning import devices_of_trace
from rest_jax.rewards import characters
from rest_jax.rewards.base import RewardBatch, RewardVocabulary

_WORD_BITS = 32
# Reference characters per turn of the loop.
_BLOCK = 32
# Samples scored at once on one device: what its cache holds, or what keeps it busy in bounded memory (50 KB a text of
# 2048 characters).
_CPU_TEXTS = 640
_ACCELERATOR_TEXTS = 8192
# Texts are written into the first of these widths that holds the longest, or into one that holds all; each is compiled.
_WIDTHS = (128, 256, 512)


@dataclasses.dataclass(frozen=True)
class ChrF:
    """Sentence chrF of samples against the reference, in [0, 1].

    A reference scores 1.0 against itself, so a threshold below 1 never drops D's own pairs: filter D by itself where
    its quality matters. A sample or reference without any character scores 0.

    Attributes:
      char_order: longest character n-gram.
      beta: weight of recall against precision.
    """

    char_order: int = 6
    beta: float = 2.0
    name: str = dataclasses.field(default="chrf", init=False)
    requires_reference: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.char_order <= _WORD_BITS // 2:
            raise UserError(f"ChrF.char_order is {self.char_order}; it must be 1 to {_WORD_BITS // 2}. chrF has 6.")
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
    """The fewest equal passes over the sources that keep each within the texts that a device scores at once."""
    platform, devices = devices_of_trace()
    texts = (_CPU_TEXTS if platform == "cpu" else _ACCELERATOR_TEXTS) * devices
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
    """chrF `[sources, num_samples]` of tokens `[sources, num_samples, length]` and `[sources, reference_length]`."""
    length = max(samples.shape[2], references.shape[1])
    # The reference goes along as the last text of its source.
    texts = jnp.concatenate([_pad_to(samples, length), _pad_to(references[:, None], length)], axis=1)
    spelling = characters.spell(table, texts.reshape(-1, length))
    num_characters = spelling.num_characters.reshape(texts.shape[:2])
    matches = _matches_in_fitting_width(table, spelling, texts_per_source=texts.shape[1], char_order=char_order)
    return f_score(
        matches=matches,
        sample_characters=num_characters[:, :-1],
        reference_characters=num_characters[:, -1:],
        beta=beta,
    )


def _pad_to(tokens: jax.Array, length: int) -> jax.Array:
    return jnp.pad(tokens, ((0, 0), (0, 0), (0, length - tokens.shape[2])))


def f_score(
    *, matches: jax.Array, sample_characters: jax.Array, reference_characters: jax.Array, beta: float
) -> jax.Array:
    """chrF from clipped match counts, as sacreBLEU computes it.

    Precision and recall are averaged over the orders that both texts are long enough for, then combined.

    Args:
      matches: int32 `[char_order, sources, num_samples]`.
      sample_characters: int32 `[sources, num_samples]`.
      reference_characters: int32 `[sources, 1]`.
      beta: weight of recall.

    Returns:
      float32 `[sources, num_samples]`, 0 where nothing matches.
    """
    precision = recall = jnp.zeros(sample_characters.shape, jnp.float32)
    orders = jnp.zeros(sample_characters.shape, jnp.int32)
    # A score must not depend on its batch, bit for bit. So the orders are added one by one, not by a reduction whose
    # order XLA chooses by shape; and the divisors are no broadcasts, which XLA may invert before it multiplies.
    for shorter, matched in enumerate(matches):
        in_sample = jnp.maximum(sample_characters - shorter, 0)  # n-grams
        in_reference = jnp.maximum(reference_characters - shorter, 0)
        effective = (in_sample > 0) & (in_reference > 0)  # else nothing matched
        precision += matched / jnp.where(effective, in_sample, 1)
        recall += matched / jnp.where(effective, in_reference, 1)
        orders += effective
    precision, recall = precision / jnp.maximum(orders, 1), recall / jnp.maximum(orders, 1)
    factor = beta**2
    weighted = factor * precision + recall
    return jnp.where(weighted > 0, (1 + factor) * precision * recall / jnp.where(weighted > 0, weighted, 1.0), 0.0)


def _matches_in_fitting_width(
    table: characters.CharacterTable, spelling: characters.Spelling, *, texts_per_source: int, char_order: int
) -> jax.Array:
    """`clipped_matches` over character arrays as wide as the longest text asks for, chosen at run time.

    Tokens bound the characters only loosely (a piece may have 16), and cost is quadratic in the width.
    """
    rows, length = spelling.ends.shape
    num_characters = spelling.num_characters.reshape(-1, texts_per_source)

    def matches(width: int) -> jax.Array:
        codes = characters.characters(table, spelling, max_characters=width)
        return clipped_matches(
            codes.reshape(rows // texts_per_source, texts_per_source, width),
            longest_reference=jnp.max(num_characters[:, -1]),
            char_order=char_order,
        )

    bound = table.codes.shape[1] * length
    widths = [*(width for width in _WIDTHS if width < bound), bound]
    fitting = jnp.sum(jnp.max(num_characters) > jnp.asarray(widths[:-1], jnp.int32))
    return jax.lax.switch(fitting, [functools.partial(matches, width) for width in widths])


def clipped_matches(texts: jax.Array, *, longest_reference: jax.Array, char_order: int) -> jax.Array:
    """For n = 1..char_order: the sum over distinct n-grams of min(count in sample, count in reference).

    Args:
      texts: code points int32 `[sources, num_samples + 1, width]`, 0 past the end; the last text of each source is
        its reference.
      longest_reference: int32, no reference has more characters.
      char_order: highest n.

    Returns:
      int32 `[char_order, sources, num_samples]`.
    """
    sources, per_source, width = texts.shape
    planes = _bit_planes(texts.reshape(-1, width), char_order=char_order)  # [CODE_BITS, words, texts]
    is_reference = jnp.arange(sources * per_source, dtype=jnp.int32) % per_source == per_source - 1
    # References' characters lie behind each other, texts beside each other: [width + _BLOCK + char_order, sources].
    references = jnp.pad(texts[:, -1].T, ((0, _BLOCK + char_order), (0, 0)))

    # Loops over characters, not one operation on all of them: a loop's result is an array, where XLA would fuse the
    # comparison into each of its uses and repeat it there.
    def block(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start, matches = state
        codes = jax.lax.dynamic_slice_in_dim(references, start, _BLOCK + char_order - 1)
        # E of the block's characters and the few after it: [_BLOCK + char_order - 1, words, texts].
        equal = jax.lax.map(lambda code: _equal_places(planes, jnp.repeat(code, per_source)), codes)

        def count(offset: jax.Array) -> list[jax.Array]:
            window = jax.lax.dynamic_slice_in_dim(equal, offset, char_order)
            # In the reference itself only the places from this character on count: that is the rank.
            before = _places_before(start + offset, words=planes.shape[1], char_order=char_order)
            places = _first_bits(char_order) & jnp.where(is_reference, ~before[:, None], jnp.uint32(0xFFFFFFFF))
            counts = []
            for step in range(char_order):
                places &= window[step] >> step
                counts.append(jnp.sum(jax.lax.population_count(places), axis=0, dtype=jnp.uint32))
            return counts

        counts = jax.lax.map(count, jnp.arange(_BLOCK, dtype=jnp.int32))  # char_order times [_BLOCK, texts]
        found = []
        for count_of_order in counts:
            by_source = count_of_order.reshape(_BLOCK, sources, per_source)
            rank = by_source[:, :, -1:]  # 0 where the n-gram would reach past the reference's end
            found.append(jnp.sum((rank > 0) & (rank <= by_source[:, :, :-1]), axis=0, dtype=jnp.int32))
        return start + _BLOCK, matches + jnp.stack(found)

    start = (jnp.int32(0), jnp.zeros((char_order, sources, per_source - 1), jnp.int32))
    return jax.lax.while_loop(lambda state: state[0] < longest_reference, block, start)[1]


def _stride(char_order: int) -> int:
    """Characters from the start of one word to the next.

    Words of 32 bits overlap by char_order - 1 bits, so that an n-gram that starts in the first `stride` bits lies in
    one word and no bit moves between words.
    """
    return _WORD_BITS - char_order + 1


def _first_bits(char_order: int) -> jax.Array:
    """The bits of a word in which an n-gram is counted."""
    return jnp.uint32((1 << _stride(char_order)) - 1)


def _bit_planes(codes: jax.Array, *, char_order: int) -> jax.Array:
    """Code points `[texts, width]` -> uint32 `[CODE_BITS, words, texts]`: bit i of word w of plane b is bit b of the
    character `stride * w + i`. Texts are last, so that neighbouring lanes do the same work on different texts."""
    words = -(-codes.shape[1] // _stride(char_order))
    bit = jnp.arange(_WORD_BITS, dtype=jnp.uint32)
    character = _stride(char_order) * jnp.arange(words)[:, None] + jnp.arange(_WORD_BITS)
    grouped = jnp.take(codes.T, character, axis=0, mode="fill", fill_value=0).astype(jnp.uint32)  # [words, 32, texts]
    plane = jnp.arange(characters.CODE_BITS, dtype=jnp.uint32)[:, None, None, None]
    return jnp.sum(((grouped >> plane) & 1) << bit[:, None], axis=2, dtype=jnp.uint32)


def _equal_places(planes: jax.Array, code: jax.Array) -> jax.Array:
    """Which characters of each text are `code [texts]`: bits `[words, texts]`. Code 0, past the end, equals nothing."""
    different = jnp.where(code == 0, jnp.uint32(0xFFFFFFFF), jnp.uint32(0))
    for bit in range(characters.CODE_BITS):
        different |= planes[bit] ^ (jnp.uint32(0) - ((code >> bit) & 1).astype(jnp.uint32))
    return ~different


def _places_before(position: jax.Array, *, words: int, char_order: int) -> jax.Array:
    """uint32 `[words]`: bits of the characters before `position`."""
    count = position - _stride(char_order) * jnp.arange(words, dtype=jnp.int32)
    some = (jnp.uint32(1) << jnp.clip(count, 0, _WORD_BITS - 1).astype(jnp.uint32)) - 1
    return jnp.where(count >= _WORD_BITS, jnp.uint32(0xFFFFFFFF), some)
