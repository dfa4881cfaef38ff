"""The policy's vocabulary, without TensorFlow."""

import functools
import hashlib
from collections.abc import Iterable, Sequence

import sentencepiece

from rest_jax import paths
from rest_jax.errors import UserError

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2


class SentencePieceVocabulary:
    """A SentencePiece model with the T5 ids: pad 0, end of sequence 1, unknown 2.

    Attributes and methods carry seqio's names (`vocab_size`, `eos_id`, `encode`, `decode`), so that a T5X model class
    takes it in the place of seqio's.
    """

    def __init__(self, sentencepiece_model_file: str):
        """Opens the model file. `rest_jax://tasks/...` names a file of the package.

        Raises:
          UserError: the file is missing, or its special ids are not T5's.
        """
        self.path = paths.resolve(sentencepiece_model_file)
        if not self.path.is_file():
            raise UserError(
                f"VOCABULARY: no such SentencePiece model: {str(self.path)!r}. Make one with "
                "'python -m rest_jax vocab --task NAME --output FILE', or correct "
                "vocabulary.SentencePieceVocabulary.sentencepiece_model_file."
            )
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.Load(str(self.path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"VOCABULARY: {str(self.path)!r} is not a SentencePiece model: {error}") from error
        found = (self._processor.pad_id(), self._processor.eos_id(), self._processor.unk_id())
        if found != (PAD_ID, EOS_ID, UNK_ID):
            raise UserError(
                f"VOCABULARY: {str(self.path)!r} has (pad, eos, unk) ids {found}; rest_jax needs "
                f"{(PAD_ID, EOS_ID, UNK_ID)}. 'python -m rest_jax vocab' trains such a model."
            )

    @property
    def vocab_size(self) -> int:
        return self._processor.GetPieceSize()

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
        """Hash of the model file: what tokenised data and checkpoints are checked against."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def id_to_piece(self, token: int) -> str:
        return self._processor.IdToPiece(token)

    def is_byte(self, token: int) -> bool:
        return self._processor.IsByte(token)

    def is_control(self, token: int) -> bool:
        return self._processor.IsControl(token)

    def is_unknown(self, token: int) -> bool:
        return self._processor.IsUnknown(token)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without EOS."""
        return self._processor.EncodeAsIds(text)

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of `tokens` up to the first EOS. Ids past the vocabulary (padding of the embedding) are unknown."""
        size = self.vocab_size
        ids: list[int] = []
        for token in tokens:
            if token == EOS_ID:
                break
            if token != PAD_ID:
                ids.append(int(token) if token < size else UNK_ID)
        return self._processor.DecodeIds(ids)

    def decode_batch(self, batch: Iterable[Sequence[int]]) -> list[str]:
        return [self.decode(tokens) for tokens in batch]
