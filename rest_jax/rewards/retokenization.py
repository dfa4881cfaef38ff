"""Policy token ids -> token ids of another SentencePiece unigram vocabulary, in the graph.

A reward with its own vocabulary sees text: the policy's pieces are spelled (`characters.py`), joined by a template such
as `source: {source} candidate: {candidate}`, normalised by the vocabulary's rules, and segmented by Viterbi's algorithm
(Kudo 2018), which is what `sentencepiece` does with the decoded texts, and in the same float32 additions.

What differs from the library (0.2.3): its path's score starts again from 0 where it passes 100,000 in size, which is
thousands of tokens; the rounding there may break ties otherwise.
"""

import dataclasses
import functools
import string
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rest_jax import paths
from rest_jax.errors import UserError
from rest_jax.rewards import characters
from rest_jax.rewards.base import RewardVocabulary
from rest_jax.rewards.lexical import deal, number_of_passes
from rest_jax.rewards.sentencepiece_tables import (
    SPACE_SYMBOL,
    Normaliser,
    Pieces,
    SentencePieceTables,
    read_tables,
)

# Texts are written into the first of these widths that holds the longest of a pass; each is compiled.
_WIDTHS = (256, 1024)
_CHARACTERS_PER_TOKEN = 8
_SPACE_SYMBOL = ord(SPACE_SYMBOL)
_NO_RULE = -1
_UNKNOWN = -1


class RetokenizerParams(NamedTuple):
    """The policy's vocabulary as characters, the reward's as tables; an argument of the jitted program."""

    policy: characters.CharacterTable
    reward: SentencePieceTables


class Retokenized(NamedTuple):
    """Token ids of the reward's vocabulary.

    Attributes:
      ids: int32 `[batch, num_samples, max_tokens]`, 0 behind the text.
      lengths: int32 `[batch, num_samples]`.
    """

    ids: jax.Array
    lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class Retokenizer:
    """Writes texts of the policy's ids into a template and encodes them in another vocabulary.

    The result is that of `SentencePieceProcessor.encode` on `template.format(...)` of the decoded texts.

    Attributes:
      sentencepiece_model_file: the other vocabulary, unigram; `rest_jax://tasks/...` names a file of the package.
      template: text with the names of token ids in braces, e.g. `source: {source} candidate: {candidate}`.
      max_tokens: ids of each result; longer ones lose their end, thus what stands last in the template first.
      append_eos: the vocabulary's EOS is put last, and kept when the text is cut.
      max_characters: text past them is not read; None for 8 a token of the result.
    """

    sentencepiece_model_file: str
    template: str
    max_tokens: int
    append_eos: bool = False
    max_characters: int | None = None

    def __post_init__(self) -> None:
        least = 2 if self.append_eos else 1
        if self.max_tokens < least:
            raise UserError(f"Retokenizer.max_tokens is {self.max_tokens}; it must be {least} or more.")
        if self.max_characters is not None and self.max_characters < 1:
            raise UserError(f"Retokenizer.max_characters is {self.max_characters}; it must be 1 or more, or None.")
        if not self.fields or "" in self.fields:
            raise UserError(
                f"Retokenizer.template names no token ids: {self.template!r}. Name them in braces, as in "
                "'source: {source} candidate: {candidate}'."
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the token ids in the template, in its order."""
        return tuple(field for _, field in self._parts() if field is not None)

    def init(self, policy_vocabulary: RewardVocabulary) -> RetokenizerParams:
        """Reads both vocabularies, on the host.

        Raises:
          UserError: the model file is missing or can not be segmented in the graph, or has no EOS where it is asked.
        """
        tables = read_tables(paths.resolve(self.sentencepiece_model_file))
        if self.append_eos and int(tables.pieces.eos_id) < 0:
            raise UserError(
                f"Retokenizer.append_eos is set, but {self.sentencepiece_model_file!r} has no EOS. Leave it False."
            )
        return RetokenizerParams(
            policy=characters.character_table(policy_vocabulary, whitespace="verbatim"), reward=tables
        )

    def __call__(self, params: RetokenizerParams, tokens: Mapping[str, jax.Array]) -> Retokenized:
        """Encodes the template's text of each sample.

        Args:
          params: of `init`.
          tokens: policy ids of each of `fields`, int32 `[batch, num_samples, length]`, or `[batch, 1, length]` where
            all samples share them; read up to the first EOS.
        """
        shapes = [tokens[field].shape for field in self.fields]
        batch, num_samples = shapes[0][0], max(shape[1] for shape in shapes)
        passes = number_of_passes(batch, num_samples=num_samples)

        def encode_pass(tokens: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            sources = batch // passes
            shared = {
                field: jnp.broadcast_to(ids, (sources, num_samples, ids.shape[2])).reshape(-1, ids.shape[2])
                for field, ids in tokens.items()
            }
            return self._encode(params, shared)

        # A pass takes every passes-th source, so that each has its share of every shard of the batch.
        ids, lengths = jax.lax.map(encode_pass, {field: deal(tokens[field], passes) for field in self.fields})
        by_source = ids.reshape(passes, batch // passes, num_samples, self.max_tokens)
        return Retokenized(
            ids=jnp.moveaxis(by_source, 0, 1).reshape(batch, num_samples, self.max_tokens),
            lengths=jnp.moveaxis(lengths.reshape(passes, -1, num_samples), 0, 1).reshape(batch, num_samples),
        )

    def _parts(self) -> list[tuple[str, str | None]]:
        """(constant text, name behind it) of the template."""
        try:
            return [(text, field) for text, field, _, _ in string.Formatter().parse(self.template)]
        except ValueError as error:
            raise UserError(f"Retokenizer.template {self.template!r} is no template: {error}.") from error

    def _encode(self, params: RetokenizerParams, tokens: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Ids `[rows, max_tokens]` and lengths of tokens `[rows, length]`, in arrays as wide as the texts ask for."""
        parts = []
        for text, field in self._parts():
            parts += [characters.constant(text)] if text else []
            parts += [characters.spell(params.policy, tokens[field])] if field is not None else []
        spelling = characters.concatenate(parts)
        bound = self.max_characters or _CHARACTERS_PER_TOKEN * self.max_tokens
        widths = [*(width for width in _WIDTHS if width < bound), bound]

        def in_width(width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
            codes = characters.characters(params.policy, spelling, max_characters=width)
            codes = jnp.where(codes == characters.NUL, 0, codes)  # lengths say where texts end
            lengths = jnp.minimum(spelling.num_characters, width)
            codes, lengths = normalise(params.reward.normaliser, codes, lengths)
            ids, num_tokens = segment(
                params.reward.pieces, codes, jnp.minimum(lengths, width), max_tokens=self.max_tokens - self.append_eos
            )
            return ids, num_tokens, jnp.max(lengths)

        # Normalising may lengthen a text past the width that held it; then the next one is taken.
        def attempt(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            index = state[0]
            branches = [functools.partial(in_width, width) for width in widths]
            ids, num_tokens, longest = jax.lax.switch(index, branches)
            return index + 1, longest > jnp.asarray(widths)[index], ids, num_tokens

        rows = spelling.ends.shape[0]
        fitting = jnp.sum(jnp.max(spelling.num_characters) > jnp.asarray(widths[:-1], jnp.int32))
        empty = jnp.zeros((rows, self.max_tokens - self.append_eos), jnp.int32)
        start: tuple[jax.Array, ...] = (fitting, jnp.asarray(True), empty, jnp.zeros(rows, jnp.int32))
        _, _, ids, lengths = jax.lax.while_loop(lambda state: state[1] & (state[0] < len(widths)), attempt, start)
        if self.append_eos:
            ids = jnp.pad(ids, ((0, 0), (0, 1)))
            ids = jnp.where(jnp.arange(self.max_tokens) == lengths[:, None], params.reward.pieces.eos_id, ids)
            lengths += 1
        return ids, lengths


def join(
    prefix_ids: jax.Array,
    prefix_lengths: jax.Array,
    ids: jax.Array,
    lengths: jax.Array,
    *,
    total_length: int,
) -> Retokenized:
    """Puts prefixes that the host encoded before the ids of samples; what is too long loses the sample's end.

    Args:
      prefix_ids: int32 `[batch, prefix_length]`.
      prefix_lengths: int32 `[batch]`.
      ids: int32 `[batch, num_samples, length]`.
      lengths: int32 `[batch, num_samples]`.
      total_length: ids of each result.
    """
    positions = jnp.arange(total_length, dtype=jnp.int32)
    before = prefix_lengths[:, None, None]
    total = jnp.minimum(prefix_lengths[:, None] + lengths, total_length)
    prefix = jnp.take_along_axis(prefix_ids, jnp.minimum(positions, prefix_ids.shape[1] - 1)[None], axis=1)[:, None]
    sample = jnp.take_along_axis(ids, jnp.clip(positions - before, 0, ids.shape[2] - 1), axis=2)
    joined = jnp.where(positions < before, prefix, sample)
    return Retokenized(ids=jnp.where(positions < total[:, :, None], joined, 0), lengths=total)


def normalise(rules: Normaliser, codes: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rewrites texts as SentencePiece does before it segments them.

    Args:
      rules: of the vocabulary.
      codes: code points int32 `[rows, width]`.
      lengths: int32 `[rows]`.

    Returns:
      Code points `[rows, width]`, spaces as U+2581, and lengths; one above `width` says that the text was cut to it.
    """
    rows, width = codes.shape
    inside = jnp.arange(width, dtype=jnp.int32) < lengths[:, None]
    rule = _matching_rules(rules, jnp.where(inside, codes, -1))
    matched = rule != _NO_RULE
    is_space = codes == characters.SPACE
    # By place, then by row: the loop below reads one place after the other.
    covers = jnp.where(matched, rules.match_lengths[rule], 1).T
    produces = jnp.where(matched, rules.lengths[rule], 1).T
    leading = jnp.where(matched, rules.leading_spaces[rule], is_space).T
    ends_in_space = jnp.where(matched, rules.ends_in_space[rule], is_space).T

    def place(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        covered, after_space, dropped, emitted = state
        starts = (index >= covered) & (index < lengths)
        drop = jnp.where(after_space, leading[index], 0)
        emit = jnp.where(starts, produces[index] - drop, 0)
        after_space = jnp.where(emit > 0, ends_in_space[index] & rules.extra_spaces_removed, after_space)
        covered = jnp.where(starts, index + covers[index], covered)
        return covered, after_space, dropped.at[index].set(drop), emitted.at[index].set(emit)

    nothing = jnp.zeros((width, rows), jnp.int32)
    start = (jnp.zeros(rows, jnp.int32), jnp.broadcast_to(rules.extra_spaces_removed, (rows,)), nothing, nothing)
    _, _, dropped, emitted = jax.lax.fori_loop(0, jnp.max(lengths), place, start)

    ends = jnp.cumsum(emitted.T, axis=1)
    first_of = ends - emitted.T - dropped.T
    prefix = (rules.dummy_prefix & (lengths > 0)).astype(jnp.int32)[:, None]
    positions = jnp.arange(width, dtype=jnp.int32) - prefix
    place_of = _first_past(ends, positions)
    rule_of = jnp.take_along_axis(rule, place_of, axis=1, mode="clip")
    within = positions - jnp.take_along_axis(first_of, place_of, axis=1, mode="clip")
    literal = jnp.take_along_axis(codes, place_of, axis=1, mode="clip")
    literal = jnp.where(literal == characters.SPACE, _SPACE_SYMBOL, literal)
    replaced = jnp.take(rules.pool, rules.starts[rule_of] + within, mode="clip")
    written = jnp.where(rule_of == _NO_RULE, literal, replaced)
    written = jnp.where(positions < 0, _SPACE_SYMBOL, written)
    total = ends[:, -1:] + prefix
    stays = (positions + prefix < total) & (written != _SPACE_SYMBOL)
    # Where the text was cut, spaces at the cut are none at the end.
    last = jnp.max(jnp.where(stays, positions + prefix + 1, 0), axis=1)
    total = total[:, 0]
    return written, jnp.where(rules.extra_spaces_removed & (total <= width), last, total)


def segment(pieces: Pieces, codes: jax.Array, lengths: jax.Array, *, max_tokens: int) -> tuple[jax.Array, jax.Array]:
    """The likeliest segmentation of normalised texts; of equally likely ones that of the library.

    Args:
      pieces: the unigram model.
      codes: code points int32 `[rows, width]`.
      lengths: int32 `[rows]`.
      max_tokens: ids to return; later ones are left out.

    Returns:
      Ids int32 `[rows, max_tokens]`, 0 behind the text, and their number `[rows]`.
    """
    width = codes.shape[1]
    ids = _best_last_pieces(pieces, codes, lengths)
    on_path = _best_path(jnp.where(ids == _UNKNOWN, 1, pieces.lengths[ids]), lengths).T
    ids = ids.T
    unknown = on_path & (ids == _UNKNOWN)
    after_unknown = jnp.pad(unknown, ((0, 0), (1, 0)))[:, :width]
    num_bytes = 1 + (codes >= 0x80).astype(jnp.int32) + (codes >= 0x800) + (codes >= 0x10000)
    # Unknown characters beside each other are one unknown token, or each is spelled in bytes.
    of_unknown = jnp.where(pieces.byte_fallback, num_bytes, ~after_unknown)
    counts = jnp.where(unknown, of_unknown, on_path)
    ends = jnp.cumsum(counts, axis=1)
    positions = jnp.broadcast_to(jnp.arange(max_tokens, dtype=jnp.int32), (codes.shape[0], max_tokens))
    place_of = _first_past(ends, positions)

    def there(array: jax.Array) -> jax.Array:
        return jnp.take_along_axis(array, place_of, axis=1, mode="clip")

    byte = _utf8_byte(there(codes), count=there(num_bytes), index=positions - there(ends - counts))
    of_unknown = jnp.where(pieces.byte_fallback, pieces.byte_ids[byte], pieces.unknown_id)
    found = there(ids)
    num_tokens = jnp.minimum(ends[:, -1], max_tokens)
    ids = jnp.where(found == _UNKNOWN, of_unknown, found)
    return jnp.where(positions < num_tokens[:, None], ids, 0), num_tokens


def _matching_rules(rules: Normaliser, codes: jax.Array) -> jax.Array:
    """Number of the rule that applies where it starts at each place, or -1; int32 `[rows, width]`."""
    classes = jnp.where(codes < 0, 0, rules.trie.classes_of(codes))

    def deeper(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        nodes, bases, classes, rule, symbol = state
        nodes, bases = rules.trie.step(nodes, bases, classes)
        value = jnp.where(nodes >= 0, rules.trie.values[nodes], _NO_RULE)
        is_symbol = value >= rules.first_symbol
        ahead = jnp.pad(classes, ((0, 0), (0, 1)))[:, 1:]
        return (
            nodes,
            bases,
            ahead,
            jnp.where((value != _NO_RULE) & ~is_symbol, value, rule),
            jnp.where(is_symbol, value, symbol),
        )

    none = jnp.full(codes.shape, _NO_RULE, jnp.int32)
    start: tuple[jax.Array, ...] = (*rules.trie.start(codes.shape), classes, none, none)
    *_, rule, symbol = jax.lax.while_loop(lambda state: jnp.any(state[0] >= 0), deeper, start)
    return jnp.where(symbol != _NO_RULE, symbol, rule)


def _best_last_pieces(pieces: Pieces, codes: jax.Array, lengths: jax.Array) -> jax.Array:
    """Last piece of the best segmentation up to and including each place: ids or -1, int32 `[width, rows]`."""
    rows, width = codes.shape
    longest = pieces.no_walks.shape[0]
    classes = pieces.trie.classes_of(codes).T

    # Walks through the trie from the last `longest` places, the longest first.
    def place(index: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        nodes, bases, scores, best, slots = state
        new_node, new_base = pieces.trie.start((1, rows))
        nodes, bases = (jnp.concatenate([old[1:], new]) for old, new in ((nodes, new_node), (bases, new_base)))
        scores = jnp.concatenate([scores[1:], best[None]])
        nodes, bases = pieces.trie.step(nodes, bases, classes[index])
        piece = jnp.where(nodes >= 0, pieces.scores[nodes], -jnp.inf)  # [longest, rows]
        no_character = piece[-1] == -jnp.inf
        piece = piece.at[-1].set(jnp.where(no_character, pieces.unknown_score, piece[-1]))
        totals = piece + scores
        # The first maximum: of equal scores the library keeps the piece that starts first.
        chosen = jnp.argmax(totals, axis=0)[None]
        slot = jnp.take_along_axis(nodes, chosen, axis=0)[0]
        slot = jnp.where(no_character & (chosen[0] == longest - 1), _UNKNOWN, slot)
        best = jnp.take_along_axis(totals, chosen, axis=0)[0]
        return nodes, bases, scores, best, slots.at[index].set(slot)

    outside = jnp.broadcast_to(pieces.no_walks[:, None], (longest, rows))
    start = (
        outside,
        jnp.zeros_like(outside),
        jnp.zeros((longest, rows), jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.full((width, rows), _UNKNOWN, jnp.int32),
    )
    *_, slots = jax.lax.fori_loop(0, jnp.max(lengths), place, start)
    return jnp.where(slots == _UNKNOWN, _UNKNOWN, pieces.trie.values[slots])


def _best_path(piece_lengths: jax.Array, lengths: jax.Array) -> jax.Array:
    """Whether a piece of the best segmentation ends at each place: bool `[width, rows]`, followed from the end."""

    def place(step: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        end, on_path = state
        index = longest - 1 - step
        ends_here = end == index
        end = jnp.where(ends_here, end - piece_lengths[index], end)
        return end, on_path.at[index].set(ends_here)

    longest = jnp.max(lengths)
    start = (lengths - 1, jnp.zeros(piece_lengths.shape, jnp.bool_))
    return jax.lax.fori_loop(0, longest, place, start)[1]


def _first_past(ends: jax.Array, positions: jax.Array) -> jax.Array:
    """The first entry of each row of `ends` (ascending) that is above each of the row's positions."""
    return jax.vmap(lambda row, position: jnp.searchsorted(row, position, side="right"))(ends, positions)


def _utf8_byte(code: jax.Array, *, count: jax.Array, index: jax.Array) -> jax.Array:
    """Byte number `index` of the `count` that spell a code point."""
    shifted = code >> 6 * jnp.clip(count - 1 - index, 0, 3)
    lead = jnp.asarray([0, 0xC0, 0xE0, 0xF0])[count - 1] | shifted
    return jnp.where(index == 0, lead, 0x80 | shifted & 0x3F)
