"""gin, with errors that say what to write.

T5X's conventions: `--gin_file` (repeatable), `--gin.NAME=value`, macros in capitals, `%gin.REQUIRED` for what must be given.
"""

import ast
import difflib
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gin
from gin import config as gin_config

from rest_jax import paths
from rest_jax.errors import UserError


def load(*, gin_files: Sequence[str], bindings: Sequence[str]) -> None:
    """Parses gin files, then `NAME=value` bindings over them.

    Raises:
      UserError: a file that is not found, an unknown name, a value that is no Python literal (with the quoting that
        works), or REQUIRED macros that nothing sets (all of them in one message).
    """
    gin.clear_config()
    search_paths = paths.gin_search_paths()
    for path in search_paths:
        gin.add_config_file_search_path(path)
    if not gin_files:
        raise UserError(f"--gin_file is missing. The package has {', '.join(_shipped(search_paths, 'runs'))}.")
    files = [_find(name, search_paths) for name in gin_files]
    try:
        # Bindings are parsed after the files: their names must then exist.
        gin.parse_config_files_and_bindings([str(file) for file in files], None, finalize_config=False)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{', '.join(gin_files)}: {_explain(error)}") from error
    for binding in bindings:
        _apply(binding)
    missing = sorted(_missing_macros())
    if missing:
        listed = "\n".join(f"  --gin.{name}=...{_hint(name)}" for name in missing)
        raise UserError(f"{len(missing)} required gin macro(s) are not set:\n{listed}")
    gin.finalize()


def _find(name: str, search_paths: Sequence[str]) -> Path:
    for root in search_paths:
        candidate = Path(root) / name
        if candidate.is_file():
            return candidate
    close = difflib.get_close_matches(name, _shipped(search_paths, ""), n=3, cutoff=0.4)
    also = f" Did you mean {' or '.join(close)}?" if close else ""
    raise UserError(f"--gin_file {name!r} is in none of {', '.join(search_paths)}.{also}")


def _shipped(search_paths: Sequence[str], folder: str) -> list[str]:
    """Names of the package's gin files, as `--gin_file` takes them."""
    names: set[str] = set()
    for root in search_paths[1:]:
        names.update(str(path.relative_to(root)) for path in (Path(root) / folder).rglob("*.gin"))
    return sorted(names)


def _apply(binding: str) -> None:
    """One `NAME=value` of the command line."""
    name, equals, value = binding.partition("=")
    name = name.strip()
    if not equals:
        raise UserError(f"--gin.{binding}: write --gin.NAME=value.")
    is_macro = "." not in name
    if is_macro and name not in _known_macros():
        close = difflib.get_close_matches(name, sorted(_known_macros()), n=3, cutoff=0.6)
        also = f" Did you mean {' or '.join(close)}?" if close else f" Known: {', '.join(sorted(_known_macros()))}."
        raise UserError(f"--gin.{name}: no gin file defines or uses this macro.{also}")
    text = value.strip()
    if text[:1] not in ("@", "%"):
        try:
            ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            if not re.search(r"[@%]", text):
                raise UserError(
                    f"--gin.{name}={value}: not a Python value. Strings need quotes that the shell leaves alone: "
                    f"--gin.{name}=\"'{value}'\""
                ) from error
    try:
        gin.parse_config(f"{name} = {text}")
    except Exception as error:
        raise UserError(f"--gin.{binding}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    """gin's message, with the nearest known name where it did not know one."""
    message = str(error).strip()
    unknown = re.search(r"(?:No configurable matching|Could not resolve configurable|Couldn't find)\s*'?([\w.]+)", message)
    if unknown is None:
        unknown = re.search(r"doesn't have (?:a parameter|an argument) named '?(\w+)", message)
    if unknown:
        known = {selector.split(".")[-1]: selector for selector in gin_config._REGISTRY}
        name = unknown[1].split(".")[-1]
        close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)
        if close:
            message += f"\nDid you mean {' or '.join(close)}?"
    return message


def _references(value: Any) -> Iterator[Any]:
    if isinstance(value, gin_config.ConfigurableReference):
        yield value
    elif isinstance(value, dict):
        for item in value.items():
            yield from _references(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _references(item)


def _macro_values() -> dict[str, Any]:
    """Macros that some line defines."""
    return {
        scope: parameters["value"]
        for (scope, selector), parameters in gin_config._CONFIG.items()
        if selector == "gin.macro" and "value" in parameters
    }


def _known_macros() -> set[str]:
    """Macros that are defined or used anywhere."""
    used = {
        reference.scoped_selector.removesuffix("/gin.macro")
        for parameters in gin_config._CONFIG.values()
        for value in parameters.values()
        for reference in _references(value)
        if reference.selector == "gin.macro"
    }
    return used | _macro_values().keys()


def _missing_macros() -> set[str]:
    """Macros that are used without a value, or whose value is REQUIRED."""
    values = _macro_values()
    required = {
        name
        for name, value in values.items()
        if isinstance(value, gin_config.ConfigurableReference) and value.scoped_selector == "gin.REQUIRED/gin.constant"
    }
    return (_known_macros() - values.keys()) | required


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hint(name: str) -> str:
    examples = {
        "MODEL_DIR": "\"'/tmp/my_run'\"  (quotes inside quotes)",
        "MIXTURE_OR_TASK_NAME": "\"'demo_de_en'\"  (quotes inside quotes)",
    }
    return examples.get(name, "")
