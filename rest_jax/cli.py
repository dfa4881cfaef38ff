"""The commands.

Exit codes: 0 done; 2 the configuration or the data is at fault; 42 preempted after saving, run it again; 1 otherwise.
"""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from rest_jax.commands import checkpoints, compile, phases, rewards, stores, text, train_reward
from rest_jax.errors import Preempted, UserError

EXIT_OTHER, EXIT_USER, EXIT_PREEMPTED = 1, 2, 42
GIN_PREFIX = "--gin."
EPILOG = """\
Configuration is gin, searched in the working directory, --gin_search_paths and the package:
  rest_jax run --gin_file=runs/smoke.gin --gin.MODEL_DIR="'/tmp/smoke'"
Strings need quotes inside quotes. 'rest_jax COMMAND --help' lists the options of a command.

Exit codes: 0 done; 2 the configuration or the data is at fault; 42 preempted after saving (run it again); 1 otherwise.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # --gin.NAME=value is no fixed option, so it is taken out before argparse sees it.
    # T5X's two ways to write one.
    arguments = [re.sub(r"^--gin_bindings=", GIN_PREFIX, argument) for argument in arguments]
    bindings = [argument.removeprefix(GIN_PREFIX) for argument in arguments if argument.startswith(GIN_PREFIX)]
    rest = [argument for argument in arguments if not argument.startswith(GIN_PREFIX)]
    try:
        options = _parser().parse_args(rest)
    except SystemExit as stop:  # argparse has printed the help, or what it did not understand.
        return int(stop.code or 0)
    options.bindings, options.argv = bindings, ["rest_jax", *arguments]
    try:
        if bindings and not hasattr(options, "gin_file"):
            raise UserError(f"{GIN_PREFIX}{bindings[0]}: this command is not configured by gin; see its --help.")
        options.command(options)
    except UserError as error:
        print(f"rest_jax: {error}", file=sys.stderr)
        return EXIT_USER
    except Preempted as error:
        print(f"rest_jax: preempted: {error} Run the same command to continue.", file=sys.stderr)
        return EXIT_PREEMPTED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OTHER
    except Exception:
        traceback.print_exc()
        return EXIT_OTHER
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rest_jax",
        description="Reinforced Self-Training (ReST) for encoder-decoder translation models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[Any], None], help_text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        sub.set_defaults(command=command)
        return sub

    for group in (phases, text, stores, train_reward, rewards, checkpoints, compile):
        group.register(add)
    return parser
