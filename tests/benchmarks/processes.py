"""The same Grow step as one process with four devices and as two with two, in turn: what processes cost.

    python -m tests.benchmarks.processes [--rounds 3] [--sources 2048]

The demo policy on the demo text. Timed from the first chunk's commit to the last one's, so without starting, compiling
and evaluating.
"""

import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {"1 x 4": (1, 4), "2 x 2": (2, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sources", type=int, default=2048)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in SHAPES}
    for number in range(options.rounds):
        # The order turns, so that a machine that gets slower favours neither.
        for name in list(SHAPES)[:: 1 if number % 2 == 0 else -1]:
            times[name].append(grow_seconds(*SHAPES[name], sources=options.sources))
            print(f"round {number + 1}: {name} {times[name][-1]:.1f} s", flush=True)
    one, two = (statistics.median(each) for each in times.values())
    for name, found in times.items():
        print(f"{name}: {statistics.median(found):.1f} s ({min(found):.1f} to {max(found):.1f})")
    print(f"2 x 2 takes {two / one:.3f} of the time of 1 x 4")


def grow_seconds(processes: int, devices: int, *, sources: int) -> float:
    """Seconds from the first chunk in the store to the last, of all processes."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_SHARE_BINARY_BETWEEN_HOSTS": "true",  # as launch/local_multiprocess.sh
            "JAX_ENABLE_COMPILATION_CACHE": "false",
        }
        command = [sys.executable, "-m", "rest_jax", "run", "--gin_file=runs/smoke.gin", f"--model_dir={folder}/run"]
        settings = {"GROW_STEPS": 1, "IMPROVE_STEPS": 0, "BC_LONG": False, "EVAL_SAMPLES": 1, "GROW_SOURCES": sources}
        command += [f"--gin.{name}={value}" for name, value in settings.items()]
        started = []
        for index in range(processes):
            own = [f"--coordinator_address={address}", f"--num_processes={processes}", f"--process_id={index}"]
            log = (Path(folder) / f"{index}.log").open("w")
            started.append(
                subprocess.Popen(command + own * (processes > 1), env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
        codes = [each.wait() for each in started]
        if any(codes):
            sys.exit("\n".join((Path(folder) / f"{index}.log").read_text() for index in range(processes)))
        commits: dict[str, float] = {}
        for path in (Path(folder) / "run" / "grow_1").glob("sources-*.arrow"):
            (chunk,) = re.findall(r"-(\d+)\.arrow$", path.name)
            commits[chunk] = max(commits.get(chunk, 0.0), path.stat().st_mtime)
        return max(commits.values()) - min(commits.values())


if __name__ == "__main__":
    main()
