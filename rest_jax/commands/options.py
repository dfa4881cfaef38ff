"""What commands share: gin's options, and reading the configuration that they give."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rest_jax.errors import UserError

AddCommand = Callable[[str, Callable[[Any], None], str], argparse.ArgumentParser]
"""Adds a command: its name, the function of its options, one line of help."""


def add_gin_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--gin_file",
        action="append",
        default=[],
        help="repeatable; without any, the config.gin of --model_dir; then --gin.NAME=value over them",
    )
    sub.add_argument(
        "--gin_search_paths", action="append", default=[], help="further folders for gin files, with commas between"
    )
    sub.add_argument("--model_dir", help="short for --gin.MODEL_DIR, without quotes inside quotes")
    sub.add_argument("--tfds_data_dir", help="where TFDS keeps its data sets; without it, $TFDS_DATA_DIR")


def leave_accelerators_alone() -> None:
    """For commands that compute on the host alone: another program may need this machine's accelerator."""
    # Imported here so that --help is quick; the variable by itself comes too late, JAX has read it.
    import jax

    if "JAX_PLATFORMS" not in os.environ:
        jax.config.update("jax_platforms", "cpu")


def add_process_options(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("several processes", "found by JAX on TPU VMs, GKE and Slurm; all three elsewhere")
    group.add_argument("--coordinator_address", help="HOST:PORT of process 0, the same for all")
    group.add_argument("--num_processes", type=int, help="how many there are")
    group.add_argument("--process_id", type=int, help="which one this is, from 0")
    group.add_argument(
        "--barrier_seconds", type=float, default=600.0, help="how long the others wait for one before they give up"
    )
    sub.add_argument(
        "--watchdog_seconds",
        type=float,
        help="no step, chunk or phase ended for so long: print all threads' stacks and exit with 1; must exceed what "
        "the longest compilation takes; without it, never",
    )
    sub.add_argument(
        "--profile_steps", metavar="FIRST:LAST", help="trace these training steps into MODEL_DIR/profile, e.g. 10:15"
    )
    sub.add_argument(
        "--compilation_cache_dir",
        help="where compiled programs are kept for the next start: a folder that all hosts share, or gs://; without "
        "it, $JAX_COMPILATION_CACHE_DIR",
    )


def load_config(options: Any, *, fallbacks: dict[str, str] | None = None, also: Sequence[str] = ()) -> None:
    """Parses what `--gin_file` and `--model_dir` give, the files `also` of a command, and `--gin.NAME=value`."""
    from rest_jax import config, paths, run_files

    if options.tfds_data_dir is not None:
        os.environ["TFDS_DATA_DIR"] = options.tfds_data_dir  # read by TFDS when it is imported
    files = list(options.gin_file)
    if not files and options.model_dir is not None:
        given = paths.resolve(options.model_dir) / run_files.CONFIG
        if not given.is_file():
            raise UserError(
                f"--gin_file is missing, and --model_dir {options.model_dir!r} has no {run_files.CONFIG} yet."
            )
        files = [str(given)]
    bindings = [] if options.model_dir is None else [f"MODEL_DIR={options.model_dir!r}"]
    folders = [folder for text in options.gin_search_paths for folder in text.split(",") if folder]
    for note in config.load(
        gin_files=[*files, *also], bindings=bindings + options.bindings, search_paths=folders, fallbacks=fallbacks
    ):
        print(f"rest_jax: {note}", file=sys.stderr)
