"""A run that is killed in any phase, and continued by the same command, ends with the same bytes as one left alone."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rest_jax.data.store import ScoredStore
from tests.tiny_project import make_project

SIZES = {"train": 96, "validation": 12, "test": 8}
PREEMPTED = 42
POLICIES = ("bc", "grow_1/improve_1", "bc_long")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"), sizes=SIZES)


def start(project: Path, model_dir: Path) -> subprocess.Popen[str]:
    """The real command, in a process group of its own."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # The model is so small that compiling it is nearly all there is to do.
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": str(project),
        # Compiled programs are the same each time; taking them from a cache only saves the tests' time.
        "JAX_COMPILATION_CACHE_DIR": str(project / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "rest_jax", "run", "--gin_file=tiny.gin", f"--gin.MODEL_DIR='{model_dir}'"]
    return subprocess.Popen(
        command, cwd=project, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], *, code: int) -> str:
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def stop_in(
    project: Path, model_dir: Path, *, phase: str, begun: Callable[[Path], bool], by: signal.Signals, code: int
) -> None:
    """Starts the command, and sends the signal once `begun` says that the phase is under way."""
    directory = model_dir / phase
    process = start(project, model_dir)
    while not begun(directory):
        if process.poll() is not None:
            pytest.fail(f"{phase} was over before it was seen to begin:\n{finish(process, code=0)}")
        time.sleep(0.002)
    process.send_signal(by)
    finish(process, code=code)
    assert not (directory / "RESULT.json").exists(), f"{phase} was already finished: nothing was tested"


def has_checkpoint(directory: Path) -> bool:
    """A whole checkpoint beyond that of the first measurement: Orbax writes to another name, and renames."""
    return any(re.fullmatch(r"checkpoint_[1-9]\d*", path.name) for path in directory.glob("checkpoint_*"))


def has_part(directory: Path) -> bool:
    return any(directory.glob("sources-*.arrow"))


@pytest.fixture(scope="module")
def uninterrupted(project: Path) -> Path:
    model_dir = project / "uninterrupted"
    finish(start(project, model_dir), code=0)
    return model_dir


@pytest.fixture(scope="module")
def interrupted(project: Path, uninterrupted: Path) -> Path:
    """The same run, killed in BC, in Grow and in Improve, then asked to stop in the control run."""
    model_dir = project / "interrupted"
    kill = {"by": signal.SIGKILL, "code": -signal.SIGKILL}
    stop_in(project, model_dir, phase="bc", begun=has_checkpoint, **kill)
    stop_in(project, model_dir, phase="grow_1", begun=has_part, **kill)
    stop_in(project, model_dir, phase="grow_1/improve_1", begun=has_checkpoint, **kill)
    stop_in(project, model_dir, phase="bc_long", begun=has_checkpoint, by=signal.SIGTERM, code=PREEMPTED)
    finished = files(model_dir, "bc", "grow_1", "eval")
    finish(start(project, model_dir), code=0)
    after = files(model_dir, "bc", "grow_1", "eval")
    assert {path: after[path] for path in finished} == finished, "a finished phase was written again"
    return model_dir


def files(model_dir: Path, *folders: str) -> dict[Path, int]:
    """Times of all files in these folders."""
    paths = [path for folder in folders for path in (model_dir / folder).rglob("*")]
    return {path: path.stat().st_mtime_ns for path in paths if path.is_file()}


def mark(model_dir: Path, name: str) -> dict[str, Any]:
    """A commit mark without its time."""
    return {key: value for key, value in json.loads((model_dir / name).read_text()).items() if key != "seconds"}


def checkpoints(model_dir: Path) -> dict[str, np.ndarray]:
    """Every array of every checkpoint that is there: parameters, optimiser states, steps; and the last policy's."""
    found = {}
    for directory in sorted([*model_dir.rglob("checkpoint_*/state"), *model_dir.glob("policy/state")]):
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(directory).item_metadata.tree
            numpy_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            tree = checkpointer.restore(directory, args=ocp.args.PyTreeRestore(restore_args=numpy_arrays))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            found[f"{directory.relative_to(model_dir)}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return found


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_parameters_are_the_same_bit_for_bit(uninterrupted: Path, interrupted: Path):
    first, second = checkpoints(uninterrupted), checkpoints(interrupted)
    assert first.keys() == second.keys()
    assert {name.split("/checkpoint_")[0] for name in first if "checkpoint_" in name} == set(POLICIES)
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        np.testing.assert_array_equal(value, second[name], err_msg=name)


def test_the_run_trained_something(uninterrupted: Path):
    """Guards the test above: equal parameters would mean nothing if no phase moved them."""
    values = checkpoints(uninterrupted)
    last = {
        name.split("/state")[0]: value
        for name, value in values.items()
        if "checkpoint_32/" in name and "target" in name and "embedding" in name
    }
    assert len(last) == len(POLICIES)
    for (first, a), (second, b) in itertools.combinations(last.items(), 2):
        assert not np.array_equal(a, b), (first, second)


def test_stores_have_the_same_rows(uninterrupted: Path, interrupted: Path):
    first, second = (ScoredStore.open(directory / "grow_1") for directory in (uninterrupted, interrupted))
    assert len(first.source_ids) == SIZES["train"]
    assert first.rows.equals(second.rows)
    for name in ("source_ids", "rewards", "valid", "reference_rewards"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    assert first.stats == second.stats


def test_marks_and_evaluations_are_the_same(uninterrupted: Path, interrupted: Path):
    names = sorted(str(path.relative_to(uninterrupted)) for path in uninterrupted.glob("eval/*"))
    assert len(names) == 3 * len(POLICIES)  # a mark, translations and samples each
    for name in names:
        if name.endswith(".jsonl"):
            assert lines(uninterrupted / name) == lines(interrupted / name), name
        else:
            assert mark(uninterrupted, name) == mark(interrupted, name), name
    for phase in (*POLICIES, "grow_1"):
        assert mark(uninterrupted, f"{phase}/RESULT.json") == mark(interrupted, f"{phase}/RESULT.json"), phase


def test_measurements_stand_once_in_the_metrics(uninterrupted: Path, interrupted: Path):
    def measured(model_dir: Path) -> list[tuple[str, int, float]]:
        rows = lines(model_dir / "metrics.jsonl")
        return [(row["phase"], row["step"], row["eval/reward"]) for row in rows if "eval/reward" in row]

    assert measured(uninterrupted) == measured(interrupted)
    assert len(measured(uninterrupted)) == 2 + 2 * 3  # bc at 16 and 32, the others at 0 too


def test_summaries_differ_in_times_alone(uninterrupted: Path, interrupted: Path):
    def timeless(model_dir: Path) -> dict[str, Any]:
        summary = json.loads((model_dir / "summary.json").read_text())
        phases = [{key: value for key, value in phase.items() if key != "seconds"} for phase in summary["phases"]]
        # The configurations name different MODEL_DIRs.
        return {**summary, "phases": phases, "config_sha256": None}

    assert timeless(uninterrupted) == timeless(interrupted)
    assert [phase["name"] for phase in timeless(uninterrupted)["phases"]] == [
        "bc", "grow_1", "improve_1.1", "bc_long",
    ]  # fmt: skip
