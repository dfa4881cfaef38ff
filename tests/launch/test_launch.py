"""The launch scripts: what a dry run prints, what a real process gets of signals, and the JobSet's schema."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
MODEL_DIR = "--gin.MODEL_DIR='gs://bucket/a run'"
RUN = ("run", "--gin_file=runs/own_text.gin", MODEL_DIR)
QUOTED = r"run --gin_file=runs/own_text.gin --gin.MODEL_DIR=\'gs://bucket/a\ run\'"
TPU = {"PROJECT": "p", "ZONE": "z", "TPU_NAME": "t"}
GKE = {
    "JOB_NAME": "rest", "NAMESPACE": "team", "IMAGE": "registry/rest_jax:1", "TPU_ACCELERATOR": "tpu-v5-lite-podslice",
    "TPU_TOPOLOGY": "16x16", "SLICES": "2", "HOSTS_PER_SLICE": "64", "CHIPS_PER_HOST": "4", "MAX_RESTARTS": "3",
}  # fmt: skip

# Stands in for rest_jax: the same way to stop, without its compilation.
FAKE = """\
import os, sys, time
from rest_jax.preemption import stop_on_sigterm
number = next((a.split("=")[1] for a in sys.argv if a.startswith("--process_id=")), "0")
print("started", *sys.argv[1:], os.environ["JAX_PLATFORMS"], flush=True)
codes = os.environ.get("EXIT_CODES")
if codes:
    sys.exit(int(codes.split()[int(number)]))
with stop_on_sigterm() as stop_requested:
    print("ready", flush=True)
    while not stop_requested():
        time.sleep(0.05)
print("saved", flush=True)
sys.exit(42)
"""


def environment(**variables):
    kept = {name: value for name, value in os.environ.items() if name not in {*TPU, *GKE, "XLA_FLAGS", "DEVICES"}}
    return {**kept, **variables}


def call(script, *arguments, **variables):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments], env=environment(**variables), capture_output=True, text=True
    )


def dry(script, *arguments, **variables):
    done = call(script, "--dry_run", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    done = subprocess.run(
        [str(Path(sys.executable).with_name("shellcheck")), "-x", "-P", str(LAUNCH), str(script)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "lines"),
    [
        ("local.sh", RUN, {}, [f"env JAX_PLATFORMS=cpu python -m rest_jax {QUOTED}"]),
        (
            "local.sh",
            ("filter", "--store=x"),
            {"DEVICES": "4", "PYTHON": "/py"},
            [
                "env JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4 /py -m rest_jax filter "
                "--store=x"
            ],
        ),
        (
            "local_multiprocess.sh",
            ("2", *RUN),
            {"DEVICES": "2"},
            [
                "env JAX_PLATFORMS=cpu JAX_SHARE_BINARY_BETWEEN_HOSTS=true JAX_ENABLE_COMPILATION_CACHE=false "
                "XLA_FLAGS=--xla_force_host_platform_device_count=2 python -u -m rest_jax "
                f"{QUOTED} --coordinator_address=127.0.0.1:PORT --num_processes=2 --process_id={number}"
                for number in range(2)
            ],
        ),
        (
            "tpu_vm.sh",
            ("create",),
            {**TPU, "ACCELERATOR_TYPE": "v5litepod-256", "RUNTIME_VERSION": "r", "SPOT": "true"},
            [
                "gcloud compute tpus queued-resources create t --node-id=t --project=p --zone=z "
                "--accelerator-type=v5litepod-256 --runtime-version=r --spot",
                r"gcloud compute tpus queued-resources describe t --project=p --zone=z --format=value\(state.state\)",
            ],
        ),
        (
            "tpu_vm.sh",
            ("delete",),
            TPU,
            ["gcloud compute tpus queued-resources delete t --project=p --zone=z --force --quiet"],
        ),
        (
            "slurm.sbatch",
            RUN,
            {},
            [f"srun --kill-on-bad-exit=0 --wait=900 python -u -m rest_jax {QUOTED}"],
        ),
    ],
)
def test_a_dry_run_prints_what_would_be_run(script, arguments, variables, lines):
    assert dry(script, *arguments, **variables) == lines


@pytest.mark.parametrize(
    ("arguments", "variables", "on_the_host"),
    [
        (
            RUN,
            {},
            f"rm -f ~/rest_jax.stopped ~/rest_jax.exit; ~/rest_jax/bin/python -u -m rest_jax {QUOTED}; "
            "echo $? > ~/rest_jax.exit",
        ),
        (
            ("install",),
            {"SOURCE": "rest_jax @ git+https://host/x"},
            "curl -LsSf https://astral.sh/uv/install.sh | sh && "
            "~/.local/bin/uv venv --quiet --allow-existing --python 3.12 ~/rest_jax "
            "&& ~/.local/bin/uv pip install --quiet --python ~/rest_jax/bin/python "
            r"rest_jax\ @\ git+https://host/x 'jax[tpu]'",
        ),
        (
            ("stop",),
            {},
            "touch ~/rest_jax.stopped; pkill -TERM -f '^[^ ]*/rest_jax/bin/python -u -m rest_jax ' || true",
        ),
    ],
    ids=["run", "install", "stop"],
)
def test_a_tpu_vms_hosts_get_one_command_line(arguments, variables, on_the_host):
    first, *_ = dry("tpu_vm.sh", *arguments, **TPU, **variables)
    *command, last = shlex.split(first)
    assert command == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "t", "--project=p", "--zone=z", "--worker=all"]
    assert last == f"--command={on_the_host}"


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "message"),
    [
        ("tpu_vm.sh", ("run",), {"PROJECT": "p"}, "set ZONE TPU_NAME"),
        ("tpu_vm.sh", ("create",), TPU, "set ACCELERATOR_TYPE RUNTIME_VERSION"),
        ("gke.sh", ("run",), {**GKE, "IMAGE": ""}, "set IMAGE"),
        ("local_multiprocess.sh", ("run", "--gin_file=x"), {}, "N is 'run'"),
        ("local.sh", (), {}, "launch/local.sh [--dry_run] COMMAND"),
        ("slurm.sbatch", (), {}, "sbatch --nodes=4"),
    ],
)
def test_what_is_missing_is_named_before_anything_runs(script, arguments, variables, message):
    done = call(script, *arguments, **variables)
    assert done.returncode == 2 and message in done.stderr and not done.stdout


# The JobSet ----------------------------------------------------------------------------------------------------------

# Of jobset.x-k8s.io/v1alpha2, the part that launch/jobset.yaml uses; Kubernetes' own schemas hold for the Job in it.
JOBSET = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["replicatedJobs"],
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["name", "action"],
                                "properties": {
                                    "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {
                                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                                    },
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {"enum": ["PodFailurePolicy", "BackoffLimitExceeded"]},
                                    },
                                    "onJobFailureMessagePatterns": {"type": "array", "items": {"type": "string"}},
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "required": ["name", "template"],
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {"type": "object"},
                        },
                    },
                },
            },
        },
    },
}


def jobset(*arguments):
    *lines, command = dry("gke.sh", *arguments, **GKE)
    assert command == "kubectl create --filename=-"
    return yaml.safe_load("\n".join(lines))


def test_the_jobset_is_one_by_its_schema_and_kubernetes():
    manifest = jobset(*RUN, "--gin.X='$(HOME)'")
    jsonschema.validate(manifest, JOBSET)
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **replicated["template"]}
    kubernetes_validate.validate(job, "1.31", strict=True)
    assert (replicated["replicas"], job["spec"]["parallelism"], job["spec"]["completions"]) == (2, 64, 64)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == [*RUN, "--gin.X='$$(HOME)'"]  # Kubernetes makes $(HOME) of it


def test_a_broken_job_would_be_found():
    (replicated,) = jobset(*RUN)["spec"]["replicatedJobs"]
    replicated["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] = ["2"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}, **replicated["template"]}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


@pytest.mark.parametrize(
    ("message", "action"),
    [
        ("failed with exit code 2 matching FailJob rule at index 0", "FailJobSet"),
        ("failed with exit code 42 matching FailJob rule at index 1", "RestartJobSetAndIgnoreMaxRestarts"),
        ("has condition DisruptionTarget matching FailJob rule at index 2", "RestartJobSetAndIgnoreMaxRestarts"),
        ("Job has reached the specified backoff limit", None),
    ],
)
def test_exit_codes_lead_to_what_the_design_says(message, action):
    # The first rule that matches counts; the patterns are regular expressions.
    import re

    rules = jobset(*RUN)["spec"]["failurePolicy"]["rules"]
    matching = [
        rule["action"] for rule in rules if any(re.search(p, message) for p in rule["onJobFailureMessagePatterns"])
    ]
    assert matching[:1] == ([] if action is None else [action])


# Real processes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_python(tmp_path):
    """An interpreter that runs FAKE in place of rest_jax."""
    (tmp_path / "fake.py").write_text(FAKE)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(tmp_path / "fake.py"))} "$@"\n')
    script.chmod(0o755)
    return str(script)


def start(script, *arguments, ready, **variables):
    """The script's process, when its output has said "ready" so often."""
    process = subprocess.Popen(
        ["bash", str(LAUNCH / script), *arguments],
        env=environment(PYTHONPATH=str(ROOT), PORT="1", **variables), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = []
    while sum("ready" in line for line in lines) < ready:
        line = process.stdout.readline()
        assert line, lines
        lines.append(line)
    return process, lines


@pytest.mark.parametrize(
    ("script", "arguments", "count"), [("local.sh", ("run", "x"), 1), ("local_multiprocess.sh", ("3", "run", "x"), 3)]
)
def test_sigterm_reaches_the_processes_and_their_exit_code_comes_back(fake_python, script, arguments, count):
    process, lines = start(script, *arguments, ready=count, PYTHON=fake_python)
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 42
    assert sum("saved" in line for line in rest.splitlines()) == count
    assert all(" run x" in line for line in lines if "started" in line)


@pytest.mark.parametrize(
    ("codes", "expected"), [("0 0 0", 0), ("0 42 1", 42), ("1 42 2", 2), ("0 0 1", 1), ("42 0 42", 42)]
)
def test_the_exit_code_of_several_processes(fake_python, codes, expected):
    done = call(
        "local_multiprocess.sh", "3", "run", PYTHON=fake_python, PORT="1", EXIT_CODES=codes, PYTHONPATH=str(ROOT)
    )
    assert done.returncode == expected
    assert {line[:3] for line in done.stdout.splitlines()} == {"[0]", "[1]", "[2]"}


def test_what_a_failed_process_leaves_behind_is_killed_after_the_grace(fake_python, tmp_path):
    waiting = tmp_path / "waiting"
    waiting.write_text('#!/bin/sh\ncase "$*" in *process_id=0*) exit 1;; esac\ntrap "" TERM\nexec sleep 600\n')
    waiting.chmod(0o755)
    begun = time.monotonic()
    done = call("local_multiprocess.sh", "2", "run", PYTHON=str(waiting), PORT="1", GRACE_SECONDS="1")
    assert done.returncode == 1 and "killing" in done.stderr
    assert time.monotonic() - begun < 60
