"""Checkpoints: of a training phase, and of parameters alone, which are read from any of `formats`.

A step is a directory `checkpoint_N/` with T5X's tree under `state/`: `{'target': params, 'state': {'step',
'param_states'}}`. A policy without optimiser state is the same tree with `target` alone, so both are read the same way.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from rest_jax import paths
from rest_jax.checkpoints import formats, orbax_files, tensors
from rest_jax.checkpoints.formats import STATE_ITEM, STEP_PREFIX, find_checkpoint
from rest_jax.partitioning import Partitioner
from rest_jax.processes import Processes

__all__ = [
    "PhaseCheckpoints",
    "check_fits",
    "find_checkpoint",
    "load_params",
    "put_params",
    "save_params",
    "step_directory",
]

Tree = Any
FIELD = "INITIAL_CHECKPOINT_PATH"


class PhaseCheckpoints:
    """The checkpoints of one training phase: the newest, to resume from, and the best, to keep.

    Which one is best is the caller's to say: Orbax's own ranking forgets the rewards of an earlier process.
    A save is complete or absent: Orbax writes to a temporary name and renames; in a bucket it writes a mark at last.
    """

    def __init__(self, directory: Path):
        self._preserve = _PreserveSteps()
        self._manager = ocp.CheckpointManager(
            paths.absolute(directory),
            item_names=(STATE_ITEM, "progress"),
            options=ocp.CheckpointManagerOptions(
                step_prefix=STEP_PREFIX,
                preservation_policy=self._preserve,
                enable_async_checkpointing=False,
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, step: int, tree: Tree, *, progress: Mapping[str, Any], best_step: int | None) -> None:
        """Writes one step, then deletes all others but `best_step`.

        `progress` is what a resumed phase needs besides the tree, as JSON.
        """
        if step in self._manager.all_steps():
            self._manager.delete(step)  # The same state, written to resume from, now measured.
        self._preserve.steps = frozenset((step, best_step))
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{STATE_ITEM: ocp.args.StandardSave(tree), "progress": ocp.args.JsonSave(dict(progress))}
            ),
            force=True,
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def restore(self, step: int, *, abstract_tree: Tree) -> tuple[Tree, dict[str, Any]]:
        """The tree of a step, placed as `abstract_tree` (ShapeDtypeStructs with shardings or formats) says, and its
        progress."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    STATE_ITEM: ocp.args.StandardRestore(abstract_tree, support_layout=True),
                    "progress": ocp.args.JsonRestore(),
                }
            ),
        )
        return restored[STATE_ITEM], restored["progress"]

    def close(self) -> None:
        self._manager.close()


class _PreserveSteps(checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoints of `steps`."""

    steps: frozenset[int | None] = frozenset()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step in self.steps for checkpoint in checkpoints]


def step_directory(directory: Path, step: int) -> Path:
    return directory / f"{STEP_PREFIX}_{step}"


def save_params(directory: Path, params: Tree, *, dtype: str | None = None, processes: Processes | None = None) -> None:
    """Writes parameters alone, cast to `dtype`: what `INITIAL_CHECKPOINT_PATH` takes. Replaces what stood there.

    All `processes` of a run write their devices' parts together; None is one process.
    """
    processes = processes or Processes()
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    # A bucket cannot rename, and needs not: without Orbax's mark there is no checkpoint (`formats.detect`).
    partial = directory if paths.in_bucket(directory) else directory.with_name(f"{directory.name}.tmp")
    if processes.lead:
        paths.remove_tree(partial)
    processes.wait(f"{partial.name} deleted")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(paths.absolute(partial) / STATE_ITEM, {"target": params})
    if processes.lead and partial != directory:
        paths.remove_tree(directory)
        partial.rename(directory)
    processes.wait_for_file(directory)


def load_params(path: str, *, abstract_params: Tree, partitioner: Partitioner) -> Tree:
    """Parameters from a checkpoint of any format, on the mesh. Each process reads its devices' parts.

    Layers that are scanned in the model and separate in the checkpoint, or the other way round, are converted; so are
    the attention kernels of T5X's scalable_t5, in which heads have a dimension of their own.

    Args:
      path: see `formats.find_checkpoint`.
      abstract_params: the model's own tree of shapes, and the types to be read as.
      partitioner: where the parameters go.

    Raises:
      UserError: names or shapes are not the model's; both are named.
    """
    directory = find_checkpoint(path)
    shardings = partitioner.param_shardings(abstract_params)
    if formats.detect(directory) == "orbax":
        stored, _ = orbax_files.read_metadata(directory / STATE_ITEM)
        if tensors.flat_shapes(stored) == tensors.flat_shapes(abstract_params):
            return _restore(directory / STATE_ITEM, abstract_params, shardings)
    leaves = _fitting(path, abstract_params)
    flat_shardings = tensors.flatten(shardings)
    return tensors.unflatten(
        {
            name: _put(leaves[name], leaf.dtype, flat_shardings[name])
            for name, leaf in tensors.flatten(abstract_params).items()
        }
    )


def put_params(tree: Tree, partitioner: Partitioner) -> Tree:
    """Reads the tensors of `tree` that lie in files onto the mesh, in their own dtype; other leaves go there whole.

    Each process reads its devices' parts. A tensor lies as a policy's parameter of that name does.
    """
    shardings = partitioner.param_shardings(tree)
    return jax.tree.map(
        lambda leaf, sharding: (
            _put(leaf, leaf.dtype, sharding)
            if isinstance(leaf, tensors.LazyTensor)
            else partitioner.put_everywhere(leaf)
        ),
        tree,
        shardings,
    )


def abstract_params(tree: Tree, partitioner: Partitioner) -> Tree:
    """Shapes and shardings of what `put_params(tree, partitioner)` makes; nothing is read."""

    def shape_of(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        lies = sharding if isinstance(leaf, tensors.LazyTensor) else partitioner.replicated()
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=lies)

    return jax.tree.map(shape_of, tree, partitioner.param_shardings(tree))


def bytes_on_device(tree: Tree, partitioner: Partitioner) -> int:
    """Of one device's memory, that `put_params(tree, partitioner)` takes. Other leaves are on each device whole."""
    shardings = jax.tree.leaves(partitioner.param_shardings(tree))
    shapes = (
        sharding.shard_shape(leaf.shape) if isinstance(leaf, tensors.LazyTensor) else leaf.shape
        for leaf, sharding in zip(jax.tree.leaves(tree), shardings, strict=True)
    )
    return sum(
        math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shapes, jax.tree.leaves(tree), strict=True)
    )


def check_fits(path: str, *, abstract_params: Tree) -> None:
    """Raises UserError, without reading any weight, when a checkpoint's names or shapes are not the model's."""
    _fitting(path, abstract_params)


def _fitting(path: str, abstract_params: Tree) -> tensors.Tensors:
    """The checkpoint's tensors in the model's layout, once they are known to fit."""
    checkpoint = formats.open_checkpoint(path, field=FIELD)
    wanted = tensors.flat_shapes(abstract_params)
    leaves = formats.in_layout_of(checkpoint.tensors, wanted)
    tensors.check_same_names_and_shapes(
        have={name: leaf.shape for name, leaf in leaves.items()},
        want=wanted,
        what=f"{FIELD}: {str(checkpoint.directory)!r}",
        advice="Include the gin/models file the checkpoint was trained with, and its vocabulary "
        "(token_embedder/embedding has a row for each token).",
    )
    return leaves


def _restore(directory: Path, abstract_params: Tree, shardings: Tree) -> Tree:
    item = {
        "target": jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract_params,
            shardings,
        )
    }
    with orbax_files.reader() as checkpointer:
        restored = checkpointer.restore(
            directory,
            args=ocp.args.PyTreeRestore(
                item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
            ),
        )
    return restored["target"]


def _put(tensor: tensors.LazyTensor, dtype: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """A tensor on the mesh; a part that several devices hold is read once."""
    parts: dict[tuple[tuple[Any, Any], ...], npt.NDArray[Any]] = {}

    def part(index: Any) -> npt.NDArray[Any]:
        key = tuple((s.start, s.stop) for s in index)
        if key not in parts:
            parts[key] = np.ascontiguousarray(tensor[index].astype(dtype))
        return parts[key]

    return jax.make_array_from_callback(tensor.shape, sharding, part)
