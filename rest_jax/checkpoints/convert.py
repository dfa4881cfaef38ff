"""Checkpoints from one format to another, a tensor at a time.

Weights are copied bit for bit, in the dtype they are stored in. A directory is complete or absent: it is written under
another name and renamed.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from rest_jax import paths
from rest_jax.checkpoints import formats, hugging_face, model_config, orbax_files, t5x_legacy, tensors
from rest_jax.checkpoints.attention_heads import joined_heads, split_heads
from rest_jax.data.vocabulary import Vocabulary
from rest_jax.errors import UserError
from rest_jax.models import t5

ExportFormat = Literal["t5x", "hugging_face"]
CONFIG_GIN, RUN = "config.gin", "run.json"


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import found: for the message to the user."""

    format: formats.Format
    config: t5.T5Config
    num_parameters: int
    has_vocabulary: bool


@dataclasses.dataclass(frozen=True)
class Model:
    """What a configuration says of a checkpoint that its tensors do not.

    Attributes:
      config: of the network. A `vocab_size` of None is the checkpoint's.
      vocabulary: None where it is not known.
    """

    config: t5.T5Config
    vocabulary: Vocabulary | None = None


def import_checkpoint(source: str, dest: Path, *, model: Model | None = None) -> Imported:
    """Writes DEST/state, what `INITIAL_CHECKPOINT_PATH` takes, and DEST/config.gin, the model and its vocabulary.

    The tokenizer's files of a Hugging Face folder come along, and its config.json, which an export starts from.
    run.json records the vocabulary, so that a run with another one is refused.

    Args:
      source: a checkpoint of any format.
      dest: must not exist.
      model: that the parameters are for; without it, the checkpoint's own. Layers are stored together if its network
        has `scan_layers`.

    Raises:
      UserError: there is no checkpoint, it is damaged or not the model's, or DEST exists. Nothing is left behind.
    """
    _check_absent(dest)
    checkpoint = formats.open_checkpoint(source, field="SOURCE")
    config = _config_of(checkpoint, model)
    leaves = _fitting(checkpoint, config)
    vocabulary = None if model is None else model.vocabulary
    if vocabulary is None:
        vocabulary = hugging_face.open_vocabulary(checkpoint.directory, vocab_size=config.vocab_size or 0)
    if vocabulary is not None and vocabulary.vocab_size > (config.vocab_size or 0):
        raise UserError(
            f"SOURCE: {str(checkpoint.directory)!r} has an embedding of {config.vocab_size} rows, and its vocabulary "
            f"{vocabulary!r} has {vocabulary.vocab_size} ids. Give the tokenizer's files that the model was made for."
        )
    with _new_directory(dest) as partial:
        orbax_files.write_tensors(partial / formats.STATE_ITEM, leaves, step=checkpoint.step)
        if checkpoint.config_json is not None:
            _write_json(partial / hugging_face.CONFIG, checkpoint.config_json)
        _write_tokenizer(partial, vocabulary, source=checkpoint.directory, vocab_size=config.vocab_size or 0)
        if vocabulary is not None:
            facts = {"imported_from": str(paths.absolute(checkpoint.directory)), "vocabulary_sha256": vocabulary.sha256}
            _write_json(partial / RUN, facts)
        text = model_config.gin_text(
            config,
            comment=f"The model of {checkpoint.directory}, imported from the format {checkpoint.format}.",
            vocabulary=None
            if vocabulary is None
            else model_config.vocabulary_text(vocabulary, model_file=paths.absolute(dest) / hugging_face.SENTENCEPIECE),
        )
        (partial / CONFIG_GIN).write_text(text, encoding="utf-8")
    return Imported(checkpoint.format, config, _num_parameters(leaves), vocabulary is not None)


def export_checkpoint(
    source: str,
    dest: Path,
    *,
    to: ExportFormat,
    model: Model | None = None,
    max_shard_bytes: int = hugging_face.MAX_SHARD_BYTES,
) -> int:
    """Writes a checkpoint in another program's format; returns its number of parameters.

    Args:
      source: a checkpoint of any format.
      dest: must not exist.
      to: T5X's has the tree of its scalable_t5, layers together or apart as in the source, where each layer has its
        own position biases (UMT5); else that of its t5, layers apart. Hugging Face's are always apart.
      model: that was trained; without it, it is inferred from the tensors.
      max_shard_bytes: of a safetensors file.

    Raises:
      UserError: as `import_checkpoint`, or the format has no such network.
    """
    _check_absent(dest)
    checkpoint = formats.open_checkpoint(source, field="SOURCE")
    config = _config_of(checkpoint, model)
    leaves = _fitting(checkpoint, config)
    vocabulary = None if model is None else model.vocabulary
    with _new_directory(dest) as partial:
        if to == "t5x":
            scalable = config.relative_bias_per_layer
            theirs = split_heads(leaves, num_heads=config.num_heads) if scalable else tensors.unstacked(leaves)
            t5x_legacy.write_checkpoint(partial, theirs, step=checkpoint.step or 0)
            return _num_parameters(leaves)
        dtypes = {str(tensor.dtype) for tensor in leaves.values()}
        hugging_face.write_config(
            partial,
            config=config,
            dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
            eos_id=None if vocabulary is None else vocabulary.eos_id,
            base=checkpoint.config_json or hugging_face.read_config(checkpoint.directory),
        )
        _write_tokenizer(partial, vocabulary, source=checkpoint.directory, vocab_size=config.vocab_size or 0)
        hugging_face.write_weights(partial, tensors.unstacked(leaves), config=config, max_shard_bytes=max_shard_bytes)
    return _num_parameters(leaves)


def _write_tokenizer(directory: Path, vocabulary: Vocabulary | None, *, source: Path, vocab_size: int) -> None:
    """The tokenizer's files: the source's own as they are, unless `vocabulary` is another."""
    own = hugging_face.open_vocabulary(source, vocab_size=vocab_size)
    hugging_face.write_vocabulary(directory, vocabulary)
    if vocabulary is None or own is None or own.sha256 == vocabulary.sha256:
        hugging_face.copy_companions(source, directory)


def _num_parameters(leaves: tensors.Tensors) -> int:
    return sum(math.prod(tensor.shape) for tensor in leaves.values())


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(dict(value), indent=2) + "\n", encoding="utf-8")


def _config_of(checkpoint: formats.Checkpoint, model: Model | None) -> t5.T5Config:
    """The network's configuration: as given, else the format's own, else inferred."""
    if model is not None:
        given = model.config
        embedding = checkpoint.tensors.get("token_embedder/embedding")
        if given.vocab_size is None and embedding is not None:
            return dataclasses.replace(given, vocab_size=embedding.shape[0])
        return given
    if checkpoint.config is not None:
        return checkpoint.config
    shapes = {name: tensor.shape for name, tensor in joined_heads(checkpoint.tensors).items()}
    return model_config.infer_config(shapes, what=f"SOURCE: {str(checkpoint.directory)!r}")


def _fitting(checkpoint: formats.Checkpoint, config: t5.T5Config) -> tensors.Tensors:
    shapes = model_config.expected_shapes(config)
    leaves = formats.in_layout_of(checkpoint.tensors, shapes)
    tensors.check_same_names_and_shapes(
        have={name: tensor.shape for name, tensor in leaves.items()},
        want=shapes,
        what=f"SOURCE: {str(checkpoint.directory)!r}",
        advice="Give --gin_file of the model it was trained with, or none to take the model from the checkpoint.",
    )
    return {name: leaves[name] for name in shapes}


def _check_absent(dest: Path) -> None:
    if dest.exists() or (not paths.in_bucket(dest) and dest.is_symlink()):
        raise UserError(f"DEST: {str(dest)!r} exists. Give a new directory, or remove it first.")


@contextlib.contextmanager
def _new_directory(dest: Path) -> Iterator[Path]:
    """A directory that becomes `dest` when all went well, and disappears otherwise."""
    _check_absent(dest)
    if paths.in_bucket(dest):  # which cannot rename
        try:
            yield dest
        except BaseException:
            paths.remove_tree(dest)
            raise
        return
    partial = dest.with_name(f"{dest.name}.tmp")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"DEST: {str(partial)!r} cannot be made: {error}. Give a folder that can be written. If it is there, "
            "another import or export is writing it, or was killed; then remove it."
        ) from error
    try:
        yield partial
        partial.rename(dest)
    except OSError as error:
        raise UserError(f"DEST: {str(dest)!r} was not written: {error}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
