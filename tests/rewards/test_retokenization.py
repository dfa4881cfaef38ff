"""Retokenisation in the graph against the `sentencepiece` library's own encoding of the decoded texts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary
from rest_jax.errors import UserError
from rest_jax.rewards.retokenization import Retokenizer, join

BYTES = ByteVocabulary()
LENGTH, MAX_TOKENS, NUM_SAMPLES = 96, 160, 4
TEMPLATE = "source: {source} candidate: {candidate}"
# Kinds of unigram vocabularies; each is trained on the demo text.
KINDS = {
    "byte_fallback": {"byte_fallback": True, "normalization_rule_name": "identity"},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["<x>", "<xy>", "en"]},
    "spaces_kept": {"normalization_rule_name": "nfkc_cf", "remove_extra_whitespaces": False},
    "no_prefix": {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False, "split_by_whitespace": False},
}


@pytest.fixture(scope="module")
def train(demo_pairs, tmp_path_factory):
    """Trains a vocabulary on 1,000 pairs of the demo text, and returns its file."""
    texts = [text for pair in demo_pairs[:1000] for text in pair]

    def run(name: str, **options) -> str:
        prefix = tmp_path_factory.mktemp("retokenization") / name
        options = {"vocab_size": 700, "character_coverage": 0.998, "max_sentencepiece_length": 12, **options}
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=str(prefix),
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            minloglevel=2,
            **options,
        )
        return f"{prefix}.model"

    return run


@pytest.fixture(scope="module", params=KINDS)
def encode_both(request, train):
    """(rows of (source, candidate)) -> ids in the graph, ids of the library; the policy speaks bytes."""
    file = train(request.param, **KINDS[request.param])
    return both_encoders(file, BYTES)


def both_encoders(file: str, policy, *, template: str = TEMPLATE):
    retokenizer = Retokenizer(file, template, max_tokens=MAX_TOKENS)
    params = retokenizer.init(policy)
    library = sentencepiece.SentencePieceProcessor(model_file=file)
    in_graph = jax.jit(retokenizer)

    def run(sources: list[list[int]], samples: list[list[list[int]]]):
        tokens = {"source": padded(sources)[:, None], "candidate": jnp.stack([padded(rows) for rows in samples])}
        ids, lengths = jax.device_get(in_graph(params, {field: tokens[field] for field in retokenizer.fields}))
        for row_ids, row_lengths, source, candidates in zip(ids, lengths, sources, samples, strict=True):
            for row, length, candidate in zip(row_ids, row_lengths, candidates, strict=True):
                text = template.format(source=policy.decode(source), candidate=policy.decode(candidate))
                assert row[:length].tolist() == library.encode(text)[:MAX_TOKENS], repr(text)
                assert not row[length:].any()

    return run


def padded(rows: list[list[int]]) -> jax.Array:
    tokens = np.zeros((len(rows), LENGTH), np.int32)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row[:LENGTH]
    return jnp.asarray(tokens)


def byte_rows(texts: list[str]) -> list[list[int]]:
    return [BYTES.encode(text)[: LENGTH - 1] + [BYTES.eos_id] for text in texts]


def test_real_sentences(encode_both, demo_pairs):
    pairs = demo_pairs[5000:5256]
    samples = byte_rows([target for _, target in pairs] * NUM_SAMPLES)
    grouped = [samples[index::256] for index in range(256)]
    encode_both(byte_rows([source for source, _ in pairs]), grouped)


TEXT = st.text(
    alphabet=st.one_of(
        st.sampled_from(" \u2581\u3000\u00a0\t\nabenäÄß<xy>fi\ufb01\u00a8\u0301\u1100\u1161\uff21½…\u200b⁇\ufffd好🙂"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    ),
    max_size=20,
)


@given(st.lists(TEXT, min_size=5, max_size=5))
@settings(max_examples=60, deadline=None)
def test_any_text(encode_both, texts):
    source, *candidates = byte_rows(texts)
    encode_both([source], [candidates])
