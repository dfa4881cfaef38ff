"""Speed of the packed train step, beside the machine's matrix-product rate and, where installed, T5X and transformers.

    python -m tests.benchmarks.training --model nano --microbatches 8

Everything is measured in turn within each round, so that a machine that is busy for a while slows all of it; the best
round of each counts. Text, vocabulary and lengths are the demo's, in the order of training.

FLOPs are those of the matrix products over whole rows, padding too, by formula. With D emb_dim, A = heads x head_dim,
F mlp_dim, V vocabulary, S and T the rows' lengths, a row costs forward

    encoder layer   2 S (4 D A + 3 D F) + 4 S S A
    decoder layer   2 T (4 D A + 3 D F) + 4 T T A + 2 D A (2 T + 2 S) + 4 T S A
    logits          2 T D V

(3 D F for a gated feed-forward layer, 2 D F for a plain one) and backward twice that.
"""

import argparse
import dataclasses
import gzip
import importlib.util
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gin
import jax
import numpy as np

from rest_jax import optimizers, paths
from rest_jax.data.batching import BatchPlan, MixtureSpec
from rest_jax.data.token_dataset import TokenDataset, TokenRow, write_token_dataset
from rest_jax.data.vocabulary import EOS_ID, SentencePieceVocabulary
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel, SizedVocabulary
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.training import Training, compile_train_step, initial_state
from tests.benchmarks.matmul import SQUARES, MatmulRates, lines

PAIRS = 8000
# Trains one step on each batch; returns how many target tokens they hold.
Run = Callable[[], float]


def train_flops(config: t5.T5Config, *, rows: int, source_length: int, target_length: int) -> float:
    """FLOPs of one train step by the formula above."""
    assert config.vocab_size is not None
    width, attention = config.emb_dim, config.num_heads * config.head_dim
    projections = 4 * width * attention
    feed_forward = (len(config.mlp_activations) + 1) * width * config.mlp_dim
    s, t = source_length, target_length
    encoder = 2 * s * (projections + feed_forward) + 4 * s * s * attention
    decoder = (
        2 * t * (projections + feed_forward) + 4 * t * t * attention
        + 2 * width * attention * (2 * t + 2 * s) + 4 * t * s * attention
    )  # fmt: skip
    logits = 2 * t * width * config.vocab_size
    return 3.0 * rows * (config.num_encoder_layers * encoder + config.num_decoder_layers * decoder + logits)


def demo_pairs(vocabulary: SentencePieceVocabulary, directory: Path, *, length: int) -> TokenDataset:
    """The first pairs of the demo's training text, cut to `length`."""

    def tokens(text: str) -> list[int]:
        return [*vocabulary.encode(text)[: length - 1], EOS_ID]

    with gzip.open(paths.resolve("rest_jax://tasks/demo_data/train.tsv.gz"), "rt", encoding="utf-8") as file:
        pairs = [line.rstrip("\n").split("\t")[:2] for line, _ in zip(file, range(PAIRS), strict=False)]
    write_token_dataset(directory, [TokenRow(tokens(a), tokens(b), a, b) for a, b in pairs], info={})
    return TokenDataset.open(directory)


def jax_run(model: EncoderDecoderModel, batches: list[dict[str, np.ndarray]], training: Training) -> Run:
    """Our train step around a model, on all devices."""
    partitioner = Partitioner(make_mesh())
    shapes = {"encoder_input_tokens": (1, 1), "decoder_input_tokens": (1, 1)}
    params = model.get_initial_variables(jax.random.key(0), shapes)["params"]
    state = initial_state(training=training, params=params, partitioner=partitioner)
    step = compile_train_step(state=state, training=training, model=model, partitioner=partitioner)

    def run() -> float:
        nonlocal state
        for batch in batches:
            state, metrics = step(state, partitioner.put_batch(batch), jax.random.key(0))
        jax.block_until_ready((state, metrics))
        return sum(float(batch["decoder_loss_weights"].sum()) for batch in batches)

    return run


def t5x_run(config: t5.T5Config, batches: list[dict[str, np.ndarray]], training: Training) -> Run:
    """T5X's network under the same loss and optimiser."""
    from t5x.examples.t5 import network

    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    known = {field.name for field in dataclasses.fields(network.T5Config)}
    module = network.Transformer(network.T5Config(**{name: value for name, value in fields.items() if name in known}))
    return jax_run(EncoderDecoderModel(module, None, None), batches, training)


def transformers_run(config: t5.T5Config, batches: list[dict[str, np.ndarray]], training: Training) -> Run:
    """transformers' T5 with torch's AdamW. It can not pack, so its batches hold one pair a row."""
    import torch
    import transformers

    network = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=config.vocab_size, d_model=config.emb_dim, d_kv=config.head_dim, d_ff=config.mlp_dim,
            num_layers=config.num_encoder_layers, num_decoder_layers=config.num_decoder_layers,
            num_heads=config.num_heads, dropout_rate=config.dropout_rate, feed_forward_proj="gated-gelu",
            tie_word_embeddings=config.logits_via_embedding, decoder_start_token_id=0, pad_token_id=0,
        )
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.learning_rate)

    def run() -> float:
        for batch in batches:
            source, target = (
                torch.from_numpy(batch[name].astype(np.int64))
                for name in ("encoder_input_tokens", "decoder_target_tokens")
            )
            optimizer.zero_grad()
            for part in range(training.microbatches):
                rows = slice(part, None, training.microbatches)
                labels = target[rows].masked_fill(target[rows] == 0, -100)
                loss = network(input_ids=source[rows], attention_mask=source[rows] > 0, labels=labels).loss
                (loss / training.microbatches).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        return sum(float(batch["decoder_loss_weights"].sum()) for batch in batches)

    return run


def parse_model(name: str) -> None:
    """Reads gin/models/NAME.gin, in place of what gin has read before."""
    gin.clear_config()
    for path in paths.gin_search_paths():
        gin.add_config_file_search_path(path)
    logging.disable(logging.ERROR)  # gin's notes about each folder in which a file is not
    gin.parse_config_file(f"models/{name}.gin")
    logging.disable(logging.NOTSET)


def make_model(name: str, vocabulary: SizedVocabulary | None) -> EncoderDecoderModel:
    """The model of gin/models/NAME.gin; without a vocabulary, its file must say how large one is."""
    parse_model(name)
    gin.bind_parameter("VOCABULARY/macro.value", vocabulary)
    return gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()


def measure(*, name: str, batch_size: int, microbatches: int, length: int, steps: int, rounds: int) -> dict[str, Any]:
    """Tokens/s of every train step that can be run here, and the share of the limit that ours reaches."""
    vocabulary = SentencePieceVocabulary("rest_jax://tasks/demo_data/vocab.model")
    model = make_model(name, vocabulary)
    config = model.module.config
    training = Training(
        steps=10_000, batch_size=batch_size, learning_rate=1e-3, microbatches=microbatches, optimizer=optimizers.adamw
    )
    batches = {}
    with tempfile.TemporaryDirectory() as directory:
        pairs = MixtureSpec.single(demo_pairs(vocabulary, Path(directory) / "pairs", length=length))
        for pack in (True, False):
            plan = BatchPlan(
                pairs, batch_size=batch_size, source_length=length, target_length=length, pack=pack, seed=0
            )  # fmt: skip
            batches[pack] = [plan.batch(step) for step in range(steps)]

    runs = {"rest_jax, packed": jax_run(model, batches[True], training)}
    runs["rest_jax, one pair a row"] = jax_run(model, batches[False], training)
    peers = {
        "T5X's network, packed": ("t5x", t5x_run, True),
        "transformers, one pair a row": ("transformers", transformers_run, False),
    }
    absent = []
    for label, (package, make, pack) in peers.items():
        if importlib.util.find_spec(package) is None:
            absent.append(label)
        else:
            runs[label] = make(config, batches[pack], training)

    rows = batch_size // microbatches * length
    own = [(rows, config.emb_dim, n) for n in (config.mlp_dim, config.vocab_size)]
    rates = MatmulRates([*SQUARES, *own])
    for run in runs.values():
        run()  # compiles
    best: dict[str, float] = dict.fromkeys(runs, 0.0)
    step_seconds = float("inf")
    for _ in range(rounds):
        for label, run in runs.items():
            start = time.perf_counter()
            tokens = run()
            seconds = time.perf_counter() - start
            best[label] = max(best[label], tokens / seconds)
            if label == "rest_jax, packed":
                step_seconds = min(step_seconds, seconds / steps)
        rates.measure()
    flops = train_flops(config, rows=batch_size, source_length=length, target_length=length)
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "model": name,
        "batch_size": batch_size,
        "microbatches": microbatches,
        "length": length,
        "target_tokens_per_second": {**best, **dict.fromkeys(absent)},
        "step_seconds": step_seconds,
        "flops_per_step": flops,
        "flops_per_second": flops / step_seconds,
        "matmul_flops_per_second": rates.limit,
        "share": flops / step_seconds / (rates.limit * jax.device_count()),
        "matmul": list(lines(rates)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="nano", help="a file of gin/models (default nano)")
    parser.add_argument("--batch_size", type=int, default=64, help="rows (default 64)")
    parser.add_argument(
        "--microbatches", type=int, default=8, help="default 8: eight rows at a time suit a CPU's cache"
    )
    parser.add_argument("--length", type=int, default=96, help="tokens of a row, on either side (default 96)")
    parser.add_argument("--steps", type=int, default=4, help="of one measurement (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each (default 5)")
    parser.add_argument("--json", help="also write the numbers to this file")
    options = parser.parse_args()
    result = measure(
        name=options.model, batch_size=options.batch_size, microbatches=options.microbatches, length=options.length,
        steps=options.steps, rounds=options.rounds,
    )  # fmt: skip
    print(f"{result['model']} on {result['devices']} x {result['device']}, {result['batch_size']} rows of "
          f"{result['length']} tokens in {result['microbatches']} parts, float32")  # fmt: skip
    for label, rate in result["target_tokens_per_second"].items():
        print(f"{label:32s} {'not installed' if rate is None else f'{rate:.0f} target tokens/s'}")
    print(f"{'train step':32s} {result['flops_per_step'] / 1e9:.2f} GFLOP in {result['step_seconds'] * 1e3:.1f} ms")
    print("matrix products, best of each shape")
    print("\n".join(result["matmul"]))
    print(f"{'share of the limit':32s} {result['share']:.1%} of {result['matmul_flops_per_second'] / 1e9:.1f} GFLOP/s")
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
