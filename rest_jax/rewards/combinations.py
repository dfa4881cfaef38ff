"""Rewards made of rewards: each part's components stand in the store under their own names.

A combination scores nothing itself: `score` gives what its parts give, and `combine` is a function of that alone. So a
store's total can be computed anew with another combination of the same parts (`python -m rest_jax rescore`).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from rest_jax.errors import UserError
from rest_jax.rewards.base import Reward, RewardBatch, RewardParams, RewardVocabulary, leaves


class Combination(Reward):
    """What all combinations share: parts that stand in several places are scored once."""

    @property
    def requires_reference(self) -> bool:
        return any(part.requires_reference for part in self.parts)

    @property
    def comparable(self) -> bool:
        return all(part.comparable for part in self.parts)

    def init(self, vocabulary: RewardVocabulary) -> RewardParams:
        return {name: leaf.init(vocabulary) for name, leaf in leaves(self).items()}

    def score(self, params: RewardParams, batch: RewardBatch) -> dict[str, jax.Array]:
        components: dict[str, jax.Array] = {}
        for name, leaf in leaves(self).items():
            components |= leaf.score(params[name], batch)
        return components


@dataclasses.dataclass(frozen=True)
class WeightedSum(Combination):
    """sum_k weights[k] * rewards[k]; e.g. weights that add up to 1 give a mean."""

    rewards: tuple[Reward, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        _check_parts(self)
        object.__setattr__(self, "weights", tuple(self.weights))
        if len(self.weights) != len(self.rewards):
            raise UserError(
                f"WeightedSum.weights is {self.weights}, for {len(self.rewards)} rewards; give one weight to each."
            )

    @property
    def parts(self) -> tuple[Reward, ...]:
        return self.rewards

    @property
    def name(self) -> str:
        return "+".join(f"{weight:g}*{part.name}" for weight, part in zip(self.weights, self.rewards, strict=True))

    @property
    def range(self) -> tuple[float, float]:
        ends = [
            sorted(weight * end for end in part.range) for weight, part in zip(self.weights, self.rewards, strict=True)
        ]
        low, high = (sum(end) for end in zip(*ends, strict=True))
        return round(low, 6), round(high, 6)  # weights such as 0.1, 0.2 and 0.7 add up to 1 within float64 only

    def combine(self, components: Mapping[str, jax.Array]) -> jax.Array:
        # One by one: the order of a reduction could depend on the batch's shape.
        total = self.weights[0] * self.rewards[0].combine(components)
        for weight, part in zip(self.weights[1:], self.rewards[1:], strict=True):
            total = total + weight * part.combine(components)
        low, high = self.range
        return jnp.clip(total, low, high)


@dataclasses.dataclass(frozen=True)
class Min(Combination):
    """The least of its rewards: a sample must satisfy all of them."""

    rewards: tuple[Reward, ...]

    def __post_init__(self) -> None:
        _check_parts(self)

    @property
    def parts(self) -> tuple[Reward, ...]:
        return self.rewards

    @property
    def name(self) -> str:
        return f"min({', '.join(part.name for part in self.rewards)})"

    @property
    def range(self) -> tuple[float, float]:
        lows, highs = zip(*(part.range for part in self.rewards), strict=True)
        return min(lows), min(highs)

    def combine(self, components: Mapping[str, jax.Array]) -> jax.Array:
        total = self.rewards[0].combine(components)
        for part in self.rewards[1:]:
            total = jnp.minimum(total, part.combine(components))
        return total


@dataclasses.dataclass(frozen=True)
class MeanOfRanks(Combination):
    """The mean over its rewards of a sample's rank within its source's samples; no reward's scale counts.

    A rank is the share of the source's other samples that the sample beats, a tie counting half: the best of all has 1,
    the worst 0. Copies are samples like all others. A sample without others, such as a reference, has 1; one whose
    reward is NaN has NaN, and is beaten by nobody.
    """

    rewards: tuple[Reward, ...]

    def __post_init__(self) -> None:
        _check_parts(self)

    @property
    def parts(self) -> tuple[Reward, ...]:
        return self.rewards

    @property
    def name(self) -> str:
        return f"mean_of_ranks({', '.join(part.name for part in self.rewards)})"

    @property
    def comparable(self) -> bool:
        return False

    def combine(self, components: Mapping[str, jax.Array]) -> jax.Array:
        total = _ranks(self.rewards[0].combine(components))
        for part in self.rewards[1:]:
            total = total + _ranks(part.combine(components))
        return total / len(self.rewards)


@dataclasses.dataclass(frozen=True)
class Guarded(Combination):
    """The reward where every guard is passed, else 0 (`guards.py`); a product, but for NaN."""

    reward: Reward
    guards: tuple[Reward, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "guards", tuple(self.guards))
        if not self.guards:
            raise UserError("Guarded.guards is empty; name the guards, or bind the reward by itself.")

    @property
    def parts(self) -> tuple[Reward, ...]:
        return self.reward, *self.guards

    @property
    def name(self) -> str:
        return f"guarded({self.reward.name})"

    @property
    def range(self) -> tuple[float, float]:
        low, high = self.reward.range
        return min(low, 0.0), max(high, 0.0)

    def combine(self, components: Mapping[str, jax.Array]) -> jax.Array:
        total = self.reward.combine(components)
        for guard in self.guards:
            total = jnp.where(guard.combine(components) > 0, total, 0.0)
        return total


@dataclasses.dataclass(frozen=True)
class Affine(Combination):
    """scale * reward + offset, cut to [0, 1]; e.g. an error of 0 to 25 with scale = -0.04, offset = 1."""

    reward: Reward
    scale: float
    offset: float = 0.0

    def __post_init__(self) -> None:
        if not (abs(self.scale) > 0 and abs(self.offset) < float("inf")):
            raise UserError(f"Affine.scale is {self.scale}, offset {self.offset}; numbers, and scale not 0, are legal.")

    @property
    def parts(self) -> tuple[Reward, ...]:
        return (self.reward,)

    @property
    def name(self) -> str:
        return f"{self.scale:g}*{self.reward.name}{self.offset:+g}"

    def combine(self, components: Mapping[str, jax.Array]) -> jax.Array:
        return jnp.clip(self.scale * self.reward.combine(components) + self.offset, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Quantile(Combination):
    """The reward's place in a distribution: knots[k] becomes k / (K - 1), linear between, 0 below and 1 above.

    Attributes:
      reward: the part.
      knots: K rising values: the quantiles 0, 1 / (K - 1), ... 1 of the reward on some samples, e.g. those that
        `python -m rest_jax rescore` prints of a store.
    """

    reward: Reward
    knots: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "knots", tuple(self.knots))
        pairs = zip(self.knots, self.knots[1:], strict=False)
        if len(self.knots) < 2 or not all(low < high for low, high in pairs):
            raise UserError(f"Quantile.knots is {self.knots}; it must be at least two strictly rising numbers.")

    @property
    def parts(self) -> tuple[Reward, ...]:
        return (self.reward,)

    @property
    def name(self) -> str:
        return f"quantile({self.reward.name})"

    def combine(self, components: Mapping[str, jax.Array]) -> jax.Array:
        knots = jnp.asarray(self.knots, jnp.float32)
        return jnp.interp(self.reward.combine(components), knots, jnp.linspace(0.0, 1.0, len(self.knots)))


def unguarded(reward: Reward) -> Reward:
    """`reward` with each `Guarded` within the combinations of this module replaced by what it guards."""
    match reward:
        case Guarded():
            return unguarded(reward.reward)
        case WeightedSum() | Min() | MeanOfRanks():
            return dataclasses.replace(reward, rewards=tuple(map(unguarded, reward.rewards)))
        case Affine() | Quantile():
            return dataclasses.replace(reward, reward=unguarded(reward.reward))
    return reward


def _check_parts(combination: WeightedSum | Min | MeanOfRanks) -> None:
    object.__setattr__(combination, "rewards", tuple(combination.rewards))
    if not combination.rewards:
        raise UserError(f"{type(combination).__name__}.rewards is empty; give at least one reward.")


def _ranks(rewards: jax.Array) -> jax.Array:
    """`[sources, num_samples]` -> share of the source's other samples that each beats, ties half."""
    others = rewards.shape[1] - 1
    if not others:
        return jnp.where(jnp.isnan(rewards), jnp.nan, jnp.ones_like(rewards))
    above = jnp.sum(rewards[:, :, None] > rewards[:, None, :], axis=2, dtype=jnp.int32)
    level = jnp.sum(rewards[:, :, None] == rewards[:, None, :], axis=2, dtype=jnp.int32) - 1
    return jnp.where(jnp.isnan(rewards), jnp.nan, (above + 0.5 * level) / others)
