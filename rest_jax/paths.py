"""Paths that users give, on disk or in a bucket, and names of files that come with the package."""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

from rest_jax.errors import UserError

PACKAGE_PREFIX = "rest_jax://"
# Orbax and TensorStore, through which arrays travel, know this one together: of s3:// Orbax writes nothing.
BUCKET_PREFIX = "gs://"


def resolve(path: str | os.PathLike[str]) -> Path:
    """The path object of what a user wrote.

    `gs://bucket/run` becomes an `etils.epath.Path`, which has pathlib's methods, except `absolute` and `rglob`
    (`absolute` and `with_parents` here) and renaming, which copies. `rest_jax://tasks/demo_data/vocab.model` becomes
    a file of the package: `rest_jax.tasks` is the checkout's `tasks/` folder in an editable install and a sub-package
    in a wheel, so the first part of the name is looked up as a package rather than joined to a directory. Other paths
    stay as they are, `~` expanded.

    Raises:
      UserError: an unknown scheme, or a package that is missing for it. Nothing is looked up in the bucket.
    """
    text = os.fspath(path)
    scheme, separator, rest = text.partition("://")
    if not separator or "/" in scheme:
        return Path(text).expanduser()
    if text.startswith(BUCKET_PREFIX):
        return _in_bucket(text)
    if not text.startswith(PACKAGE_PREFIX):
        raise UserError(
            f"{text!r}: {scheme}:// is unknown. Legal are paths on this machine, {BUCKET_PREFIX}BUCKET/... for Google "
            f"Cloud Storage, and {PACKAGE_PREFIX}... for files of the package. Other stores can be mounted as folders."
        )
    first, _, rest = rest.partition("/")
    spec = importlib.util.find_spec(f"rest_jax.{first}")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{text!r}: rest_jax has no sub-package {first!r}. Names look like 'rest_jax://tasks/...'.")
    return Path(list(spec.submodule_search_locations)[0]) / rest


def _in_bucket(text: str) -> Path:
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text!r}: {BUCKET_PREFIX} needs the package gcsfs: pip install 'rest_jax[gcs]'")
    if not text.removeprefix(BUCKET_PREFIX).strip("/"):
        raise UserError(f"{text!r} names no bucket; write {BUCKET_PREFIX}BUCKET/FOLDER.")
    # epath would import TensorFlow where it is installed, and use its own way to buckets.
    os.environ.setdefault("EPATH_USE_TF", "0")
    import fsspec.config
    from etils import epath

    # Other processes, and TensorStore in this one, write where gcsfs has listed before: it must look again.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return cast(Path, epath.Path(text))


def local(path: str | os.PathLike[str], field: str) -> Path:
    """`resolve(path)` of what must lie on this machine. Raises UserError naming `field` for a bucket's."""
    found = resolve(path)
    if in_bucket(found):
        raise UserError(f"{field} {os.fspath(path)!r} must be a folder of this machine.")
    return found


def in_bucket(path: Path) -> bool:
    """Whether a path of `resolve`, or one made of it, is an object store's."""
    return not isinstance(path, Path)


def check_bucket(path: Path, field: str) -> None:
    """Raises UserError naming `field` where a path's bucket is not there or does not let us in; local paths pass."""
    if not in_bucket(path):
        return
    bucket, reason = BUCKET_PREFIX + str(path).removeprefix(BUCKET_PREFIX).partition("/")[0], "there is no such bucket"
    try:
        if resolve(bucket).exists():
            return
    except Exception as error:  # gcsfs, google.auth and aiohttp each have their own
        reason = f"{type(error).__name__}: {error}"
    raise UserError(
        f"{field} {str(path)!r}: {bucket} cannot be reached: {reason}. Is its name right, and does this machine have "
        "credentials (gcloud auth application-default login, or a service account)? See docs/distributed.md."
    )


def absolute(path: Path) -> Path:
    """The absolute path. epath's own method puts the working directory before a bucket's."""
    return path if in_bucket(path) else path.absolute()


def with_parents(path: Path) -> list[Path]:
    """The absolute path and the folders above it, up to the root or the bucket."""
    folders = [absolute(path), *absolute(path).parents]
    return [folder for folder in folders if str(folder) not in (BUCKET_PREFIX, "/")] if in_bucket(path) else folders


def url(folder: Path) -> str:
    """How TensorStore names a folder, without a slash at its end."""
    return str(folder) if in_bucket(folder) else f"file://{folder.absolute()}"


def kvstore(folder: Path) -> dict[str, str]:
    """TensorStore's specification of a folder as a key-value store."""
    if not in_bucket(folder):
        return {"driver": "file", "path": f"{folder.absolute()}/"}
    bucket, _, path = str(folder).removeprefix(BUCKET_PREFIX).partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as JSON, in a folder that is made where there is none."""
    text = json.dumps(value, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Writes a file that is whole or absent, and that is there for good when this returns.

    On disk it is written to `*.tmp`, synced and renamed. In a bucket an object appears when its upload is complete.
    """
    if in_bucket(path):
        path.write_bytes(content)
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    # The rename itself must survive a power cut, before anything that relies on it is written.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Deletes a folder with all that is in it, if it is there."""
    if in_bucket(folder):
        cast(Any, folder).rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def t5x_search_paths() -> list[str]:
    """Where T5X's gin files are found under their own names, `t5x/examples/...`; nowhere without T5X.

    T5X is not imported for it.
    """
    spec = importlib.util.find_spec("t5x")
    return [str(Path(folder).parent) for folder in (spec.submodule_search_locations or ())] if spec else []


def gin_search_paths() -> list[str]:
    """Where `--gin_file` names are looked up: the working directory, then the package's gin files.

    The gin files stand in the wheel as `rest_jax/gin`, in a checkout as `gin/` beside the package.
    """
    package = Path(__file__).parent
    return [".", *(str(path) for path in (package / "gin", package.parent / "gin") if path.is_dir())]
