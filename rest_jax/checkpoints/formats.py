"""Which format a checkpoint has, and its parameters whatever that is."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import orbax.checkpoint as ocp

from rest_jax import paths
from rest_jax.checkpoints import hugging_face, orbax_files, t5x_legacy, tensors
from rest_jax.checkpoints.attention_heads import with_heads_of
from rest_jax.checkpoints.tensors import Tensors
from rest_jax.errors import UserError
from rest_jax.models import t5

Format = Literal["orbax", "t5x", "hugging_face"]
STEP_PREFIX = "checkpoint"
STATE_ITEM = "state"
# Weights that torch or TensorFlow unpickle, that is, execute.
_REFUSED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Parameters under our names, each read when it is asked for.

    Attributes:
      format: what the directory holds.
      directory: as `find_checkpoint` gives it.
      tensors: name -> tensor.
      step: training steps; None where the format has none.
      config: of the network, where the format says it.
      config_json: Hugging Face's, otherwise None.
    """

    format: Format
    directory: Path
    tensors: Tensors
    step: int | None = None
    config: t5.T5Config | None = None
    config_json: Mapping[str, Any] | None = None


def find_checkpoint(path: str, *, field: str = "INITIAL_CHECKPOINT_PATH") -> Path:
    """The directory of a checkpoint of any format: the path itself, or its newest `checkpoint_N`.

    Raises:
      UserError: there is none, or only weights that would have to be unpickled.
    """
    root = paths.resolve(path)
    # T5X's users name the file in the directory as well.
    if root.name == t5x_legacy.FILE and root.is_file():
        return root.parent
    if detect(root) is not None:
        return root
    steps = {
        int(match[1]): child
        for child in (root.iterdir() if root.is_dir() else ())
        if (match := re.fullmatch(rf"{STEP_PREFIX}_(\d+)", child.name)) and detect(child) is not None
    }
    if steps:
        return steps[max(steps)]
    pickled = [file.name for pattern in _REFUSED for file in sorted(root.glob(pattern))] if root.is_dir() else []
    if pickled:
        raise UserError(
            f"{field}: {str(root)!r} has weights in {', '.join(pickled[:4])} only. Reading those can run any program "
            "that is hidden in them, so rest_jax does not. Convert them to safetensors where you trust them: "
            "transformers.AutoModelForSeq2SeqLM.from_pretrained(FOLDER).save_pretrained(NEW, safe_serialization=True)."
        )
    raise UserError(
        f"{field}: {str(root)!r} is no checkpoint. Give a directory with '{STATE_ITEM}/' in it (such as "
        f"MODEL_DIR/bc/{STEP_PREFIX}_1000 or MODEL_DIR/policy), a T5X checkpoint (a file named '{t5x_legacy.FILE}'), a "
        f"Hugging Face folder ({hugging_face.CONFIG} and *.safetensors), or a directory that holds {STEP_PREFIX}_N "
        "directories of these."
    )


def detect(directory: Path) -> Format | None:
    """The format of what lies in a directory; None if it is no checkpoint.

    Raises:
      UserError: there are two.
    """
    own: Format | None = None
    if t5x_legacy.weights_folder(directory) is not None:
        own = "t5x"
    elif (directory / STATE_ITEM).is_dir() and ocp.utils.is_checkpoint_finalized(directory / STATE_ITEM):
        own = "orbax"
    if not ((directory / hugging_face.CONFIG).is_file() and any(directory.glob("*.safetensors"))):
        return own
    if own is not None:
        raise UserError(
            f"{str(directory)!r} holds two checkpoints, one of the format {own} and one of hugging_face. Move one of "
            "them into a folder of its own."
        )
    return "hugging_face"


def open_checkpoint(path: str, *, field: str = "INITIAL_CHECKPOINT_PATH") -> Checkpoint:
    """Finds a checkpoint, and opens it without reading its weights.

    Raises:
      UserError: see `find_checkpoint`; or the checkpoint is damaged. The message begins with `field`.
    """
    directory = find_checkpoint(path, field=field)
    found = detect(directory)
    try:
        if found == "hugging_face":
            folder = hugging_face.open_folder(directory)
            return Checkpoint(
                "hugging_face", directory, folder.tensors, config=folder.config, config_json=folder.config_json
            )
        if (weights := t5x_legacy.weights_folder(directory)) is not None:
            leaves, step = t5x_legacy.open_checkpoint(weights)
            return Checkpoint("t5x", directory, leaves, step=step)
        leaves, step = orbax_files.open_tensors(directory / STATE_ITEM)
        return Checkpoint("orbax", directory, leaves, step=step)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error


def in_layout_of(leaves: Tensors, wanted: Mapping[str, tuple[int, ...]]) -> Tensors:
    """`leaves` with layers together or apart and heads joined or not, as the names and shapes of `wanted` have them."""
    if tensors.is_scanned(leaves) != tensors.is_scanned(wanted):
        leaves = tensors.stacked(leaves) if tensors.is_scanned(wanted) else tensors.unstacked(leaves)
    return with_heads_of(leaves, wanted)
