"""Orbax's `state/` directory, written and read a tensor at a time."""

import asyncio
import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import orbax.checkpoint as ocp
import tensorstore

from rest_jax import paths
from rest_jax.checkpoints.tensors import Index, LazyTensor, Tensors, flatten, unflatten
from rest_jax.errors import UserError

Tree = Any
# Large tensors are stored in chunks of about this size, so that a device reads its part of them alone.
CHUNK_BYTES = 64 * 2**20
INDEX_CACHE_BYTES = 16 * 2**20


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes tensors one after another; Orbax's own handler has all of them in memory at once."""

    async def serialize(
        self,
        values: Sequence[LazyTensor],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.type_handlers.SaveArgs] | None = None,
    ) -> Sequence[ocp.future.Future]:
        for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
            futures = await super().serialize([value.read()], [info], None if arg is None else [arg])
            for future in futures:
                await asyncio.to_thread(future.result)
        return []


def write_tensors(directory: Path, tensors: Tensors, *, step: int | None = None) -> None:
    """Writes `{'target': params}`, with `{'state': {'step'}}` if a step is given, holding one tensor at a time."""
    tree: dict[str, Any] = {"target": unflatten(tensors)}
    if step is not None:
        tree["state"] = {"step": np.asarray(step, np.int32)}
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (LazyTensor, _LazyHandler(deepcopy_host_arrays=False)),
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    arguments = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in flatten(tree)}
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(paths.absolute(directory), args=ocp.args.PyTreeSave(tree, save_args=unflatten(arguments)))


def open_tensors(directory: Path) -> tuple[Tensors, int]:
    """The parameters, of which only the metadata is read, and the step, 0 where there is none.

    Raises:
      UserError: the directory holds no parameters, or is damaged.
    """
    target, state = read_metadata(directory)
    # Of all tensors together: each would read the database's index again.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": INDEX_CACHE_BYTES}})
    driver = "zarr3" if _uses_zarr3(directory) else "zarr"

    def open_leaf(name: str, leaf: Any) -> LazyTensor:
        return _open_leaf(directory, name, leaf, driver=driver, context=context)

    leaves = {name: open_leaf(f"target/{name}", leaf) for name, leaf in flatten(target).items()}
    return leaves, int(open_leaf("state/step", state["step"]).read()) if "step" in state else 0


def read_metadata(directory: Path) -> tuple[Tree, Tree]:
    """The trees of shapes of 'target' and of 'state'; the latter may be empty."""
    with reader() as checkpointer:
        try:
            tree = checkpointer.metadata(directory).item_metadata.tree
            return tree["target"], tree.get("state") or {}
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{str(directory)!r} is no checkpoint of parameters, or is damaged: {type(error).__name__}: {error}. "
                "Orbax's tree must have 'target'."
            ) from error


def _open_leaf(directory: Path, name: str, leaf: Any, *, driver: str, context: tensorstore.Context) -> LazyTensor:
    """A tensor of Orbax's database, or directory, read by TensorStore: Orbax itself reads whole arrays alone."""
    path = name.replace("/", ".")
    store = (
        {"driver": "ocdbt", "base": f"{paths.url(directory)}/", "path": f"{path}/"}
        if (directory / "manifest.ocdbt").exists()
        else paths.kvstore(directory / path)
    )

    def read(index: Index) -> npt.NDArray[Any]:
        spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": False}
        try:
            return np.asarray(tensorstore.open(spec, read=True, context=context).result()[index].read().result())
        except (ValueError, OSError) as error:
            reason = str(error).partition(" [")[0]
            raise UserError(f"{str(directory)!r}: {name} cannot be read: {reason}. Fetch it again.") from error

    return LazyTensor(tuple(leaf.shape), np.dtype(leaf.dtype), read)


def _uses_zarr3(folder: Path) -> bool:
    file = folder / "_METADATA"
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("use_zarr3", False))


@contextlib.contextmanager
def reader() -> Iterator[ocp.PyTreeCheckpointer]:
    """Reads `state/` by itself. Orbax keeps its time stamps one folder up, and warns of that at each reading."""

    def not_about_time_stamps(record: logging.LogRecord) -> bool:
        return "Metadata file does not exist" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(not_about_time_stamps)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            yield checkpointer
    finally:
        logger.removeFilter(not_about_time_stamps)
