"""Clipped n-gram matches of samples with their source's reference: exact, neither hashed nor sorted.

Characters: let r_j be the reference's characters and bit i of the row E[j] say whether character i of the sample is
r_j. The sample's occurrences of the n-gram that starts at r_j are then the bits of

    M_n[j] = E[j] & (E[j + 1] >> 1) & ... & (E[j + n - 1] >> (n - 1))

and with rank_n[j] = how many of r_j, r_{j+1}, ... start the same n-gram, the clipped number of matches is

    sum over distinct n-grams of min(count in sample, in reference) = sum over j of [rank_n[j] <= popcount(M_n[j])]

The rank is the same popcount with the reference in the place of the sample, over the places from j on. E[j] itself
comes from the bit planes of the code points: 21 exclusive-ors of words that hold 32 characters each.

Words have no fixed length, so there the n-grams of words grow character by character: S_n[j] are the places of the
sample where a text ends that equals the reference from the start of the n-th last word up to r_j (word starts equal
too), thus S_n[j] = (S_n[j - 1] << 1) & E[j], and at the start of a word S_{n+1} takes the place of S_n. Where r_j ends
a word, the bits of S_n[j] at ends of words are the occurrences of an n-gram of words.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.rewards import characters

_WORD_BITS = 32
_ALL = np.uint32(0xFFFFFFFF)
# Reference characters per turn of the loop.
_BLOCK = 32
MAX_CHARACTER_ORDER = _WORD_BITS // 2


def clipped_character_matches(texts: jax.Array, *, longest_reference: jax.Array, char_order: int) -> jax.Array:
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
    stride = _stride(char_order)
    planes = _bit_planes(texts.reshape(-1, width), bits=characters.CODE_BITS, stride=stride)  # [bits, words, texts]
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
            before = _places_before(start + offset, words=planes.shape[1], stride=stride)
            places = _first_bits(char_order) & jnp.where(is_reference, ~before[:, None], _ALL)
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


def _bit_planes(codes: jax.Array, *, bits: int, stride: int) -> jax.Array:
    """Codes `[texts, width]` of `bits` bits -> uint32 `[bits, words, texts]`: bit i of word w of plane b is bit b of
    the character `stride * w + i`. Texts are last, so that neighbouring lanes do the same work on different texts."""
    words = -(-codes.shape[1] // stride)
    bit = jnp.arange(_WORD_BITS, dtype=jnp.uint32)
    character = stride * jnp.arange(words)[:, None] + jnp.arange(_WORD_BITS)
    grouped = jnp.take(codes.T, character, axis=0, mode="fill", fill_value=0).astype(jnp.uint32)  # [words, 32, texts]
    plane = jnp.arange(bits, dtype=jnp.uint32)[:, None, None, None]
    return jnp.sum(((grouped >> plane) & 1) << bit[:, None], axis=2, dtype=jnp.uint32)


def _equal_places(planes: jax.Array, code: jax.Array) -> jax.Array:
    """Which characters of each text are `code [texts]`: bits `[words, texts]`. Code 0, past the end, equals nothing."""
    different = jnp.where(code == 0, _ALL, jnp.uint32(0))
    for bit, plane in enumerate(planes):
        different |= plane ^ (jnp.uint32(0) - ((code >> bit) & 1).astype(jnp.uint32))
    return ~different


def _places_before(position: jax.Array, *, words: int, stride: int) -> jax.Array:
    """uint32 `[words]`: bits of the characters before `position`."""
    count = position - stride * jnp.arange(words, dtype=jnp.int32)
    some = (jnp.uint32(1) << jnp.clip(count, 0, _WORD_BITS - 1).astype(jnp.uint32)) - 1
    return jnp.where(count >= _WORD_BITS, _ALL, some)


def clipped_word_matches(codes: jax.Array, starts: jax.Array, *, word_order: int) -> jax.Array:
    """For n = 1..word_order: the sum over distinct n-grams of words of min(count in sample, count in reference).

    Args:
      codes: code points int32 `[sources, num_samples + 1, width]` of the words, nothing between them, 0 past the end;
        the last text of each source is its reference.
      starts: bool, of that shape; a word starts at this character.
      word_order: highest n.

    Returns:
      int32 `[word_order, sources, num_samples]`.
    """
    sources, per_source, width = codes.shape
    marked = jnp.where(starts, codes | (1 << characters.CODE_BITS), codes)
    planes = _bit_planes(marked.reshape(-1, width), bits=characters.CODE_BITS + 1, stride=_WORD_BITS)
    words = planes.shape[1]
    next_starts = jnp.pad(starts[..., 1:], ((0, 0), (0, 0), (0, 1)))
    past_end = jnp.pad(codes[..., 1:], ((0, 0), (0, 0), (0, 1))) == 0
    ends = (codes != 0) & (next_starts | past_end)
    end_places = _bit_planes(ends.reshape(-1, width).astype(jnp.int32), bits=1, stride=_WORD_BITS)[0]
    is_reference = jnp.arange(sources * per_source, dtype=jnp.int32) % per_source == per_source - 1
    references, reference_ends = marked[:, -1].T, ends[:, -1].T  # [width, sources]
    longest = jnp.max(jnp.sum(codes[:, -1] != 0, axis=1, dtype=jnp.int32))

    def character(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        position, grown, matches = state
        code = jnp.repeat(jax.lax.dynamic_index_in_dim(references, position, keepdims=False), per_source)
        equal = _equal_places(planes, code)
        # The next place of each: bit 31 moves into bit 0 of the word after.
        carry = jnp.pad(grown[:, :-1] >> (_WORD_BITS - 1), ((0, 0), (1, 0), (0, 0)))
        moved = grown << 1 | carry
        one_more = jnp.concatenate([jnp.full_like(moved[:1], _ALL), moved[:-1]])
        grown = jnp.where(code >> characters.CODE_BITS, one_more, moved) & equal  # [word_order, words, texts]
        # In the reference itself only the places up to this one count: that is the rank.
        up_to = jnp.where(is_reference, _places_before(position + 1, words=words, stride=_WORD_BITS)[:, None], _ALL)
        counts = jnp.sum(jax.lax.population_count(grown & (end_places & up_to)), axis=1, dtype=jnp.uint32)
        by_source = counts.reshape(word_order, sources, per_source)
        rank = by_source[..., -1:]  # 0 where the n-gram would reach before the first word
        ended = jax.lax.dynamic_index_in_dim(reference_ends, position, keepdims=False)[:, None]
        return position + 1, grown, matches + (ended & (rank > 0) & (rank <= by_source[..., :-1]))

    start = (
        jnp.int32(0),
        jnp.zeros((word_order, words, sources * per_source), jnp.uint32),
        jnp.zeros((word_order, sources, per_source - 1), jnp.int32),
    )
    return jax.lax.while_loop(lambda state: state[0] < longest, character, start)[2]
