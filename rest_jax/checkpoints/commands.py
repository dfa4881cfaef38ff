"""`rest_jax import` and `rest_jax export`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import gin

from rest_jax import config, paths, run_files
from rest_jax.checkpoints import convert, formats
from rest_jax.errors import UserError
from rest_jax.models import t5

VOCABULARY_MACRO, MODEL_GIN = "%VOCABULARY", "checkpoints/model.gin"


@dataclasses.dataclass(frozen=True)
class ConfiguredModel:
    """What gin's MODEL is, see gin/checkpoints/model.gin."""

    model: Any


def import_command(source: str, dest: str, *, gin_files: Sequence[str], bindings: Sequence[str]) -> str:
    """Imports SOURCE to DEST; returns what to tell the user.

    Args:
      source, dest: see `convert.import_checkpoint`.
      gin_files: of the model; without any, the checkpoint's own is taken.
      bindings: `NAME=value` over them.
    """
    model = _configured_model(gin_files, bindings)
    imported = convert.import_checkpoint(source, paths.resolve(dest), model=model)
    vocabulary = "" if imported.has_vocabulary else " It has no vocabulary: set VOCABULARY."
    return (
        f"{dest}: {imported.num_parameters:,} parameters, imported from the format {imported.format}.{vocabulary}\n"
        f"Use it with --gin_file={dest}/{convert.CONFIG_GIN} after the run's, and "
        f"--gin.INITIAL_CHECKPOINT_PATH=\"'{dest}'\""
    )


def export_command(
    source: str, dest: str, *, to: convert.ExportFormat, gin_files: Sequence[str], bindings: Sequence[str]
) -> str:
    """Exports SOURCE to DEST; returns what to tell the user. The arguments are `import_command`'s.

    Without gin files, the config.gin beside the checkpoint or above it says which model and vocabulary it is.
    """
    files = list(gin_files) or _own_config(source)
    num_parameters = convert.export_checkpoint(
        source, paths.resolve(dest), to=to, model=_configured_model(files, bindings)
    )
    return f"{dest}: {num_parameters:,} parameters, exported to the format {to}."


def _own_config(source: str) -> list[str]:
    """The config.gin of the run that a checkpoint belongs to. T5X writes a file of this name too, of its own models."""
    found = formats.find_checkpoint(source, field="SOURCE")
    if formats.detect(found) != "orbax":
        return []
    try:
        file = run_files.find_config(str(found))
    except UserError:
        return []
    return [str(file)] if "from rest_jax." in file.read_text(encoding="utf-8") else []


def _configured_model(gin_files: Sequence[str], bindings: Sequence[str]) -> convert.Model | None:
    """The network and the vocabulary of gin files; None where there are none."""
    if not gin_files:
        if bindings:
            raise UserError(f"--gin.{bindings[0]}: give --gin_file of the model too, e.g. models/t5_1_1_base.gin.")
        return None
    config.load(gin_files=[*gin_files, MODEL_GIN], bindings=bindings, fallbacks={"VOCABULARY": "None"})
    if gin.query_parameter(VOCABULARY_MACRO) is None:
        return convert.Model(config.build(t5.T5Config))
    model = config.build(ConfiguredModel).model
    network = getattr(getattr(model, "module", None), "config", None)
    if not isinstance(network, t5.T5Config):
        raise UserError(f"MODEL is {type(model).__name__} with another network; only rest_jax's own T5 is converted.")
    return convert.Model(network, model.output_vocabulary)
