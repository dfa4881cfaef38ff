"""What a reward is: a pure function of token ids that runs inside the program that drew them."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypedDict

import jax

from rest_jax.errors import UserError

RewardParams = Any


class RewardBatch(TypedDict):
    """What a reward sees; padded with 0 after EOS.

    Attributes:
      samples: int32 `[batch, num_samples, target_length]`, ids of the policy's vocabulary; EOS where it was hit.
      references: int32 `[batch, reference_length]`, of D.
      sources: int32 `[batch, source_length]`.
    """

    samples: jax.Array
    references: jax.Array
    sources: jax.Array


class RewardVocabulary(Protocol):
    """The part of `rest_jax.data.vocabulary.Vocabulary` that rewards need to read token ids as text."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_id(self) -> int: ...

    @property
    def unk_id(self) -> int: ...

    @property
    def invalid_bytes_shown(self) -> bool: ...

    def id_to_piece(self, token: int) -> str: ...

    def is_byte(self, token: int) -> bool: ...

    def is_control(self, token: int) -> bool: ...

    def is_unknown(self, token: int) -> bool: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class Reward(Protocol):
    """A sequence-level reward in [0, 1], higher is better.

    Attributes:
      name: in the store's columns, metrics and reports.
      requires_reference: the source's reference from D is read, so D must have one.
    """

    name: str
    requires_reference: bool

    def init(self, vocabulary: RewardVocabulary) -> RewardParams:
        """Arrays that `score` needs (tables, weights), passed to the jitted program as an argument."""

    def score(self, params: RewardParams, batch: RewardBatch) -> dict[str, jax.Array]:
        """Components by name, float32 `[batch, num_samples]`. Pure and jit-able: no callback to the host."""

    def combine(self, components: Mapping[str, jax.Array]) -> jax.Array:
        """Total reward in [0, 1], float32 `[batch, num_samples]`: what filters compare."""


def check_reward(reward: Reward, *, has_references: bool) -> None:
    """Raises UserError, before anything is compiled, where the data lacks what `reward` reads."""
    if reward.requires_reference and not has_references:
        raise UserError(
            f"REWARD: {reward.name!r} compares samples with the source's reference, but the sources have none "
            "(monolingual text). Grow from parallel text, or bind a reward that needs no reference."
        )
