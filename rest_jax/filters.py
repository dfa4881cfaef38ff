"""Which scored samples a policy learns from, and how that choice tightens from one Improve step to the next.

A filter maps rewards and validity `[sources, num_samples]` to a keep mask of that shape. It is pure jnp, so one object
runs inside the Grow program and, on the stored rewards, on the host. An invalid sample (a duplicate, a refused one) and
a NaN reward are never kept, and count for no percentile, maximum or mean.

A schedule maps the Improve step and the statistics of D_g to the filter of that step: Algorithm 1 of Gulcehre et al.
2023 (arXiv 2308.08998) asks for tau_1 above the mean reward of D_g and tau_{i+1} > tau_i.
"""

import dataclasses
import fractions
import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from rest_jax.errors import UserError

Value = TypeVar("Value")


class Filter(Protocol):
    """Rewards float32 `[sources, num_samples]`, valid bool of the same shape -> keep, bool of the same shape."""

    def __call__(self, rewards: jax.typing.ArrayLike, valid: jax.typing.ArrayLike) -> jax.Array: ...


def describe(keep_filter: Filter) -> str:
    """A filter in one line, for reports: `Cap(filter=Threshold(tau=0.5), k=3)` -> `cap(threshold(tau=0.5), k=3)`."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(keep_filter).__name__).lower()
    if not dataclasses.is_dataclass(keep_filter):
        return name
    arguments = []
    for field in dataclasses.fields(keep_filter):
        value = getattr(keep_filter, field.name)
        if isinstance(value, tuple):
            arguments.extend(describe(part) for part in value)
        elif dataclasses.is_dataclass(value):
            arguments.append(describe(value))
        else:
            arguments.append(f"{field.name}={value:.4g}" if isinstance(value, float) else f"{field.name}={value}")
    return f"{name}({', '.join(arguments)})"


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Keeps R > tau: strict, as in the paper."""

    tau: float

    def __post_init__(self) -> None:
        if np.isnan(self.tau):
            raise UserError("Threshold.tau is NaN; it must be a number, rewards lie in [0, 1].")

    def __call__(self, rewards: jax.typing.ArrayLike, valid: jax.typing.ArrayLike) -> jax.Array:
        rewards, usable = _usable(rewards, valid)
        return usable & (rewards > self.tau)


@dataclasses.dataclass(frozen=True)
class Percentile:
    """Keeps R above the p-th percentile of that source's own valid samples, 0 <= p < 100.

    The percentile is numpy's (linear between neighbours). Since R > low + fraction * (high - low) with neighbours
    low <= high and fraction < 1 holds just when R > low, only a rank is computed: the answer is the same on every
    device. The lowest sample is never kept, so neither is the only one of a source.
    """

    p: float

    def __post_init__(self) -> None:
        _check_range("Percentile.p", self.p, low=0, high=100)

    def __call__(self, rewards: jax.typing.ArrayLike, valid: jax.typing.ArrayLike) -> jax.Array:
        rewards, usable = _usable(rewards, valid)
        num_samples = rewards.shape[1]
        # Rank of the lower neighbour for each possible number of valid samples, exact: a float product could fall
        # on either side of an integer.
        share = fractions.Fraction(str(self.p)) / 100
        lower_rank = jnp.asarray([int(share * max(count - 1, 0)) for count in range(num_samples + 1)], jnp.int32)
        ascending = jnp.sort(jnp.where(usable, rewards, jnp.inf), axis=1)
        rank = lower_rank[jnp.sum(usable, axis=1, dtype=jnp.int32)]
        lower = jnp.take_along_axis(ascending, rank[:, None], axis=1)  # [sources, 1]
        return usable & (rewards > lower)


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """Keeps R > gamma * max + (1 - gamma) * mean over that source's valid samples, 0 <= gamma < 1.

    A source whose valid samples all have one reward keeps none. Rewards lie in [0, 1].
    """

    gamma: float

    def __post_init__(self) -> None:
        _check_range("Interpolation.gamma", self.gamma, low=0, high=1)

    def __call__(self, rewards: jax.typing.ArrayLike, valid: jax.typing.ArrayLike) -> jax.Array:
        rewards, usable = _usable(rewards, valid)
        highest = jnp.max(jnp.where(usable, rewards, -jnp.inf), axis=1, keepdims=True)
        # Distances below the maximum, in fixed point: sums of integers are the same in any order and on any device, and
        # equal rewards give exactly zero.
        bits = 30 - int(rewards.shape[1]).bit_length()
        below = jnp.where(usable, jnp.clip(rewards - highest, -1.0, 0.0), 0.0)
        steps = jnp.round(below * 2**bits).astype(jnp.int32)
        count = jnp.sum(usable, axis=1, keepdims=True, dtype=jnp.int32)
        total = jnp.sum(steps, axis=1, keepdims=True, dtype=jnp.int32)
        # R - max > (1 - gamma) * (mean - max), times count.
        return usable & ((steps * count).astype(jnp.float32) > (1.0 - self.gamma) * total.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class TopK:
    """Keeps the k valid samples of highest reward of each source; of equal rewards, the lower sample index.

    A reward of 0, the least there is and what a guard gives, is never kept, as no other filter keeps it: a source with
    fewer than k better samples has fewer pairs.
    """

    k: int

    def __post_init__(self) -> None:
        _check_count("TopK.k", self.k)

    def __call__(self, rewards: jax.typing.ArrayLike, valid: jax.typing.ArrayLike) -> jax.Array:
        rewards, usable = _usable(rewards, valid)
        return _best(rewards, usable & (rewards > 0), self.k)


@dataclasses.dataclass(frozen=True)
class Cap:
    """Keeps at most the k best per source of those that `filter` keeps (ReST-EM: 10): easy sources do not dominate."""

    filter: Filter
    k: int

    def __post_init__(self) -> None:
        _check_count("Cap.k", self.k)

    def __call__(self, rewards: jax.typing.ArrayLike, valid: jax.typing.ArrayLike) -> jax.Array:
        rewards, usable = _usable(rewards, self.filter(rewards, valid))
        return _best(rewards, usable, self.k)


@dataclasses.dataclass(frozen=True)
class AllOf:
    """Keeps what every one of `filters` keeps; each sees all valid samples."""

    filters: tuple[Filter, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "filters", tuple(self.filters))
        if not self.filters:
            raise UserError("AllOf.filters is empty; give at least one filter, or Threshold(0.0).")

    def __call__(self, rewards: jax.typing.ArrayLike, valid: jax.typing.ArrayLike) -> jax.Array:
        keep = self.filters[0](rewards, valid)
        for part in self.filters[1:]:
            keep &= part(rewards, valid)
        return keep


def distinct(samples: jax.typing.ArrayLike) -> jax.Array:
    """Marks the first of each set of equal samples of a source; exact, no hashes.

    Args:
      samples: int32 `[sources, num_samples, length]`, padded alike after EOS.

    Returns:
      bool `[sources, num_samples]`.
    """
    samples = jnp.asarray(samples)
    num_samples = samples.shape[1]

    # [length, sources, num_samples] -> [sources, num_samples, num_samples], one position at a time: the comparison of
    # all positions at once would be `length` times as large.
    def narrow(equal: jax.Array, column: jax.Array) -> tuple[jax.Array, None]:
        return equal & (column[:, :, None] == column[:, None, :]), None

    earlier = jnp.tril(jnp.ones((num_samples, num_samples), bool), k=-1)
    start = jnp.broadcast_to(earlier, (samples.shape[0], num_samples, num_samples))
    repeated, _ = jax.lax.scan(narrow, start, jnp.moveaxis(samples, 2, 0))
    return ~jnp.any(repeated, axis=2)


def repeated_ngrams(samples: jax.typing.ArrayLike, *, order: int = 4) -> jax.Array:
    """Counts the positions of a sample at which an n-gram begins that began earlier in the same sample.

    A sample caught in a loop has many; chrF, which weighs recall, hardly minds them.

    Args:
      samples: int32 `[sources, num_samples, length]`, 0 after the end.
      order: n.

    Returns:
      int32 `[sources, num_samples]`.
    """
    samples = jnp.asarray(samples)
    length = samples.shape[-1] - order + 1
    if length < 2:
        return jnp.zeros(samples.shape[:-1], jnp.int32)
    equal = jnp.ones((*samples.shape[:-1], length, length), bool)
    for offset in range(order):
        part = samples[..., offset : offset + length]
        equal &= (part[..., :, None] == part[..., None, :]) & (part[..., :, None] != 0)
    earlier = jnp.tril(jnp.ones((length, length), bool), k=-1)
    return jnp.sum(jnp.any(equal & earlier, axis=-1), axis=-1, dtype=jnp.int32)


@dataclasses.dataclass(frozen=True)
class RewardStatistics:
    """Rewards of one D_g, for schedules.

    Attributes:
      sorted_rewards: float64 `[count]`, ascending, no NaN; at least one.
    """

    sorted_rewards: npt.NDArray[np.float64]

    @classmethod
    def of(cls, rewards: npt.ArrayLike, valid: npt.ArrayLike | None = None) -> "RewardStatistics":
        """Collects rewards of any shape, of those marked `valid` alone where that is given.

        Raises:
          UserError: none is left.
        """
        flat = np.asarray(rewards, np.float64)
        flat = flat[np.asarray(valid, bool)] if valid is not None else flat.ravel()
        flat = np.sort(flat[~np.isnan(flat)])
        if not flat.size:
            raise UserError("D_g has no valid sample: every reward is NaN or every sample was refused.")
        return cls(flat)

    @property
    def mean(self) -> float:
        return float(self.sorted_rewards.mean())

    @property
    def std(self) -> float:
        return float(self.sorted_rewards.std())

    def quantile(self, level: float) -> float:
        """Reward below which a share `level` of D_g lies, 0 <= level <= 1; linear between neighbours."""
        return float(np.quantile(self.sorted_rewards, level))

    def share_above(self, tau: float) -> float:
        """Share of D_g with R > tau."""
        return 1.0 - float(np.searchsorted(self.sorted_rewards, tau, side="right")) / self.sorted_rewards.size


class Schedule(Protocol):
    """The filter of each Improve step, counted from 1."""

    @property
    def num_steps(self) -> int | None:
        """How many Improve steps there is a filter for; None for any number."""

    def __call__(self, improve_step: int, statistics: RewardStatistics) -> Filter: ...


def check_schedule(schedule: Schedule, *, improve_steps: int) -> None:
    """Raises UserError where `schedule` has fewer steps than the run has Improve steps per Grow."""
    if schedule.num_steps is not None and schedule.num_steps < improve_steps:
        raise UserError(
            f"The schedule {type(schedule).__name__} has {schedule.num_steps} steps, but each Grow is followed by "
            f"{improve_steps} Improve steps. Add {improve_steps - schedule.num_steps} to the schedule, or take fewer "
            "Improve steps."
        )


def check_nested(schedule: Schedule, *, grow_filter: Filter, improve_steps: int, num_samples: int) -> None:
    """Raises UserError where an Improve step asks for samples that Grow's filter dropped, whatever the rewards are.

    Both are tried on rewards spread over several parts of [0, 1]: a threshold may suit one part and not another, a rank
    suits all or none. What only the real rewards can tell is found when Grow is done.
    """
    generator = np.random.default_rng(0)
    clash = None
    for low, high in ((0.0, 1.0), (0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0), (0.9, 1.0)):
        rewards = generator.uniform(low, high, (64, num_samples)).astype(np.float32)
        valid = np.ones(rewards.shape, bool)
        statistics = RewardStatistics.of(rewards)
        steps = [schedule(step, statistics) for step in range(1, improve_steps + 1)]
        kept = [np.asarray(keep_filter(rewards, valid)) for keep_filter in steps]
        if not any(np.any(keep) for keep in kept):
            continue
        dropped = ~np.asarray(grow_filter(rewards, valid))
        clashes = [number for number, keep in enumerate(kept, start=1) if np.any(keep & dropped)]
        if not clashes:
            return
        clash = clash or (clashes[0], describe(steps[clashes[0] - 1]))
    if clash is not None:
        raise UserError(
            f"SCHEDULE keeps {clash[1]} in Improve step {clash[0]}, and some of that GROW_FILTER, "
            f"{describe(grow_filter)}, does not store. Loosen GROW_FILTER (GROW_FILTER = @filters.Threshold() stores "
            "all rewards above 0), or tighten SCHEDULE."
        )


@dataclasses.dataclass(frozen=True)
class Constant:
    """The same filter in every Improve step."""

    filter: Filter
    num_steps: None = dataclasses.field(default=None, init=False, repr=False)

    def __call__(self, improve_step: int, statistics: RewardStatistics) -> Filter:
        return self.filter


@dataclasses.dataclass(frozen=True)
class ThresholdGrid:
    """Threshold(taus[i - 1]); the paper's grid is 0.7, 0.8, 0.9, 0.95, 0.99."""

    taus: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "taus", _rising("ThresholdGrid.taus", self.taus))

    @property
    def num_steps(self) -> int:
        return len(self.taus)

    def __call__(self, improve_step: int, statistics: RewardStatistics) -> Filter:
        return Threshold(_step_of(self, self.taus, improve_step))


@dataclasses.dataclass(frozen=True)
class AboveMean:
    """Thresholds above the mean reward of D_g that each keep a fixed share of what the one before kept.

    With s the share of D_g above its mean, step i keeps the best s * ratio^i of D_g:

        tau_i = quantile(1 - s * ratio^i),  0 < ratio < 1

    so tau_1 exceeds the mean and tau_{i+1} > tau_i wherever D_g has that many different rewards; where it has not, the
    next float32 above is taken (so that the order still holds, and nothing more is kept). A quantile adapts to any
    reward's scale, where a fixed grid can keep all of D_g or nothing.
    """

    ratio: float = 0.5
    num_steps: None = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UserError(f"AboveMean.ratio is {self.ratio}; it must lie between 0 and 1, exclusive.")

    def __call__(self, improve_step: int, statistics: RewardStatistics) -> Filter:
        _check_count("improve_step", improve_step)
        share = statistics.share_above(statistics.mean)
        tau = np.float32(statistics.mean)
        for step in range(1, improve_step + 1):
            level = np.float32(statistics.quantile(1.0 - share * self.ratio**step))
            tau = max(level, np.nextafter(tau, np.float32(np.inf)))
        return Threshold(float(tau))


@dataclasses.dataclass(frozen=True)
class PercentileSchedule:
    """Percentile(ps[i - 1])."""

    ps: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ps", _rising("PercentileSchedule.ps", self.ps))
        for p in self.ps:
            Percentile(p)

    @property
    def num_steps(self) -> int:
        return len(self.ps)

    def __call__(self, improve_step: int, statistics: RewardStatistics) -> Filter:
        return Percentile(_step_of(self, self.ps, improve_step))


@dataclasses.dataclass(frozen=True)
class InterpolationSchedule:
    """Interpolation(gammas[i - 1])."""

    gammas: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "gammas", _rising("InterpolationSchedule.gammas", self.gammas))
        for gamma in self.gammas:
            Interpolation(gamma)

    @property
    def num_steps(self) -> int:
        return len(self.gammas)

    def __call__(self, improve_step: int, statistics: RewardStatistics) -> Filter:
        return Interpolation(_step_of(self, self.gammas, improve_step))


@dataclasses.dataclass(frozen=True)
class TopKSchedule:
    """TopK(ks[i - 1]), k falling."""

    ks: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ks", tuple(self.ks))
        for k in self.ks:
            _check_count("TopKSchedule.ks", k)
        _rising("TopKSchedule.ks", [-k for k in self.ks], given=self.ks, direction="falling")

    @property
    def num_steps(self) -> int:
        return len(self.ks)

    def __call__(self, improve_step: int, statistics: RewardStatistics) -> Filter:
        return TopK(_step_of(self, self.ks, improve_step))


def _usable(rewards: jax.typing.ArrayLike, valid: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    rewards = jnp.asarray(rewards, jnp.float32)
    return rewards, jnp.asarray(valid, bool) & ~jnp.isnan(rewards)


def _best(rewards: jax.Array, usable: jax.Array, k: int) -> jax.Array:
    order = jnp.argsort(jnp.where(usable, -rewards, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1)
    # The first test matters where there are fewer than k usable ones.
    return usable & (rank < k)


def _check_range(name: str, value: float, *, low: float, high: float) -> None:
    if not low <= value < high:
        raise UserError(f"{name} is {value}; it must be at least {low} and below {high}.")


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least 1.")


def _rising(
    name: str, values: Sequence[float], *, given: Sequence[float] | None = None, direction: str = "rising"
) -> tuple[float, ...]:
    values = tuple(values)
    if not values or any(not later > earlier for earlier, later in zip(values, values[1:], strict=False)):
        raise UserError(
            f"{name} is {tuple(values if given is None else given)}; it must be a strictly {direction}, non-empty "
            "list: each Improve step is stricter than the one before."
        )
    return values


def _step_of(schedule: Schedule, values: Sequence[Value], improve_step: int) -> Value:
    _check_count("improve_step", improve_step)
    check_schedule(schedule, improve_steps=improve_step)
    return values[improve_step - 1]
