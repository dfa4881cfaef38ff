"""Unit tests of a reward: does it prefer translations that were made bad on purpose?

Each pair's base text is compared with one variant of every kind of `rewards/corruptions.py` under the reward, with
guards and without. The base text is the reference; a reward that reads the reference gives that its highest value by
definition, so there it is another translation, a hypothesis. A variant may be right where the base text is
wrong, so a share above 0 is no proof; what to look for is shares that stand out.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import scipy.stats

from rest_jax.data.lines import read_lines
from rest_jax.data.parallel import ParallelData
from rest_jax.data.token_dataset import TokenDataset
from rest_jax.data.vocabulary import Vocabulary
from rest_jax.errors import UserError
from rest_jax.partitioning import Partitioner, trace_mesh
from rest_jax.rewards.base import Reward, RewardBatch, RewardParams, check_comparable, leaves
from rest_jax.rewards.combinations import Guarded, unguarded
from rest_jax.rewards.corruptions import CORRUPTIONS, Corruption, other_source
from rest_jax.rewards.guards import GUARD_PREFIX, Finished, LengthRatio, NotCopied, NotEmpty, NotRepetitive
from rest_jax.sampling import Sampling

T = TypeVar("T")
# Those of gin/rewards/guarded.gin: what guards would do to a reward that has none.
USUAL_GUARDS: tuple[Reward, ...] = (NotEmpty(), Finished(), LengthRatio(0.4, 2.5), NotRepetitive(), NotCopied())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A source with its task's prefix, its reference, and another translation of it, where there is one."""

    source: str
    reference: str
    hypothesis: str | None = None


def audit(
    reward: Reward,
    pairs: Sequence[Pair],
    *,
    params: RewardParams,
    data: ParallelData,
    sampling: Sampling,
    partitioner: Partitioner,
    source_prefix: str = "",
    wrong_language: Corruption = other_source,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores base texts and their variants.

    Args:
      reward: any; its guards are told apart from the rest. One without guards is tried with `USUAL_GUARDS`.
      pairs: real ones. Those of which a side does not fit into the lengths are left out, and counted.
      params: the reward's (`Reward.init`), on the mesh.
      data: whose vocabulary and lengths are the policy's.
      sampling: of the policy: how many sources are scored at a time, and the prefix of all translations.
      partitioner: the mesh.
      source_prefix: what sources begin with for the policy's sake, which no variant has.
      wrong_language: makes the variant of that name.
      seed: of the variants.

    Returns:
      reward, guards and guards_in_reward; base ('reference' or 'hypothesis') and base_refused, the share of base
      texts that fail a guard; pairs, too_long; variants: for each kind, pairs (less than all where the variant is the
      base text itself) and, `without_guards` and `with_guards`, the shares preferred (the variant's reward is higher,
      with its 95 % interval low, high, by Wilson) and equal. For JSON.

    Raises:
      UserError: no pair is left, or the reward reads references and a pair has no hypothesis.
    """
    check_comparable(reward)
    base = "hypothesis" if _compares_hypotheses(reward) else "reference"
    if base == "hypothesis" and any(pair.hypothesis is None for pair in pairs):
        raise UserError(
            f"audit_reward: {reward.name} reads the reference, so the reference can not be what variants are compared "
            "with. Give other translations of the same sources, --hypotheses FILE (python -m rest_jax translate makes "
            "them), or the MODEL_DIR of a run that has evaluated bc."
        )
    has_guards = any(name.startswith(GUARD_PREFIX) for name in leaves(reward))
    guarded = reward if has_guards else Guarded(reward, USUAL_GUARDS)
    guards = [leaf for name, leaf in leaves(guarded).items() if name.startswith(GUARD_PREFIX)]
    bases = [pair.reference if base == "reference" else pair.hypothesis or "" for pair in pairs]
    kinds, samples, sources, references = _tokens(
        pairs,
        bases,
        corruptions={**CORRUPTIONS, "wrong_language": wrong_language},
        vocabulary=data.vocabulary,
        lengths=data.lengths,
        source_prefix=source_prefix,
        target_prefix=sampling.target_prefix,
        seed=seed,
    )
    components = _score(
        guarded,
        {"samples": samples, "sources": sources, "references": references},
        params=_leaf_params(reward, params)
        | ({} if has_guards else {guard.name: guard.init(data.vocabulary) for guard in guards}),
        partitioner=partitioner,
        sources_per_chunk=sampling.sources_per_chunk,
    )
    totals = {
        name: np.asarray(whole.combine({leaf: jnp.asarray(values) for leaf, values in components.items()}))
        for name, whole in (("without_guards", unguarded(reward)), ("with_guards", guarded))
    }
    passed = np.all([components[guard.name] > 0 for guard in guards], axis=0)
    variants = {}
    for column, kind in enumerate(kinds, start=1):
        differs = np.any(samples[:, column] != samples[:, 0], axis=1)
        variants[kind] = {"pairs": int(differs.sum())} | {
            name: _preference(total[differs, column], total[differs, 0]) for name, total in totals.items()
        }
    return {
        "reward": reward.name,
        "guards": [guard.name.removeprefix(GUARD_PREFIX) for guard in guards],
        "guards_in_reward": has_guards,
        "base": base,
        "base_refused": float(1 - passed[:, 0].mean()),
        "pairs": len(samples),
        "too_long": len(pairs) - len(samples),
        "variants": variants,
    }


def _leaf_params(reward: Reward, params: RewardParams) -> dict[str, RewardParams]:
    """By the leaf's name, as combinations have them."""
    return dict(params) if reward.parts else {reward.name: params}


def _tokens(
    pairs: Sequence[Pair],
    bases: Sequence[str],
    *,
    corruptions: Mapping[str, Corruption],
    vocabulary: Vocabulary,
    lengths: Mapping[str, int],
    source_prefix: str,
    target_prefix: str,
    seed: int,
) -> tuple[list[str], npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Kinds of variants, samples `[pairs, 1 + kinds, T]`, the base text first, sources `[pairs, S]`, references."""

    def encode(text: str) -> list[int]:
        return [*vocabulary.encode(text), vocabulary.eos_id]

    def padded(rows: Sequence[Sequence[int]], length: int) -> npt.NDArray[np.int32]:
        array = np.zeros((len(rows), length), np.int32)
        for target, row in zip(array, rows, strict=True):
            target[: len(row)] = row[:length]  # as a policy's samples, without EOS where they reach the limit
        return array

    source_rows, base_rows = [encode(pair.source) for pair in pairs], [encode(text) for text in bases]
    reference_rows = [encode(pair.reference) for pair in pairs]
    fitting = [
        k
        for k, (source, base) in enumerate(zip(source_rows, base_rows, strict=True))
        if len(source) <= lengths["inputs"] and max(len(base), len(reference_rows[k])) <= lengths["targets"]
    ]
    if not fitting:
        raise UserError(
            f"audit_reward: of {len(pairs)} pairs none fits into TASK_FEATURE_LENGTHS {dict(lengths)}. Give other text."
        )
    tag = target_prefix.strip()
    texts = [bases[k].removeprefix(tag).lstrip() for k in fitting]
    plain_sources = [pairs[k].source.removeprefix(source_prefix) for k in fitting]
    samples = [padded([base_rows[k] for k in fitting], lengths["targets"])]
    for number, corrupt in enumerate(corruptions.values()):
        variants = corrupt(plain_sources, texts, np.random.default_rng((seed, number)))
        samples.append(padded([encode(f"{tag} {text}" if tag else text) for text in variants], lengths["targets"]))
    return (
        list(corruptions),
        np.stack(samples, axis=1),
        padded([source_rows[k] for k in fitting], lengths["inputs"]),
        padded([reference_rows[k] for k in fitting], lengths["targets"]),
    )


def _score(
    reward: Reward,
    batch: Mapping[str, npt.NDArray[np.int32]],
    *,
    params: Mapping[str, RewardParams],
    partitioner: Partitioner,
    sources_per_chunk: int,
) -> dict[str, npt.NDArray[np.float32]]:
    """Components by name, `[pairs, 1 + kinds]`."""
    partitioner.check_batch_divisible(sources_per_chunk, "Evaluation.sampling.sources_per_chunk")

    @jax.jit
    def program(params: RewardParams, batch: RewardBatch) -> dict[str, jax.Array]:
        with trace_mesh(partitioner.mesh):
            return reward.score(params, batch)

    parts = []
    num_pairs, own = len(batch["samples"]), partitioner.local_rows(sources_per_chunk)
    for start in range(0, num_pairs, sources_per_chunk):
        rows = np.arange(start, start + sources_per_chunk)
        # The last chunk is filled up with its first pair.
        taken = np.where(rows < num_pairs, rows, start)[own]
        scored = program(params, partitioner.put_batch({name: values[taken] for name, values in batch.items()}))
        parts.append({name: values[rows < num_pairs] for name, values in partitioner.fetch(scored).items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _preference(variants: npt.NDArray[np.floating], bases: npt.NDArray[np.floating]) -> dict[str, float] | None:
    """None where there is no variant."""
    if not len(bases):
        return None
    preferred = int(np.count_nonzero(variants > bases))
    interval = scipy.stats.binomtest(preferred, len(bases)).proportion_ci(method="wilson")
    return {
        "preferred": preferred / len(bases),
        "low": float(interval.low),
        "high": float(interval.high),
        "equal": float(np.mean(variants == bases)),
    }


def read_pairs(
    sources: str, references: str, hypotheses: str | None = None, *, source_prefix: str = "", num_pairs: int, seed: int
) -> list[Pair]:
    """Pairs of text files, a sentence a line, aligned; those with an empty side are left out.

    Raises:
      UserError: a file is missing or no UTF-8, or they have different numbers of lines.
    """
    columns = [read_lines(path) for path in (sources, references, hypotheses) if path is not None]
    if len({len(column) for column in columns}) > 1:
        raise UserError(
            f"audit_reward: --sources, --references and --hypotheses have {', '.join(str(len(c)) for c in columns)} "
            "lines; line k of each must belong together."
        )
    pairs = [
        Pair(source=source_prefix + texts[0], reference=texts[1], hypothesis=texts[2] if len(texts) > 2 else None)
        for texts in zip(*columns, strict=True)
        if all(text.strip() for text in texts)
    ]
    return _choose(pairs, num_pairs=num_pairs, seed=seed)


def pairs_of_run(reward: Reward, *, eval_set: TokenDataset, model_dir: Path, num_pairs: int, seed: int) -> list[Pair]:
    """Pairs of D_eval; for a reward that reads references, with BC's first samples once BC is evaluated."""
    samples = model_dir / "eval" / "bc.validation.samples.jsonl"
    if _compares_hypotheses(reward) and samples.is_file():
        with samples.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        pairs = [
            Pair(source=row["source"], reference=row["reference"], hypothesis=row["samples"][0])
            for row in rows
            if row["samples"][0].strip()
        ]
        return _choose(pairs, num_pairs=num_pairs, seed=seed)
    chosen = _choose(range(len(eval_set)), num_pairs=num_pairs, seed=seed)
    return [Pair(source=eval_set.inputs_text(k), reference=eval_set.targets_text(k)) for k in chosen]


def _compares_hypotheses(reward: Reward) -> bool:
    return any(leaf.requires_reference for leaf in leaves(reward).values())


def _choose(items: Sequence[T], *, num_pairs: int, seed: int) -> list[T]:
    """At most `num_pairs` of them, at random, in order."""
    chosen = np.random.default_rng(seed).permutation(len(items))[:num_pairs]
    return [items[k] for k in np.sort(chosen)]
