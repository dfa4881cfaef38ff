"""T5X's own format, that of every public T5 checkpoint: a msgpack file named `checkpoint`, and zarr arrays beside it.

Facts (t5x/checkpoints.py): the file is flax's msgpack of `{'version': 3, 'optimizer': {'target': params, 'state':
{'step', 'param_states'}}}`. A leaf is an array, or the specification of a TensorStore array (driver zarr, gzip) whose
path is relative to the folder, `target.encoder.encoder_norm.scale`. Version 2 wrote bfloat16 as uint16. T5X's first
Orbax (2022) wrote the same into `state/`, with `PLACEHOLDER://target.encoder...` for an array and no version; today's
Orbax does not open that without a tree to restore to.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import msgpack  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import tensorstore
from flax import serialization

from rest_jax import paths
from rest_jax.checkpoints.tensors import FLOATS, Index, LazyTensor, Tensors, of_array, unflatten
from rest_jax.errors import UserError

FILE = "checkpoint"
VERSION = 3
OLDEST_VERSION = 2
CHUNK_BYTES = 64 * 2**20
_MESH_TENSORFLOW = b"model_checkpoint_path"
_PLACEHOLDER = "PLACEHOLDER://"


def weights_folder(directory: Path) -> Path | None:
    """Where the file and its arrays are, if this is a checkpoint that `open_checkpoint` reads."""
    if (directory / FILE).is_file():
        return directory
    state = directory / "state"
    return state if (state / FILE).is_file() and not (state / "manifest.ocdbt").exists() else None


def open_checkpoint(folder: Path) -> tuple[Tensors, int]:
    """The parameters, of which only the msgpack file is read, and the step.

    Args:
      folder: see `weights_folder`.

    Raises:
      UserError: the file is cut off, is another program's, or names an array that is not there.
    """
    file = folder / FILE
    content = file.read_bytes()
    if content.startswith(_MESH_TENSORFLOW):
        raise UserError(
            f"{str(folder)!r} is a TensorFlow checkpoint (Mesh TensorFlow's T5), which rest_jax does not read. Fetch "
            "the same model in T5X's format (gs://t5-data/pretrained_models/t5x) or from Hugging Face."
        )
    try:
        tree = serialization.msgpack_restore(content)
        version = tree.get("version", 0)
        state = tree["optimizer"] if version else tree
        target, step = state["target"], int(np.asarray(state.get("state", {}).get("step", 0)))
        leaves = _leaves(target)
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise UserError(
            f"{str(file)!r} is no T5X checkpoint, or is cut off: {type(error).__name__}: {error}. Fetch it again."
        ) from error
    if version and not OLDEST_VERSION <= version <= VERSION:
        raise UserError(f"{str(file)!r} has T5X's version {version}; rest_jax reads {OLDEST_VERSION} to {VERSION}.")
    return {name: _open_leaf(folder, name, leaf) for name, leaf in leaves.items()}, step


def write_checkpoint(folder: Path, tensors: Tensors, *, step: int) -> None:
    """Writes one checkpoint without optimizer state, a tensor at a time; `folder` exists."""
    specs: dict[str, Any] = {}
    for name, tensor in tensors.items():
        path = f"target/{name}".replace("/", ".")
        row = max(1, tensor.nbytes // max(1, tensor.shape[0])) if tensor.shape else 1
        chunks = [min(tensor.shape[0], max(1, CHUNK_BYTES // row)), *tensor.shape[1:]] if tensor.shape else []
        spec = {
            "driver": "zarr",
            "dtype": str(tensor.dtype),
            "kvstore": {"driver": "file", "path": path},
            "metadata": {"compressor": {"id": "gzip"}, "shape": list(tensor.shape), "chunks": chunks},
        }
        there = spec | {"kvstore": paths.kvstore(folder / path)}
        tensorstore.open(there, create=True).result().write(tensor.read()).result()
        specs[name] = tensorstore.Spec(spec).to_json()
    state = {"step": np.asarray(step, np.int32), "param_states": {}}
    content = {"version": VERSION, "optimizer": {"target": unflatten(specs), "state": state}}
    (folder / FILE).write_bytes(serialization.msgpack_serialize(content))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Like `tensors.flatten`, with the specification of an array as a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        inner = isinstance(value, Mapping) and not _is_spec(value)
        leaves |= _leaves(value, f"{name}/") if inner else {name: value}
    return leaves


def _is_spec(value: Mapping[str, Any]) -> bool:
    return {"driver", "kvstore", "metadata"} <= value.keys()


def _open_leaf(folder: Path, name: str, leaf: Any) -> LazyTensor:
    if isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
        leaf = {"driver": "zarr", "kvstore": {"path": leaf.removeprefix(_PLACEHOLDER)}}
    if not isinstance(leaf, Mapping):
        tensor = of_array(leaf)
    else:
        # Before TensorStore 0.1.14 the path stood beside the kvstore.
        path = str(leaf["kvstore"].get("path", leaf.get("path", ""))).strip("/")
        if not path or path != PurePosixPath(path).name or leaf["driver"] != "zarr":
            raise UserError(f"{str(folder)!r}: {name} names no zarr array of its own folder: {leaf['kvstore']!r}.")
        tensor = _open_zarr(folder, path, name=name, shape=leaf.get("metadata", {}).get("shape"))
    if tensor.dtype == np.uint16:
        stored = tensor
        tensor = LazyTensor(
            stored.shape, jnp.dtype(jnp.bfloat16), lambda index: stored.read_slice(index).view(jnp.bfloat16)
        )
    if str(tensor.dtype) not in FLOATS:
        raise UserError(f"{str(folder)!r}: {name} is {tensor.dtype}; weights must be {', '.join(FLOATS)}.")
    return tensor


def _open_zarr(folder: Path, path: str, *, name: str, shape: Sequence[int] | None) -> LazyTensor:
    # A chunk that is not there would otherwise be read as zeros. Chunks of zeros are written like all others.
    spec = {"driver": "zarr", "kvstore": paths.kvstore(folder / path), "fill_missing_data_reads": False}
    try:
        array = tensorstore.open(spec, read=True).result()
    except (ValueError, OSError) as error:
        raise UserError(
            f"{str(folder)!r}: {name} cannot be read: {path}/ is missing or damaged. Fetch it again. ({_short(error)})"
        ) from error
    if shape is not None and tuple(array.shape) != tuple(shape):
        raise UserError(f"{str(folder)!r}: {path}/ holds {tuple(array.shape)}, the file {FILE!r} says {tuple(shape)}.")

    def read(index: Index) -> npt.NDArray[Any]:
        try:
            return np.asarray(array[index].read().result())
        except (ValueError, OSError) as error:
            raise UserError(
                f"{str(folder)!r}: {name} cannot be read: a chunk of {path}/ is missing or cut off. Fetch it again. "
                f"({_short(error)})"
            ) from error

    return LazyTensor(tuple(array.shape), np.dtype(array.dtype.numpy_dtype), read)


def _short(error: Exception) -> str:
    """TensorStore repeats its whole specification at the end."""
    return str(error).partition(" [")[0]
