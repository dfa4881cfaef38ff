"""Measures the chrF reward: its difference from sacreBLEU on 10,000 pairs, and its time beside that of drawing samples.

    python -m tests.benchmarks.rewards

The pairs are references of the demo's training text and hypotheses made from them by replacing, dropping and repeating
tokens. The time is that of one compiled `ChrF.score` on all of them, per sample; drawing is `sampler.decode` by a
`nano` policy for some of the same sources. Its parameters are random, so nearly every sample runs to the length limit
of 128 tokens; a trained policy ends sooner and draws faster, so there the share of chrF is larger. The best of several
runs counts, the two taken in turn.
"""

import functools
import gzip
import random
import time
from collections.abc import Callable

import jax
import numpy as np
from sacrebleu.metrics import CHRF

from rest_jax import paths
from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.models import encoder_decoder, t5
from rest_jax.rewards.chrf import ChrF
from rest_jax.sampling import sampler
from rest_jax.sampling.processors import LogitProcessing

NUM_SOURCES, NUM_SAMPLES, LENGTH = 625, 16, 128
DRAWN_SOURCES = 32
REPEATS = 3


def padded(tokens: list[int]) -> list[int]:
    return ([*tokens[: LENGTH - 1], 1] + [0] * LENGTH)[:LENGTH]


def faulty(rng: random.Random, tokens: list[int], vocab_size: int) -> list[int]:
    share = rng.random()
    hypothesis: list[int] = []
    for token in tokens:
        draw = rng.random()
        if draw < 0.1 * share:
            continue
        hypothesis += [rng.randrange(2, vocab_size)] if draw < 0.4 * share else [token]
    return hypothesis * 2 if rng.random() < 0.05 else hypothesis


def read_pairs(vocabulary: SentencePieceVocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources `[sources, length]`, references alike, and samples `[sources, num_samples, length]`."""
    rng = random.Random(0)
    with gzip.open(paths.resolve("rest_jax://tasks/demo_data/train.tsv.gz"), "rt", encoding="utf-8") as lines:
        rows = rng.sample([line.rstrip("\n").split("\t") for line in lines], NUM_SOURCES)
    sources, references, samples = [], [], []
    for source, reference, *_ in rows:
        tokens = vocabulary.encode(reference)
        sources.append(padded(vocabulary.encode(source)))
        references.append(padded(tokens))
        samples.append([padded(faulty(rng, tokens, vocabulary.vocab_size)) for _ in range(NUM_SAMPLES)])
    return np.asarray(sources, np.int32), np.asarray(references, np.int32), np.asarray(samples, np.int32)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def main() -> None:
    vocabulary = SentencePieceVocabulary("rest_jax://tasks/demo_data/vocab.model")
    sources, references, samples = read_pairs(vocabulary)
    reward = ChrF()
    table = reward.init(vocabulary)
    batch = {"samples": samples, "references": references, "sources": sources}
    score = functools.partial(jax.jit(reward.score), table, batch)

    config = t5.T5Config(
        vocab_size=-(-vocabulary.vocab_size // 128) * 128,
        emb_dim=128,
        num_heads=4,
        head_dim=32,
        mlp_dim=256,
        num_encoder_layers=3,
        num_decoder_layers=2,
    )
    model = encoder_decoder.EncoderDecoderModel(t5.Transformer(config), vocabulary, vocabulary, optimizer_def=None)
    shape = {"encoder_input_tokens": (1, LENGTH), "decoder_input_tokens": (1, LENGTH)}
    params = model.get_initial_variables(jax.random.key(0), shape)["params"]
    draw = functools.partial(
        jax.jit(
            functools.partial(
                sampler.decode,
                model,
                num_samples=NUM_SAMPLES,
                max_length=LENGTH,
                processing=LogitProcessing(temperature=0.8),
                seed=0,
                stream=1,
            )
        ),
        params,
        encoder_input_tokens=sources[:DRAWN_SOURCES],
        source_ids=np.arange(DRAWN_SOURCES, dtype=np.uint32),
    )

    compile_seconds = seconds(score)
    found = np.asarray(score()["chrf"])
    metric = CHRF()
    start = time.perf_counter()
    expected = [
        [metric.sentence_score(vocabulary.decode(row), [vocabulary.decode(reference)]).score / 100 for row in rows]
        for rows, reference in zip(samples.tolist(), references.tolist(), strict=True)
    ]
    sacrebleu_time = (time.perf_counter() - start) / found.size
    mean_length = np.mean([len("".join(vocabulary.decode(reference).split())) for reference in references.tolist()])

    seconds(draw)
    runs = [(seconds(score), seconds(draw)) for _ in range(REPEATS)]
    score_time = min(run[0] for run in runs) / found.size
    draw_time = min(run[1] for run in runs) / (DRAWN_SOURCES * NUM_SAMPLES)
    print(f"device                        {jax.devices()[0].device_kind}")
    print(f"pairs                         {found.size}, references of {mean_length:.0f} characters")
    print(f"largest difference            {np.abs(found - np.asarray(expected)).max():.2e}")
    print(f"first call, with compilation  {compile_seconds:.1f} s")
    print(f"chrF in the graph             {score_time * 1e6:.1f} microseconds a sample")
    print(f"sacreBLEU with decoding       {sacrebleu_time * 1e6:.1f} microseconds a sample")
    print(f"drawing a sample (nano)       {draw_time * 1e6:.1f} microseconds")
    print(f"chrF / drawing                {score_time / draw_time:.1%}")


if __name__ == "__main__":
    main()
