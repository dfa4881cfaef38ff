"""Measures retokenisation in the graph: how often it equals the `sentencepiece` library, and its time per sample.

    python -m tests.benchmarks.rewards retokenization --vocabulary FILE --pairs de-en.tsv.gz zh-en.tsv.gz

FILE is a SentencePiece unigram model, or a Hugging Face tokenizer.json of one, such as XLM-R's 250,002 pieces, whose
pieces, scores and normaliser are then written as a model. The pairs are lines of `source <TAB> target` text, encoded in
the policy's vocabulary (the demo's, 2,048 pieces with byte fallback). The library encodes
`source: {source} candidate: {candidate}` of what the policy's ids decode to. Every difference is counted by its kind.
The time is that of all calls after the first, of one program, reading the policy's ids and giving the reward's.
"""

import argparse
import base64
import collections
import gzip
import itertools
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from rest_jax import paths
from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.rewards.retokenization import Retokenizer

TEMPLATE = "source: {source} candidate: {candidate}"
POLICY = "rest_jax://tasks/demo_data/vocab.model"
BATCH, LENGTHS, MAX_TOKENS = 640, (64, 128, 256, 512), 1024
SHOWN = 5


def model_of_tokenizer(tokenizer: dict[str, Any], path: pathlib.Path) -> None:
    """Writes the unigram model that a tokenizer.json of the XLM-R kind holds as a SentencePiece model."""
    unigram = tokenizer["model"]
    steps = tokenizer["normalizer"].get("normalizers", [tokenizer["normalizer"]])
    charsmap = next(step["precompiled_charsmap"] for step in steps if step["type"] == "Precompiled")
    special = {token["content"] for token in tokenizer["added_tokens"]}
    model = sentencepiece_model_pb2.ModelProto()
    for index, (piece, score) in enumerate(unigram["vocab"]):
        entry = model.pieces.add(piece=piece, score=score)
        if index == unigram["unk_id"]:
            entry.type = model.SentencePiece.UNKNOWN
        elif piece in special:
            entry.type = model.SentencePiece.CONTROL
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    model.trainer_spec.pad_id = -1
    model.normalizer_spec.precompiled_charsmap = base64.b64decode(charsmap)
    path.write_bytes(model.SerializeToString())


def read_pairs(file: pathlib.Path, *, policy: SentencePieceVocabulary, count: int) -> Iterator[tuple[list[int], ...]]:
    """Policy ids of source and target, with EOS; pairs that are too long for the largest shape are left out."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = (line.rstrip("\n").split("\t")[:2] for line in lines)
        encoded = (tuple([*policy.encode(text), policy.eos_id] for text in row) for row in rows)
        fitting = (pair for pair in encoded if max(map(len, pair)) <= LENGTHS[-1])
        yield from itertools.islice(fitting, count)


def batches(pairs: list[tuple[list[int], ...]]) -> Iterator[tuple[list[tuple[list[int], ...]], int]]:
    """Pairs of alike length, padded to one of `LENGTHS`."""
    for shorter, longer in itertools.pairwise((0, *LENGTHS)):
        alike = [pair for pair in pairs if shorter < max(map(len, pair)) <= longer]
        for start in range(0, len(alike), BATCH):
            yield alike[start : start + BATCH], longer


def padded(rows: list[list[int]], length: int) -> np.ndarray:
    """`[BATCH, 1, length]`."""
    tokens = np.zeros((BATCH, 1, length), np.int32)
    for target, row in zip(tokens, rows, strict=False):
        target[0, : len(row)] = row
    return tokens


def kind_of_difference(library: sentencepiece.SentencePieceProcessor, ids: list[int], expected: list[int]) -> str:
    """Whether the text is another, or only where it is cut, and then whether both are equally likely."""
    pieces, others = ([library.id_to_piece(index) for index in row] for row in (ids, expected))
    if "".join(pieces) != "".join(others):
        return "text"
    scores = [np.float32(sum(map(library.get_score, row))) for row in (ids, expected)]
    return "segmentation, equally likely in float32" if scores[0] == scores[1] else "segmentation"


def measure(file: pathlib.Path, *, pair_files: list[pathlib.Path], count: int) -> None:
    """Prints exactness and time for each file of pairs."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(file))
    policy = SentencePieceVocabulary(str(paths.resolve(POLICY)))
    start = time.perf_counter()
    retokenizer = Retokenizer(str(file), TEMPLATE, max_tokens=MAX_TOKENS)
    params = jax.block_until_ready(retokenizer.init(policy))
    sizes = sum(array.nbytes for array in jax.tree.leaves(params)) / 2**20
    print(f"{library.vocab_size():,} pieces; tables built in {time.perf_counter() - start:.1f} s, {sizes:.1f} MiB")
    in_graph = jax.jit(retokenizer)
    compiled: set[int] = set()
    for pair_file in pair_files:
        pairs = list(read_pairs(pair_file, policy=policy, count=count))
        equal, timed, seconds, tokens = 0, 0, 0.0, 0
        kinds: collections.Counter[str] = collections.Counter()
        for batch, length in batches(pairs):
            columns = dict(zip(("source", "candidate"), map(list, zip(*batch, strict=True)), strict=True))
            arrays = {name: padded(rows, length) for name, rows in columns.items()}
            if length not in compiled:
                jax.block_until_ready(in_graph(params, arrays))
                compiled.add(length)
            start = time.perf_counter()
            result = jax.device_get(in_graph(params, arrays))
            seconds += time.perf_counter() - start
            timed += len(batch)
            decoded = [policy.decode_batch(rows) for rows in columns.values()]
            texts = [TEMPLATE.format(source=source, candidate=sample) for source, sample in zip(*decoded, strict=True)]
            for ids, size, expected, text in zip(
                result.ids[:, 0], result.lengths[:, 0], library.encode(texts), texts, strict=False
            ):
                expected = expected[:MAX_TOKENS]
                found = ids[:size].tolist()
                tokens += size
                if found == expected:
                    equal += 1
                    continue
                kind = kind_of_difference(library, found, expected)
                kinds[kind] += 1
                if kinds[kind] <= SHOWN:
                    print(f"  {kind}: {text!r}\n    here    {found}\n    library {expected}")
        print(
            f"{pair_file}: {equal:,} of {len(pairs):,} equal ({equal / len(pairs):.4%}), differences {dict(kinds)}; "
            f"{1e6 * seconds / timed:.0f} us a sample, {tokens / len(pairs):.0f} tokens each"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=pathlib.Path, required=True)
    parser.add_argument("--pairs", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--count", type=int, default=100_000, help="pairs of each file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as directory:
        file = options.vocabulary
        if file.suffix == ".json":
            file = pathlib.Path(directory) / "vocabulary.model"
            model_of_tokenizer(json.loads(options.vocabulary.read_text(encoding="utf-8")), file)
        measure(file, pair_files=options.pairs, count=options.count)
