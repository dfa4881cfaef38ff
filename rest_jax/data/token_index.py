"""Which tokenised data set is that of a task and split: answered without seqio, so without TensorFlow.

`CACHE_DIR/index/KEY.json` names the data set's directory and the files that its rows were made from. An entry whose
files have changed is not used; one whose files are not on this machine is, since then the tokens are all there is.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from rest_jax.data.token_dataset import INFO_FILE, dataset_key, file_sha256

_VERSION = 1
_DATA_DIR = "REST_JAX_DATA_DIR"  # the folder of corpora that tasks/corpus_folder.py reads


def find(
    cache_dir: Path, *, task: str, split: str, lengths: Mapping[str, int], vocabulary: str, modules: Sequence[str]
) -> Path | None:
    """The data set's directory; None where none is known, or where what it was made from has changed.

    Args:
      cache_dir: where tokenised data sets stand.
      task, split, lengths: what `seqio_tasks.tokenize_task` was given.
      vocabulary: SHA-256 of the vocabulary's file.
      modules: those that register the task; their source is part of what the rows are made from.
    """
    try:
        entry = json.loads(_path(cache_dir, task, split, lengths, vocabulary, modules).read_text(encoding="utf-8"))
        directory = cache_dir / entry["directory"]
        fresh = all(_unchanged(_place(file), file) for file in entry["files"])
        fresh = fresh and all(_module_unchanged(name, file) for name, file in entry["modules"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None  # No entry, or half of one: seqio knows.
    return directory if fresh and (directory / INFO_FILE).is_file() else None


def record(
    cache_dir: Path,
    *,
    task: str,
    split: str,
    lengths: Mapping[str, int],
    vocabulary: str,
    modules: Sequence[str],
    directory: Path,
    files: Iterable[str],
    code: Iterable[str],
) -> None:
    """Writes an entry for `find`.

    Args:
      cache_dir, task, split, lengths, vocabulary, modules: as for `find`.
      directory: the data set, in `cache_dir`.
      files: text files that the rows were read from; none for a set of TFDS, whose version stands in its name.
      code: modules, beside `modules`, that the task's preprocessors come from.
    """
    known = {name: _origin(name) for name in sorted({*modules, *code})}
    entry = {
        "task": task,
        "split": split,
        "directory": directory.name,
        "files": [_fingerprint(Path(file)) | _ways_to(Path(file)) for file in files],
        "modules": {name: _fingerprint(origin) for name, origin in known.items() if origin is not None},
    }
    path = _path(cache_dir, task, split, lengths, vocabulary, modules)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    partial.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _path(
    cache_dir: Path, task: str, split: str, lengths: Mapping[str, int], vocabulary: str, modules: Sequence[str]
) -> Path:
    key = dataset_key(
        version=_VERSION,
        task=task,
        split=split,
        lengths={name: int(length) for name, length in lengths.items()},
        vocabulary=vocabulary,
        modules=list(modules),
    )
    return cache_dir / "index" / f"{key}.json"


def _origin(module: str) -> Path | None:
    """The module's file; None for one that is not installed here."""
    try:
        spec = _spec(module)
    except ImportError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None and Path(spec.origin).is_file() else None


def _spec(module: str) -> ModuleSpec | None:
    """As `importlib.util.find_spec`, which would import the parent packages: theirs may be TensorFlow."""
    parent, _, _ = module.rpartition(".")
    folders = None
    if parent:
        found = _spec(parent)
        if found is None or found.submodule_search_locations is None:
            return None
        folders = list(found.submodule_search_locations)
    for finder in sys.meta_path:
        spec = finder.find_spec(module, folders)
        if spec is not None:
            return spec
    return None


def _module_unchanged(name: str, entry: Mapping[str, Any]) -> bool:
    origin = _origin(name)
    return origin is None or _unchanged(origin, entry)


def _ways_to(path: Path) -> dict[str, str]:
    """How the path would be found in a copy of the project, or with other corpora: not where it stands today."""
    root = os.environ.get(_DATA_DIR)
    ways = {"as_given": str(path)} if not path.is_absolute() else {}
    if root is not None and path.absolute().is_relative_to(Path(root).expanduser().absolute()):
        ways["in_data_dir"] = str(path.absolute().relative_to(Path(root).expanduser().absolute()))
    return ways


def _place(file: Mapping[str, Any]) -> Path:
    """The file that the task would read now; where it was when the rows were made, if there is none."""
    root = os.environ.get(_DATA_DIR)
    candidates = [Path(file["as_given"])] if "as_given" in file else []
    if root is not None and "in_data_dir" in file:
        candidates.append(Path(root).expanduser() / file["in_data_dir"])
    return next((path for path in candidates if path.exists()), Path(file["path"]))


def _fingerprint(path: Path) -> dict[str, Any]:
    stat = path.stat()
    return {
        "path": str(path.absolute()),
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": file_sha256(path),
    }


def _unchanged(path: Path, entry: Mapping[str, Any]) -> bool:
    """By size and time; a file that was only copied or touched is read."""
    if not path.exists():
        return True
    stat = path.stat()
    if stat.st_size != entry["size"]:
        return False
    return stat.st_mtime_ns == entry["mtime_ns"] or file_sha256(path) == entry["sha256"]
