"""The safetensors format (https://github.com/huggingface/safetensors): a JSON header and raw little-endian bytes.

Read and written here rather than by its library, which maps whole files into memory and writes whole dictionaries: an
import or export holds one tensor at a time. Nothing in a file is ever executed.
"""

import io
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from rest_jax.checkpoints.tensors import Index, LazyTensor, Tensors
from rest_jax.errors import UserError

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
MAX_HEADER_BYTES = 100_000_000
_LENGTH = struct.Struct("<Q")


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """Name -> tensor of one file; only its header is read.

    Raises:
      UserError: the file is cut off, or no safetensors.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        start = file.read(_LENGTH.size)
        length = _LENGTH.unpack(start)[0] if len(start) == _LENGTH.size else None
        if length is None or length > MAX_HEADER_BYTES:
            raise UserError(f"{str(path)!r} is no safetensors file: it has no valid header. Fetch it again.")
        header = file.read(length)
    data_start = _LENGTH.size + length
    if len(header) < length:
        raise UserError(
            f"{str(path)!r} is cut off: {size} bytes, and its header alone ends at {data_start}. Fetch it again."
        )
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
        tensors = {name: _tensor(path, data_start, entry) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{str(path)!r} is no safetensors file: its header is damaged ({error}). Fetch it again."
        ) from (error)
    if data_start + max(ends, default=0) > size:
        raise UserError(
            f"{str(path)!r} is cut off: {size} bytes of the {data_start + max(ends)} that its header announces. "
            "Fetch it again."
        )
    return tensors


def _tensor(path: Path, data_start: int, entry: Mapping[str, Any]) -> LazyTensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype {entry['dtype']!r} is none of {', '.join(DTYPES)}")
    dtype, shape = DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"])
    begin, end = entry["data_offsets"]
    if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for {shape} of {entry['dtype']}")

    def read(index: Index) -> npt.NDArray[Any]:
        # Whole rows are read, and of these the asked columns kept.
        row = math.prod(shape[1:])
        first, last = (index[0].start, index[0].stop) if shape else (0, 1)
        values = np.empty((last - first) * row, dtype)
        with path.open("rb") as file:
            file.seek(data_start + begin + first * row * dtype.itemsize)
            _fill(file, values, path)
        return values.reshape(shape if not shape else (last - first, *shape[1:]))[
            (slice(None), *index[1:])[: len(shape)]
        ]

    return LazyTensor(shape, dtype, read)


def _fill(file: io.BufferedReader, values: npt.NDArray[Any], path: Path) -> None:
    if values.size and file.readinto(values.view(np.uint8).data) != values.nbytes:
        raise UserError(f"{str(path)!r} became shorter while it was read. Fetch it again.")


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Writes one file, a tensor at a time, in the safetensors library's own order: wide dtypes first, then by name."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in ordered:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        for name in ordered:
            values = np.ascontiguousarray(tensors[name].read())
            file.write(values.reshape(-1).view(np.uint8).data)
