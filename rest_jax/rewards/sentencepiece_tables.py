"""A SentencePiece unigram model as arrays: its pieces and its normaliser's rules. Read on the host, used in the graph.

What the library does was read in its source, version 0.2.3: `unigram_model.cc`, `normalizer.cc`.
"""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from rest_jax.errors import UserError
from rest_jax.rewards.piece_trie import DEAD, Trie, build_trie

SPACE_SYMBOL = "\u2581"
_UNKNOWN_PENALTY = 10.0


class Normaliser(NamedTuple):
    """Rewrites text before it is segmented: of the rules that match at a character, the longest.

    Attributes:
      trie: what rules match; values are their numbers.
      match_lengths: int32 `[rules]`, characters that a rule replaces.
      starts: int32 `[rules]`, where its replacement starts in `pool`.
      lengths: int32 `[rules]`, characters of the replacement.
      leading_spaces: int32 `[rules]`, of the replacement.
      ends_in_space: bool `[rules]`.
      pool: int32 `[characters]`, replacements, spaces as U+2581.
      first_symbol: int32 scalar; rules from here on are the user-defined symbols, which come before all others.
      dummy_prefix: bool scalar; a space is put first.
      extra_spaces_removed: bool scalar; of several spaces one stays, at the start and the end none.
    """

    trie: Trie
    match_lengths: jax.Array
    starts: jax.Array
    lengths: jax.Array
    leading_spaces: jax.Array
    ends_in_space: jax.Array
    pool: jax.Array
    first_symbol: jax.Array
    dummy_prefix: jax.Array
    extra_spaces_removed: jax.Array


class Pieces(NamedTuple):
    """The unigram model.

    Attributes:
      trie: of the pieces that segment text; values are ids.
      scores: float32 `[slots]` of the trie, -inf where no piece ends.
      lengths: int32 `[vocab_size]`, characters of each piece.
      byte_ids: int32 `[256]`, or -1 without byte fallback.
      byte_fallback: bool scalar; unknown characters are spelled in bytes.
      unknown_id: int32 scalar.
      unknown_score: float32 scalar.
      eos_id: int32 scalar, -1 where there is none.
      no_walks: int32 `[longest_piece]`, the nodes of the walks from the last places of a text before it begins.
    """

    trie: Trie
    scores: jax.Array
    lengths: jax.Array
    byte_ids: jax.Array
    byte_fallback: jax.Array
    unknown_id: jax.Array
    unknown_score: jax.Array
    eos_id: jax.Array
    no_walks: jax.Array


class SentencePieceTables(NamedTuple):
    """What is read of one model file."""

    normaliser: Normaliser
    pieces: Pieces


def read_tables(path: pathlib.Path) -> SentencePieceTables:
    """Reads a SentencePiece model.

    Raises:
      UserError: there is no such file, it is none, or its segmentation is not one that the graph does.
    """
    if not path.is_file():
        raise UserError(f"Retokenizer.sentencepiece_model_file: no such SentencePiece model: {str(path)!r}.")
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's and the library's, of several kinds
        raise UserError(
            f"Retokenizer.sentencepiece_model_file: {str(path)!r} is not a SentencePiece model: {error}"
        ) from error
    _check_segmentation(model, path)
    kinds = model.SentencePiece
    symbols = [piece.piece for piece in model.pieces if piece.type == kinds.USER_DEFINED]
    rules: list[tuple[str, str]] = []
    if model.normalizer_spec.precompiled_charsmap:
        rules = sentencepiece.SentencePieceNormalizer(model_proto=path.read_bytes()).Decompile()
    return SentencePieceTables(
        normaliser=_normaliser(rules, symbols=symbols, spec=model.normalizer_spec),
        pieces=_pieces(model, eos_id=processor.eos_id(), unknown_id=processor.unk_id()),
    )


def _check_segmentation(model: Any, path: pathlib.Path) -> None:
    trainer, normaliser = model.trainer_spec, model.normalizer_spec
    kind = trainer.ModelType.Name(trainer.model_type)
    reason = None
    if trainer.model_type != trainer.UNIGRAM:
        reason = f"is a {kind} model; only UNIGRAM models (T5's, mT5's, XLM-R's, MADLAD-400's) can be"
    elif trainer.treat_whitespace_as_suffix:
        reason = "writes spaces behind words (treat_whitespace_as_suffix); only models that write them before can be"
    elif not normaliser.escape_whitespaces:
        reason = "does not write spaces as U+2581 (escape_whitespaces=false); only models that do can be"
    if reason is not None:
        raise UserError(
            f"Retokenizer.sentencepiece_model_file: {str(path)!r} {reason} segmented in the graph. Give the policy the "
            "reward's vocabulary, or choose another reward."
        )


def _pieces(model: Any, *, eos_id: int, unknown_id: int) -> Pieces:
    kinds = model.SentencePiece
    in_text = [index for index, piece in enumerate(model.pieces) if piece.type in (kinds.NORMAL, kinds.USER_DEFINED)]
    trie = build_trie([model.pieces[index].piece for index in in_text])
    ids = np.asarray(in_text, np.int32)
    score_of = np.asarray(
        [
            _symbol_score(model.pieces[index].piece)
            if model.pieces[index].type == kinds.USER_DEFINED
            else model.pieces[index].score
            for index in in_text
        ],
        np.float32,
    )
    values = np.asarray(trie.values)
    is_piece = values >= 0
    normal = [piece.score for piece in model.pieces if piece.type == kinds.NORMAL]
    byte_ids = np.full(256, -1, np.int32)
    for index, piece in enumerate(model.pieces):
        if piece.type == kinds.BYTE:
            byte_ids[int(piece.piece[3:5], 16)] = index  # "<0x0A>"
    return Pieces(
        trie=trie._replace(values=jnp.asarray(np.where(is_piece, ids[values], -1))),
        scores=jnp.asarray(np.where(is_piece, score_of[values], np.float32(-np.inf))),
        lengths=jnp.asarray([len(piece.piece) for piece in model.pieces], jnp.int32),
        byte_ids=jnp.asarray(byte_ids),
        byte_fallback=jnp.asarray(bool(model.trainer_spec.byte_fallback)),
        unknown_id=jnp.asarray(unknown_id, jnp.int32),
        unknown_score=jnp.asarray(np.float32(min(normal)) - np.float32(_UNKNOWN_PENALTY)),
        eos_id=jnp.asarray(eos_id, jnp.int32),
        no_walks=jnp.full(max(len(model.pieces[index].piece) for index in in_text), DEAD, jnp.int32),
    )


def _symbol_score(piece: str) -> float:
    """Of a user-defined symbol: above 0, so that it is always taken."""
    return 0.1 * (len(piece.encode()) - 1)


def _normaliser(rules: Sequence[tuple[str, str]], *, symbols: Sequence[str], spec: Any) -> Normaliser:
    kept = [(match, replacement) for match, replacement in rules if match not in set(symbols)] if symbols else rules
    every = [*kept, *((symbol, symbol) for symbol in symbols)]
    matches = [match for match, _ in every]
    replacements = [replacement for _, replacement in every]
    lengths = np.asarray([len(replacement) for replacement in replacements], np.int32)
    text = "".join(replacements).replace(" ", SPACE_SYMBOL)
    return Normaliser(
        trie=build_trie(matches),
        match_lengths=_integers([len(match) for match in matches]),
        starts=_integers(np.cumsum(lengths) - lengths),
        lengths=_integers(lengths),
        leading_spaces=_integers([len(text) - len(text.lstrip(" ")) for text in replacements]),
        ends_in_space=_integers([text.endswith(" ") for text in replacements]).astype(bool),
        pool=_integers([ord(character) for character in text]),
        first_symbol=jnp.asarray(len(kept), jnp.int32),
        dummy_prefix=jnp.asarray(bool(spec.add_dummy_prefix)),
        extra_spaces_removed=jnp.asarray(bool(spec.remove_extra_whitespaces)),
    )


def _integers(values: Any) -> jax.Array:
    """int32 with one entry more, so that there is something to read where there are no rules."""
    return jnp.asarray(np.concatenate([np.asarray(values, np.int32), np.zeros(1, np.int32)]))
