"""The Grow step: ONE jitted program samples, scores, filters and compacts; the host only appends what survived.

Sampling and scoring are `sampling.scored.sample_and_score`, which also measures a policy's mean reward on D_eval: the
number that selects checkpoints and the rewards in the store come from the same code.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.data.batching import LengthGroup
from rest_jax.data.store import ChunkRows, ChunkSources, ScoredStore, StoreWriter
from rest_jax.data.store_files import DONE_FILE
from rest_jax.data.token_dataset import TokenDataset
from rest_jax.errors import Preempted, UserError
from rest_jax.filters import Filter, Threshold, distinct, repeated_ngrams
from rest_jax.partitioning import Partitioner, fetch_owned
from rest_jax.processes import Processes
from rest_jax.reporting.metrics_writer import MetricsWriter
from rest_jax.reporting.progress import ProgressLine
from rest_jax.rewards.base import Reward
from rest_jax.rewards.guards import GUARD_PREFIX
from rest_jax.sampling import Sampling
from rest_jax.sampling.scored import Program, choose_sources, chunks, run_chunks, sample_and_score
from rest_jax.training import training_flops

Params = Any
Batch = Mapping[str, jax.Array]
HISTOGRAM_BINS = 100
COMPONENT = "reward/"
# Shapes of fetched survivors are multiples of this share of a chunk, so that few copies are compiled.
_FETCH_STEPS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growing:
    """What a Grow step samples and what it keeps.

    Attributes:
      sampling: how.
      filter: what is stored. Improve filters again, so this is the loosest filter that any Improve step will ask for.
      max_sources: this many sources, drawn anew for each Grow step; None for all of D.
      refuse_unfinished: a sample that max_length cut is not valid, whatever its reward: it would teach not to end.
      max_repeated_ngrams: nor is one in which more 4-grams than this repeat (`filters.repeated_ngrams`); None for any.
    """

    sampling: Sampling
    filter: Filter = Threshold(0.0)
    max_sources: int | None = None
    refuse_unfinished: bool = False
    max_repeated_ngrams: int | None = None

    def __post_init__(self) -> None:
        if self.max_repeated_ngrams is not None and self.max_repeated_ngrams < 0:
            raise UserError(f"MAX_REPEATED_NGRAMS is {self.max_repeated_ngrams}; it must be None (any) or 0 or more.")


def grow_chunk(
    params: Params,
    reward_params: Params,
    batch: Batch,
    seed: jax.Array,
    stream: jax.Array,
    *,
    growing: Growing,
    reward: Reward,
    data_shards: int,
    **sample_and_score_kwargs: Any,
) -> dict[str, Any]:
    """sample -> reward -> filter -> compact, for one chunk of sources.

    Returns:
      survivors: `{field: [data_shards, batch * num_samples / data_shards, ...]}`, kept rows first, the rest zeros;
      kept: `[data_shards]`, how many rows of each shard survived;
      sources: per-source rewards, validity and reference reward, the rewards with their components;
      statistics: sums over all samples of the chunk (see `chunk_statistics`).
    """
    scored = sample_and_score(params, reward_params, batch, seed, stream, reward=reward, **sample_and_score_kwargs)
    samples, rewards, real = scored["samples"], scored["rewards"], scored["real"]
    first = distinct(samples.tokens) & real[:, None]
    valid = first
    if growing.refuse_unfinished:
        valid &= samples.hit_eos
    if growing.max_repeated_ngrams is not None:
        valid &= repeated_ngrams(samples.tokens) <= growing.max_repeated_ngrams
    keep = growing.filter(rewards, valid)
    rows, columns = rewards.shape
    survivors, kept = compact(
        {
            "row": jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], (rows, columns)),
            "sample_id": jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), (rows, columns)),
            "targets": samples.tokens,
            "log_prob": samples.log_probs,
            "reward": rewards,
            "length": samples.lengths,
            "hit_eos": samples.hit_eos,
            **{f"{COMPONENT}{name}": value for name, value in scored["components"].items()},
        },
        keep,
        data_shards=data_shards,
    )
    return {
        "survivors": survivors,
        "kept": kept,
        "sources": {
            "rewards": rewards,
            "valid": valid,
            "reference_rewards": scored["reference_rewards"],
            "components": scored["components"],
            "reference_components": {name: value[:, 0] for name, value in scored["reference_components"].items()},
        },
        "statistics": chunk_statistics(samples=samples, rewards=rewards, real=real, first=first, valid=valid)
        | guard_statistics(scored["components"], real=real),
    }


def compact(
    fields: Mapping[str, jax.Array], keep: jax.Array, *, data_shards: int
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Moves the kept rows to the front, in order, each data shard by itself, so that no row crosses the mesh.

    Args:
      fields: `[batch, num_samples, ...]` each.
      keep: `[batch, num_samples]` bool.
      data_shards: into how many contiguous parts the batch axis is sharded.

    Returns:
      Fields `[data_shards, batch * num_samples / data_shards, ...]`, zero past the kept rows; and the number kept by
      each shard.
    """
    flat_keep = keep.reshape(data_shards, -1)
    order = jnp.argsort(~flat_keep, axis=1, stable=True)
    kept = jnp.sum(flat_keep, axis=1, dtype=jnp.int32)
    front = jnp.arange(flat_keep.shape[1]) < kept[:, None]

    def move(field: jax.Array) -> jax.Array:
        flat = field.reshape(*flat_keep.shape, *field.shape[2:])
        wide = (...,) + (None,) * (flat.ndim - 2)
        return jnp.where(front[wide], jnp.take_along_axis(flat, order[wide], axis=1), jnp.zeros((), flat.dtype))

    return {name: move(field) for name, field in fields.items()}, kept


def chunk_statistics(
    *, samples: Any, rewards: jax.Array, real: jax.Array, first: jax.Array, valid: jax.Array
) -> dict[str, jax.Array]:
    """Sums over all samples of real sources, so that chunks add up.

    Args:
      samples, rewards: of the chunk, `[batch, num_samples]`.
      real: `[batch]`, False for fillers.
      first: `[batch, num_samples]`, no copy of an earlier sample of its source.
      valid: of these, the ones that are not refused.

    Returns:
      count, reward_sum, reward_square_sum, length_sum, hit_eos_count, distinct_count, refused_count, source_count,
      zero_variance_count (sources whose samples all have the same reward), histogram `[100]` of rewards over [0, 1],
      slot_steps (see `Samples`).
    """
    counted = jnp.broadcast_to(real[:, None], rewards.shape)
    rewards = jnp.where(counted, rewards, 0.0)  # a filler's may be NaN
    bins = jnp.clip((rewards * HISTOGRAM_BINS).astype(jnp.int32), 0, HISTOGRAM_BINS - 1)
    spread = jnp.max(rewards, axis=1) - jnp.min(rewards, axis=1)
    return {
        "count": jnp.sum(counted, dtype=jnp.int32),
        "reward_sum": jnp.sum(rewards),
        "reward_square_sum": jnp.sum(jnp.square(rewards)),
        "slot_steps": jnp.sum(samples.slot_steps, dtype=jnp.int32),
        "length_sum": jnp.sum(samples.lengths * counted, dtype=jnp.int32),
        "hit_eos_count": jnp.sum(samples.hit_eos & counted, dtype=jnp.int32),
        "distinct_count": jnp.sum(first, dtype=jnp.int32),
        "refused_count": jnp.sum(first & ~valid, dtype=jnp.int32),
        "source_count": jnp.sum(real, dtype=jnp.int32),
        "zero_variance_count": jnp.sum((spread == 0) & real, dtype=jnp.int32),
        "histogram": jnp.zeros(HISTOGRAM_BINS, jnp.int32).at[bins].add(counted.astype(jnp.int32)),
    }


def guard_statistics(components: Mapping[str, jax.Array], *, real: jax.Array) -> dict[str, jax.Array]:
    """How many samples of real sources each guard stopped, by the guard's name (`rewards/guards.py`)."""
    return {
        name: jnp.sum((passed <= 0) & real[:, None], dtype=jnp.int32)
        for name, passed in components.items()
        if name.startswith(GUARD_PREFIX)
    }


def compile_grow(
    *,
    growing: Growing,
    model: Any,
    reward: Reward,
    partitioner: Partitioner,
    max_length: int,
    reward_bytes: int = 0,
) -> Program:
    """`grow_chunk` under jit, sources over the mesh's data axes."""
    partitioner.check_batch_divisible(growing.sampling.sources_per_chunk, "SOURCES_PER_CHUNK")
    rows, everywhere = partitioner.batch_sharding(), partitioner.replicated()
    return jax.jit(
        functools.partial(
            grow_chunk,
            growing=growing,
            data_shards=partitioner.num_batch_shards,
            model=model,
            reward=reward,
            sampling=growing.sampling,
            max_length=max_length,
            mesh=partitioner.mesh,
            reward_bytes=reward_bytes,
        ),
        # Each process stores what its own devices drew, and knows of all the numbers that there is one of.
        out_shardings={"survivors": rows, "kept": everywhere, "sources": rows, "statistics": everywhere},
    )


def grow(
    *,
    directory: Path,
    growing: Growing,
    program: Program,
    params: Params,
    reward_params: Params,
    policy_step: int,
    dataset: TokenDataset,
    lengths: Mapping[str, int],
    partitioner: Partitioner,
    processes: Processes,
    seed: int,
    grow_step: int,
    progress: ProgressLine,
    metrics_writer: MetricsWriter,
    phase: str,
    stop_requested: Callable[[], bool],
    preview: Callable[[ScoredStore], list[dict[str, Any]]],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Samples D and writes the survivors to the store at `directory`; chunks already there are not drawn again.

    Args:
      directory: of the store.
      growing, program: what `compile_grow` was given, and what it made.
      params, policy_step: the policy that samples, and its training step, for the record.
      reward_params: the reward's tables or weights.
      dataset, lengths: D, and the rows' lengths in tokens.
      partitioner: the mesh.
      processes: of the run; each writes its own part of the store.
      seed, grow_step: what the draws are a function of, beside source and sample.
      progress, metrics_writer, phase: where to report, under which name.
      stop_requested: True after SIGTERM.
      preview: what each Improve step would train on; goes into the statistics, and fails here rather than later.
      facts: further entries of the statistics, such as the vocabulary's hash.

    Returns:
      The statistics of all samples, as written to `stats.json`.

    Raises:
      Preempted: when `stop_requested`; every finished chunk is in the store.
      UserError: an Improve step would train on nothing, or ask for samples that Grow's filter dropped.
    """
    writer = StoreWriter(directory, process_index=processes.index)
    indices = choose_sources(num_sources=len(dataset), max_sources=growing.max_sources, seed=seed, stream=grow_step)
    groups = chunks(dataset, indices=indices, sampling=growing.sampling, max_source_length=lengths["inputs"])
    committed: set[int] = set()
    with processes.lead_first(f"{phase}: unfinished chunks deleted"):
        if processes.lead:
            committed = writer.committed_chunks({number: len(group.indices) for number, group in enumerate(groups)})
    # One bit a chunk, in hexadecimal: all must draw the same chunks.
    mask = processes.gather(f"{phase}: chunks", hex(sum(1 << number for number in committed)))[0]
    committed = {number for number in range(len(groups)) if int(mask, 16) >> number & 1}
    progress.start(total=len(groups), done=len(committed))
    drawn = run_chunks(
        [(number, group) for number, group in enumerate(groups) if number not in committed],
        program=program,
        params=params,
        reward_params=reward_params,
        dataset=dataset,
        sampling=growing.sampling,
        target_length=lengths["targets"],
        partitioner=partitioner,
        seed=seed,
        stream=grow_step,
    )
    for number, group, result in drawn:
        _append(
            writer, number, group, result, params=params, dataset=dataset, policy_step=policy_step, progress=progress
        )
        if stop_requested():
            raise Preempted(f"{phase}: stopped at chunk {number + 1} of {len(groups)}; finished chunks are saved.")
    processes.wait(f"{phase}: all chunks written")
    statistics = summarise(writer.chunk_statistics())
    metrics_writer.write(
        phase=phase, step=grow_step, scalars={k: v for k, v in statistics.items() if isinstance(v, (int, float))}
    )
    store = ScoredStore.open(directory, require_done=False)
    rewards = store.rewards[store.valid]
    statistics |= {
        "kept": int(store.stored.sum()),
        "reference_mean": float(np.nanmean(store.reference_rewards)),
        "kept_by_threshold": [int((rewards > percent / 100).sum()) for percent in range(101)],
        "thresholds": preview(store),
        **facts,
    }
    # All read the same store and come to the same numbers; one writes them, once all have read.
    processes.wait(f"{phase}: statistics")
    if processes.lead:
        writer.finish(statistics)
    processes.wait_for_file(directory / DONE_FILE)
    return statistics


def _append(
    writer: StoreWriter,
    number: int,
    group: LengthGroup,
    result: Mapping[str, Any],
    *,
    params: Params,
    dataset: TokenDataset,
    policy_step: int,
    progress: ProgressLine,
) -> None:
    """Fetches one chunk's survivors and statistics, and commits them: of its own rows, each process."""
    source_ids = np.asarray(dataset.source_ids)[group.indices]
    kept, statistics = jax.device_get((result["kept"], result["statistics"]))
    owned, sources = fetch_owned(result["sources"])
    rows = fetch_survivors(result["survivors"], kept)
    row = rows.pop("row")
    real = int(np.sum(owned < len(group.indices)))
    if real:
        writer.write(
            number,
            ChunkRows(
                source_ids=source_ids[row],
                sample_ids=rows["sample_id"],
                inputs=[dataset.inputs(int(group.indices[r])) for r in row],
                targets=[tokens[:length] for tokens, length in zip(rows["targets"], rows["length"], strict=True)],
                log_probs=rows["log_prob"],
                rewards={
                    name.removeprefix(COMPONENT): values for name, values in rows.items() if name.startswith(COMPONENT)
                },
                total_rewards=rows["reward"],
                hit_eos=rows["hit_eos"],
                policy_step=policy_step,
            ),
            ChunkSources(
                source_ids=source_ids[owned[:real]],
                **jax.tree.map(lambda values: values[:real], sources),
            ),
            # The sums are of all processes' samples, so they stand with the chunk's first row alone.
            {name: np.asarray(value).tolist() for name, value in statistics.items()} if owned[0] == 0 else {},
        )
    count = int(statistics["count"])
    mean = float(statistics["reward_sum"]) / max(count, 1)
    values = {"reward": mean, "kept": int(kept.sum()) / max(count, 1)}
    if statistics["slot_steps"]:
        values["utilisation"] = int(statistics["length_sum"]) / int(statistics["slot_steps"])
    drawn = int(statistics["length_sum"])
    source_tokens = float(np.sum(np.asarray(dataset.source_lengths)[group.indices]))
    # Of the three passes that training counts, the forward one; a source is encoded once, whatever is drawn for it.
    flops = training_flops(params, source_tokens=source_tokens, target_tokens=drawn) / 3
    progress.advance(1, tokens=drawn, flops=flops, **values)


def fetch_survivors(survivors: Mapping[str, jax.Array], kept: np.ndarray) -> dict[str, np.ndarray]:
    """Copies the kept rows of this process's shards to the host, and nothing of the others.

    Args:
      survivors: `[data_shards, rows, ...]`, kept rows first, the others zero.
      kept: `[data_shards]`, of all processes: they copy shapes that all agree on.

    Returns:
      Fields `[sum(kept of the shards), ...]`, shard after shard.
    """
    rows = next(iter(survivors.values())).shape[1]
    unit = max(rows // _FETCH_STEPS, 1)
    length = min(-(-int(kept.max()) // unit) * unit, rows)
    shards, fetched = fetch_owned(_first_rows(dict(survivors), length))
    return {
        name: np.concatenate(
            [
                np.zeros((0, *field.shape[2:]), field.dtype),
                *(rows[:count] for rows, count in zip(field, kept[shards], strict=True)),
            ]
        )
        for name, field in fetched.items()
    }


@functools.partial(jax.jit, static_argnums=1)
def _first_rows(survivors: dict[str, jax.Array], length: int) -> dict[str, jax.Array]:
    return {name: field[:, :length] for name, field in survivors.items()}


def summarise(chunk_sums: list[dict[str, Any]]) -> dict[str, Any]:
    """Adds up the chunks' sums (`chunk_statistics`) into the Grow step's statistics, in float64."""
    if not chunk_sums:
        raise UserError("Grow sampled no source at all: the training split is empty.")
    total = {
        name: np.sum([np.asarray(sums[name], np.float64) for sums in chunk_sums], axis=0) for name in chunk_sums[0]
    }
    count = float(total["count"])
    mean = float(total["reward_sum"]) / count
    return {
        "count": int(count),
        "sources": int(total["source_count"]),
        "distinct": int(total["distinct_count"]),
        "refused": int(total["refused_count"]),
        "mean": mean,
        "variance": max(float(total["reward_square_sum"]) / count - mean**2, 0.0),
        "mean_length": float(total["length_sum"]) / count,
        # The share of decoding's slot-steps that made a token of a sample; None where decoding does not count them.
        "utilisation": float(total["length_sum"]) / float(total["slot_steps"]) if total["slot_steps"] else None,
        "hit_eos": float(total["hit_eos_count"]) / count,
        "zero_variance_sources": float(total["zero_variance_count"]) / max(float(total["source_count"]), 1.0),
        "histogram": total["histogram"].astype(int).tolist(),
        "guards": {
            name.removeprefix(GUARD_PREFIX): int(stopped)
            for name, stopped in total.items()
            if name.startswith(GUARD_PREFIX)
        },
    }
