"""Runs of several real processes on one machine, over gloo: the same run as of one process, also when some die.

What may differ. All samples are the same bit for bit for the same parameters. A gradient is a sum over the batch's
tokens, and float32 adds up n terms with a relative error of at most (n - 1) u, u = 2^-24, in whatever order; other
numbers of devices add in another order. A batch here has fewer than 8 x 24 target tokens, so two gradients differ by
less than 2 * 192 u = 2.3e-5 of their terms' size. Adafactor divides an update by its own root mean square, and clips it
to 1, so a parameter moves by about the learning rate (1e-2 of the parameters' scale, at most 1) a step whatever the
gradient's size; the relative error of an update that is no smaller than the others is again the gradient's. Over the
8 + 4 steps of BC and Improve, parameters may so differ by 12 * 1e-2 * 2.3e-5 = 2.8e-6 where errors only add up; each
step also works on parameters that differ already, for which we allow a factor of 10.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rest_jax.data.store import ScoredStore
from tests.rewards.tiny_embeddings import write_model
from tests.tiny_project import make_project

pytestmark = pytest.mark.multiprocess
TOLERANCE = 3e-5
BARRIER_SECONDS = 40
CONFIG = """
from rest_jax.rewards import embeddings

TRAIN_STEPS = 8
MICROBATCHES = 1
EVAL_PERIOD = 4
BC_LONG = False
SOURCES_PER_CHUNK = 8
IMPROVE_TRAIN_STEPS = 4
IMPROVE_EVAL_PERIOD = 2
improve/training.Training.checkpoint_period = 1
REWARD = @embeddings.StaticEmbeddings()
embeddings.StaticEmbeddings.directory = 'embeddings'
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # The last chunk has fewer sources than there are rows, and with four processes some have none.
    root = tmp_path_factory.mktemp("pods")
    make_project(root, sizes={"train": 49, "validation": 8, "test": 8}, config=CONFIG)
    # A learned reward, which the run audits on sentences that are short enough.
    write_model(root / "embeddings", shared=True)
    short = sorted((root / "train.tsv").read_text().splitlines(keepends=True), key=len)[:8]
    (root / "validation.tsv").write_text("".join(short))
    return root


def start(
    project: Path, model_dir: Path, *, processes: int, of_the_last: Sequence[str] = ()
) -> list[subprocess.Popen[str]]:
    """The real command, with two devices a process; what each prints goes to MODEL_DIR.N.log."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": os.pathsep.join([str(project), os.environ.get("PYTHONPATH", "")]),
        # One process compiles for all: they share this machine's cores, and gloo gives up on one that is 30 s late.
        # Not with a cache on disk: a process that finds a program there gives nothing to the others, who wait for it.
        "JAX_SHARE_BINARY_BETWEEN_HOSTS": "true",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    started = []
    for index in range(processes):
        command = [sys.executable, "-m", "rest_jax", "run", "--gin_file=tiny.gin", f"--model_dir={model_dir}"]
        if processes > 1:
            command += [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={index}"]
            command += [f"--barrier_seconds={BARRIER_SECONDS}"]
        if index == processes - 1:
            command += of_the_last
        with log_of(model_dir, index).open("w") as log:
            started.append(subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=log, text=True))
    return started


def log_of(model_dir: Path, index: int) -> Path:
    return model_dir.with_name(f"{model_dir.name}.{index}.log")


def finish(started: Sequence[subprocess.Popen[str]], model_dir: Path) -> None:
    try:
        for index, process in enumerate(started):
            assert process.wait(timeout=400) == 0, log_of(model_dir, index).read_text()
    finally:
        for process in started:
            process.kill()


def run(project: Path, name: str, *, processes: int) -> Path:
    model_dir = project / name
    finish(start(project, model_dir, processes=processes), model_dir)
    return model_dir


@pytest.fixture(scope="module")
def one(project: Path) -> Path:
    return run(project, "one", processes=1)


def rows(model_dir: Path) -> list[dict[str, Any]]:
    """The store's rows in order of (source, sample)."""
    table = ScoredStore.open(model_dir / "grow_1").rows
    return sorted(table.to_pylist(), key=lambda row: (row["source_id"], row["sample_id"]))


def parameters(directory: Path) -> dict[str, np.ndarray]:
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(directory).item_metadata.tree
        numpy_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = checkpointer.restore(directory, args=ocp.args.PyTreeRestore(restore_args=numpy_arrays))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_same_run(model_dir: Path, other: Path) -> None:
    mine, theirs = rows(model_dir), rows(other)
    assert len(mine) == len(theirs) > 40
    for row, same in zip(mine, theirs, strict=True):
        exact = {key: value for key, value in row.items() if not isinstance(value, float)}
        assert exact == {key: same[key] for key in exact}
        for key in row.keys() - exact.keys():
            # A log-probability adds up to 24 tokens' of about 6 each, from logits that parameters' errors move.
            np.testing.assert_allclose(row[key], same[key], atol=24 * TOLERANCE, err_msg=key)
    for folder in ("bc/checkpoint_8", "grow_1/improve_1/checkpoint_4", "policy"):
        first, second = (parameters(run / folder / "state") for run in (model_dir, other))
        assert first.keys() == second.keys()
        for name, value in first.items():
            np.testing.assert_allclose(value, second[name], rtol=0, atol=TOLERANCE, err_msg=f"{folder} {name}")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (model_dir, other)]
    for phase, same in zip(*(summary["phases"] for summary in summaries), strict=True):
        for key in phase.keys() - {"seconds"}:
            close = pytest.approx(same[key], abs=1e-4) if isinstance(phase[key], float) else same[key]
            if key not in ("history", "best_of_n"):
                assert phase[key] == close, (phase["name"], key)
            else:
                np.testing.assert_allclose(phase[key], same[key], atol=1e-4)
    audits = [json.loads((folder / "audit.json").read_text()) for folder in (model_dir, other)]
    assert audits[0] == audits[1] and audits[0]["pairs"] > 0


def test_two_processes_make_the_run_of_one(project: Path, one: Path) -> None:
    two = run(project, "two", processes=2)
    check_same_run(two, one)
    # Both drew and stored; the first alone wrote what there is one of.
    assert {path.name.split("-")[1] for path in (two / "grow_1").glob("part-*.arrow")} == {"00000", "00001"}
    assert "mean reward" in log_of(two, 0).read_text() and "mean reward" not in log_of(two, 1).read_text()
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert len({(line["phase"], line["step"], *sorted(line)) for line in lines}) == len(lines)


@pytest.mark.slow
def test_four_processes_make_the_run_of_one(project: Path, one: Path) -> None:
    check_same_run(run(project, "four", processes=4), one)


def kill_one_in(project: Path, model_dir: Path, *, begun: Callable[[], bool]) -> None:
    """Kills process 1 of 2 once `begun`; the other must end by itself, in time, and say who is lost.

    It notices by a broken connection or at a barrier, and exits with 1; or, where it waits inside a program, JAX
    notices that heartbeats stopped, says so and aborts.
    """
    started = start(project, model_dir, processes=2)
    try:
        while not begun():
            assert all(process.poll() is None for process in started), log_of(model_dir, 0).read_text()
            time.sleep(0.005)
        started[1].send_signal(signal.SIGKILL)
        code = started[0].wait(timeout=2 * BARRIER_SECONDS)
        assert code in (1, -signal.SIGABRT), log_of(model_dir, 0).read_text()
    finally:
        for process in started:
            process.kill()
    said = r"waited \d+ s at .* for process 1 of 2" if code == 1 else r"stopped sending heartbeats\):\n1\n"
    assert re.search(said, log_of(model_dir, 0).read_text())


@pytest.mark.slow
def test_a_setting_that_is_wrong_on_one_host_is_said_there_and_not_tried_again(project: Path) -> None:
    model_dir = project / "wrong"
    first, last = start(project, model_dir, processes=2, of_the_last=["--gin.NUM_SAMPLE=3"])
    try:
        assert last.wait(timeout=200) == 2
        assert "NUM_SAMPLE" in log_of(model_dir, 1).read_text()
        # The other one is told nothing; it waits, and names who did not come, or JAX ends it.
        assert first.wait(timeout=200) in (1, -signal.SIGABRT)
    finally:
        first.kill()
        last.kill()


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_run_goes_on_with_any_number(project: Path, one: Path) -> None:
    model_dir = project / "killed"
    grow = model_dir / "grow_1"
    kill_one_in(project, model_dir, begun=lambda: any(grow.glob("sources-*.arrow")))
    assert not (grow / "DONE").exists(), "Grow was over: nothing was tested"
    kill_one_in(project, model_dir, begun=lambda: (grow / "improve_1" / "checkpoint_1").exists())
    assert not (grow / "improve_1" / "RESULT.json").exists(), "Improve was over: nothing was tested"
    finish(start(project, model_dir, processes=1), model_dir)
    check_same_run(model_dir, one)
