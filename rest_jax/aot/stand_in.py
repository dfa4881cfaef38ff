"""A vocabulary of a given size, for compiling where the real one is not at hand."""

import hashlib
from collections.abc import Iterable, Sequence

_SYLLABLES = ("ka", "ro", "mi", "ten", "sul", "ba", "re", "vo", "lin", "ta", "es", "u", "do", "per", "ni", "gra")


class StandInVocabulary:
    """Pieces of made-up syllables, so that a reward's tables have the sizes that a real vocabulary's have.

    Programs depend on the number of pieces and on the longest one's length alone. It can not tokenise text.

    Args:
      size: ids, those of padding, EOS and unknown text included.
    """

    pad_id, eos_id, unk_id = 0, 1, 2
    invalid_bytes_shown = False

    def __init__(self, size: int) -> None:
        self.vocab_size = size

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"stand-in {self.vocab_size}".encode()).hexdigest()

    def id_to_piece(self, token: int) -> str:
        if token <= self.unk_id:
            return ("<pad>", "</s>", "<unk>")[token]
        base, number, piece = len(_SYLLABLES), token, ""
        while number:
            number, digit = divmod(number, base)
            piece += _SYLLABLES[digit]
        return ("▁" if token % 2 else "") + piece

    def is_byte(self, token: int) -> bool:
        return False

    def is_control(self, token: int) -> bool:
        return token <= self.eos_id

    def is_unknown(self, token: int) -> bool:
        return token == self.unk_id

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError(f"A stand-in for a vocabulary can not tokenise {text!r}; it only has a size.")

    def decode(self, tokens: Iterable[int]) -> str:
        pieces = (self.id_to_piece(token) for token in tokens if token > self.unk_id)
        return "".join(pieces).replace("▁", " ").strip()

    def decode_batch(self, batch: Iterable[Sequence[int]]) -> list[str]:
        return [self.decode(tokens) for tokens in batch]
