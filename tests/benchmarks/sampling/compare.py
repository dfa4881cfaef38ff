"""Ours and other engines in one run, in turn."""

import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import numpy.typing as npt

from rest_jax.checkpoints import hugging_face, tensors
from rest_jax.data.vocabulary import EOS_ID, SentencePieceVocabulary
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from tests.benchmarks.matmul import SQUARES, MatmulRates, lines
from tests.benchmarks.sampling import weights
from tests.benchmarks.sampling.engines import ENGINES, Task
from tests.benchmarks.sampling.setting import Setting, benchmark_model, cores, make_params, random_sources

OURS, *PEERS = ENGINES
# Engines that must agree with ours when all compute in float32.
_EXACT = ("t5x", "transformers", "ctranslate2")
# The first draw costs some tens of milliseconds more than the next ones: one that is shorter than this is left out.
_WARM_SECONDS = 5.0


class EngineProcess:
    """An engine that was loaded, compiled and tried, and waits."""

    def __init__(self, name: str, folder: Path) -> None:
        threads = str(cores())
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            # All engines are on one accelerator; none may take its whole memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # float32 is float32 on a GPU too
            "HF_HUB_OFFLINE": "1",
        }
        self._name = name
        self._errors: BinaryIO = (folder / f"{name}.log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.sampling.engines", name, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, env=environment,
        )  # fmt: skip
        self.compile_seconds: float | None = self._answer()["compile_seconds"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            log = self._errors.read().decode(errors="replace")
            raise RuntimeError(f"{self._name} stopped with exit code {code}:\n{log[-4000:]}")
        return json.loads(line)


def sample_flops(config: t5.T5Config, *, steps: npt.NDArray[np.int64], source_length: int, num_samples: int) -> float:
    """FLOPs of samples of `steps` tokens with EOS, `num_samples` of each source, by __main__.py's formula."""
    assert config.vocab_size is not None
    width, attention = config.emb_dim, config.num_heads * config.head_dim
    layer = 8 * width * attention + 2 * (len(config.mlp_activations) + 1) * width * config.mlp_dim
    cross = 4 * width * attention + 4 * attention * source_length
    total, pairs = float(steps.sum()), float((steps * (steps + 1) / 2).sum())
    decoder = config.num_decoder_layers * (total * (layer + cross) + 4 * attention * pairs)
    encoder = config.num_encoder_layers * (layer * source_length + 4 * attention * source_length**2)
    keys_and_values = config.num_decoder_layers * 4 * width * attention * source_length
    sources = len(steps) / num_samples
    return decoder + 2 * total * width * config.vocab_size + sources * (encoder + keys_and_values)


def write_task(folder: Path, setting: Setting, model: EncoderDecoderModel) -> None:
    """What engines read, see engines.py."""
    config = model.module.config
    leaves = {name: tensors.of_array(value) for name, value in tensors.flatten(make_params(setting, model)).items()}
    model_folder = folder / "model"
    model_folder.mkdir()
    hugging_face.write_weights(model_folder, leaves, config=config)
    hugging_face.write_config(model_folder, config=config, dtype="float32", eos_id=EOS_ID)
    # ctranslate2's converter wants a tokenizer; it names the ids past its pieces itself.
    hugging_face.write_vocabulary(model_folder, SentencePieceVocabulary(weights.DEMO_VOCABULARY))
    np.save(folder / "sources.npy", random_sources(setting, vocab_size=config.vocab_size))
    task = Task(
        config=dataclasses.asdict(config), num_samples=setting.samples, target_length=setting.target_length,
        temperature=setting.temperature, dtype=setting.dtype, threads=cores(), sampling=dict(setting.sampling),
    )  # fmt: skip
    (folder / "task.json").write_text(json.dumps(dataclasses.asdict(task)), encoding="utf-8")


@contextlib.contextmanager
def started(names: Sequence[str], folder: Path) -> Iterator[dict[str, EngineProcess]]:
    processes: dict[str, EngineProcess] = {}
    try:
        for name in names:
            print(f"loading {name} ...", file=sys.stderr, flush=True)
            processes[name] = EngineProcess(name, folder)
        yield processes
    finally:
        for process in processes.values():
            process.close()


def compare(setting: Setting, *, peers: Sequence[str]) -> dict[str, Any]:
    """Tokens/s of our engine and of `peers`, the machine's limit, and what else the module's docstring says."""
    model = benchmark_model(setting.model, dtype=setting.dtype)
    config = model.module.config
    rows = setting.sources * setting.samples
    products = [(rows, config.emb_dim, n) for n in (config.mlp_dim, config.vocab_size)]
    with tempfile.TemporaryDirectory() as directory:
        write_task(Path(directory), setting, model)
        with started([OURS, *peers], Path(directory)) as engines:
            rates = MatmulRates([*SQUARES, *products], dtype=setting.dtype)
            draws: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
            for number in range(setting.rounds):
                rates.measure()
                for name, engine in engines.items():
                    request = {"do": "draw", "seed": setting.seed + number}
                    draw = engine.ask(request)
                    if number == 0 and draw["seconds"] < _WARM_SECONDS:
                        draw = engine.ask(request)
                    draws[name].append(draw)
                print(f"round {number + 1} of {setting.rounds} done", file=sys.stderr, flush=True)
            peaks = {name: engine.ask({"do": "peak"}) for name, engine in engines.items()}
            greedy = {name: engine.ask({"do": "greedy"}) for name, engine in engines.items()}
            compile_seconds = {name: engine.compile_seconds for name, engine in engines.items()}
    results = {name: _summary(draws[name], draws[OURS], setting, config) for name in draws}
    for name, result in results.items():
        result |= peaks[name] | _agreement(greedy[name], greedy[OURS]) | {"compile_seconds": compile_seconds[name]}
        result["share"] = result["flops_per_second"] / rates.limit
    if setting.dtype == "float32":
        _check_same_weights({name: results[name] for name in _EXACT if name in results})
    return {
        "device": jax.devices()[0].device_kind,
        "cores": cores(),
        **dataclasses.asdict(setting),
        "engines": results,
        "matmul_flops_per_second": rates.limit,
        "limit_tokens_per_second": rates.limit * results[OURS]["tokens_per_second"]
        / results[OURS]["flops_per_second"],
        "matmul": list(lines(rates)),
    }  # fmt: skip


def _summary(
    draws: list[dict[str, Any]], ours: list[dict[str, Any]], setting: Setting, config: t5.T5Config
) -> dict[str, Any]:
    def rate(draw: dict[str, Any]) -> float:
        return sum(draw["lengths"]) / draw["seconds"]

    lengths = np.array([draw["lengths"] for draw in draws])  # [rounds, sources * samples]
    steps = np.minimum(lengths + 1, setting.target_length).ravel()
    flops = sample_flops(config, steps=steps, source_length=setting.source_length, num_samples=setting.samples)
    per_second = [rate(draw) for draw in draws]
    tokens_per_second = statistics.median(per_second)
    return {
        "tokens_per_second": tokens_per_second,
        "tokens_per_second_of_rounds": per_second,
        "times_ours": statistics.median(rate(a) / b for a, b in zip(ours, per_second, strict=True)),
        "seconds_of_rounds": [draw["seconds"] for draw in draws],
        "mean_length": float(lengths.mean()),
        "length_deviation": float(lengths.std()),
        "max_length": int(lengths.max()),
        "flops_per_second": tokens_per_second * flops / float(lengths.sum()),
    }


def _agreement(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, float | None]:
    same = np.array(theirs["tokens"]) == np.array(ours["tokens"])
    rows = same.all(axis=1)  # log-probabilities can be compared of the same tokens alone
    difference = np.abs(np.array(theirs["log_probs"]) - np.array(ours["log_probs"]))[rows]
    return {
        "greedy_agreement": float(same.mean()),
        "greedy_log_prob_difference": float(difference.max()) if rows.any() else None,
    }


def _check_same_weights(results: dict[str, dict[str, Any]]) -> None:
    """Float32 sums in another order may turn a greedy choice over, with random weights; other weights turn all."""
    for name, result in results.items():
        agreement, difference = result["greedy_agreement"], result["greedy_log_prob_difference"]
        if agreement < 0.5 or difference is None or difference > 0.05:
            raise RuntimeError(
                f"{name} does not compute what rest_jax computes: {agreement:.0%} of its greedy tokens are ours, with "
                f"log-probabilities {difference} apart."
            )


def report(result: dict[str, Any]) -> Iterator[str]:
    """The comparison as lines of text."""
    ends = "ends as the demo's sentences do" if result["real_lengths"] else "no early end"
    yield (
        f"{result['model']}, {result['dtype']}, {result['sources']} sources x {result['samples']} samples, source "
        f"{result['source_length']}, target {result['target_length']}, {ends}; {result['cores']} cores, "
        f"{result['device']}"
    )
    yield (
        f"{'':18s} {'tokens/s':>9s} {'range':>15s} {'ours is':>8s} {'of limit':>8s} {'lengths':>17s} {'peak MB':>8s} "
        f"{'compile':>8s} {'greedy as ours':>15s}"
    )
    for name, row in result["engines"].items():
        rounds = row["tokens_per_second_of_rounds"]
        peak = row["host_peak"] if row["device_peak"] is None else row["device_peak"]
        compiling = "" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f} s"
        lengths = f"{row['mean_length']:.1f}±{row['length_deviation']:.1f} ≤{row['max_length']}"
        yield (
            f"{name:18s} {row['tokens_per_second']:9.0f} {f'{min(rounds):.0f}..{max(rounds):.0f}':>15s} "
            f"{row['times_ours']:7.2f}x {row['share']:8.1%} {lengths:>17s} {peak / 1e6:8.0f} {compiling:>8s} "
            f"{row['greedy_agreement']:15.0%}"
        )
    yield "matrix products, best of each shape"
    yield from result["matmul"]
    yield (
        f"limit: {result['matmul_flops_per_second'] / 1e9:.1f} GFLOP/s, which is "
        f"{result['limit_tokens_per_second']:.0f} tokens/s"
    )
