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

    def encode(self, text: str) -> list[int]: ...

    def decode(self, tokens: Iterable[int]) -> str: ...


class Reward(Protocol):
    """A sequence-level reward, higher is better. Subclass it: what a reward does not declare has the defaults below.

    What it declares is checked before anything is compiled (`check_reward`).
    """

    @property
    def name(self) -> str:
        """In the store's columns, metrics and reports."""

    @property
    def requires_reference(self) -> bool:
        """The source's reference from D is read, so D must have one."""
        return False

    @property
    def languages(self) -> tuple[str, ...] | None:
        """Target languages that it is made for, as in LANGUAGES; None for any."""
        return None

    @property
    def range(self) -> tuple[float, float]:
        """Least and greatest total. A run's reward stays in [0, 1]; `combinations.Affine` brings others there."""
        return 0.0, 1.0

    @property
    def comparable(self) -> bool:
        """Totals of different sources and policies can be compared; ranks within a source's samples can not."""
        return True

    @property
    def parts(self) -> "tuple[Reward, ...]":
        """The rewards that this one combines; none for one that scores by itself."""
        return ()

    @property
    def measures(self) -> frozenset[str]:
        """Evaluation's metrics that it is, of `evaluation.metrics.METRICS`; those say nothing held out of it."""
        return frozenset[str]().union(*(part.measures for part in self.parts))

    @property
    def learned(self) -> bool:
        """It was trained, so a run that uses it audits it (`audit`)."""
        return any(part.learned for part in self.parts)

    def init(self, vocabulary: RewardVocabulary) -> RewardParams:
        """Arrays that `score` needs (tables, weights), passed to the jitted program as an argument.

        Large ones as `checkpoints.tensors.LazyTensor`: the run reads them onto its mesh (`checkpointer.put_params`).
        """

    def score(self, params: RewardParams, batch: RewardBatch) -> dict[str, jax.Array]:
        """Components by name, float32 `[batch, num_samples]`. Pure and jit-able: no callback to the host."""

    def combine(self, components: Mapping[str, jax.Array]) -> jax.Array:
        """Total reward, float32 `[batch, num_samples]`: what filters compare."""
        return components[self.name]


def leaves(reward: Reward) -> dict[str, Reward]:
    """The rewards that score by themselves in `reward`, by name.

    Raises:
      UserError: two that are not the same have one name, and so would share a column of the store.
    """
    found = {} if reward.parts else {reward.name: reward}
    for part in reward.parts:
        for name, leaf in leaves(part).items():
            if found.setdefault(name, leaf) != leaf:
                raise UserError(
                    f"REWARD: {reward.name} has two different rewards named {name!r}: {found[name]!r} and {leaf!r}. "
                    "Each stands in the store under its name, so take one of them."
                )
    return found


def check_reward(reward: Reward, *, has_references: bool, languages: tuple[str, str] | None = None) -> None:
    """Raises UserError, before anything is compiled, where a run can not have `reward`.

    Args:
      reward: the run's, R.
      has_references: the sources have references.
      languages: source and target language of the run, where it says.
    """
    for leaf in leaves(reward).values():
        if leaf.requires_reference and not has_references:
            raise UserError(
                f"REWARD: {leaf.name!r} compares samples with the source's reference, but the sources have none "
                "(monolingual text). Grow from parallel text, or bind a reward that needs no reference."
            )
        if leaf.languages is not None and (languages is None or languages[1] not in leaf.languages):
            given = "says no languages" if languages is None else f"translates into {languages[1]!r}"
            raise UserError(
                f"REWARD: {leaf.name!r} is made for translations into {', '.join(leaf.languages)}, but this run "
                f"{given}. Set LANGUAGES = ('source', 'target'), or bind another reward."
            )
    low, high = reward.range
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"REWARD: {reward.name} gives values from {low:g} to {high:g}; a run's reward stays in [0, 1]. Wrap it in "
            "combinations.Affine or combinations.Quantile, or let the weights of a WeightedSum add up to at most 1."
        )


def check_comparable(reward: Reward) -> None:
    """Raises UserError where the mean of `reward` can not tell a better policy."""
    if not reward.comparable:
        raise UserError(
            f"REWARD: {reward.name} ranks each source's samples among themselves: every policy has the same mean, so "
            "checkpoints can not be chosen by it. Bind its parts in another combination, and take ranks of a store "
            "that is there: python -m rest_jax rescore."
        )
