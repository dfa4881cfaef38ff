"""Compiles every public model for every TPU, Grow and Improve, and writes the table of `docs/pods.md`.

    python -m tests.benchmarks.pods --json build/pods.json [--models t5_1_1_small ...] [--chips v5e ...] [--every]

Each program is compiled by one run of `python -m rest_jax compile`. What is kept is the narrowest 'model' that fits. On
one host Improve has its parameters whole on every data shard or, where those do not fit, split over 'data'; on 256
chips they are split. Data shards of a Grow step exchange nothing but two sums at its end, so a chip's program is that
of any number of them: it is compiled for one host, and for the others too with `--every`.

What stands in the file is not compiled again, so that a run that was stopped goes on.
"""

import argparse
import concurrent.futures
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

# Name of the model's gin file -> ids of its vocabulary, as `spiece.model` has them with T5's 100 sentinels, and
# parameters.
MODELS = {
    "t5_1_1_small": (32100, 77e6),
    "t5_1_1_base": (32100, 248e6),
    "t5_1_1_large": (32100, 783e6),
    "t5_1_1_xl": (32100, 2.85e9),
    "t5_1_1_xxl": (32100, 11.1e9),
    "madlad400_3b": (256000, 2.94e9),
    "madlad400_10b": (256000, 10.7e9),
}
# One host, one slice of 256 chips, two such slices.
TOPOLOGIES = {
    "v5e": {"host": ("v5e:2x4", 1), "slice": ("v5e:16x16", 1), "slices": ("v5e:16x16", 2)},
    "v5p": {"host": ("v5p:2x2x1", 1), "slice": ("v5p:4x8x8", 1), "slices": ("v5p:4x8x8", 2)},
    "v6e": {"host": ("v6e:2x4", 1), "slice": ("v6e:16x16", 1), "slices": ("v6e:16x16", 2)},
}
HBM = {"v5e": 16e9, "v5p": 95e9, "v6e": 32e9}
CHIPS = {"host": {"v5e": 8, "v5p": 4, "v6e": 8}, "slice": dict.fromkeys(TOPOLOGIES, 256)}
MODEL_PARALLEL = (1, 2, 4, 8, 16)
# Of each parameter that is whole on a data shard, the bytes that are certain to be there: a bfloat16 copy; a float32
# parameter and its gradient.
BYTES_PER_PARAMETER = {"grow": 2, "improve": 8}
SOURCES_PER_SHARD, ROWS_PER_SHARD = 8, 8
_lock = threading.Lock()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--chips", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--scales", nargs="+", default=["host", "slice", "slices"], choices=["host", "slice", "slices"])
    parser.add_argument("--phases", nargs="+", default=["grow", "improve"], choices=["grow", "improve"])
    parser.add_argument("--effort", type=float, default=0.0, help="the compiler's; less makes other, slower programs")
    parser.add_argument("--every", action="store_true", help="also Grow for more than one host")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    wanted = [
        (model, chip, scale, phase)
        for phase in options.phases
        for scale in (options.scales if phase == "improve" or options.every else ["host"])
        for chip in options.chips
        for model in options.models
        if "/".join((model, chip, scale, phase)) not in found
    ]

    def one(row: tuple[str, str, str, str]) -> None:
        started = time.monotonic()
        result = compile_row(*row, effort=options.effort)
        with _lock:
            found["/".join(row)] = result
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found, indent=1) + "\n")
            print(
                f"{'/'.join(row)} | {' | '.join(cells(row[3], result))} | {time.monotonic() - started:.0f} s",
                flush=True,
            )

    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(one, wanted))
    print(table(found))


def compile_row(model: str, chip: str, scale: str, phase: str, *, effort: float) -> dict[str, Any]:
    """What `compile` finds for the narrowest mesh that fits; why not, where none does."""
    topology, slices = TOPOLOGIES[chip][scale]
    devices = CHIPS["host" if scale == "host" else "slice"][chip] * slices
    vocabulary_size, parameters = MODELS[model]
    reason = "the parameters alone are more than the chip has"
    splits = ((False, True) if scale == "host" else (True,)) if phase == "improve" else (False,)
    for width, over_data in itertools.product(MODEL_PARALLEL, splits):
        if devices % (slices * width):
            continue
        if not over_data and BYTES_PER_PARAMETER[phase] * parameters / width > HBM[chip]:
            continue
        shards = devices // width
        bindings = {
            "VOCABULARY_SIZE": vocabulary_size,
            "MODEL_PARALLEL": width,
            "REPLICAS": slices,
            "SOURCES_PER_CHUNK": SOURCES_PER_SHARD * shards,
            "BATCH_SIZE": ROWS_PER_SHARD * shards,
        }
        if phase == "improve":
            bindings |= {"REMAT_POLICY": "'full'", "PARAMETER_PARTITIONING_DIMS": 2 if over_data else 1}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            command = [sys.executable, "-m", "rest_jax", "compile", f"--gin_file=models/{model}.gin"]
            command += ["--gin_file=tests/benchmarks/pods/pods.gin", f"--topology={topology}", f"--slices={slices}"]
            command += [f"--phase={phase}", f"--effort={effort}", f"--json={file}"]
            command += [f"--gin.{name}={value}" for name, value in bindings.items()]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                found = json.loads(file.read_text())
                return {"fits": True, "over_data": over_data, "command": command[1:], **found}
            reason = done.stderr.strip().splitlines()[-1]
            # What does not fit, or does not divide, may do so on a wider mesh; any other error is one of this script's.
            if done.returncode != 2 or not ("does not fit" in reason or "divided" in reason):
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return {"fits": False, "reason": reason}


def compiled(found: dict[str, Any], model: str, chip: str, scale: str, phase: str) -> dict[str, Any] | None:
    """What the file has of a row; of a Grow step its data shard's program, compiled for one host."""
    row: dict[str, Any] | None = found.get(f"{model}/{chip}/{scale}/{phase}")
    if row is not None or phase == "improve":
        return row
    row = found.get(f"{model}/{chip}/host/{phase}")
    if row is None or not row["fits"]:
        return row
    slices = TOPOLOGIES[chip][scale][1]
    devices = CHIPS["slice"][chip] * slices
    width = row["mesh"]["model"]
    (program,) = row["programs"]
    total = program["tokens_per_second_per_device"] * devices
    return row | {
        "devices": devices,
        "mesh": {"replica": slices, "data": devices // slices // width, "model": width},
        "programs": [program | {"tokens_per_second": total}],
    }


def cells(phase: str, result: dict[str, Any] | None) -> list[str]:
    """One phase's part of a row of the table."""
    width = 5 if phase == "grow" else 4
    if result is None or not result["fits"]:
        return ["not compiled" if result is None else "no mesh fits", *[""] * (width - 1)]
    (found,) = result["programs"]
    mesh = " x ".join(str(size) for size in result["mesh"].values())
    return [
        f"{mesh}, over data" if result["over_data"] else mesh,
        *([str(found["slots"])] if phase == "grow" else []),
        f"{found['total'] / 2**30:.1f} of {found['hbm'] / 2**30:.1f}",
        f"{found['tokens_per_second_per_device']:,.0f}",
        f"{found['roofline_share']:.0%}",
    ]


def table(found: dict[str, Any]) -> str:
    """A row for each model and topology; `found` by 'model/chip/scale/phase'."""
    head = ["model", "topology"]
    for phase in ("Grow", "Improve"):
        head += [f"{phase}: mesh", *(["slots"] if phase == "Grow" else []), "GiB", "tokens/s", "roofline"]
    rows = [head, ["---"] * len(head)]
    for chip, scales in TOPOLOGIES.items():
        for scale, (topology, slices) in scales.items():
            for model in MODELS:
                results = {phase: compiled(found, model, chip, scale, phase) for phase in ("grow", "improve")}
                if any(results.values()):
                    where = topology if slices == 1 else f"{slices} x {topology}"
                    rows.append([model, where, *cells("grow", results["grow"]), *cells("improve", results["improve"])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
