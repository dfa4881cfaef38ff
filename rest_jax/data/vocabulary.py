"""The policy's vocabulary, without TensorFlow.

Padding is id 0 in all of them: the network masks it. The other ids are the vocabulary's own.
"""

import functools
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import sentencepiece

from rest_jax import paths
from rest_jax.errors import UserError

# The ids of T5's own vocabularies. MADLAD-400 has EOS 2 and unk 0, UMT5 unk 3: ask the vocabulary.
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2


class Vocabulary(Protocol):
    """What rest_jax asks of a vocabulary.

    Names are seqio's where it has them (`vocab_size`, `eos_id`, `encode`, `decode`), so that a T5X model class takes it
    in the place of seqio's.
    """

    @property
    def vocab_size(self) -> int:
        """Ids that it has, extra ids included; the embedding may have more rows."""

    @property
    def pad_id(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def unk_id(self) -> int: ...

    @property
    def sha256(self) -> str:
        """What tokenised data and checkpoints are checked against."""

    @property
    def invalid_bytes_shown(self) -> bool:
        """`decode` writes U+FFFD for each byte that is part of no valid UTF-8 sequence, rather than nothing."""

    def id_to_piece(self, token: int) -> str:
        """The token's spelling; `<0x0A>` for a byte."""

    def is_byte(self, token: int) -> bool: ...

    def is_control(self, token: int) -> bool: ...

    def is_unknown(self, token: int) -> bool: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without EOS."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens` up to the first EOS. Ids past the vocabulary (padding of the embedding) are unknown."""

    def decode_batch(self, batch: Iterable[Sequence[int]]) -> list[str]: ...


class SentencePieceVocabulary:
    """A SentencePiece model: those that rest_jax trains, T5's, mT5's, UMT5's and MADLAD-400's."""

    invalid_bytes_shown = True

    def __init__(self, sentencepiece_model_file: str, extra_ids: int = 0):
        """Opens the model file.

        Args:
          sentencepiece_model_file: path; `rest_jax://tasks/...` names a file of the package.
          extra_ids: sentinels `<extra_id_0>`, ... that stand behind the file's pieces, number 0 last, as in seqio. The
            files of T5, mT5 and UMT5 on Hugging Face lack them: 100 for T5, 300 for UMT5. A translation has none, so
            they matter only where the same ids as in T5X are wanted.

        Raises:
          UserError: the file is missing, or id 0 cannot serve as padding, or there is no EOS.
        """
        _check_extra_ids(extra_ids)
        self.path = paths.resolve(sentencepiece_model_file)
        self.extra_ids = extra_ids
        paths.check_bucket(self.path, "VOCABULARY")
        if not self.path.is_file():
            raise UserError(
                f"VOCABULARY: no such SentencePiece model: {str(self.path)!r}. Make one with "
                "'python -m rest_jax vocab --task NAME --output FILE', or correct "
                "vocabulary.SentencePieceVocabulary.sentencepiece_model_file."
            )
        sentinels = [f"\u2581<extra_id_{index}>" for index in reversed(range(extra_ids))]
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(
                self.path.read_bytes() + b"".join(map(_serialized_user_piece, sentinels))
            )
        except (RuntimeError, OSError) as error:
            raise UserError(f"VOCABULARY: {str(self.path)!r} is not a SentencePiece model: {error}") from error
        pad, eos, unk = (self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id())
        padding_is_free = pad == PAD_ID or (pad == -1 and unk == PAD_ID)
        if not padding_is_free or eos <= PAD_ID:
            raise UserError(
                f"VOCABULARY: {str(self.path)!r} has (pad, eos, unk) ids {(pad, eos, unk)}. rest_jax needs pad 0 (or "
                "no pad, and unk 0, as MADLAD-400 has it) and an eos, e.g. T5's "
                f"{(PAD_ID, EOS_ID, UNK_ID)}. 'python -m rest_jax vocab' trains such a model."
            )

    def __repr__(self) -> str:
        extra = f", extra_ids={self.extra_ids}" if self.extra_ids else ""
        return f"SentencePieceVocabulary({str(self.path)!r}{extra})"

    @property
    def vocab_size(self) -> int:
        return self._processor.GetPieceSize()

    @property
    def pad_id(self) -> int:
        return PAD_ID

    @property
    def eos_id(self) -> int:
        return self._processor.eos_id()

    @property
    def unk_id(self) -> int:
        return self._processor.unk_id()

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the model file and the number of extra ids."""
        digest = hashlib.sha256(self.path.read_bytes())
        if self.extra_ids:
            digest.update(f"extra_ids {self.extra_ids}".encode())
        return digest.hexdigest()

    def id_to_piece(self, token: int) -> str:
        return self._processor.IdToPiece(token)

    def is_byte(self, token: int) -> bool:
        return self._processor.IsByte(token)

    def is_control(self, token: int) -> bool:
        return self._processor.IsControl(token)

    def is_unknown(self, token: int) -> bool:
        return self._processor.IsUnknown(token)

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def decode(self, tokens: Iterable[int]) -> str:
        size, eos_id, unk_id = self.vocab_size, self.eos_id, self.unk_id
        until_eos = itertools.takewhile(lambda token: token != eos_id, tokens)
        known = (int(token) if token < size else unk_id for token in until_eos)
        return self._processor.DecodeIds([token for token in known if token != PAD_ID])

    def decode_batch(self, batch: Iterable[Sequence[int]]) -> list[str]:
        return [self.decode(tokens) for tokens in batch]


class ByteVocabulary:
    """ByT5's vocabulary: the bytes of UTF-8 text from id 3 on, behind pad 0, EOS 1 and unk 2; then sentinels.

    Text of ids that are no valid UTF-8 leaves the invalid bytes out, as seqio and Hugging Face do.
    """

    invalid_bytes_shown = False
    _FIRST_BYTE = 3
    _NUM_BYTES = 256

    def __init__(self, extra_ids: int = 0):
        """Args: extra_ids: sentinels behind the bytes; ByT5 has 125, so that there are 384 ids."""
        _check_extra_ids(extra_ids)
        self.extra_ids = extra_ids

    def __repr__(self) -> str:
        return f"ByteVocabulary(extra_ids={self.extra_ids})"

    @property
    def vocab_size(self) -> int:
        return self._FIRST_BYTE + self._NUM_BYTES + self.extra_ids

    @property
    def pad_id(self) -> int:
        return PAD_ID

    @property
    def eos_id(self) -> int:
        return EOS_ID

    @property
    def unk_id(self) -> int:
        return UNK_ID

    @functools.cached_property
    def sha256(self) -> str:
        return hashlib.sha256(f"ByteVocabulary {self.vocab_size}".encode()).hexdigest()

    def id_to_piece(self, token: int) -> str:
        if self.is_byte(token):
            return f"<0x{token - self._FIRST_BYTE:02X}>"
        if token < self._FIRST_BYTE:
            return ("<pad>", "</s>", "<unk>")[token]
        return f"<extra_id_{self.vocab_size - 1 - token}>"

    def is_byte(self, token: int) -> bool:
        return 0 <= token - self._FIRST_BYTE < self._NUM_BYTES

    def is_control(self, token: int) -> bool:
        """Sentinels too: they have no text."""
        return not self.is_byte(token) and not self.is_unknown(token)

    def is_unknown(self, token: int) -> bool:
        return token == UNK_ID

    def encode(self, text: str) -> list[int]:
        return [byte + self._FIRST_BYTE for byte in text.encode()]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text up to the first EOS. An id that is no byte has no text, and no character goes across it."""
        until_eos = itertools.takewhile(lambda token: token != EOS_ID, tokens)
        runs = itertools.groupby((int(token) for token in until_eos), key=self.is_byte)
        return "".join(
            bytes(token - self._FIRST_BYTE for token in run).decode(errors="ignore") for is_byte, run in runs if is_byte
        )

    def decode_batch(self, batch: Iterable[Sequence[int]]) -> list[str]:
        return [self.decode(tokens) for tokens in batch]


def adopt(vocabulary: Any) -> Vocabulary:
    """Ours with the same ids for one of seqio's, as a T5X gin file binds it; ours as it is.

    Raises:
      UserError: of another kind, or the SentencePiece file is not on this machine.
    """
    if hasattr(vocabulary, "sha256"):
        return vocabulary
    if hasattr(vocabulary, "sentencepiece_model_file"):
        return SentencePieceVocabulary(vocabulary.sentencepiece_model_file, extra_ids=vocabulary.extra_ids)
    if type(vocabulary).__name__ == "ByteVocabulary":
        return ByteVocabulary(extra_ids=vocabulary.extra_ids)
    raise UserError(
        f"VOCABULARY is {vocabulary!r}; legal are SentencePieceVocabulary and ByteVocabulary, of "
        "rest_jax.data.vocabulary or of seqio."
    )


def eos_id_of(vocabulary: Any) -> int:
    """The EOS of the vocabulary, ours or seqio's; T5's where a model has none."""
    return EOS_ID if vocabulary is None else vocabulary.eos_id


def _check_extra_ids(extra_ids: int) -> None:
    if isinstance(extra_ids, bool) or not isinstance(extra_ids, int) or extra_ids < 0:
        raise UserError(f"VOCABULARY: extra_ids must be a whole number of at least 0; got {extra_ids!r}.")


def _serialized_user_piece(piece: str) -> bytes:
    """A piece as it stands in a SentencePiece file, where a further one may simply be appended.

    `pieces` is field 1 of sentencepiece_model.proto's ModelProto; in it, the piece is field 1, its score (0.0) field 2,
    its type field 3, and user-defined is type 4. Fields this short have lengths of one byte.
    """
    text = piece.encode()
    entry = b"\x0a" + bytes([len(text)]) + text + b"\x15\x00\x00\x00\x00" + b"\x18\x04"
    return b"\x0a" + bytes([len(entry)]) + entry
