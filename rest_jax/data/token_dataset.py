"""Parallel text as token ids, in Arrow files that open as they are in pandas, polars, DuckDB and `datasets`.

A token data set is a directory: `shard-00000.arrow`, ... and `info.json`. It is written beside its final place and
renamed, so a directory that exists is complete; every shard's SHA-256 stands in `info.json`, so damage is noticed at
opening. Reading maps the files into memory: opening costs one pass over the bytes for the checksum and no copy.
"""

import bisect
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rest_jax.errors import UserError

INFO_FILE = "info.json"

SCHEMA = pa.schema(
    [
        ("source_id", pa.int64()),
        ("inputs", pa.list_(pa.int32())),
        ("targets", pa.list_(pa.int32())),
        ("inputs_pretokenized", pa.string()),
        ("targets_pretokenized", pa.string()),
    ]
)


@dataclass(frozen=True)
class TokenRow:
    """One pair: token ids of both sides, each ending in EOS, and the text that they came from."""

    inputs: npt.ArrayLike
    targets: npt.ArrayLike
    inputs_text: str
    targets_text: str


def dataset_key(**fields: Any) -> str:
    """A directory name that is a function of `fields` alone: 20 hexadecimal digits.

    The fields are whatever decides the tokens (task, split, vocabulary hash, lengths, ...), as JSON values; their
    order does not matter.
    """
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def write_token_dataset(
    directory: str | os.PathLike[str],
    rows: Iterable[TokenRow],
    *,
    info: Mapping[str, Any],
    rows_per_shard: int = 100_000,
) -> None:
    """Writes `rows` as a token data set; `directory` appears only when all of it is on disk.

    Args:
      directory: where the data set will stand. If another process finishes the same data set first, its files stay
        and these are thrown away: the directory's name is a hash of the content's fields.
      rows: streamed; no more than one shard is held in memory. `source_id` is the row's number.
      info: fields for `info.json`, JSON values (see `dataset_key`).
      rows_per_shard: rows in each file.

    Raises:
      UserError: there are no rows.
    """
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
    directory = Path(directory)
    # The process id says whose leftovers these are; the random part keeps two hosts on one file system apart.
    temporary = directory.with_name(f"{directory.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        shards: list[dict[str, Any]] = []
        num_examples = 0
        iterator = iter(rows)
        while block := list(islice(iterator, rows_per_shard)):
            shards.append(
                _write_shard(
                    temporary / f"shard-{len(shards):05d}.arrow",
                    block,
                    first_id=num_examples,
                )
            )
            num_examples += len(block)
        if not num_examples:
            raise UserError(f"{directory}: the corpus has no examples; check the task's files and split ({dict(info)})")
        text = json.dumps(
            {
                **info,
                "num_examples": num_examples,
                "num_shards": len(shards),
                "shards": shards,
            },
            indent=2,
        )
        (temporary / INFO_FILE).write_text(text + "\n", encoding="utf-8")
        try:
            os.rename(temporary, directory)
        except OSError:
            if not (directory / INFO_FILE).exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shard(path: Path, rows: list[TokenRow], *, first_id: int) -> dict[str, Any]:
    """Writes one Arrow IPC file of one record batch; returns its entry for `info.json`."""
    batch = pa.record_batch(
        [
            pa.array(np.arange(first_id, first_id + len(rows), dtype=np.int64)),
            token_lists([np.asarray(row.inputs, np.int32) for row in rows]),
            token_lists([np.asarray(row.targets, np.int32) for row in rows]),
            pa.array([row.inputs_text for row in rows], pa.string()),
            pa.array([row.targets_text for row in rows], pa.string()),
        ],
        schema=SCHEMA,
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(batch)
    return {"file": path.name, "rows": len(rows), "sha256": file_sha256(path)}


def token_lists(sequences: list[npt.NDArray[np.int32]]) -> pa.ListArray:
    """Ragged int32 sequences as one Arrow list array."""
    offsets = np.zeros(len(sequences) + 1, np.int32)
    np.cumsum([len(sequence) for sequence in sequences], out=offsets[1:])
    values = np.concatenate(sequences) if sequences else np.zeros(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, pa.int32()))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Shard:
    """Zero-copy views of one record batch. Offsets are [rows + 1]."""

    source_offsets: npt.NDArray[np.int32]
    source_values: npt.NDArray[np.int32]
    target_offsets: npt.NDArray[np.int32]
    target_values: npt.NDArray[np.int32]
    batch: pa.RecordBatch


@dataclass(frozen=True)
class TokenDataset:
    """A token data set on disk, rows in order of `source_id`. Satisfies `rest_jax.data.batching.Examples`.

    Attributes:
      source_ids: [rows] int64, the row numbers.
      source_lengths, target_lengths: [rows] int32, tokens including EOS.
      info: what stands in `info.json`.
    """

    source_ids: npt.NDArray[np.int64]
    source_lengths: npt.NDArray[np.int32]
    target_lengths: npt.NDArray[np.int32]
    info: Mapping[str, Any]
    _shards: tuple[_Shard, ...]
    _starts: tuple[int, ...]

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> "TokenDataset":
        """Maps the data set in `directory` into memory.

        Raises:
          UserError: no data set there, or a file of it is missing, truncated or changed; the message names the file.
        """
        directory = Path(directory)
        info_path = directory / INFO_FILE
        if not info_path.is_file():
            raise UserError(f"{directory}: no token data set here (it has no {INFO_FILE}); tokenise the task first")
        try:
            info = json.loads(info_path.read_text(encoding="utf-8"))
            entries = [(directory / shard["file"], shard["rows"], shard["sha256"]) for shard in info["shards"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{info_path}: damaged ({error}); delete {directory}, and the next run writes it anew"
            ) from error
        batches = [batch for entry in entries for batch in _open_shard(*entry)]
        shards = tuple(_shard_views(batch) for batch in batches)
        starts = np.cumsum([0] + [batch.num_rows for batch in batches])
        return cls(
            source_ids=np.concatenate([batch.column("source_id").to_numpy() for batch in batches]),
            source_lengths=np.concatenate([np.diff(shard.source_offsets) for shard in shards]),
            target_lengths=np.concatenate([np.diff(shard.target_offsets) for shard in shards]),
            info=info,
            _shards=shards,
            _starts=tuple(int(start) for start in starts[:-1]),
        )

    def __len__(self) -> int:
        return len(self.source_ids)

    def inputs(self, index: int) -> npt.NDArray[np.int32]:
        """Source token ids of one row, [source length], EOS last. A read-only view."""
        shard, row = self._locate(index)
        return shard.source_values[shard.source_offsets[row] : shard.source_offsets[row + 1]]

    def targets(self, index: int) -> npt.NDArray[np.int32]:
        """Reference token ids of one row, [target length], EOS last. A read-only view."""
        shard, row = self._locate(index)
        return shard.target_values[shard.target_offsets[row] : shard.target_offsets[row + 1]]

    def inputs_text(self, index: int) -> str:
        """The source text of one row, whole."""
        shard, row = self._locate(index)
        return str(shard.batch.column("inputs_pretokenized")[row].as_py())

    def targets_text(self, index: int) -> str:
        """The reference text of one row, whole."""
        shard, row = self._locate(index)
        return str(shard.batch.column("targets_pretokenized")[row].as_py())

    def _locate(self, index: int) -> tuple[_Shard, int]:
        if not 0 <= index < len(self.source_ids):
            raise IndexError(f"row {index} of a token data set of {len(self.source_ids)} rows")
        number = bisect.bisect_right(self._starts, index) - 1
        return self._shards[number], int(index) - self._starts[number]


def _open_shard(path: Path, num_rows: int, sha256: str) -> Iterator[pa.RecordBatch]:
    remedy = f"delete {path.parent}, and the next run writes it anew"
    if not path.is_file():
        raise UserError(f"{path}: this shard is missing; {remedy}")
    if file_sha256(path) != sha256:
        raise UserError(
            f"{path}: this shard is truncated or damaged (its SHA-256 is not the one in {INFO_FILE}); {remedy}"
        )
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    if reader.schema != SCHEMA:
        raise UserError(f"{path}: columns {reader.schema.names}, expected {SCHEMA.names}; {remedy}")
    batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
    if sum(batch.num_rows for batch in batches) != num_rows:
        raise UserError(f"{path}: not the {num_rows} rows that {INFO_FILE} promises; {remedy}")
    yield from batches


def _shard_views(batch: pa.RecordBatch) -> _Shard:
    inputs, targets = batch.column("inputs"), batch.column("targets")
    return _Shard(
        source_offsets=inputs.offsets.to_numpy(),
        source_values=inputs.values.to_numpy(),
        target_offsets=targets.offsets.to_numpy(),
        target_values=targets.values.to_numpy(),
        batch=batch,
    )
