"""Time and peak memory of `rest_jax import`, of a synthetic Hugging Face checkpoint with random float32 weights.

    python -m tests.benchmarks.importing --size 3b --directory /some/large/disk

The import runs in a process of its own; the peak is what the operating system counts for it (ru_maxrss), with the
program itself, whose share is printed too. The checkpoint (11.4 GB of 3b) and the copy need twice its size on the disk.
With --to t5x or hugging_face, the import is exported again and measured likewise.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from rest_jax.checkpoints import hugging_face, model_config, tensors
from rest_jax.models import t5

SIZES = {
    "tiny": t5.T5Config(1024, 64, 2, 2, 2, 32, 128),
    "small": t5.T5Config(32128, 512, 6, 8, 8, 64, 1024),
    "base": t5.T5Config(32128, 768, 12, 12, 12, 64, 2048),
    "3b": t5.T5Config(32128, 2048, 32, 24, 24, 64, 5120),
}


def random_tensor(shape: tuple[int, ...], seed: int) -> tensors.LazyTensor:
    def read(index: tensors.Index) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal(shape, np.float32)[index]

    return tensors.LazyTensor(shape, np.dtype(np.float32), read)


def write_checkpoint(folder: Path, config: t5.T5Config) -> dict[str, tensors.LazyTensor]:
    folder.mkdir(parents=True)
    shapes = model_config.expected_shapes(config)
    leaves = {name: random_tensor(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    hugging_face.write_weights(folder, leaves, config=config)
    hugging_face.write_config(folder, config=config, dtype="float32", eos_id=None)
    return leaves


def measure(arguments: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in bytes of a Python process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--directory", type=Path, required=True, help="must not exist; removed at the end")
    parser.add_argument("--to", choices=("t5x", "hugging_face"), help="also export what was imported")
    options = parser.parse_args()
    options.directory.mkdir(parents=True)
    try:
        source, ours = options.directory / "theirs", options.directory / "ours"
        leaves = write_checkpoint(source, SIZES[options.size])
        size, largest = sum(leaf.nbytes for leaf in leaves.values()), max(leaf.nbytes for leaf in leaves.values())
        count = sum(math.prod(leaf.shape) for leaf in leaves.values())
        print(f"{options.size}: {count:,} parameters, {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB")
        _, program = measure(["-c", "import rest_jax.checkpoints.commands, jax; jax.devices()"])
        print(f"the program alone: peak {program / 1e6:.0f} MB")
        commands = {"import": ["import", str(source), str(ours)]}
        if options.to is not None:
            commands["export"] = ["export", str(ours), str(options.directory / "exported"), f"--format={options.to}"]
        for name, command in commands.items():
            seconds, peak = measure(["-m", "rest_jax", *command])
            print(f"{name}: {seconds:.1f} s, {size / seconds / 1e6:.0f} MB/s, peak {peak / 1e6:.0f} MB")
    finally:
        shutil.rmtree(options.directory)


if __name__ == "__main__":
    main()
