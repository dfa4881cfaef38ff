"""A vocabulary with byte fallback, trained on the demo text, and pairs of real text with known faults."""

import gzip
import pathlib
import random

import pytest
import sentencepiece

from rest_jax.data.vocabulary import SentencePieceVocabulary

DEMO_TEXT = pathlib.Path(__file__).parents[2] / "tasks" / "demo_data" / "train.tsv.gz"


@pytest.fixture(scope="package")
def demo_pairs() -> list[tuple[str, str]]:
    """German and English of the demo's training split."""
    with gzip.open(DEMO_TEXT, "rt", encoding="utf-8") as lines:
        columns = (line.rstrip("\n").split("\t") for line in lines)
        return [(row[0], row[1]) for row in columns]


@pytest.fixture(scope="package")
def small_vocabulary(demo_pairs, tmp_path_factory) -> SentencePieceVocabulary:
    """1,000 pieces of both languages; rare letters, such as Ö, have none and are spelled in bytes."""
    prefix = tmp_path_factory.mktemp("vocabulary") / "small"
    chosen = random.Random(0).sample(demo_pairs, 2000)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for pair in chosen for text in pair]),
        model_prefix=str(prefix),
        vocab_size=1000,
        character_coverage=0.999,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return SentencePieceVocabulary(f"{prefix}.model")
