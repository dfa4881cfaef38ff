"""gin, with errors that say what to write.

T5X's conventions: `--gin_file` (repeatable), `--gin.NAME=value`, macros in capitals, `%gin.REQUIRED` for what must be
given.
"""

import ast
import contextlib
import difflib
import inspect
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gin
from gin import config as gin_config

from rest_jax import paths, t5x_macros
from rest_jax.errors import UserError

# Macros that say where a run happens and not what it computes: they may change when a run is continued.
PLACE_MACROS = ("MODEL_DIR", "CACHE_DIR", "MODEL_PARALLEL", "REPLICAS")
_BINDING_LINE = re.compile(r"\n\s*In bindings string line .*\n.*(?:\n\s*\^)?")
_CALL_PATH = re.compile(r"\n\s*In call to configurable .*")


def load(
    *,
    gin_files: Sequence[str],
    bindings: Sequence[str],
    search_paths: Sequence[str] = (),
    fallbacks: Mapping[str, str] | None = None,
) -> list[str]:
    """Parses gin files, then `NAME=value` bindings over them; returns notes for the user.

    Args:
      gin_files: names, looked up in the working directory, `search_paths`, the package and beside T5X's.
      bindings: as on the command line, `NAME=value`.
      search_paths: further folders for `gin_files` and for what they include.
      fallbacks: macro -> value, as gin text, for macros that the command does not need and that nothing sets.

    Raises:
      UserError: a file that is not found, an unknown name, a value that is no Python literal (with the quoting that
        works), or REQUIRED macros that nothing sets (all of them in one message).
    """
    gin.clear_config()
    shipped = paths.gin_search_paths()
    folders = [shipped[0], *search_paths, *shipped[1:]]
    if not gin_files:
        raise UserError(f"--gin_file is missing. The package has {', '.join(_names(shipped[1:], 'runs'))}.")
    lookup = [*folders, *paths.t5x_search_paths()]
    files = [_find(name, lookup, suggest=folders) for name in gin_files]
    with _searching(lookup):
        for name, file in zip(gin_files, files, strict=True):
            try:
                if paths.in_bucket(file):
                    gin.parse_config(file.read_text(encoding="utf-8"))
                else:
                    gin.parse_config_file(str(file.absolute()))
            except UserError:
                raise
            except OSError as error:
                raise UserError(f"{name}: {error}{_did_you_mean_file(str(error), folders)}") from error
            except Exception as error:
                raise UserError(f"{name}: {_explain(error)}") from error
    # Bindings are parsed after the files: their names must then exist.
    imports = _imports()
    ignored = {macro for binding in bindings if (macro := _apply(binding, imports=imports)) is not None}
    for name, value in (fallbacks or {}).items():
        if name in _missing_macros():
            gin.parse_config(f"{name} = {value}")
    ignored |= _check_macros()
    gin.finalize()
    return [t5x_macros.note(macro) for macro in sorted(ignored)]


def build(configurable: Any) -> Any:
    """Calls what gin configures.

    Raises:
      UserError: values of a wrong type, arguments that are missing; gin's note of the binding at fault is kept.
    """
    try:
        return gin.get_configurable(configurable)()
    except UserError as error:
        raise UserError(_CALL_PATH.sub("", str(error))) from error
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as error:
        raise UserError(
            f"the gin configuration does not fit together: {error}\nIs a value of another type than the field it sets "
            "(a number in quotes, a name without '@' or its '()')?"
        ) from error


def given_text() -> str:
    """The configuration as it was given: files and bindings, one line a parameter, macros first."""
    return _tidy(gin.config_str(max_line_length=10**5))


def operative_text() -> str:
    """The configuration as it was used so far, defaults included."""
    return _tidy(gin.operative_config_str(max_line_length=10**5))


def _tidy(text: str) -> str:
    """gin draws rulers as long as its longest line."""
    return re.sub(r"^# =+$", f"# {'=' * 118}", text, flags=re.MULTILINE)


def different_lines(before: str, after: str) -> list[str]:
    """What two `given_text`s disagree on, `- ` before and `+ ` after; comments and `PLACE_MACROS` do not count."""

    def relevant(text: str) -> list[str]:
        lines = [line.rstrip() for line in text.splitlines()]
        places = tuple(f"{name} = " for name in PLACE_MACROS)
        return sorted(line for line in lines if line and not line.startswith(("#", *places)))

    return [line for line in difflib.ndiff(relevant(before), relevant(after)) if line.startswith(("- ", "+ "))]


@contextlib.contextmanager
def _searching(folders: Iterable[str]) -> Iterator[None]:
    """gin looks for included files in `folders`, silently, and forgets them afterwards."""
    before = list(gin_config._LOCATION_PREFIXES)
    root = logging.getLogger()
    # Without any handler the first message would set up logging for the whole process.
    handler = logging.NullHandler()
    root.addFilter(_no_search_notes)
    root.addHandler(handler)
    try:
        for folder in folders:
            gin.add_config_file_search_path(folder)
        yield
    finally:
        gin_config._LOCATION_PREFIXES[:] = before
        root.removeHandler(handler)
        root.removeFilter(_no_search_notes)


def _no_search_notes(record: logging.LogRecord) -> bool:
    """False for gin's error about each folder in which a file is not: it stands in the next one."""
    return not record.getMessage().startswith("Path not found: ")


def _find(name: str, lookup: Sequence[str], *, suggest: Sequence[str]) -> Path:
    if "://" in name and paths.resolve(name).is_file():
        return paths.resolve(name)
    for root in lookup:
        candidate = Path(root) / name
        if candidate.is_file():
            return candidate
    raise UserError(
        f"--gin_file {name!r} is in none of {', '.join(lookup)}.{_did_you_mean_file(name, suggest) or _runs(suggest)}"
    )


def _did_you_mean_file(text: str, folders: Sequence[str]) -> str:
    """A suggestion for the name of a gin file, or for the one in a message of gin's."""
    match = re.search(r"Unable to open file: (\S+?)\. ", text)
    close = difflib.get_close_matches(match[1] if match else text, _names(folders[1:], ""), n=3, cutoff=0.4)
    return f"\nDid you mean {' or '.join(close)}?" if close else ""


def _runs(folders: Sequence[str]) -> str:
    return f" There are {', '.join(_names(folders[1:], 'runs'))}."


def _names(folders: Sequence[str], below: str) -> list[str]:
    """Names of gin files, as `--gin_file` takes them."""
    names: set[str] = set()
    for root in folders:
        names.update(str(path.relative_to(root)) for path in (Path(root) / below).rglob("*.gin"))
    return sorted(names)


def _imports() -> str:
    """The modules that the gin files import, so that a binding may name anything in them."""
    lines = sorted({statement.format() for statement in gin_config._IMPORTS})
    dynamic = "from __gin__ import dynamic_registration"
    return "\n".join([dynamic, *(line for line in lines if line != dynamic)]) + "\n" if dynamic in lines else ""


def _apply(binding: str, *, imports: str) -> str | None:
    """One `NAME=value` of the command line; returns the name if it is ignored."""
    name, equals, value = binding.partition("=")
    name = name.strip()
    if not equals:
        raise UserError(f"--gin.{binding}: write --gin.NAME=value.")
    is_macro = "." not in name
    if is_macro and name not in _used_macros():
        if name in t5x_macros.IGNORED:
            return name
        if name in t5x_macros.INSTEAD:
            raise UserError(f"--gin.{name}: {t5x_macros.INSTEAD[name]}.")
    if is_macro and name not in _known_macros():
        raise UserError(f"--gin.{name}: no gin file defines or uses this macro{_did_you_mean_macro(name)}")
    text = value.strip()
    if not re.search(r"[@%]", text):
        try:
            ast.literal_eval(text)
        except (ValueError, SyntaxError) as error:
            raise UserError(
                f"--gin.{name}={value}: not a Python value. Strings need quotes that the shell leaves alone: "
                f"--gin.{name}=\"'{value}'\""
            ) from error
    try:
        gin.parse_config(f"{imports}{name} = {text}")
    except Exception as error:
        raise UserError(f"--gin.{binding}: {_BINDING_LINE.sub('', _explain(error))}") from error
    return None


def _did_you_mean_macro(name: str) -> str:
    if name in t5x_macros.INSTEAD:
        return f": {t5x_macros.INSTEAD[name]}."
    known = sorted(_used_macros() - {name})
    close = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.6)
    return f". Did you mean {' or '.join(close)}?" if close else f". Known: {', '.join(known)}."


def _explain(error: Exception) -> str:
    """gin's message, with the nearest known name where it did not know one."""
    message = str(error).strip()
    if isinstance(error, ImportError) and "t5x" in message:
        return f"{message}\nT5X, or what it needs, is not installed, or not on PYTHONPATH; see docs/t5x.md."
    if re.search(r"(?:train|infer|eval)_script", message):
        return f"{message}\nT5X's run files configure T5X's own trainer. Include its model file, then rest.gin."
    if match := re.search(r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message):
        names = _parameters(match[1])
        close = difflib.get_close_matches(match[2], names, n=3, cutoff=0.6)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"It has {', '.join(names)}."
    elif match := re.search(
        r"(?:No configurable matching(?: reference)?|resolve selector|Couldn't find)\s*'?@?([\w./]+)", message
    ):
        hint = _did_you_mean_configurable(match[1])
    elif match := re.search(r"'(\w+)' was not provided by an import statement", message):
        modules = sorted({statement.bound_name() for statement in gin_config._IMPORTS})
        close = difflib.get_close_matches(match[1], modules, n=3, cutoff=0.6)
        known = f"Did you mean {' or '.join(close)}?" if close else f"Imported are {', '.join(modules)}."
        hint = f"{known} Any other module is imported in a gin file: from package import {match[1]}"
    elif isinstance(error, (SyntaxError, ValueError)):
        hint = "Is a string without its quotes? Values are Python literals, @configurables and %MACROS."
    else:
        return message
    return f"{message}\n{hint}"


def _did_you_mean_configurable(name: str) -> str:
    # Whatever the imported modules define may be named, registered so far or not.
    known = {selector.split(".")[-1] for selector, _ in gin_config._REGISTRY.items()}
    for statement in gin_config._IMPORTS:
        if not statement.module.startswith("__gin__"):
            known.update(key for key, value in vars(_module(statement.module)).items() if callable(value))
    close = difflib.get_close_matches(name.split("/")[-1].split(".")[-1], sorted(known), n=3, cutoff=0.6)
    return f"Did you mean {' or '.join(close)}?" if close else "Its module must be imported in a gin file."


def _module(name: str) -> Any:
    return __import__(name, fromlist=[""])


def _parameters(selector: str) -> list[str]:
    registered = gin_config._REGISTRY.get_match(selector)
    return [] if registered is None else sorted(inspect.signature(registered.wrapped).parameters.keys() - {"self"})


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


def _used_macros() -> set[str]:
    """Macros that some line refers to."""
    return {
        reference.scoped_selector.removesuffix("/gin.macro")
        for parameters in gin_config._CONFIG.values()
        for value in parameters.values()
        for reference in _references(value)
        if reference.selector == "gin.macro"
    }


def _known_macros() -> set[str]:
    return _used_macros() | _macro_values().keys()


def _missing_macros() -> set[str]:
    """Macros that are used without a value, or whose value is REQUIRED."""
    values = _macro_values()
    required = {
        name
        for name, value in values.items()
        if isinstance(value, gin_config.ConfigurableReference) and value.scoped_selector == "gin.REQUIRED/gin.constant"
    }
    return (_known_macros() - values.keys()) | required


def _check_macros() -> set[str]:
    """Every macro must be set, and used: one that nothing uses is a typing error that would change nothing.

    Returns those of T5X's that are set and have no effect.
    """
    unused = sorted(_macro_values().keys() - _used_macros() - t5x_macros.IGNORED.keys())
    if unused:
        lines = "\n".join(f"  {name}{_did_you_mean_macro(name)}" for name in unused)
        raise UserError(f"{len(unused)} gin macro(s) are set but nothing uses them:\n{lines}")
    missing = sorted(_missing_macros())
    if missing:
        listed = "\n".join(f"  {_EXAMPLES.get(name, f'--gin.{name}=...')}" for name in missing)
        raise UserError(f"{len(missing)} required gin macro(s) are not set; quotes inside quotes are meant:\n{listed}")
    return t5x_macros.IGNORED.keys() & (_macro_values().keys() - _used_macros())


_EXAMPLES = {
    "CHECKPOINT_PATH": "--gin.CHECKPOINT_PATH=\"'/tmp/my_run/policy'\"",
    "INFER_OUTPUT_DIR": "--gin.INFER_OUTPUT_DIR=\"'/tmp/inferred'\"",
    "MODEL_DIR": "--gin.MODEL_DIR=\"'/tmp/my_run'\"",
    "MIXTURE_OR_TASK_NAME": "--gin.MIXTURE_OR_TASK_NAME=\"'demo_de_en'\"",
    "TASK_FEATURE_LENGTHS": "--gin.TASK_FEATURE_LENGTHS=\"{'inputs': 128, 'targets': 128}\"",
    "MODEL": "MODEL: include one of gin/models/, e.g. --gin_file=models/nano.gin",
    "REWARD": "REWARD: include one of gin/rewards/, e.g. --gin_file=rewards/chrf.gin",
    "VOCABULARY": "VOCABULARY: in a gin file, as in runs/demo_bc.gin",
}
