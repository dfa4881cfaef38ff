"""The commands.

Exit codes: 0 done; 2 the configuration or the data is at fault; 42 preempted after saving, run it again; 1 anything else.
"""

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rest_jax.errors import Preempted, UserError

EXIT_USER, EXIT_PREEMPTED = 2, 42
GIN_PREFIX = "--gin."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # --gin.NAME=value is no fixed option, so it is taken out before argparse sees it.
    bindings = [argument.removeprefix(GIN_PREFIX) for argument in arguments if argument.startswith(GIN_PREFIX)]
    rest = [argument for argument in arguments if not argument.startswith(GIN_PREFIX)]
    options = _parser().parse_args(rest)
    options.bindings = bindings
    try:
        options.command(options)
    except UserError as error:
        print(f"rest_jax: {error}", file=sys.stderr)
        return EXIT_USER
    except Preempted as error:
        print(f"rest_jax: preempted: {error} Run the same command to continue.", file=sys.stderr)
        return EXIT_PREEMPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rest_jax", description="Reinforced Self-Training for encoder-decoder translation models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[Any], None], text: str, *, gin: bool) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        if gin:
            sub.add_argument("--gin_file", action="append", default=[], help="repeatable; searched in the package")
            sub.add_argument("--dry_run", action="store_true", help="check everything, print the plan, write nothing")
        return sub

    add("run", _run, "Algorithm 1: BC, then Grow and Improve, each followed by its evaluation.", gin=True)
    add("train", _train, "BC alone: train a policy on D.", gin=True)
    return parser


def _run(options: Any) -> None:
    _execute(options, kinds=None)


def _train(options: Any) -> None:
    _execute(options, kinds=("bc",))


def _execute(options: Any, *, kinds: Sequence[str] | None) -> None:
    """Runs the phases of the given kinds, with the evaluation of the policies they train."""
    import gin

    from rest_jax import config
    from rest_jax.rest import ReST, Runner

    config.load(gin_files=options.gin_file, bindings=options.bindings)
    runner = Runner(gin.get_configurable(ReST)(), stop_requested=_stop_on_sigterm())
    runner.run()


def _stop_on_sigterm() -> Callable[[], bool]:
    """A function that says whether SIGTERM has arrived; the run then saves and exits with 42."""
    requested = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: requested.set())
    return requested.is_set
