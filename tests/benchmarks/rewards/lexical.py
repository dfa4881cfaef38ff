"""Measures the lexical rewards: differences from sacreBLEU on 10,000 real pairs, and time beside that of drawing.

    python -m tests.benchmarks.rewards lexical [--pairs FILE.tsv.gz]

Pairs are targets of the file (the demo's training text, unless another is named) and hypotheses made from them: tokens
replaced and dropped, the whole repeated, or another target. Times are of one sample, N = 32 for each source: a compiled
`score` of 320 sources' hypotheses, and sampling from the `iwslt_tiny` shape in float32, with weights whose samples end
as the demo's sentences do (`tests.benchmarks.sampling`). All are run in turn, and the least of several runs counts.
"""

import argparse
import functools
import gzip
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import numpy.typing as npt
from sacrebleu.metrics import BLEU as SacreBLEU
from sacrebleu.metrics import CHRF
from sacrebleu.metrics.base import Metric

from rest_jax import paths
from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.rewards.base import Reward
from rest_jax.rewards.bleu import BLEU
from rest_jax.rewards.chrf import ChrF
from rest_jax.sampling import LogitProcessing, decode
from tests.benchmarks.sampling.setting import Setting, benchmark_model, make_params, random_sources

NUM_PAIRS, LENGTH, REPEATS = 10_000, 128, 3
NUM_SOURCES, NUM_SAMPLES = 320, 32
DRAWING = Setting(model="iwslt_tiny", sources=4, samples=NUM_SAMPLES, target_length=LENGTH, real_lengths=True)
REWARDS: tuple[tuple[Reward, Metric], ...] = (
    (ChrF(), CHRF()),
    (ChrF(word_order=2), CHRF(word_order=2)),
    (BLEU(), SacreBLEU(effective_order=True)),
)


def padded(rows: list[list[int]]) -> npt.NDArray[np.int32]:
    """`[rows, LENGTH]`."""
    return np.asarray([([*tokens[: LENGTH - 1], 1] + [0] * LENGTH)[:LENGTH] for tokens in rows], np.int32)


def faulty(rng: random.Random, tokens: list[int], *, others: list[list[int]], vocab_size: int) -> list[int]:
    if rng.random() < 0.1:
        return rng.choice(others)
    share = rng.random()
    hypothesis: list[int] = []
    for token in tokens:
        draw = rng.random()
        if draw < 0.1 * share:
            continue
        hypothesis += [rng.randrange(2, vocab_size)] if draw < 0.4 * share else [token]
    return hypothesis * 2 if rng.random() < 0.05 else hypothesis


def read_targets(path: Path, vocabulary: SentencePieceVocabulary, rng: random.Random) -> list[list[int]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [line.rstrip("\n").split("\t")[1] for line in lines]
    return [vocabulary.encode(text) for text in rng.sample(texts, NUM_PAIRS)]


def batch(references: npt.NDArray[np.int32], samples: npt.NDArray[np.int32]) -> dict[str, npt.NDArray[np.int32]]:
    return {"references": references, "samples": samples, "sources": references}


def make_draw() -> Callable[[], object]:
    model = benchmark_model(DRAWING.model, dtype="float32")
    program = jax.jit(
        functools.partial(
            decode,
            model,
            num_samples=NUM_SAMPLES,
            max_length=LENGTH,
            processing=LogitProcessing(temperature=DRAWING.temperature),
        )
    )
    return functools.partial(
        program,
        make_params(DRAWING, model),
        encoder_input_tokens=random_sources(DRAWING, vocab_size=model.module.config.vocab_size),
        source_ids=np.arange(DRAWING.sources, dtype=np.uint32),
    )


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, default=paths.resolve("rest_jax://tasks/demo_data/train.tsv.gz"))
    rng, vocabulary = random.Random(0), SentencePieceVocabulary("rest_jax://tasks/demo_data/vocab.model")
    targets = read_targets(parser.parse_args(arguments).pairs, vocabulary, rng)
    make_faulty = functools.partial(faulty, rng, others=targets, vocab_size=vocabulary.vocab_size)
    references, hypotheses = padded(targets), padded([make_faulty(tokens) for tokens in targets])
    texts = [
        (vocabulary.decode(hypothesis), vocabulary.decode(reference))
        for hypothesis, reference in zip(hypotheses.tolist(), references.tolist(), strict=True)
    ]
    samples = np.stack([padded([make_faulty(tokens) for _ in range(NUM_SAMPLES)]) for tokens in targets[:NUM_SOURCES]])

    characters = np.mean([len("".join(reference.split())) for _, reference in texts])
    print(f"{jax.devices()[0].device_kind}; {NUM_PAIRS} pairs, references of {characters:.0f} characters")
    runs: dict[str, Callable[[], object]] = {"drawing": make_draw()}
    for reward, metric in REWARDS:
        score, params = jax.jit(reward.score), reward.init(vocabulary)
        found = np.asarray(score(params, batch(references, hypotheses[:, None]))[reward.name])[:, 0]
        start = time.perf_counter()
        expected = [metric.sentence_score(hypothesis, [reference]).score / 100 for hypothesis, reference in texts]
        per_pair = (time.perf_counter() - start) / NUM_PAIRS
        print(
            f"{reward.name:8} greatest difference {np.abs(found - expected).max():.1e}; mean {np.mean(expected):.3f}; "
            f"sacreBLEU takes {per_pair * 1e6:.0f} us a pair"
        )
        runs[reward.name] = functools.partial(score, params, batch(references[:NUM_SOURCES], samples))

    compile_times = {name: seconds(run) for name, run in runs.items()}
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(REPEATS)]
    drawn, scored = DRAWING.sources * NUM_SAMPLES, NUM_SOURCES * NUM_SAMPLES
    per_sample = {
        name: min(times[name] for times in rounds) / (drawn if name == "drawing" else scored) for name in runs
    }
    for name, time_of_one in per_sample.items():
        share = time_of_one / per_sample["drawing"]
        print(
            f"{name:8} {time_of_one * 1e6:8.1f} us a sample, {share:7.2%} of drawing; "
            f"first call {compile_times[name]:.1f} s"
        )
