"""Token ids -> the characters of the text they stand for, in the graph.

The text is what the vocabulary decodes: pieces joined, runs of bytes read as UTF-8 (for each byte that is part of no
valid sequence, U+FFFD in SentencePiece, nothing in a byte vocabulary), the unknown token shown by its surface, nothing
for control tokens and padding. Whitespace is left out, as chrF does not count it, folded where words are asked for, or
kept as it is decoded.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.data.vocabulary import PAD_ID
from rest_jax.rewards.base import RewardVocabulary

# Code points and NUL are at most 0x110000.
CODE_BITS = 21
REPLACEMENT = 0xFFFD
SPACE, LINE_FEED = ord(" "), ord("\n")
# What U+0000 reads as, a number that is no code point: 0 stands past the end of a text.
NUL = 0x110000
_SENTENCEPIECE_SPACE = "\u2581"
# Added to a code point to tell it from a place in the table; places are never that small.
_LITERAL = -(1 << 30)
# What str.split() splits at, as sacreBLEU does.
_WHITESPACE = tuple(code for code in range(0x3001) if chr(code).isspace())
# Left out; all but the line feed read as a space; or as decoded, without the space that decoding takes from the start.
Whitespace = Literal["dropped", "folded", "verbatim"]


class CharacterTable(NamedTuple):
    """Spelling of each token, and of the unknown token once more in the last row, for ids past the vocabulary.

    Attributes:
      codes: int32 `[vocab_size + 1, max_piece_characters]`, code points, then 0.
      lengths: int32 `[vocab_size + 1]`, characters of each token.
      byte_values: int32 `[vocab_size + 1]`, the byte that a byte piece stands for; -1 for other pieces.
      invalid_bytes_shown: bool scalar; a byte that is part of no valid sequence reads as U+FFFD, or as nothing.
      whitespace_shown: bool scalar; whitespace is not left out.
      whitespace_folded: bool scalar; it reads as a line feed or a space, which stands for all the others.
      space_lost: bool `[vocab_size + 1]`, pieces that are decoded without their first space at the start of the text.
      all_spaces_lost: bool scalar; so are all such pieces up to the first that shows something, not one alone.
      eos_id: int32 scalar; the text ends before it.
    """

    codes: jax.Array
    lengths: jax.Array
    byte_values: jax.Array
    invalid_bytes_shown: jax.Array
    whitespace_shown: jax.Array
    whitespace_folded: jax.Array
    space_lost: jax.Array
    all_spaces_lost: jax.Array
    eos_id: jax.Array


class Spelling(NamedTuple):
    """Where the characters of `rows` texts lie; `characters` reads them.

    Attributes:
      offsets: int32 `[rows, length]`. Character p of the text, where it lies in this token, is entry `offset + p` of
        the flattened table; or, where the token is a byte, the offset itself is the code point plus `_LITERAL`.
      ends: int32 `[rows, length]`, characters up to and including this token.
    """

    offsets: jax.Array
    ends: jax.Array

    @property
    def num_characters(self) -> jax.Array:
        """int32 `[rows]`."""
        return self.ends[:, -1]


def character_table(vocabulary: RewardVocabulary, *, whitespace: Whitespace = "dropped") -> CharacterTable:
    """Reads the spelling of all pieces, on the host."""
    size = vocabulary.vocab_size
    space_lost = np.zeros(size + 1, np.bool_)
    byte_values = np.full(size + 1, -1, np.int32)
    spellings: list[list[int]] = []
    for token in [*range(size), vocabulary.unk_id]:
        text = ""
        if vocabulary.is_byte(token):
            byte_values[len(spellings)] = int(vocabulary.id_to_piece(token)[3:5], 16)  # "<0x0A>"
        elif vocabulary.is_unknown(token):
            text = vocabulary.decode([token])
        elif not vocabulary.is_control(token) and token not in (PAD_ID, vocabulary.eos_id):
            text = vocabulary.id_to_piece(token).replace(_SENTENCEPIECE_SPACE, " ")
            space_lost[token] = text.startswith(" ")
        if whitespace == "folded":
            text = "".join(" " if character.isspace() and character != "\n" else character for character in text)
        elif whitespace == "dropped":
            text = "".join(text.split())
        spellings.append([ord(character) for character in text])
    lengths = np.asarray([len(spelling) for spelling in spellings], np.int32)
    codes = np.zeros((size + 1, max(int(lengths.max()), 1)), np.int32)
    for row, spelling in zip(codes, spellings, strict=True):
        row[: len(spelling)] = spelling
    lost = _leading_spaces_lost(vocabulary, space_lost) if whitespace == "verbatim" else 0
    return CharacterTable(
        codes=jnp.asarray(codes),
        lengths=jnp.asarray(lengths),
        byte_values=jnp.asarray(byte_values),
        invalid_bytes_shown=jnp.asarray(vocabulary.invalid_bytes_shown),
        whitespace_shown=jnp.asarray(whitespace != "dropped"),
        whitespace_folded=jnp.asarray(whitespace == "folded"),
        space_lost=jnp.asarray(space_lost & (lost > 0)),
        all_spaces_lost=jnp.asarray(lost > 1),
        eos_id=jnp.asarray(vocabulary.eos_id, jnp.int32),
    )


def spell(table: CharacterTable, tokens: jax.Array) -> Spelling:
    """Finds the characters of each token; what stands at and after the first EOS is left out.

    Args:
      table: of the vocabulary.
      tokens: int32 `[rows, length]`; ids outside of the vocabulary count as unknown.
    """
    vocab_size = table.lengths.shape[0] - 1
    inside = (tokens >= 0) & (tokens < vocab_size)
    ids = jnp.where(inside, tokens, vocab_size)
    in_text = jnp.cumsum(tokens == table.eos_id, axis=1) == 0
    byte_values = jnp.where(in_text, table.byte_values[ids], -1)  # [rows, length]
    decoded, shown = _decode_utf8(
        byte_values,
        invalid_bytes_shown=table.invalid_bytes_shown,
        whitespace_shown=table.whitespace_shown,
        whitespace_folded=table.whitespace_folded,
    )
    is_byte = byte_values >= 0
    lengths = jnp.where(is_byte, shown.astype(jnp.int32), table.lengths[ids])
    lengths = jnp.where(in_text, lengths, 0)
    space_lost = table.space_lost[ids] & in_text
    before = lengths - (space_lost & table.all_spaces_lost)
    space_lost &= jnp.cumsum(before, axis=1) == before
    lengths -= space_lost
    ends = jnp.cumsum(lengths, axis=1)
    starts = ends - lengths
    offsets = jnp.where(is_byte, decoded + _LITERAL, ids * table.codes.shape[1] + space_lost - starts)
    return Spelling(offsets=offsets, ends=ends)


def characters(table: CharacterTable, spelling: Spelling, *, max_characters: int) -> jax.Array:
    """Code points int32 `[rows, max_characters]`, `NUL` for U+0000, 0 past the end of each text."""
    positions = jnp.arange(max_characters, dtype=jnp.int32)
    # [rows, max_characters]: the token that position lies in is the first whose end is past it.
    token = jax.vmap(lambda ends: jnp.searchsorted(ends, positions, side="right"))(spelling.ends)
    offset = jnp.take_along_axis(spelling.offsets, token, axis=1, mode="clip")
    codes = jnp.take(table.codes.reshape(-1), offset + positions, mode="clip")
    codes = jnp.where(offset < _LITERAL // 2, offset - _LITERAL, codes)
    return jnp.where(positions < spelling.num_characters[:, None], codes, 0)


def constant(text: str) -> Spelling:
    """The same `text` for every row, `[1, characters]`; `concatenate` repeats it."""
    codes = np.asarray([ord(character) for character in text], np.int32)
    ends = np.arange(1, len(codes) + 1, dtype=np.int32)
    return Spelling(offsets=jnp.asarray(codes[None] + _LITERAL), ends=jnp.asarray(ends[None]))


def concatenate(spellings: Sequence[Spelling]) -> Spelling:
    """The texts of each row behind each other; spellings of one row belong to all rows."""
    rows = max(spelling.ends.shape[0] for spelling in spellings)
    start = jnp.zeros((rows, 1), jnp.int32)
    offsets, ends = [], []
    for spelling in spellings:
        literal = spelling.offsets < _LITERAL // 2
        offsets.append(jnp.where(literal, spelling.offsets, spelling.offsets - start))
        ends.append(spelling.ends + start)
        start = ends[-1][:, -1:]
    broadcast = [jnp.broadcast_to(array, (rows, array.shape[1])) for array in offsets]
    return Spelling(offsets=jnp.concatenate(broadcast, axis=1), ends=jnp.concatenate(ends, axis=1))


def _leading_spaces_lost(vocabulary: RewardVocabulary, starts_with_space: np.ndarray) -> int:
    """How many pieces in a row lose their first space at the start of a text: 0, 1, or 2 for any number."""
    pieces = {vocabulary.id_to_piece(int(token)): int(token) for token in np.flatnonzero(starts_with_space)}
    longer = next((token for piece, token in pieces.items() if len(piece) > 1), None)
    alone = pieces.get(_SENTENCEPIECE_SPACE)
    if longer is None or vocabulary.decode([longer]).startswith(" "):
        return 0
    if alone is None:
        return 1  # no piece is empty without its space
    return 1 if vocabulary.decode([alone, longer]).startswith(" ") else 2


def _decode_utf8(
    byte_values: jax.Array,
    *,
    invalid_bytes_shown: jax.Array,
    whitespace_shown: jax.Array,
    whitespace_folded: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Reads runs of bytes as UTF-8.

    Lead bytes are never trail bytes, so valid sequences cannot overlap, and each is found by looking three bytes ahead.

    Args:
      byte_values: int32 `[rows, length]`, -1 where no byte is.
      invalid_bytes_shown: whether bytes that are part of no valid sequence are shown.
      whitespace_shown: whether whitespace is.
      whitespace_folded: whether whitespace but the line feed reads as a space.

    Returns:
      The code point that starts at each byte (U+FFFD where none does, `NUL` for U+0000), and whether it is shown: bytes
      inside a valid sequence are not.
    """
    length = byte_values.shape[1]

    def ahead(steps: int) -> jax.Array:
        return jnp.pad(byte_values, ((0, 0), (0, steps)), constant_values=-1)[:, steps:]

    def behind(values: jax.Array, steps: int) -> jax.Array:
        return jnp.pad(values, ((0, 0), (steps, 0)))[:, :length]

    first, second, third, fourth = byte_values, ahead(1), ahead(2), ahead(3)
    trail_2, trail_3, trail_4 = ((byte & ~0x3F) == 0x80 for byte in (second, third, fourth))
    code_2 = (first & 0x1F) << 6 | (second & 0x3F)
    code_3 = (first & 0x0F) << 12 | (second & 0x3F) << 6 | (third & 0x3F)
    code_4 = (first & 0x07) << 18 | (second & 0x3F) << 12 | (third & 0x3F) << 6 | (fourth & 0x3F)
    valid_1 = (first & ~0x7F) == 0
    valid_2 = ((first & ~0x1F) == 0xC0) & trail_2 & (code_2 >= 0x80)
    surrogate = (code_3 >= 0xD800) & (code_3 < 0xE000)
    valid_3 = ((first & ~0x0F) == 0xE0) & trail_2 & trail_3 & (code_3 >= 0x800) & ~surrogate
    valid_4 = ((first & ~0x07) == 0xF0) & trail_2 & trail_3 & trail_4 & (code_4 >= 0x10000) & (code_4 < 0x110000)
    code = jnp.select([valid_1, valid_2, valid_3, valid_4], [first, code_2, code_3, code_4], REPLACEMENT)
    covered = behind(valid_2 | valid_3 | valid_4, 1) | behind(valid_3 | valid_4, 2) | behind(valid_4, 3)
    whitespace = jnp.isin(code, jnp.asarray(_WHITESPACE, jnp.int32), method="compare_all")
    starts_one = valid_1 | valid_2 | valid_3 | valid_4 | invalid_bytes_shown
    shown = (byte_values >= 0) & ~covered & starts_one & (whitespace_shown | ~whitespace)
    code = jnp.where(whitespace & whitespace_folded & (code != LINE_FEED), SPACE, code)
    return jnp.where(code == 0, NUL, code), shown
