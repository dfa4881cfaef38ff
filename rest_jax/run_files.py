"""What a run leaves in MODEL_DIR before its first phase: config.gin, operative_config.gin, model-info.txt, run.json.

A MODEL_DIR belongs to one configuration: results of two would be told apart by nobody.
"""

import datetime
import json
import platform
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from rest_jax import config, paths
from rest_jax.errors import UserError
from rest_jax.model_info import MODEL_INFO
from rest_jax.summary import versions

CONFIG, OPERATIVE, RUN = "config.gin", "operative_config.gin", "run.json"
TRANSLATE = "checkpoints/translate.gin"


def check_same_run(model_dir: Path, *, given: str, vocabulary_sha256: str) -> None:
    """Raises UserError when MODEL_DIR holds a run of another configuration or vocabulary, or cannot be reached.

    Args:
      model_dir: may be absent.
      given: `config.given_text()`.
      vocabulary_sha256: of the policy's vocabulary.
    """
    paths.check_bucket(model_dir, "MODEL_DIR")
    before = model_dir / CONFIG
    if before.is_file():
        lines = config.different_lines(before.read_text(encoding="utf-8"), given)
        if lines:
            listed = "\n".join(f"  {line}" for line in lines)
            raise UserError(
                f"MODEL_DIR {str(model_dir)!r} holds a run of another configuration (- there, + given):\n{listed}\n"
                "Give the configuration it was started with, or another MODEL_DIR."
            )
    check_same_vocabulary("MODEL_DIR", model_dir, vocabulary_sha256=vocabulary_sha256)


def check_same_vocabulary(field: str, path: Path, *, vocabulary_sha256: str) -> None:
    """Raises UserError when the run that `path` lies in was made with another vocabulary; silent without a record.

    Args:
      field: which setting gave the path.
      path: a MODEL_DIR, or a checkpoint in one, or one beside which a run.json stands.
      vocabulary_sha256: of the policy's vocabulary.
    """
    record = _nearest(path, RUN)
    if record is None:
        return
    there = json.loads(record.read_text(encoding="utf-8")).get("vocabulary_sha256")
    if there is not None and there != vocabulary_sha256:
        raise UserError(
            f"{field} {str(path)!r} was trained with another vocabulary: its sha256 is {there[:12]}... (in {record}), "
            f"that of VOCABULARY is {vocabulary_sha256[:12]}.... Token ids would mean other pieces; give the one it "
            "was trained with."
        )


def find_config(path: str) -> Path:
    """The config.gin of the run that a checkpoint belongs to: beside it, or in a folder above.

    Raises:
      UserError: there is none.
    """
    found = _nearest(paths.resolve(path), CONFIG)
    if found is None:
        raise UserError(
            f"--gin_file is missing, and no {CONFIG} stands beside {path!r} or above it. Give the gin file that the "
            "checkpoint was trained with, or import it first: python -m rest_jax import."
        )
    return found


def _nearest(path: Path, name: str) -> Path | None:
    """The file `name` in `path` or up to four folders above: MODEL_DIR/grow_1/improve_2/checkpoint_100/state."""
    return next((folder / name for folder in paths.with_parents(path)[:5] if (folder / name).is_file()), None)


def write_run_files(
    model_dir: Path,
    *,
    given: str,
    operative: str,
    argv: Sequence[str],
    facts: Mapping[str, Any],
    model_info: str | None = None,
) -> None:
    """Writes the files. A run that is continued keeps its first config.gin and adds to its run.json.

    Args:
      model_dir: made if need be.
      given, operative: see `config`.
      argv: the command line.
      facts: further entries of run.json, such as the vocabulary's hash.
      model_info: see `model_info.describe`; None for no model-info.txt.

    Raises:
      UserError: MODEL_DIR cannot be made or written.
    """
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    run: dict[str, Any] = {
        "argv": list(argv),
        "start": now,
        "hostname": socket.gethostname(),
        "devices": [str(device) for device in jax.devices()],
        "device_kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
        "versions": versions(),
        "platform": f"{platform.platform()} {sys.platform}",
        **facts,
    }
    try:
        model_dir.mkdir(parents=True, exist_ok=True)
        if (model_dir / RUN).is_file():
            before = json.loads((model_dir / RUN).read_text(encoding="utf-8"))
            run = {**before, "continued": [*before.get("continued", []), {"argv": run["argv"], "start": now}]}
        if not (model_dir / CONFIG).is_file():
            paths.write_text(model_dir / CONFIG, given)
        paths.write_text(model_dir / OPERATIVE, operative)
        if model_info is not None:
            paths.write_text(model_dir / MODEL_INFO, model_info)
        paths.write_text(model_dir / RUN, json.dumps(run, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"MODEL_DIR {str(model_dir)!r} cannot be written: {error}. Give a folder that this user may write to."
        ) from error
