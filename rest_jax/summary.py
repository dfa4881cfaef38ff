"""summary.json: the numbers of a run, from its phases' commit marks and evaluation files."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rest_jax.evaluation.metrics import make_metric
from rest_jax.evaluation.significance import BootstrapResult, paired_bootstrap, paired_bootstrap_corpus
from rest_jax.reporting.run_files import CONTROL, final_policy, is_grow

VERSIONS_OF = ("rest_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sacrebleu", "sentencepiece")

# sacreBLEU takes about half a millisecond each, for each of three policies.
_CHRF_SAMPLES = 4


def summarise(
    model_dir: Path,
    results: Mapping[str, Mapping[str, Any]],
    *,
    num_resamples: int,
    seed: int,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of summary.json.

    Args:
      model_dir: the run's directory, with `eval/` in it.
      results: phase name -> its commit mark, of finished phases in order.
      num_resamples, seed: of the paired bootstrap; 0 for no comparisons.
      facts: further entries.

    Returns:
      phases (name, reward, bleu, chrf, ter, samples, distinct, kept, seconds, ...), alarms (`evaluation.alarm`) of all
      Improve steps, comparisons, signatures, config_sha256, versions and `facts`.
    """
    phases = [_phase(name, results) for name in results if not name.startswith("evaluate_")]
    evaluated = [phase["name"] for phase in phases if "reward" in phase]
    signatures = results[f"evaluate_{evaluated[-1]}"]["signatures"] if evaluated else {}
    config = model_dir / "config.gin"
    return {
        "phases": phases,
        "alarms": [alarm for name in evaluated for alarm in results[f"evaluate_{name}"].get("alarms", ())],
        "comparisons": _comparisons(
            model_dir / "eval",
            phases,
            num_resamples=num_resamples,
            seed=seed,
            # Where chrF is the reward itself, or a part of it, the comparison by reward has said it.
            samples_chrf="chrf" in facts.get("held_out_metrics", ()),
        )
        if num_resamples
        else [],
        "signatures": signatures,
        "config_sha256": hashlib.sha256(config.read_bytes()).hexdigest() if config.is_file() else None,
        "versions": versions(),
        **facts,
    }


def _phase(name: str, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One row. `seconds` of a policy is training and evaluation together; zeros stand for what a phase does not do."""
    result = results[name]
    if is_grow(name):
        return {
            "name": name,
            "samples": result["count"],
            "distinct": result["distinct"],
            "kept": result["kept"],
            "sources": result["sources"],
            "mean_reward": result["mean"],
            "seconds": result["seconds"],
        }
    row = {
        "name": name,
        "steps": result["steps"],
        "best_step": result["best_step"],
        "history": result["history"],
        "target_tokens": result["target_tokens"],
        "samples": 0,
        "distinct": 0,
        "kept": result.get("selection", {}).get("pairs", 0),
        "seconds": result["seconds"],
    }
    scores = results.get(f"evaluate_{name}")
    if scores is not None:
        for key in ("reward", "bleu", "chrf", "ter", "test_reward", "best_of_n"):
            row[key] = scores[key]
        row["seconds"] = round(result["seconds"] + scores["seconds"], 2)
    return row


def _comparisons(
    eval_dir: Path, phases: list[dict[str, Any]], *, num_resamples: int, seed: int, samples_chrf: bool
) -> list[dict[str, Any]]:
    """The last ReST policy against BC and against its long control, by samples' reward, by their chrF if so asked, and
    by corpus scores."""
    names = [phase["name"] for phase in phases if "reward" in phase]
    last = final_policy([phase for phase in phases if "reward" in phase])
    comparisons = []
    for other in ("bc", CONTROL):
        if last is None or other not in names:
            continue
        first, second = (_source_rewards(eval_dir / f"{name}.validation.samples.jsonl") for name in (last, other))
        result = paired_bootstrap(first, second, num_resamples=num_resamples, seed=seed)
        comparisons.append(_comparison(last, other, "reward", result))
        if samples_chrf:
            first, second = (_source_chrf(eval_dir / f"{name}.validation.samples.jsonl") for name in (last, other))
            result = paired_bootstrap(first, second, num_resamples=num_resamples, seed=seed)
            comparisons.append(_comparison(last, other, "samples' chrF", result))
        hypotheses = [_column(eval_dir / f"{name}.test.jsonl", "hypothesis") for name in (last, other)]
        references = _column(eval_dir / f"{last}.test.jsonl", "reference")
        for metric in ("bleu", "chrf"):
            result = paired_bootstrap_corpus(
                hypotheses[0], hypotheses[1], references, metric=metric, num_resamples=num_resamples, seed=seed
            )
            comparisons.append(_comparison(last, other, metric, result))
    return comparisons


def _comparison(a: str, b: str, metric: str, result: BootstrapResult) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        "metric": metric,
        "difference": result.difference,
        "low": result.low,
        "high": result.high,
        "p_value": result.p_value,
    }


def _source_rewards(path: Path) -> np.ndarray:
    """`[sources]` mean reward of each source's samples."""
    return np.asarray([np.mean(rewards) for rewards in _column(path, "rewards")])


def _source_chrf(path: Path) -> np.ndarray:
    """`[sources]` mean chrF of each source's first samples: as the reward, of samples, so as sensitive as it is."""
    chrf = make_metric("chrf")
    return np.asarray(
        [
            np.mean([chrf.sentence_score(sample, [reference]).score for sample in samples[:_CHRF_SAMPLES]])
            for samples, reference in zip(_column(path, "samples"), _column(path, "reference"), strict=True)
        ]
    )


def _column(path: Path, name: str) -> list[Any]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)[name] for line in file]


def versions() -> dict[str, str | None]:
    """Python's and the libraries' versions; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
