"""What the scripts for TPU VMs and Slurm do with exit codes and SIGTERM; gcloud, srun and scontrol have stand-ins."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"

# In place of rest_jax: exits with the next code of the file `codes`; "wait" is a run that SIGTERM ends.
FAKE = """\
import os, signal, sys, time
from pathlib import Path
code, *rest = Path("codes").read_text().split()
Path("codes").write_text(" ".join(rest))
if code != "wait":
    sys.exit(int(code))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
Path("pid").write_text(str(os.getpid()))
print("ready", flush=True)
time.sleep(600)
"""

STANDINS = {
    # One host, this one: what ssh would give to its shell.
    "gcloud": 'for last; do :; done\nexec bash -c "${last#--command=}"',
    # Only among the processes of the test.
    "pkill": f'exec {shutil.which("pkill")} --session "$SESSION" "$@"',
    # As Slurm's: SIGTERM kills the tasks.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\n"$@" &\ntrap "kill -KILL $!" TERM\nwait $!',
    "scontrol": 'echo "$@" >> scontrol.log',
    "sleep": "",
}


@pytest.fixture
def run(tmp_path):
    """Starts a script among stand-ins; `codes` is what rest_jax does when it is started, time after time."""
    (tmp_path / "rest_jax" / "bin").mkdir(parents=True)
    (tmp_path / "rest_jax" / "__main__.py").write_text(FAKE)
    (tmp_path / "rest_jax" / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "bin").mkdir()
    for name, body in STANDINS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def start(script, *arguments, codes=None, **variables):
        if codes is not None:
            (tmp_path / "codes").write_text(codes)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTHONPATH"))}
        return subprocess.Popen(
            ["bash", str(LAUNCH / script), *arguments],
            env={
                **kept, "HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                "PROJECT": "p", "ZONE": "z", "TPU_NAME": "t", "SLURM_JOB_ID": "7",
                "PYTHON": sys.executable, **variables,
            },
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    return start


def end(process):
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize(
    ("codes", "left", "expected"),
    [("0 0", "0", 0), ("42 42 42 0", "", 0), ("2 0", "0", 2), ("1 1 1 0", "0", 1), ("1 42 1 0", "", 0)],
)
def test_a_tpu_vms_run_is_begun_again_as_its_exit_code_says(run, tmp_path, codes, left, expected):
    assert end(run("tpu_vm.sh", "run", "x", codes=codes, MAX_RESTARTS="2")) == expected
    assert (tmp_path / "codes").read_text() == left


@pytest.mark.skipif(shutil.which("pkill") is None, reason="pkill is not installed")
def test_stop_ends_a_tpu_vms_run_for_good(run, tmp_path):
    running = run("tpu_vm.sh", "run", "x", codes="wait 0")
    assert running.stdout.readline() == "ready\n"
    assert end(run("tpu_vm.sh", "stop", SESSION=str(running.pid))) == 0
    assert end(running) == 42
    assert (tmp_path / "codes").read_text() == "0"  # not begun again


def test_a_slurm_job_that_sigterm_ended_queues_itself_again(run, tmp_path):
    job = run("slurm.sbatch", "run", "x", codes="wait")
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGTERM)  # to the batch shell, as `scancel --full` does, and no further
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)  # to the steps' tasks, as --signal=TERM does
    assert end(job) == 42
    assert "#SBATCH --signal=TERM@120\n" in (LAUNCH / "slurm.sbatch").read_text()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"


@pytest.mark.parametrize("code", ["0", "1", "2"])
def test_a_slurm_job_that_ended_otherwise_does_not(run, tmp_path, code):
    assert end(run("slurm.sbatch", "run", "x", codes=code)) == int(code)
    assert not (tmp_path / "scontrol.log").exists()


@pytest.mark.parametrize("tasks", [{}, {"SLURM_NTASKS_PER_NODE": "2"}])
def test_gpus_that_no_process_would_use_are_refused(run, tasks):
    job = run("slurm.sbatch", "run", "x", SLURM_GPUS_ON_NODE="8", **tasks)
    _, message = job.communicate(timeout=60)
    assert job.returncode == 2 and "--ntasks-per-node=8" in message
