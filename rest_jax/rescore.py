"""A store's total reward computed anew: from the components that it keeps, and from rewards that are added now.

Nothing is drawn. A reward that scored the store is never run again; one that is new is run on the stored tokens, with
sources and references from the run's data. The result is another store, and the old one stays as it is.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from rest_jax import paths
from rest_jax.checkpoints import checkpointer
from rest_jax.data.store import ChunkRows, ChunkSources, ScoredStore, StoreRows, StoreWriter
from rest_jax.data.token_dataset import TokenDataset
from rest_jax.errors import UserError
from rest_jax.partitioning import trace_mesh
from rest_jax.rest import ReST
from rest_jax.rewards.base import Reward, RewardBatch, check_reward, leaves
from rest_jax.rewards.guards import GUARD_PREFIX
from rest_jax.sampling.scored import chunk_batch, chunks

SOURCES_PER_FILE = 4096
DECILES = tuple(level / 10 for level in range(11))
# What Grow writes of the samples under a reward; the rest of its statistics is of the drawing and stays true.
_OF_THE_OLD_REWARD = ("thresholds", "kept_by_threshold")

Arrays = dict[str, npt.NDArray[np.float32]]


def rescore(config: ReST, *, store: ScoredStore, output: str | os.PathLike[str], stored_only: bool = False) -> str:
    """Writes `store` with the total of `config.reward` to the new directory `output`.

    Args:
      config: of the run that grew the store, with the reward that is wanted.
      store: finished.
      output: must not exist; it is written beside itself and renamed when it is whole.
      stored_only: a reward is added though Grow's filter dropped samples, which are no longer valid then. Without it,
        that is refused.

    Returns:
      A table of the components, with the deciles that `combinations.Quantile` takes.

    Raises:
      UserError: the store lacks what the reward needs, or was grown from other data or with another vocabulary.
    """
    output = paths.resolve(output)
    if output.exists():
        raise UserError(f"--output {str(output)!r} exists; name a new directory, a store is never changed in place.")
    reward = config.reward
    check_reward(reward, has_references=True, languages=config.languages)
    new = _new_leaves(reward, store)
    # What an earlier rescoring could not score has no value now either.
    valid, unscored = store.valid, ~store.stored & np.isnan(store.rewards)
    components, reference_components = dict(store.components), dict(store.reference_components)
    if new:
        unscored = ~store.stored
        dropped = int(np.count_nonzero(store.valid & unscored))
        if dropped and not stored_only:
            raise UserError(
                f"{store.directory}: {', '.join(new)} can not be added: Grow's filter dropped {dropped} samples that "
                "are no copies, and their tokens were not stored. Give --stored_only to leave them out from now on, or "
                "grow again with a looser GROW_FILTER."
            )
        valid = store.valid & store.stored
        added, reference_added = _score(config, new, store)
        components |= {name: np.where(unscored, np.nan, values) for name, values in added.items()}
        reference_components |= reference_added
    totals = np.where(unscored, np.nan, _combine(reward, components))
    reference_totals = _combine(reward, {name: values[:, None] for name, values in reference_components.items()})[:, 0]
    _write(
        output,
        store=store,
        sources=ChunkSources(
            source_ids=store.source_ids,
            rewards=totals,
            valid=valid,
            reference_rewards=reference_totals,
            components=components,
            reference_components=reference_components,
        ),
        stats={name: value for name, value in store.stats.items() if name not in _OF_THE_OLD_REWARD}
        | {
            "reward": reward.name,
            "rewards": {**store.stats["rewards"], **{name: repr(leaf) for name, leaf in new.items()}},
            "rescored_from": str(store.directory),
        }
        | _statistics(totals, reference_totals, components=components),
    )
    return format_components({**components, f"total: {reward.name}": totals}, valid=valid)


def _new_leaves(reward: Reward, store: ScoredStore) -> dict[str, Reward]:
    """The rewards within `reward` that did not score the store."""
    scored: Mapping[str, str] = store.stats.get("rewards", {})
    if not scored or not store.components:
        raise UserError(
            f"{store.directory}: this store was grown before the components of all samples were kept; grow again."
        )
    wanted = leaves(reward)
    for name, leaf in wanted.items():
        if name in scored and scored[name] != repr(leaf):
            raise UserError(
                f"{store.directory}: its {name!r} is of {scored[name]}, and REWARD has {leaf!r} under the same name. "
                "Bind the one that the store has, or grow again."
            )
    return {name: leaf for name, leaf in wanted.items() if name not in scored}


def _score(config: ReST, new: Mapping[str, Reward], store: ScoredStore) -> tuple[Arrays, Arrays]:
    """Components `[S, N]` of the samples, 0 where the store has no tokens, and `[S]` of the references."""
    data, sampling = config.data, config.growing.sampling
    if store.stats.get("vocabulary_sha256") != data.vocabulary.sha256:
        raise UserError(f"{store.directory}: its tokens are of another vocabulary than VOCABULARY {data.vocabulary!r}.")
    dataset = data.open(data.train_split)
    rows = store.select(store.stored)
    indices = _indices(dataset, store, rows)
    params = {
        name: checkpointer.put_params(leaf.init(data.vocabulary), config.partitioner) for name, leaf in new.items()
    }

    @jax.jit
    def program(params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> tuple[Any, Any]:
        def score(samples: jax.Array) -> dict[str, jax.Array]:
            seen = RewardBatch(samples=samples, references=batch["references"], sources=batch["encoder_input_tokens"])
            with trace_mesh(config.partitioner.mesh):
                return {
                    component: values
                    for name, leaf in new.items()
                    for component, values in leaf.score(params[name], seen).items()
                }

        return score(batch["samples"]), score(batch["references"][:, None])

    size, target_length = sampling.sources_per_chunk, data.lengths["targets"]
    config.partitioner.check_batch_divisible(size, "SOURCES_PER_CHUNK")
    place = {int(index): row for row, index in enumerate(indices)}
    first_row = np.searchsorted(rows.source_ids, store.source_ids)
    end_row = np.searchsorted(rows.source_ids, store.source_ids, side="right")
    added: Arrays = {}
    reference_added: Arrays = {}
    for group in chunks(dataset, indices=indices, sampling=sampling, max_source_length=data.lengths["inputs"]):
        samples = np.zeros((size, store.num_samples, target_length), np.int32)
        places = np.asarray([place[int(index)] for index in group.indices])
        for source, at in zip(samples, places, strict=False):
            for row in range(first_row[at], end_row[at]):
                tokens = rows.targets(row)
                source[rows.sample_ids[row], : len(tokens)] = tokens
        batch = chunk_batch(dataset, group, rows=np.arange(size), target_length=target_length)
        found, of_references = jax.device_get(
            program(params, config.partitioner.put_batch({**batch, "samples": samples}))
        )
        for name, values in found.items():
            added.setdefault(name, np.zeros(store.rewards.shape, np.float32))[places] = values[: len(places)]
            reference_added.setdefault(name, np.zeros(len(indices), np.float32))[places] = of_references[name][
                : len(places), 0
            ]
    return added, reference_added


def _indices(dataset: TokenDataset, store: ScoredStore, rows: StoreRows) -> npt.NDArray[np.int64]:
    """`[S]`, where each source of the store stands in the data it was grown from."""
    ids = np.asarray(dataset.source_ids)
    order = np.argsort(ids, kind="stable")
    found = order[np.minimum(np.searchsorted(ids[order], store.source_ids), len(ids) - 1)]
    same = bool(np.all(ids[found] == store.source_ids))
    firsts, row_of = np.unique(rows.source_ids, return_index=True)
    for index, row in zip(found[np.searchsorted(store.source_ids, firsts)], row_of, strict=True):
        same = same and np.array_equal(dataset.inputs(int(index)), rows.inputs(int(row)))
    if not same:
        raise UserError(
            f"{store.directory}: its sources are not those of MIXTURE_OR_TASK_NAME with these TASK_FEATURE_LENGTHS; "
            "give the configuration that it was grown with (MODEL_DIR/config.gin) and only another REWARD."
        )
    return found


def _combine(reward: Reward, components: Mapping[str, npt.ArrayLike]) -> npt.NDArray[np.float32]:
    combine = jax.jit(reward.combine)
    return np.asarray(combine({name: jnp.asarray(values, jnp.float32) for name, values in components.items()}))


def _statistics(
    totals: npt.NDArray[np.float32], reference_totals: npt.NDArray[np.float32], *, components: Mapping[str, Any]
) -> dict[str, Any]:
    """Grow's, of the samples that have a reward."""
    has_value = ~np.isnan(totals)
    known = totals[has_value].astype(np.float64)
    highest, lowest = np.max(totals, 1, initial=-1.0, where=has_value), np.min(totals, 1, initial=2.0, where=has_value)
    histogram, _ = np.histogram(np.clip(known, 0, 1), bins=100, range=(0, 1))
    return {
        "count": known.size,
        "mean": known.mean(),
        "variance": known.var(),
        "histogram": histogram,
        "zero_variance_sources": float(np.mean(highest <= lowest)),
        "reference_mean": float(np.nanmean(reference_totals)),
        "guards": {
            name.removeprefix(GUARD_PREFIX): int(np.count_nonzero(values <= 0))
            for name, values in components.items()
            if name.startswith(GUARD_PREFIX)
        },
    }


def _write(output: Path, *, store: ScoredStore, sources: ChunkSources, stats: Mapping[str, Any]) -> None:
    # A bucket cannot rename; a store is one when DONE stands in it.
    partial = output if paths.in_bucket(output) else output.with_name(output.name + ".tmp")
    paths.remove_tree(partial)
    writer = StoreWriter(partial, process_index=0)
    rows = store.select(store.stored)
    everything = {
        name: np.asarray(getattr(sources, name)) for name in ("source_ids", "rewards", "valid", "reference_rewards")
    }
    for chunk, start in enumerate(range(0, len(store.source_ids), SOURCES_PER_FILE)):
        part = slice(start, start + SOURCES_PER_FILE)
        ids = store.source_ids[part]
        first = int(np.searchsorted(rows.source_ids, ids[0]))
        chosen = range(first, int(np.searchsorted(rows.source_ids, ids[-1], side="right")))
        cells = (np.searchsorted(store.source_ids, rows.source_ids[chosen]), rows.sample_ids[chosen])
        writer.write(
            chunk,
            ChunkRows(
                source_ids=rows.source_ids[chosen],
                sample_ids=rows.sample_ids[chosen],
                inputs=[rows.inputs(row) for row in chosen],
                targets=[rows.targets(row) for row in chosen],
                log_probs=rows.log_probs[chosen],
                rewards={name: np.asarray(values)[cells] for name, values in sources.components.items()},
                total_rewards=everything["rewards"][cells],
                hit_eos=rows.hit_eos[chosen],
                policy_step=int(rows.policy_steps[0]) if len(rows) else 0,
            ),
            ChunkSources(
                **{name: values[part] for name, values in everything.items()},
                components={name: np.asarray(values)[part] for name, values in sources.components.items()},
                reference_components={
                    name: np.asarray(values)[part] for name, values in sources.reference_components.items()
                },
            ),
            {},
        )
    writer.finish(stats)
    if partial != output:
        partial.rename(output)


def format_components(values: Mapping[str, npt.NDArray[Any]], *, valid: npt.NDArray[np.bool_]) -> str:
    """A line for each of `values`, `[S, N]` by name: mean and deciles of the valid samples."""
    lines: list[Sequence[str]] = [("component", "mean", *(f"{level:.0%}" for level in DECILES))]
    for name, matrix in values.items():
        known = matrix[valid & ~np.isnan(matrix)].astype(np.float64)
        numbers = [known.mean(), *np.quantile(known, DECILES)] if known.size else []
        lines.append((name, *(f"{number:.4f}" for number in numbers)))
    width = max(len(line[0]) for line in lines)
    return "\n".join(f"{line[0]:{width}}" + "".join(f"  {cell:>7}" for cell in line[1:]) for line in lines)
