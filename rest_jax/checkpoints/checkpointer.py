"""Checkpoints by Orbax: of a training phase, and of parameters alone.

A step is a directory `checkpoint_N/` with T5X's tree under `state/`: `{'target': params, 'state': {'step',
'param_states'}}`. A policy without optimiser state is the same tree with `target` alone, so both are read the same way.
"""

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from rest_jax import paths
from rest_jax.errors import UserError
from rest_jax.partitioning import Partitioner

Tree = Any
STEP_PREFIX = "checkpoint"
STATE_ITEM = "state"


class PhaseCheckpoints:
    """The checkpoints of one training phase: the newest, to resume from, and the best, to keep.

    Which one is best is the caller's to say: Orbax's own ranking forgets the rewards of an earlier process.
    A save is complete or absent: Orbax writes to a temporary name and renames.
    """

    def __init__(self, directory: Path):
        self._preserve = _PreserveSteps()
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
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
        """The tree of a step, placed as `abstract_tree` (ShapeDtypeStructs with shardings) says, and its progress."""
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{STATE_ITEM: ocp.args.StandardRestore(abstract_tree), "progress": ocp.args.JsonRestore()}
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


def save_params(directory: Path, params: Tree, *, dtype: str | None = None) -> None:
    """Writes parameters alone, cast to `dtype`: what `INITIAL_CHECKPOINT_PATH` takes. Replaces what stood there."""
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    partial = directory.with_name(f"{directory.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial.absolute() / STATE_ITEM, {"target": params})
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def find_checkpoint(path: str) -> Path:
    """The directory that holds `state/`: the path itself, or its newest `checkpoint_N`.

    Raises:
      UserError: there is none.
    """
    root = paths.resolve(path)
    if (root / STATE_ITEM).is_dir():
        return root
    steps = {
        int(match[1]): child
        for child in (root.iterdir() if root.is_dir() else ())
        if (match := re.fullmatch(rf"{STEP_PREFIX}_(\d+)", child.name)) and (child / STATE_ITEM).is_dir()
    }
    if not steps:
        raise UserError(
            f"INITIAL_CHECKPOINT_PATH: {str(root)!r} is no checkpoint. Give a directory with '{STATE_ITEM}/' in it "
            f"(such as MODEL_DIR/bc/{STEP_PREFIX}_1000 or MODEL_DIR/policy), or one that holds {STEP_PREFIX}_N "
            "directories."
        )
    return steps[max(steps)]


def load_params(path: str, *, abstract_params: Tree, partitioner: Partitioner) -> Tree:
    """Parameters from any checkpoint of this project, as float32 on the mesh.

    Args:
      path: see `find_checkpoint`.
      abstract_params: the model's own tree of shapes.
      partitioner: where the parameters go.

    Raises:
      UserError: names or shapes are not the model's; both are named.
    """
    directory = find_checkpoint(path) / STATE_ITEM
    with _reader() as checkpointer:
        stored = checkpointer.metadata(directory).item_metadata.tree["target"]
        _check_same_tree(stored=stored, wanted=abstract_params, directory=directory)
        shardings = partitioner.param_shardings(abstract_params)
        item = {
            "target": jax.tree.map(
                lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
                abstract_params,
                shardings,
            )
        }
        restored = checkpointer.restore(
            directory,
            args=ocp.args.PyTreeRestore(
                item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
            ),
        )
    return restored["target"]


def check_fits(path: str, *, abstract_params: Tree) -> None:
    """Raises UserError, without reading any weight, when a checkpoint's names or shapes are not the model's."""
    directory = find_checkpoint(path) / STATE_ITEM
    with _reader() as checkpointer:
        stored = checkpointer.metadata(directory).item_metadata.tree["target"]
    _check_same_tree(stored=stored, wanted=abstract_params, directory=directory)


@contextlib.contextmanager
def _reader() -> Iterator[ocp.PyTreeCheckpointer]:
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


def _check_same_tree(*, stored: Tree, wanted: Tree, directory: Path) -> None:
    def flat(tree: Tree) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {"/".join(str(getattr(key, "key", key)) for key in path): tuple(leaf.shape) for path, leaf in leaves}

    have, want = flat(stored), flat(wanted)
    problems = [f"missing {name} {want[name]}" for name in sorted(want.keys() - have.keys())]
    problems += [f"unexpected {name} {have[name]}" for name in sorted(have.keys() - want.keys())]
    problems += [
        f"{name} is {have[name]}, the model's is {want[name]}"
        for name in sorted(have.keys() & want.keys())
        if have[name] != want[name]
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(
            f"INITIAL_CHECKPOINT_PATH: {str(directory)!r} does not fit the model: {shown}. Include the gin/models file "
            "the checkpoint was trained with, and its vocabulary (token_embedder/embedding has a row for each token)."
        )
