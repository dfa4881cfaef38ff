"""The Improve step: choose what passes this step's filter, then train on it. The train step is in `training.py`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from rest_jax import filters
from rest_jax.data.batching import Examples, MixtureSpec
from rest_jax.data.store import ScoredStore, filter_report
from rest_jax.data.token_dataset import TokenDataset
from rest_jax.errors import UserError
from rest_jax.filters import Filter, RewardStatistics, Schedule
from rest_jax.training import Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Improving:
    """What Improve steps train on, and how.

    Attributes:
      training: steps, batch, objective; its learning rate is the first Improve step's.
      schedule: improve step i (from 1) -> filter, stricter with i. The default's τ_1 lies above the samples' mean.
      learning_rate_decay: step i trains at `training.learning_rate * learning_rate_decay ** (i - 1)`.
      reference_fraction: share of D's own pairs among the pairs of an epoch; 0 trains on samples alone.
      reference_filter: which of D's pairs may be mixed in, by their own reward (1.0 for a reward that compares with the
        reference); it can judge only sources that Grow sampled. None: all of D.
      restart_from_base: each step starts from BC's policy rather than from the previous step's (ReST-EM).
    """

    training: Training
    schedule: Schedule
    learning_rate_decay: float = 0.5
    reference_fraction: float = 0.5
    reference_filter: Filter | None = None
    restart_from_base: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate_decay <= 1:
            raise UserError(
                f"Improving.learning_rate_decay is {self.learning_rate_decay}; it must be in (0, 1]: the paper's "
                "Improve steps have falling learning rates."
            )
        if not 0 <= self.reference_fraction < 1:
            raise UserError(
                f"Improving.reference_fraction is {self.reference_fraction}; it must be in [0, 1), the share of D."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """What one Improve step trains on."""

    mixture: MixtureSpec
    training: Training
    report: dict[str, Any]  # description, tau, pairs, sources, tokens, mean_reward, references


def choose_filter(*, improving: Improving, store: ScoredStore, improve_step: int) -> Filter:
    """The filter of one Improve step, from the rewards of the samples.

    D is mixed in apart from them (`reference_fraction`). Its pairs have rewards of 1.0 where the reward compares with
    the reference: among the samples they would fill a quantile's share, and the last Improve steps would keep none.
    """
    return improving.schedule(improve_step, RewardStatistics.of(store.rewards[store.valid]))


def selection_report(*, improving: Improving, store: ScoredStore, improve_step: int) -> dict[str, Any]:
    """What Improve step `improve_step` would train on: description, tau, pairs, sources, tokens, mean_reward, ...

    Raises:
      UserError: the filter passes nothing, or asks for samples that Grow's filter dropped.
    """
    keep_filter = choose_filter(improving=improving, store=store, improve_step=improve_step)
    report = filter_report(store, np.asarray(keep_filter(store.rewards, store.valid)))
    if report["pairs"] == 0:
        valid = store.rewards[store.valid]
        raise UserError(
            f"Improve step {improve_step}: {filters.describe(keep_filter)} passes none of {valid.size} samples, whose "
            f"rewards reach from {valid.min():.3f} to {valid.max():.3f}. Loosen Improving.schedule, or use a "
            "per-source one such as filters.TopKSchedule."
        )
    fraction = improving.reference_fraction
    return {
        "improve_step": improve_step,
        "description": filters.describe(keep_filter),
        "tau": getattr(keep_filter, "tau", None),
        "learning_rate": improving.training.learning_rate * improving.learning_rate_decay ** (improve_step - 1),
        "references": round(report["pairs"] * fraction / (1 - fraction)),
        **report,
    }


def select(*, improving: Improving, store: ScoredStore, references: TokenDataset, improve_step: int) -> Selection:
    """D_g ∪ D under the filter of Improve step `improve_step` (from 1).

    Rows at or below τ_i never reach a batch, so they cost no compute.

    Raises:
      UserError: the filter passes nothing, or asks for samples that Grow's filter dropped.
    """
    report = selection_report(improving=improving, store=store, improve_step=improve_step)
    keep_filter = choose_filter(improving=improving, store=store, improve_step=improve_step)
    samples = store.select(np.asarray(keep_filter(store.rewards, store.valid)))
    parts: tuple[Examples, ...] = (samples,)
    counts: tuple[int, ...] = (len(samples),)
    if improving.reference_fraction > 0:
        pool = _reference_pool(improving.reference_filter, store=store, references=references)
        parts, counts = (samples, pool), (len(samples), max(report["references"], 1))
    return Selection(
        mixture=MixtureSpec(parts=parts, examples_per_epoch=counts),
        training=dataclasses.replace(improving.training, learning_rate=report["learning_rate"]),
        report=report,
    )


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some of a data set's examples."""

    base: TokenDataset
    chosen: np.ndarray  # [examples] int64

    @property
    def source_ids(self) -> np.ndarray:
        return self.base.source_ids[self.chosen]

    @property
    def source_lengths(self) -> np.ndarray:
        return self.base.source_lengths[self.chosen]

    @property
    def target_lengths(self) -> np.ndarray:
        return self.base.target_lengths[self.chosen]

    def inputs(self, index: int, /) -> np.ndarray:
        return self.base.inputs(int(self.chosen[index]))

    def targets(self, index: int, /) -> np.ndarray:
        return self.base.targets(int(self.chosen[index]))


def _reference_pool(keep_filter: Filter | None, *, store: ScoredStore, references: TokenDataset) -> Examples:
    if keep_filter is None:
        return references
    rewards = store.reference_rewards[:, None]
    passed = np.asarray(keep_filter(rewards, np.isfinite(rewards)))[:, 0]
    if not passed.any():
        raise UserError(
            f"Improving.reference_filter {keep_filter} passes none of {len(passed)} references. Loosen it, or set "
            "Improving.reference_fraction = 0."
        )
    rows = np.searchsorted(references.source_ids, store.source_ids[passed])
    return Subset(base=references, chosen=rows)


def describe(report: Mapping[str, Any]) -> str:
    """One line for the log."""
    return (
        f"{report['description']}: {report['pairs']} pairs of {report['sources']} sources, mean reward "
        f"{report['mean_reward']:.3f}, with {report['references']} references; learning rate "
        f"{report['learning_rate']:.2g}"
    )
