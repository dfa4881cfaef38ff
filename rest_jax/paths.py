"""Names of files that come with the package."""

import importlib.util
import os
from pathlib import Path

from rest_jax.errors import UserError

PACKAGE_PREFIX = "rest_jax://"


def resolve(path: str | os.PathLike[str]) -> Path:
    """Turns `rest_jax://tasks/demo_data/vocab.model` into a file of the package; other paths stay as they are.

    `rest_jax.tasks` is the checkout's `tasks/` folder in an editable install and a sub-package in a wheel, so the first
    part of the name is looked up as a package rather than joined to a directory.
    """
    text = os.fspath(path)
    if not text.startswith(PACKAGE_PREFIX):
        return Path(text).expanduser()
    first, _, rest = text.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(f"rest_jax.{first}")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{text!r}: rest_jax has no sub-package {first!r}. Names look like 'rest_jax://tasks/...'.")
    return Path(list(spec.submodule_search_locations)[0]) / rest


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
