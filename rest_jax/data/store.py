"""The scored-sample store of one Grow step: Arrow files that can be filtered again without any model.

A Grow directory holds two files a chunk and process, where a chunk is what one call of the Grow program drew, and each
process writes what its own devices drew of it:

    part-{process:05d}-{chunk:05d}.arrow     one row a survivor: tokens of source and sample, log-probability, rewards
    sources-{process:05d}-{chunk:05d}.arrow  one row a source: the rewards of ALL its samples, and which are valid
    stats.json, DONE                         written last, once; DONE lists every file with its rows and content hash

Each file is whole or absent, and the sources file is written last: a chunk is committed if and only if the
files of all its sources stand there and are whole, so a run may go on with another number of processes. Rows and a
SHA-256 of the columns stand in the schema's metadata, so a file vouches for itself. Tokens of rejected samples are
never stored.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rest_jax import paths
from rest_jax.data.store_files import (
    DONE_FILE,
    check_same_columns,
    describe,
    json_ready,
    matrix_column,
    read_batch,
    read_json,
    read_metadata,
    remedy,
    sample_count,
    whole_chunks,
    write_batch,
)
from rest_jax.data.token_dataset import token_lists
from rest_jax.errors import UserError

STATS_FILE = "stats.json"
REWARD_PREFIX = "reward/"
COMPONENTS_PREFIX, REFERENCE_PREFIX = "rewards/", "reference_reward/"

_STATISTICS_KEY = b"rest_jax.statistics"
_SOURCES_NAME = re.compile(r"sources-(\d+)-(\d+)\.arrow")

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class ChunkRows:
    """The survivors of one chunk, K of them.

    Attributes:
      source_ids, sample_ids: [K] which source, and which of its samples.
      inputs, targets: K sequences of token ids; a sample ends in EOS where it hit it.
      log_probs: [K] natural log-probability under the sampling policy, summed over the tokens incl. EOS.
      rewards: reward component -> [K].
      total_rewards: [K] what the filters compare.
      hit_eos: [K] the sample ended by itself.
      policy_step: train step of the sampling policy.
    """

    source_ids: npt.ArrayLike
    sample_ids: npt.ArrayLike
    inputs: Sequence[npt.ArrayLike]
    targets: Sequence[npt.ArrayLike]
    log_probs: npt.ArrayLike
    rewards: Mapping[str, npt.ArrayLike]
    total_rewards: npt.ArrayLike
    hit_eos: npt.ArrayLike
    policy_step: int


@dataclass(frozen=True, kw_only=True)
class ChunkSources:
    """The sources of one chunk, s of them, with all N samples of each.

    Attributes:
      source_ids: [s].
      rewards: [s, N] total rewards.
      valid: [s, N] False for a copy of an earlier sample of the same source, and for a refused sample.
      reference_rewards: [s] the reward of the reference; NaN without one.
      components: reward component -> [s, N], of all samples, so that `rewards` can be combined anew.
      reference_components: reward component -> [s], of the reference.
    """

    source_ids: npt.ArrayLike
    rewards: npt.ArrayLike
    valid: npt.ArrayLike
    reference_rewards: npt.ArrayLike
    components: Mapping[str, npt.ArrayLike]
    reference_components: Mapping[str, npt.ArrayLike]


class StoreWriter:
    """Appends chunks to the store in `directory`, on behalf of one process.

    Args:
      directory: the Grow directory, made if need be; all processes share it.
      process_index: part of this process's file names.
    """

    def __init__(self, directory: str | os.PathLike[str], *, process_index: int) -> None:
        self._directory = paths.resolve(directory)
        self._process_index = process_index
        self._directory.mkdir(parents=True, exist_ok=True)

    def committed_chunks(self, sources: Mapping[int, int]) -> set[int]:
        """The chunks that need not be drawn again: those of which all sources are there, whoever wrote them.

        Files of a half-written or damaged chunk are deleted, and DONE with them, which must not vouch for them. One
        process calls it, before any writes.

        Args:
          sources: chunk -> how many sources it has, over all processes.
        """
        return whole_chunks(self._directory, sources)

    def write(self, chunk: int, rows: ChunkRows, sources: ChunkSources, statistics: Mapping[str, Any]) -> None:
        """Commits one chunk.

        Args:
          chunk: its number.
          rows, sources: its survivors and its sources, of those that this process's devices drew; at least one source.
          statistics: sums over all its samples, JSON or NumPy values, kept with it for `chunk_statistics`; empty from
            all processes but one.

        Raises:
          ValueError: the store is finished, or the shapes of `rows` and `sources` do not agree.
        """
        if (self._directory / DONE_FILE).exists():
            raise ValueError(f"{self._directory} is finished: no chunk can be added")
        rows_path, sources_path = self._paths(chunk)
        row_batch, source_batch = _row_batch(rows), _source_batch(sources, statistics)
        if not set(row_batch.column("source_id").to_pylist()) <= set(source_batch.column("source_id").to_pylist()):
            raise ValueError(f"chunk {chunk}: a survivor's source is not among the chunk's sources")
        write_batch(rows_path, row_batch)
        write_batch(sources_path, source_batch)

    def chunk_statistics(self) -> list[dict[str, Any]]:
        """The `statistics` of every committed chunk, in order."""
        files = sorted(self._directory.glob("sources-*.arrow"), key=lambda path: path.stem.split("-")[:0:-1])
        return [found for path in files if (found := read_metadata(path, _STATISTICS_KEY))]

    def finish(self, stats: Mapping[str, Any]) -> None:
        """Writes stats.json, then DONE. One process calls it, once all chunks of all processes are committed.

        Args:
          stats: JSON values or NumPy values; a number that is not finite becomes null.
        """
        paths.write_text(self._directory / STATS_FILE, json.dumps(json_ready(stats), indent=2) + "\n")
        parts = {}
        for sources_path in sorted(self._directory.glob("sources-*.arrow")):
            for path in (_rows_path(sources_path), sources_path):
                parts[path.name] = describe(path)
        paths.write_text(self._directory / DONE_FILE, json.dumps(parts, indent=1) + "\n")

    def _paths(self, chunk: int) -> tuple[Path, Path]:
        suffix = f"{self._process_index:05d}-{chunk:05d}.arrow"
        return self._directory / f"part-{suffix}", self._directory / f"sources-{suffix}"


@dataclass(frozen=True)
class _TokenViews:
    """Zero-copy views of one part's tokens; offsets are [rows + 1]."""

    input_offsets: Int32Array
    input_values: Int32Array
    target_offsets: Int32Array
    target_values: Int32Array


@dataclass(frozen=True)
class StoreRows:
    """Chosen survivors in order of (source_id, sample_id). Satisfies `rest_jax.data.batching.Examples`.

    Every array is [rows]; lengths are tokens including EOS.
    """

    source_ids: Int64Array
    sample_ids: Int32Array
    source_lengths: Int32Array
    target_lengths: Int32Array
    rewards: FloatArray
    log_probs: FloatArray
    hit_eos: BoolArray
    policy_steps: Int64Array
    _views: tuple[_TokenViews, ...]
    _part_of: Int64Array
    _row_of: Int64Array

    def __len__(self) -> int:
        return len(self.source_ids)

    def inputs(self, index: int) -> Int32Array:
        """Source token ids, [source length]. A read-only view."""
        view, row = self._views[self._part_of[index]], self._row_of[index]
        return view.input_values[view.input_offsets[row] : view.input_offsets[row + 1]]

    def targets(self, index: int) -> Int32Array:
        """Token ids of the sample, [target length]. A read-only view."""
        view, row = self._views[self._part_of[index]], self._row_of[index]
        return view.target_values[view.target_offsets[row] : view.target_offsets[row + 1]]


@dataclass(frozen=True)
class ScoredStore:
    """A Grow step's store, opened. S sources in order of `source_ids`, N = `num_samples` samples each.

    Attributes:
      directory: where it stands.
      source_ids: [S] int64.
      rewards: [S, N] total reward of every sample drawn.
      valid: [S, N] see `ChunkSources`.
      reference_rewards: [S], NaN without a reference.
      components: reward component -> [S, N]; none in a store that was written before they were kept.
      reference_components: reward component -> [S].
      stats: what Grow wrote to stats.json; empty before it is done.
    """

    directory: Path
    source_ids: Int64Array
    rewards: FloatArray
    valid: BoolArray
    reference_rewards: FloatArray
    components: Mapping[str, FloatArray]
    reference_components: Mapping[str, FloatArray]
    stats: Mapping[str, Any]
    _row_paths: tuple[Path, ...]
    _promises: Mapping[str, Mapping[str, Any]]

    @classmethod
    def open(cls, directory: str | os.PathLike[str], *, require_done: bool = True) -> "ScoredStore":
        """Reads the rewards; survivors are read, and checked, when first asked for.

        Args:
          directory: the Grow directory.
          require_done: False opens the committed chunks of a Grow that still runs.

        Raises:
          UserError: no store there, it is not done, or a file of it is missing or damaged (the message names it).
        """
        directory = paths.resolve(directory)
        if not directory.is_dir():
            raise UserError(f"{directory}: no scored-sample store here (no such directory); run grow first")
        done = (directory / DONE_FILE).exists()
        if require_done and not done:
            raise UserError(
                f"{directory}: this Grow step is not finished (no {DONE_FILE}); run the same grow command again, it "
                "goes on where it stopped"
            )
        promises = read_json(directory / DONE_FILE) if done else {}
        there = {path.name for path in directory.iterdir()}
        for name in promises:
            if name not in there:
                raise UserError(f"{directory / name}: missing; {remedy(directory)}")
        files = [directory / name for name in sorted(promises or there) if _SOURCES_NAME.fullmatch(name)]
        if not files:
            raise UserError(f"{directory}: the store has no chunks; run grow first")
        batches = [read_batch(path, promises.get(path.name)) for path in files]
        for path, batch in zip(files, batches, strict=True):
            check_same_columns(path, batch, files[0], batches[0])
        source_ids = np.concatenate([batch.column("source_id").to_numpy() for batch in batches])
        num_samples = [sample_count(path, batch) for path, batch in zip(files, batches, strict=True)]
        for path, count in zip(files, num_samples, strict=True):
            if count != num_samples[0]:
                raise UserError(
                    f"{path}: {count} samples a source, but {files[0].name} has {num_samples[0]}; the number of "
                    f"samples must not change within a Grow step: delete {directory} and run grow again"
                )
        order = np.argsort(source_ids, kind="stable")
        source_ids = source_ids[order]
        if np.any(source_ids[1:] == source_ids[:-1]):
            twice = source_ids[1:][source_ids[1:] == source_ids[:-1]]
            raise UserError(
                f"{directory}: {len(twice)} sources stand in two chunks (the first: {twice[0]}); were chunk size, data "
                "or number of processes changed within a Grow step? Delete the directory and run grow again"
            )

        def matrix(name: str) -> npt.NDArray[Any]:  # [S, N]
            return np.concatenate([matrix_column(batch.column(name), num_samples[0]) for batch in batches])[order]

        def vector(name: str) -> npt.NDArray[Any]:  # [S]
            return np.concatenate([batch.column(name).to_numpy() for batch in batches])[order]

        columns = batches[0].schema.names
        return cls(
            directory=directory,
            source_ids=source_ids,
            rewards=matrix("rewards"),
            valid=matrix("valid"),
            reference_rewards=vector("reference_reward"),
            components=_by_component(columns, COMPONENTS_PREFIX, matrix),
            reference_components=_by_component(columns, REFERENCE_PREFIX, vector),
            stats=read_json(directory / STATS_FILE) if done else {},
            _row_paths=tuple(_rows_path(path) for path in files),
            _promises=promises,
        )

    @property
    def num_samples(self) -> int:
        """N, the samples drawn for each source."""
        return int(self.rewards.shape[1])

    @cached_property
    def rows(self) -> pa.Table:
        """All survivors as an Arrow table, chunk after chunk, mapped from the files."""
        batches = [read_batch(path, self._promises.get(path.name)) for path in self._row_paths]
        for path, batch in zip(self._row_paths, batches, strict=True):
            check_same_columns(path, batch, self._row_paths[0], batches[0])
        schema = batches[0].schema.remove_metadata()
        return pa.Table.from_batches([batch.replace_schema_metadata(None) for batch in batches], schema=schema)

    @cached_property
    def stored(self) -> BoolArray:
        """[S, N] the samples whose tokens are in the store: those that Grow's filter kept."""
        mask = np.zeros(self.rewards.size, np.bool_)
        mask[self._cells] = True
        return mask.reshape(self.rewards.shape)

    @cached_property
    def _cells(self) -> Int64Array:
        """[rows] the place of each row of `rows` in the flat [S, N] matrices."""
        sources = self._column("source_id")
        places = np.minimum(np.searchsorted(self.source_ids, sources), len(self.source_ids) - 1)
        samples = self._column("sample_id").astype(np.int64)
        if np.any(self.source_ids[places] != sources) or np.any((samples < 0) | (samples >= self.num_samples)):
            raise UserError(f"{self.directory}: survivors without a source; {remedy(self.directory)}")
        return places * self.num_samples + samples

    @cached_property
    def _views(self) -> tuple[_TokenViews, ...]:
        return tuple(
            _TokenViews(
                input_offsets=batch.column("inputs").offsets.to_numpy(),
                input_values=batch.column("inputs").values.to_numpy(),
                target_offsets=batch.column("targets").offsets.to_numpy(),
                target_values=batch.column("targets").values.to_numpy(),
            )
            for batch in self._batches
        )

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        # a chunk without survivors has no row to find
        return [batch for batch in self.rows.to_batches() if batch.num_rows]

    def _column(self, name: str) -> npt.NDArray[Any]:
        return np.asarray(self.rows.column(name).to_numpy())

    def select(self, keep: npt.ArrayLike) -> StoreRows:
        """The survivors that `keep` keeps.

        Args:
          keep: [S, N] bool, from a filter of `rewards` and `valid`.

        Raises:
          UserError: `keep` keeps samples whose tokens Grow's own filter threw away.
        """
        keep = np.asarray(keep, np.bool_)
        if keep.shape != self.rewards.shape:
            raise ValueError(f"keep is {keep.shape}, the store {self.rewards.shape}")
        dropped = int(np.count_nonzero(keep & ~self.stored))
        if dropped:
            raise UserError(
                f"{self.directory}: the filter keeps {int(np.count_nonzero(keep))} samples, but Grow's filter dropped "
                f"{dropped} of them and their tokens were not stored; use a filter that is at least as strict as "
                "Grow's, or loosen the Grow filter and run grow again"
            )
        rows = np.flatnonzero(keep.reshape(-1)[self._cells])
        rows = rows[np.argsort(self._cells[rows], kind="stable")]
        starts = np.cumsum([0] + [batch.num_rows for batch in self._batches])
        part_of = np.searchsorted(starts, rows, side="right") - 1
        return StoreRows(
            source_ids=self._column("source_id")[rows],
            sample_ids=self._column("sample_id")[rows],
            source_lengths=np.concatenate(
                [
                    np.zeros(0, np.int32),
                    *(np.diff(view.input_offsets) for view in self._views),
                ]
            )[rows],
            target_lengths=self._column("length")[rows],
            rewards=self._column("reward")[rows],
            log_probs=self._column("log_prob")[rows],
            hit_eos=self._column("hit_eos").astype(np.bool_)[rows],
            policy_steps=self._column("policy_step")[rows],
            _views=self._views,
            _part_of=part_of,
            _row_of=rows - starts[part_of],
        )


def filter_report(store: ScoredStore, keep: npt.ArrayLike) -> dict[str, float | int]:
    """What a filter leaves of a store; for the filter command, which needs no model.

    Returns:
      samples, distinct: drawn, and of these valid (no copies); pairs, sources: kept, and the sources they stand on;
      kept_share: pairs / samples; tokens: target tokens kept, incl. EOS; mean_reward, min_reward, mean_length,
      hit_eos: means (and the least reward) over the kept pairs, NaN without any.
    """
    rows = store.select(keep)
    return {
        "samples": int(store.rewards.size),
        "distinct": int(np.count_nonzero(store.valid)),
        "pairs": len(rows),
        "sources": len(np.unique(rows.source_ids)),
        "kept_share": len(rows) / store.rewards.size,
        "tokens": int(rows.target_lengths.sum(dtype=np.int64)),
        "mean_reward": _mean(rows.rewards),
        "min_reward": float(rows.rewards.min()) if len(rows) else math.nan,
        "mean_length": _mean(rows.target_lengths),
        "hit_eos": _mean(rows.hit_eos),
    }


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else math.nan


def _row_batch(rows: ChunkRows) -> pa.RecordBatch:
    targets = [np.asarray(target, np.int32) for target in rows.targets]
    columns: dict[str, pa.Array] = {
        "source_id": pa.array(np.asarray(rows.source_ids, np.int64)),
        "sample_id": pa.array(np.asarray(rows.sample_ids, np.int32)),
        "inputs": token_lists([np.asarray(tokens, np.int32) for tokens in rows.inputs]),
        "targets": token_lists(targets),
        "log_prob": pa.array(np.asarray(rows.log_probs, np.float32)),
        **{
            f"{REWARD_PREFIX}{name}": pa.array(np.asarray(values, np.float32))
            for name, values in sorted(rows.rewards.items())
        },
        "reward": pa.array(np.asarray(rows.total_rewards, np.float32)),
        "length": pa.array(np.asarray([len(target) for target in targets], np.int32)),
        "hit_eos": pa.array(np.asarray(rows.hit_eos, np.bool_)),
        "policy_step": pa.array(np.full(len(targets), rows.policy_step, np.int64)),
    }
    return pa.RecordBatch.from_pydict(columns)


def _source_batch(sources: ChunkSources, statistics: Mapping[str, Any]) -> pa.RecordBatch:
    rewards, valid = (
        np.asarray(sources.rewards, np.float32),
        np.asarray(sources.valid, np.bool_),
    )
    if rewards.ndim != 2 or rewards.shape != valid.shape:
        raise ValueError(f"rewards {rewards.shape} and valid {valid.shape} must both be [sources, samples]")
    offsets = pa.array(np.arange(len(rewards) + 1, dtype=np.int32) * rewards.shape[1])

    def lists(values: npt.NDArray[Any]) -> pa.ListArray:
        if values.shape != rewards.shape:
            raise ValueError(f"components {values.shape} must be like the rewards {rewards.shape}")
        return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))

    batch = pa.RecordBatch.from_pydict(
        {
            "source_id": pa.array(np.asarray(sources.source_ids, np.int64)),
            "rewards": lists(rewards),
            "valid": lists(valid),
            "reference_reward": pa.array(np.asarray(sources.reference_rewards, np.float32)),
            **{
                f"{COMPONENTS_PREFIX}{name}": lists(np.asarray(values, np.float32))
                for name, values in sorted(sources.components.items())
            },
            **{
                f"{REFERENCE_PREFIX}{name}": pa.array(np.asarray(values, np.float32))
                for name, values in sorted(sources.reference_components.items())
            },
        }
    )
    text = json.dumps(json_ready(statistics), sort_keys=True)
    return batch.replace_schema_metadata({_STATISTICS_KEY: text.encode()})


def _by_component(
    columns: Sequence[str], prefix: str, read: Callable[[str], npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    return {name.removeprefix(prefix): read(name) for name in columns if name.startswith(prefix)}


def _rows_path(sources_path: Path) -> Path:
    return sources_path.with_name(sources_path.name.replace("sources-", "part-", 1))
