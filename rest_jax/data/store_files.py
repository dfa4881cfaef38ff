"""The files of a scored-sample store: Arrow files that vouch for themselves, and small JSON files, both written whole.

Every file is whole or absent (`paths.write_bytes`). An Arrow file holds one record batch; its row count and the
SHA-256 of its columns stand in the schema's metadata.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rest_jax import paths
from rest_jax.errors import UserError

DONE_FILE = "DONE"

_ROWS_KEY, _SHA_KEY = b"rest_jax.rows", b"rest_jax.sha256"


def _content_sha256(batch: pa.RecordBatch) -> str:
    """A hash of the columns' names, types and values, and of the metadata that is not about the file itself."""
    digest = hashlib.sha256()
    for key, value in sorted((batch.schema.metadata or {}).items()):
        if key not in (_ROWS_KEY, _SHA_KEY):
            digest.update(b"%s=%s;" % (key, value))
    for field, column in zip(batch.schema, batch.columns, strict=True):
        digest.update(f"{field.name}:{field.type}:{len(column)};".encode())
        if pa.types.is_list(field.type):
            digest.update(column.offsets.to_numpy().tobytes())
            column = column.values
        digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def write_batch(path: Path, batch: pa.RecordBatch) -> None:
    """Writes `batch` with its row count and hash."""
    metadata = {
        **(batch.schema.metadata or {}),
        _ROWS_KEY: str(batch.num_rows).encode(),
        _SHA_KEY: _content_sha256(batch).encode(),
    }
    batch = batch.replace_schema_metadata(metadata)
    content = pa.BufferOutputStream()
    with pa.ipc.new_file(content, batch.schema) as writer:
        writer.write_batch(batch)
    paths.write_bytes(path, memoryview(content.getvalue()))


def describe(path: Path) -> dict[str, Any]:
    """What DONE says of a file, as its own metadata has it."""
    metadata = _open_file(path).schema.metadata
    return {"rows": int(metadata[_ROWS_KEY]), "sha256": metadata[_SHA_KEY].decode()}


def remedy(directory: Path) -> str:
    """What a user does about a damaged file."""
    return (
        f"delete the file if it is there, delete {DONE_FILE} and RESULT.json in {directory}, and run the same command "
        "again: it draws only the missing chunk"
    )


def _open_file(path: Path) -> pa.RecordBatchFileReader:
    if not path.is_file():
        raise UserError(f"{path}: missing; {remedy(path.parent)}")
    try:
        reader = pa.ipc.open_file(path.open("rb") if paths.in_bucket(path) else pa.memory_map(str(path)))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or damaged ({error}); {remedy(path.parent)}") from error
    if not {_ROWS_KEY, _SHA_KEY} <= set(reader.schema.metadata or {}):
        raise UserError(f"{path}: not a file of a scored-sample store; {remedy(path.parent)}")
    return reader


def read_batch(path: Path, promise: Mapping[str, Any] | None = None) -> pa.RecordBatch:
    """Maps a file's one record batch, or reads a bucket's, checked against its metadata and DONE's `promise` if any.

    Raises:
      UserError: missing, truncated, damaged or another file; the message names it.
    """
    reader = _open_file(path)
    metadata = reader.schema.metadata
    try:
        batch = reader.get_batch(0)
        batch.validate()
        intact = _content_sha256(batch).encode() == metadata[_SHA_KEY]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: truncated or damaged ({error}); {remedy(path.parent)}") from error
    if not intact:
        raise UserError(
            f"{path}: damaged (its content is not that of the SHA-256 in its metadata); {remedy(path.parent)}"
        )
    if promise is not None and promise["sha256"].encode() != metadata[_SHA_KEY]:
        raise UserError(f"{path}: not the file that {DONE_FILE} lists; {remedy(path.parent)}")
    return batch


def check_same_columns(path: Path, batch: pa.RecordBatch, first_path: Path, first: pa.RecordBatch) -> None:
    """Raises UserError where a chunk has other columns than the first: its samples had another reward."""
    if batch.schema != first.schema:  # metadata apart
        raise UserError(
            f"{path}: columns {batch.schema.names}, but {first_path.name} has {first.schema.names}; the reward must "
            f"not change within a Grow step: delete {path.parent} and run grow again"
        )


def sample_count(path: Path, batch: pa.RecordBatch) -> int:
    """N of a chunk, all of whose sources have as many samples."""
    if not batch.num_rows:
        raise UserError(f"{path}: a chunk without sources; {remedy(path.parent)}")
    return len(batch.column("rewards").values) // int(batch.num_rows)


def matrix_column(column: pa.ListArray, num_samples: int) -> npt.NDArray[Any]:
    """`[sources, num_samples]` of a column of lists."""
    return np.asarray(column.values.to_numpy(zero_copy_only=False)).reshape(-1, num_samples)


def whole_chunks(directory: Path, sources: Mapping[int, int]) -> set[int]:
    """Chunks whose files are all there and whole; the files of others are deleted, and DONE with them.

    Args:
      directory: of the store.
      sources: chunk -> how many sources it has, over all processes.
    """
    for path in directory.glob("*.arrow.tmp"):
        path.unlink()
    files: dict[int, set[str]] = {}
    for path in directory.glob("*-*-*.arrow"):
        _, process, chunk = path.stem.split("-")
        files.setdefault(int(chunk), set()).add(process)
    whole = set()
    for number, processes in files.items():
        pairs = [
            [directory / f"{kind}-{process}-{number:05d}.arrow" for kind in ("part", "sources")]
            for process in sorted(processes)
        ]
        try:
            rows = [[read_batch(path).num_rows for path in pair] for pair in pairs]
            complete = sum(num_sources for _, num_sources in rows) == sources.get(number)
        except UserError:
            complete = False
        if complete:
            whole.add(number)
        else:
            for path in (directory / DONE_FILE, *(path for pair in pairs for path in pair)):
                path.unlink(missing_ok=True)
    return whole


def read_metadata(path: Path, key: bytes) -> dict[str, Any]:
    """A JSON object from an Arrow file's metadata; the file was checked when it was written or `read_batch` read it."""
    content: dict[str, Any] = json.loads(_open_file(path).schema.metadata[key])
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; UserError if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: damaged ({error}); {remedy(path.parent)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: damaged (not a JSON object); {remedy(path.parent)}")
    return content


def json_ready(value: Any) -> Any:
    """NumPy values as plain ones, and null for what JSON has no number for."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
