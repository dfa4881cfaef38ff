"""Measuring a policy: mean reward of its samples on D_eval (the paper's measure), and sacreBLEU on the test split."""

import concurrent.futures
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rest_jax import paths
from rest_jax.data.token_dataset import TokenDataset
from rest_jax.data.vocabulary import adopt
from rest_jax.errors import Preempted, UserError
from rest_jax.evaluation.best_of_n import best_of_n_curve, distinct_samples
from rest_jax.evaluation.metrics import corpus_scores
from rest_jax.partitioning import Partitioner
from rest_jax.rewards.base import Reward
from rest_jax.sampling import LogitProcessing, Sampling
from rest_jax.sampling.scored import (
    Program,
    choose_sources,
    chunks,
    compile_sample_and_score,
    run_chunks,
    without_prefix,
)

Params = Any
# Random stream of evaluation; Grow steps use 1, 2, ... Every policy is measured with the same random numbers, so
# differences between policies are paired.
EVALUATION_STREAM = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured, and how.

    Attributes:
      sampling: of the mean reward on D_eval that is reported; N also bounds the best-of-N curve.
      selection_samples, selection_sources: a smaller measure while training, for the choice of a checkpoint; None for
        all of D_eval.
      beam_size: the test split is decoded greedily with 1, else by beam search.
      beam_alpha: length penalty of the beam, see `sampling.beam_search`.
      max_test_sources: the first so many of the test split; None for all.
      bootstrap_resamples: of the paired bootstrap between policies.
      audit_pairs: pairs of D_eval that a learned reward is audited with, for the report; 0 for no audit.
    """

    sampling: Sampling
    selection_samples: int = 4
    selection_sources: int | None = None
    beam_size: int = 1
    beam_alpha: float = 0.6
    max_test_sources: int | None = None
    bootstrap_resamples: int = 2000
    audit_pairs: int = 1000

    def __post_init__(self) -> None:
        for name in ("selection_samples", "beam_size", "bootstrap_resamples"):
            if getattr(self, name) < 1:
                raise UserError(f"Evaluation.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.audit_pairs < 0:
            raise UserError(f"Evaluation.audit_pairs is {self.audit_pairs}; it must be at least 0.")
        for name in ("selection_sources", "max_test_sources"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"Evaluation.{name} is {getattr(self, name)}; it must be at least 1, or None for all.")


class Evaluator:
    """Compiled programs for one model, reward and mesh; all methods are functions of the parameters alone.

    `stop_requested` is asked once a chunk of sources, and `Preempted` raised when it says so.
    """

    def __init__(
        self,
        *,
        evaluation: Evaluation,
        model: Any,
        reward: Reward,
        reward_params: Any,
        reward_bytes: int = 0,
        partitioner: Partitioner,
        lengths: Mapping[str, int],
        eval_set: TokenDataset,
        test_set: TokenDataset,
        seed: int,
        stop_requested: Callable[[], bool] = lambda: False,
    ):
        self._model = model
        self._reward = reward
        self._reward_params = reward_params
        self._reward_bytes = reward_bytes
        self._partitioner = partitioner
        self._lengths = lengths
        self._eval_set = eval_set
        self._test_set = test_set
        self._seed = seed
        self._stop_requested = stop_requested
        samplings = samplings_of(evaluation)
        self._sampling, self._selection = samplings["evaluate"], samplings["select"]
        self._translation = samplings["translate"]
        self._selection_indices = choose_sources(
            num_sources=len(eval_set), max_sources=evaluation.selection_sources, seed=seed, stream=EVALUATION_STREAM
        )
        self._test_indices = np.arange(min(len(test_set), evaluation.max_test_sources or len(test_set)))
        self._programs: dict[Sampling, Program] = {}

    def _program(self, sampling: Sampling) -> Program:
        if sampling not in self._programs:
            self._programs[sampling] = compile_sample_and_score(
                model=self._model,
                reward=self._reward,
                sampling=sampling,
                partitioner=self._partitioner,
                max_length=self._lengths["targets"],
                reward_bytes=self._reward_bytes,
            )
        return self._programs[sampling]

    def _draw(
        self, params: Params, dataset: TokenDataset, indices: np.ndarray, sampling: Sampling
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards `[sources, N]` and tokens `[sources, N, T]`, in the order of `indices`, which rises."""
        groups = chunks(dataset, indices=indices, sampling=sampling, max_source_length=self._lengths["inputs"])
        order, rewards, tokens = [], [], []
        for _, group, result in run_chunks(
            list(enumerate(groups)),
            program=self._program(sampling),
            params=params,
            reward_params=self._reward_params,
            dataset=dataset,
            sampling=sampling,
            target_length=self._lengths["targets"],
            partitioner=self._partitioner,
            seed=self._seed,
            stream=EVALUATION_STREAM,
        ):
            if self._stop_requested():
                raise Preempted("stopped while a policy was measured; everything before is saved.")
            real = len(group.indices)
            reward, sample = self._partitioner.fetch((result["rewards"], result["samples"].tokens))
            order.append(group.indices)
            rewards.append(reward[:real])
            tokens.append(sample[:real])
        back = np.argsort(np.concatenate(order), kind="stable")
        return np.concatenate(rewards)[back], np.concatenate(tokens)[back]

    def mean_reward(self, params: Params) -> float:
        """Mean reward of samples on (some of) D_eval: what checkpoints are chosen by."""
        rewards, _ = self._draw(params, self._eval_set, self._selection_indices, self._selection)
        return float(rewards.mean(dtype=np.float64))

    def evaluate(self, params: Params, *, directory: Path, name: str) -> dict[str, Any]:
        """Everything about one policy, in files at `directory` and as numbers.

        Writes `NAME.validation.samples.jsonl` (source, reference, samples, rewards) and `NAME.test.jsonl` (source,
        reference, hypothesis, reward).

        Returns:
          reward, bleu, chrf, ter, signatures, best_of_n, samples, distinct, greedy_reward, mean_length.
        """
        directory.mkdir(parents=True, exist_ok=True)
        vocabulary = adopt(self._model.output_vocabulary)
        eval_set, test_set = self._eval_set, self._test_set

        indices = self._test_indices
        test_rewards, test_tokens = self._draw(params, test_set, indices, self._translation)
        translated = vocabulary.decode_batch(test_tokens[:, 0].tolist())
        hypotheses = [without_prefix(text, self._translation) for text in translated]
        references = [without_prefix(test_set.targets_text(int(i)), self._translation) for i in indices]
        _write_jsonl(
            directory / f"{name}.test.jsonl",
            (
                {
                    "source_id": int(test_set.source_ids[i]),
                    "source": test_set.inputs_text(int(i)),
                    "reference": references[row],
                    "hypothesis": hypotheses[row],
                    "reward": round(float(test_rewards[row, 0]), 6),
                }
                for row, i in enumerate(indices)
            ),
        )

        # TER takes sacreBLEU seconds of one core, which the device's program leaves free.
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
            scoring = thread.submit(corpus_scores, hypotheses, references)
            rewards, tokens = self._draw(params, eval_set, np.arange(len(eval_set)), self._sampling)
            scores = scoring.result()
        texts = [vocabulary.decode_batch(samples.tolist()) for samples in tokens]
        _write_jsonl(
            directory / f"{name}.validation.samples.jsonl",
            (
                {
                    "source_id": int(eval_set.source_ids[i]),
                    "source": eval_set.inputs_text(i),
                    "reference": eval_set.targets_text(i),
                    "samples": texts[i],
                    "rewards": [round(float(reward), 6) for reward in rewards[i]],
                }
                for i in range(len(eval_set))
            ),
        )
        return {
            "reward": float(rewards.mean(dtype=np.float64)),
            **scores,
            "test_reward": float(test_rewards.mean(dtype=np.float64)),
            "samples": int(rewards.size),
            "distinct": int(distinct_samples([[tuple(s) for s in samples] for samples in tokens.tolist()])),
            "best_of_n": [float(value) for value in best_of_n_curve(rewards)],
        }


def samplings_of(evaluation: Evaluation) -> dict[str, Sampling]:
    """What each of an evaluation's programs draws, by name: the reported measure, the choice of a checkpoint, the
    translations of the test split."""
    return {
        "evaluate": evaluation.sampling,
        "select": dataclasses.replace(evaluation.sampling, num_samples=evaluation.selection_samples),
        "translate": translation_sampling(
            evaluation.sampling, beam_size=evaluation.beam_size, beam_alpha=evaluation.beam_alpha
        ),
    }


def translation_sampling(sampling: Sampling, *, beam_size: int, beam_alpha: float) -> Sampling:
    """One translation per source, in chunks as `sampling`'s: greedy with `beam_size` 1, else the beam's best."""
    return dataclasses.replace(
        sampling,
        num_samples=1,
        processing=LogitProcessing(temperature=0.0),
        beam_size=beam_size if beam_size > 1 else 0,
        beam_alpha=beam_alpha,
    )


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """By process 0 alone; all have the rows."""
    if jax.process_index() > 0:
        return
    paths.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
