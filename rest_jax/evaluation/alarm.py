"""Is the policy fooling its reward? A metric that the reward does not contain watches every Improve step."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from rest_jax.errors import UserError
from rest_jax.evaluation.metrics import LABELS, METRICS
from rest_jax.evaluation.significance import paired_bootstrap_corpus
from rest_jax.rewards.base import Reward

_LOWER_IS_BETTER = frozenset({"ter"})


class Alarm(TypedDict):
    """A held-out metric that got worse over an Improve step, beyond its interval, while the reward rose.

    Attributes:
      policy, start: the phases whose policies the step ended and began with.
      metric: of `METRICS`.
      reward, score: of `start` and of `policy`.
      low, high: the 95 % interval of the score's difference, `policy` less `start`.
      text: the same in words.
    """

    policy: str
    start: str
    metric: str
    reward: tuple[float, float]
    score: tuple[float, float]
    low: float
    high: float
    text: str


def held_out_metrics(reward: Reward) -> tuple[str, ...]:
    """Evaluation's metrics that `reward` does not measure.

    Raises:
      UserError: there is none left.
    """
    held_out = tuple(name for name in METRICS if name not in reward.measures)
    if not held_out:
        raise UserError(
            f"REWARD: {reward.name} measures all that evaluation computes ({', '.join(METRICS)}), so nothing could "
            "tell that a policy fools it. Leave one of them out."
        )
    return held_out


def raise_alarms(
    eval_dir: Path,
    *,
    policy: str,
    scores: Mapping[str, Any],
    start: str,
    metrics: Sequence[str],
    num_resamples: int,
    seed: int,
) -> list[Alarm]:
    """What is to be said of the step from `start` to `policy`; nothing, mostly.

    The interval is the percentile interval of the paired bootstrap by source of the test split.

    Args:
      eval_dir: with both policies' `NAME.test.jsonl`, and the scores of `start`; if it was not evaluated, there is
        nothing to compare.
      policy, start: names of phases.
      scores: of `policy`, its `reward` on D_eval and its corpus scores on the test split.
      metrics: those that are held out (`held_out_metrics`).
      num_resamples, seed: of the bootstrap.
    """
    start_file = eval_dir / f"{start}.json"
    if not start_file.exists():
        return []
    start_scores = json.loads(start_file.read_text(encoding="utf-8"))
    if not scores["reward"] > start_scores["reward"]:
        return []
    worse = [name for name in metrics if _sign(name) * (scores[name] - start_scores[name]) < 0]
    if not worse:  # the usual case, in which no resampling is paid for
        return []
    (hypotheses, references), (start_hypotheses, _) = (_test_split(eval_dir, name) for name in (policy, start))
    alarms = []
    for name in worse:
        result = paired_bootstrap_corpus(
            hypotheses, start_hypotheses, references, metric=name, num_resamples=num_resamples, seed=seed
        )
        if result.significant:
            alarms.append(
                Alarm(
                    policy=policy,
                    start=start,
                    metric=name,
                    reward=(start_scores["reward"], scores["reward"]),
                    score=(start_scores[name], scores[name]),
                    low=result.low,
                    high=result.high,
                    text=(
                        f"ALARM: from {start} to {policy} the reward rose from {start_scores['reward']:.4f} to "
                        f"{scores['reward']:.4f}, but test {LABELS[name]}, which is no part of it, got worse: from "
                        f"{start_scores[name]:.2f} to {scores[name]:.2f} (95 % interval of the difference "
                        f"{result.low:+.2f} to {result.high:+.2f}). The policy may be fooling the reward: read its "
                        "translations, audit the reward and put guards around it (docs/reward_hacking.md)."
                    ),
                )
            )
    return alarms


def _sign(metric: str) -> int:
    return -1 if metric in _LOWER_IS_BETTER else 1


def _test_split(eval_dir: Path, name: str) -> tuple[list[str], list[str]]:
    """Hypotheses and references, aligned."""
    with (eval_dir / f"{name}.test.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row["hypothesis"] for row in rows], [row["reference"] for row in rows]
