"""Characters with whitespace -> words, in the graph: as chrF++ splits them, and as BLEU's 13a tokenisation does.

A text's words are its characters without whitespace and a mark where each word starts. Both ways of splitting only add
starts to those that whitespace makes; what 13a rewrites in the text (HTML's entities, hyphens at the end of a line) is
rewritten before, in the program's branch for batches that have some of it.
"""

import functools
import string
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rest_jax.rewards.characters import CODE_BITS, LINE_FEED, SPACE

# sacrebleu.tokenizers.tokenizer_13a: each occurrence of the first becomes the second, one line after the other.
_REWRITTEN_IN_13A = (
    ("<skipped>", ""),
    ("-\n", ""),
    ("&quot;", '"'),
    ("&amp;", "&"),
    ("&lt;", "<"),
    ("&gt;", ">"),
)


class Words(NamedTuple):
    """The words of `rows` texts.

    Attributes:
      codes: int32 `[rows, width]`, code points without whitespace, 0 past the end.
      starts: bool `[rows, width]`, a word starts at this character.
    """

    codes: jax.Array
    starts: jax.Array

    @property
    def num_characters(self) -> jax.Array:
        """int32 `[rows]`."""
        return jnp.sum(self.codes != 0, axis=1, dtype=jnp.int32)

    @property
    def num_words(self) -> jax.Array:
        """int32 `[rows]`."""
        return jnp.sum(self.starts, axis=1, dtype=jnp.int32)


def chrf_words(text: jax.Array) -> Words:
    """Words as in sacreBLEU's chrF++: a punctuation mark at the end of a word is a word, else one at its start is.

    Args:
      text: code points int32 `[rows, width]` with whitespace as spaces and line feeds, 0 past the end.
    """
    words = _split_at_whitespace(text)
    codes, starts = words
    mark = _is_any_of(codes, string.punctuation)
    last = (codes != 0) & (_next(starts, True) | (_next(codes, 0) == 0))
    # Whether the word that a character stands in ends in a mark: the nearest last character from it on says so.
    position = jnp.arange(codes.shape[1], dtype=jnp.int32)
    nearest = jax.lax.cummin(jnp.where(last, 2 * position + mark, 2 * codes.shape[1]), axis=1, reverse=True)
    ends_in_mark = nearest % 2 == 1
    after_first_mark = _previous(starts & mark, False) & ~ends_in_mark
    return Words(codes, starts | (codes != 0) & ((last & mark) | after_first_mark))


def tokens_13a(text: jax.Array) -> Words:
    """Tokens as in sacreBLEU's `13a`, mteval-v13a's tokenisation of Western languages.

    With its four substitutions worked out for a run of full stops and commas between the characters c and d:
    there is a start between all of them; one before the first, unless the run is a single mark between digits; and one
    before d, unless d is a digit and the run's length is even where c is none, odd where c is one.

    Args:
      text: as of `chrf_words`.
    """
    codes, starts = _split_at_whitespace(_rewrite_13a(text))
    alone = _is_any_of(codes, '{|}~[\\]^_` !"#$%&()*+:;<=>?@/')
    point = _is_any_of(codes, ".,")
    digit = (codes >= ord("0")) & (codes <= ord("9"))
    digit_before = ~starts & _previous(digit, False)
    digit_after = ~_next(starts, True) & _next(digit, False)

    first = point & (starts | ~_previous(point, False))
    last = point & (_next(starts, True) | ~_next(point, False))
    # Where the run of each of its marks began, and whether a digit stands before it, of the nearest run so far.
    position = jnp.arange(codes.shape[1], dtype=jnp.int32)
    nearest = jax.lax.cummax(jnp.where(first, 2 * position + digit_before, -1), axis=1)
    length, after_digit = position - nearest // 2 + 1, nearest % 2 == 1
    number = first & last & digit_before & digit_after
    split_after = last & (~digit_after | ((length % 2 == 0) == after_digit))
    dash = (codes == ord("-")) & digit_before
    before = alone | (point & ~number) | dash
    after = alone | (point & ~last) | split_after | dash
    return Words(codes, (codes != 0) & (starts | before | _previous(after, False)))


def _split_at_whitespace(text: jax.Array) -> Words:
    space = (text == SPACE) | (text == LINE_FEED)
    starts = (text != 0) & ~space & _previous(space, True)
    marked = _drop(text | starts.astype(jnp.int32) << CODE_BITS, space)
    return Words(marked & ((1 << CODE_BITS) - 1), marked >> CODE_BITS == 1)


def _rewrite_13a(text: jax.Array) -> jax.Array:
    """What 13a replaces before it tokenises; a line feed at the end of the text was stripped before."""
    solid = (text != 0) & (text != SPACE) & (text != LINE_FEED)
    rest = jax.lax.cummax(solid.astype(jnp.int32), axis=1, reverse=True)  # a solid character follows, or is here
    text = jnp.where(rest == 1, text, 0)
    found = functools.reduce(jnp.logical_or, (_find(text, pattern) for pattern, _ in _REWRITTEN_IN_13A))

    def rewrite(text: jax.Array) -> jax.Array:
        for pattern, replacement in _REWRITTEN_IN_13A:
            text = _replace(text, pattern, replacement)
        return text

    return jax.lax.cond(jnp.any(found), rewrite, lambda text: text, text)


def _find(text: jax.Array, pattern: str) -> jax.Array:
    """bool `[rows, width]`: the pattern, which has no border, starts here."""
    width = text.shape[1]
    ahead = jnp.pad(text, ((0, 0), (0, len(pattern))))
    return functools.reduce(
        jnp.logical_and, (ahead[:, i : i + width] == ord(character) for i, character in enumerate(pattern))
    )


def _replace(text: jax.Array, pattern: str, replacement: str) -> jax.Array:
    """As `str.replace`, of a pattern without a border by one character or none."""
    found = _find(text, pattern)
    if replacement:
        text = jnp.where(found, ord(replacement), text)
    dropped = (jnp.pad(found, ((0, 0), (i, 0)))[:, : text.shape[1]] for i in range(len(replacement), len(pattern)))
    return _drop(text, functools.reduce(jnp.logical_or, dropped))


def _drop(text: jax.Array, dropped: jax.Array) -> jax.Array:
    """`text [rows, width]` without the characters `dropped`, the others moved together; 0 past the end."""
    rows, width = text.shape
    place = jnp.where(dropped, width, jnp.cumsum(~dropped, axis=1, dtype=jnp.int32) - 1)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    return jnp.zeros_like(text).at[row, place].set(text, mode="drop", unique_indices=True)


def _is_any_of(codes: jax.Array, characters: str) -> jax.Array:
    """bool, of the shape of `codes`: one of these ASCII characters."""
    table = jnp.asarray([chr(code) in characters for code in range(128)])
    return jnp.take(table, codes, mode="fill", fill_value=False)


def _previous(values: jax.Array, before: int) -> jax.Array:
    """The value one place before, `before` for the first."""
    return jnp.pad(values[:, :-1], ((0, 0), (1, 0)), constant_values=before)


def _next(values: jax.Array, past: int) -> jax.Array:
    """The value one place on, `past` for the last."""
    return jnp.pad(values[:, 1:], ((0, 0), (0, 1)), constant_values=past)
