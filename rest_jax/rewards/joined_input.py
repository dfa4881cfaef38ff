"""The input of a learned reward: source, sample and reference between constant pieces, as token ids.

A template such as MetricX-24's `source: {source} candidate: {sample}` is cut into constants and fields. Constants are
encoded by themselves, so that one joins ids, on the host for training and in the graph for scoring, and both see the
same. No field has its EOS; the input ends without one, as MetricX's does.

Where a template has no `{sample}`, the decoder reads it: then an EOS and the sample follow in the joined row, and
`split` takes them apart.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from rest_jax.errors import UserError

FIELDS = ("source", "sample", "reference")
IN_DECODER = "{source}"
WITHOUT_REFERENCE = "source: {source} candidate: {sample}"
WITH_REFERENCE = "source: {source} candidate: {sample} reference: {reference}"


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


@dataclasses.dataclass(frozen=True)
class JoinedInput:
    """Constants around fields: constants[0], fields[0], constants[1], ... constants[-1].

    Attributes:
      constants: token ids, one tuple more than there are fields; any may be empty.
      fields: names, of FIELDS, in their order.
    """

    constants: tuple[tuple[int, ...], ...]
    fields: tuple[str, ...]

    @classmethod
    def from_template(cls, template: str, vocabulary: Encoder) -> "JoinedInput":
        """Cuts a template at its fields.

        Raises:
          UserError: a field that is unknown or stands there twice, or none at all.
        """
        parts = re.split(r"\{(\w*)\}", template)
        fields = tuple(parts[1::2])
        if set(fields) - set(FIELDS) or len(set(fields)) < len(fields) or not fields:
            raise UserError(
                f"TEMPLATE is {template!r}; its fields may be {', '.join(f'{{{name}}}' for name in FIELDS)}, each "
                f"once: e.g. {WITHOUT_REFERENCE!r}, or {IN_DECODER!r} where the decoder reads the sample."
            )
        return cls(constants=tuple(tuple(vocabulary.encode(text.strip())) for text in parts[::2]), fields=fields)

    @property
    def num_constant_tokens(self) -> int:
        return sum(map(len, self.constants))

    @property
    def sample_in_decoder(self) -> bool:
        return "sample" not in self.fields

    def join(self, texts: Mapping[str, Sequence[int] | npt.NDArray[np.int32]]) -> npt.NDArray[np.int32]:
        """Ids of one encoder input from its fields' ids, none of which has padding or EOS."""
        pieces: list[npt.ArrayLike] = [self.constants[0]]
        for name, constant in zip(self.fields, self.constants[1:], strict=True):
            pieces += [texts[name], constant]
        return np.concatenate([np.asarray(piece, np.int32) for piece in pieces])

    def join_rows(self, texts: Mapping[str, jax.Array], *, eos_id: jax.typing.ArrayLike) -> jax.Array:
        """`join` of many in the graph; with the sample behind EOS where the decoder reads it.

        Args:
          texts: field -> int32 `[rows, length]`, padded with 0; a field ends before its EOS.
          eos_id: the vocabulary's.

        Returns:
          int32 `[rows, constants + all fields' lengths]`, padded with 0.
        """
        rows = len(texts["sample"])
        pieces = [_constant(self.constants[0], rows)]
        for name, constant in zip(self.fields, self.constants[1:], strict=True):
            pieces += [_before_eos(texts[name], eos_id), _constant(constant, rows)]
        if self.sample_in_decoder:
            pieces += [jnp.full((rows, 1), eos_id, jnp.int32), _before_eos(texts["sample"], eos_id)]
        spread = jnp.concatenate(pieces, axis=1)
        # Real tokens to the left, in their order.
        order = jnp.argsort(spread == 0, axis=1, stable=True)
        return jnp.take_along_axis(spread, order, axis=1)


def without_prefix(tokens: jax.Array, prefix: jax.Array) -> jax.Array:
    """int32 `[rows, length]` without the `prefix` `[P]` of the rows that start with it, 0 in its place at the end."""
    size = prefix.shape[0]
    if not size or size > tokens.shape[1]:
        return tokens
    starts = jnp.all(tokens[:, :size] == prefix, axis=1, keepdims=True)
    return jnp.where(starts, jnp.pad(tokens[:, size:], ((0, 0), (0, size))), tokens)


def split(rows: jax.Array, *, eos_id: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows int32 `[rows, length]` of `join_rows` with the sample behind EOS, taken apart.

    Returns:
      What the encoder reads and what the decoder reads, token 0 before the sample, int32 `[rows, length]` each, padded
      with 0; and at which step the sample has been read, int32 `[rows]`.
    """
    length = rows.shape[1]
    is_source = jnp.cumsum(rows == eos_id, axis=1) == 0
    size = jnp.sum(is_source, axis=1, keepdims=True)  # of the source; there stands EOS
    places = jnp.arange(length) + size
    shifted = jnp.take_along_axis(rows, jnp.minimum(places, length - 1), axis=1)
    sample = jnp.where((places < length) & (jnp.arange(length) > 0), shifted, 0)
    return jnp.where(is_source, rows, 0), sample, jnp.sum(sample > 0, axis=1, dtype=jnp.int32)


def _before_eos(tokens: jax.Array, eos_id: jax.typing.ArrayLike) -> jax.Array:
    return jnp.where(jnp.cumsum(tokens == eos_id, axis=1) == 0, tokens, 0)


def _constant(tokens: Sequence[int], rows: int) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(tokens, jnp.int32).reshape(1, -1), (rows, len(tokens)))
