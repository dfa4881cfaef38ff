"""Measures learned rewards: MetricX against PyTorch on 1,000 real pairs, and what a sample costs.

    python -m tests.benchmarks.rewards learned [--peer torch] [--peer_python PYTHON]

The pairs are German and English of the demo's training text, of all lengths, padded and in one batch. MetricX is a
random mT5 in the layout of the published folders (d_model 64, 4 + 4 layers), in float32. The peer is
tests/fixtures/metricx_torch.py, which scores one text at a time without padding; PYTHON is one that has torch,
transformers and sentencepiece (this one, unless given). Times are the best of several runs, taken in turn, of a
compiled program on all pairs: with the policy's vocabulary being the reward's, with another that is retokenised in the
graph, and without groups of like length, where each row is as wide as the widest could be.
"""

import argparse
import dataclasses
import functools
import gzip
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

from rest_jax import paths
from rest_jax.checkpoints import checkpointer, hugging_face, tensors
from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.models import t5
from rest_jax.models.regressor import regress
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.rewards.embeddings import vector_sums
from rest_jax.rewards.metricx import MetricX

NUM_PAIRS, LENGTH, HEAD_ROW, PIECES, REPEATS = 1000, 128, 89, 4000, 3
CONFIG = t5.T5Config(-(-PIECES // 128) * 128, 64, 4, 4, 4, 16, 128)
EMBEDDING_DIM = 256
PEER = pathlib.Path(__file__).parents[2] / "fixtures" / "metricx_torch.py"


def read_text() -> list[list[str]]:
    with gzip.open(paths.resolve("rest_jax://tasks/demo_data/train.tsv.gz"), "rt", encoding="utf-8") as lines:
        return [line.rstrip("\n").split("\t")[:2] for line in lines]


def write_model(folder: pathlib.Path, text: list[list[str]]) -> None:
    """A vocabulary, config.json and weights."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([side for pair in text[:8000] for side in pair]), model_prefix=str(folder / "spiece"),
        vocab_size=PIECES, byte_fallback=True, normalization_rule_name="identity",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2,
    )  # fmt: skip
    token = jnp.ones((1, 1), jnp.int32)
    module = t5.Transformer(CONFIG)
    params = module.init(jax.random.key(0), token, token, token, enable_dropout=False)["params"]
    params["decoder"]["logits_dense"]["kernel"] *= 8.0  # errors of some units, as MetricX's are
    leaves = {name: tensors.of_array(np.asarray(leaf)) for name, leaf in tensors.flatten(params).items()}
    hugging_face.write_config(folder, config=CONFIG, dtype="float32", eos_id=1, base={"model_type": "mt5"})
    hugging_face.write_weights(folder, leaves, config=CONFIG)


def pairs_within(text: list[list[str]], *vocabularies: SentencePieceVocabulary) -> list[list[str]]:
    """Pairs, drawn at random, that are shorter than LENGTH in each vocabulary."""
    shuffled = random.Random(0).sample(text, len(text))
    fitting = (pair for pair in shuffled if all(len(v.encode(side)) < LENGTH for v in vocabularies for side in pair))
    return [next(fitting) for _ in range(NUM_PAIRS)]


def batch_of(pairs: list[list[str]], vocabulary: SentencePieceVocabulary) -> dict[str, np.ndarray]:
    rows = np.zeros((2, len(pairs), LENGTH), np.int32)
    for number, pair in enumerate(pairs):
        for side, text in enumerate(pair):
            ids = [*vocabulary.encode(text), 1]
            rows[side, number, : len(ids)] = ids
    return {"sources": rows[0], "samples": rows[1][:, None], "references": rows[1]}


def peer_errors(python: str, folder: pathlib.Path, texts: list[str]) -> tuple[np.ndarray, float]:
    request, scores = folder / "request.json", folder / "scores.json"
    request.write_text(json.dumps({"texts": texts, "max_length": 1536, "head_row": HEAD_ROW}), encoding="utf-8")
    start = time.perf_counter()
    subprocess.run([python, str(PEER), str(folder), str(request), str(scores)], check=True)
    return np.asarray(json.loads(scores.read_text())), time.perf_counter() - start


def best_times(runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(REPEATS + 1):  # the first compiles
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            found[name] += [time.perf_counter() - start] if number else []
    return {name: min(times) for name, times in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("torch",))
    parser.add_argument("--peer_python", default=sys.executable)
    options = parser.parse_args(arguments)
    folder = pathlib.Path(tempfile.mkdtemp())
    try:
        measure(folder, options)
    finally:
        shutil.rmtree(folder)


def measure(folder: pathlib.Path, options: argparse.Namespace) -> None:
    text = read_text()
    write_model(folder, text)
    own = SentencePieceVocabulary(str(folder / "spiece.model"))
    other = SentencePieceVocabulary("rest_jax://tasks/demo_data/vocab.model")
    pairs = pairs_within(text, own, other)
    reward = MetricX(str(folder), str(folder / "spiece.model"), dtype="float32", head_row=HEAD_ROW)
    one_device = Partitioner(make_mesh(devices=jax.devices()[:1]))
    program = jax.jit(reward.errors)
    runs = {}
    for name, vocabulary in (("same vocabulary", own), ("retokenised", other)):
        params = checkpointer.put_params(reward.init(vocabulary), one_device)
        runs[name] = functools.partial(program, params, batch_of(pairs, vocabulary))
    network = params["network"]
    texts = [reward.template.format(source=source, sample=sample) for source, sample in pairs]
    rows = np.zeros((-(-NUM_PAIRS // reward.rows_per_step) * reward.rows_per_step, 2 * LENGTH + 4), np.int32)
    for row, joined in zip(rows, texts, strict=False):
        row[: len(ids)] = (ids := own.encode(joined))
    module = t5.Transformer(dataclasses.replace(CONFIG, scan_layers=True))
    groups = rows.reshape(-1, reward.rows_per_step, rows.shape[1])
    runs["all equally wide"] = functools.partial(
        jax.jit(lambda network, groups: jax.lax.map(lambda group: regress(module, network, group), groups)),
        network,
        groups,
    )
    table = np.random.default_rng(0).normal(size=(other.vocab_size, EMBEDDING_DIM)).astype(np.float32)
    runs["embeddings: one side's lookups"] = functools.partial(
        jax.jit(vector_sums), table, batch_of(pairs, other)["samples"], np.int32(1)
    )

    found = {name: np.asarray(runs[name]()).ravel() for name in ("same vocabulary", "retokenised")}
    lengths = np.sum(rows[:NUM_PAIRS] > 0, axis=1)
    print(f"device                    {jax.devices()[0].device_kind}")
    print(f"pairs                     {NUM_PAIRS}, joined {lengths.min()} to {lengths.max()} tokens")
    print(f"mean                      {lengths.mean():.0f} tokens")
    print(f"errors                    {found['same vocabulary'].min():.2f} to {found['same vocabulary'].max():.2f}")
    if options.peer:
        expected, seconds = peer_errors(options.peer_python, folder, texts)
        for name, errors in found.items():
            print(f"largest difference        {np.abs(errors - expected).max():.2e} ({name}; PyTorch)")
        print(f"PyTorch, one at a time    {seconds / NUM_PAIRS * 1e6:.0f} microseconds a pair, with loading")
    for name, seconds in best_times(runs).items():
        print(f"{name:34}{seconds / NUM_PAIRS * 1e6:.1f} microseconds a pair")
