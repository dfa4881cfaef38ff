"""Retokenisation in the graph against the `sentencepiece` library's own encoding of the decoded texts."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.data.vocabulary import ByteVocabulary, Vocabulary
from rest_jax.errors import UserError
from rest_jax.rewards.retokenization import Retokenizer, RetokenizerParams, join

BYTES = ByteVocabulary()
LENGTH, MAX_TOKENS, NUM_SAMPLES = 96, 160, 4
TEMPLATE = "source: {source} candidate: {candidate}"
TRAINING = {
    **{"vocab_size": 600, "character_coverage": 0.998, "max_sentencepiece_length": 12},
    **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "num_threads": 1, "minloglevel": 2},
}
# A normaliser's rules: hexadecimal code points of the text, and of what replaces it.
RULES = """\
BD\t20 31 2F 32 20
FB01\t66 69
61 301\tE1
61 301 302\t78
A8\t20 308
200B\t
3000\t20
"""
# Kinds of unigram vocabularies; each is trained on the demo text.
KINDS = {
    "byte_fallback": {"byte_fallback": True, "normalization_rule_name": "identity"},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc", "user_defined_symbols": ["<x>", "<xy>", "en"]},
    "spaces_kept": {"normalization_rule_tsv": RULES, "remove_extra_whitespaces": False},
    "no_prefix": {"normalization_rule_tsv": RULES, "add_dummy_prefix": False, "split_by_whitespace": False},
}


@pytest.fixture(scope="module")
def train(demo_pairs, tmp_path_factory):
    """Trains a vocabulary on 500 pairs of the demo text, and returns its file."""
    texts = [text for pair in demo_pairs[:500] for text in pair]

    def run(name: str, **options) -> str:
        prefix = tmp_path_factory.mktemp("retokenization") / name
        if "normalization_rule_tsv" in options:
            rules = prefix.with_suffix(".tsv")
            rules.write_text(options["normalization_rule_tsv"], encoding="utf-8")
            options["normalization_rule_tsv"] = str(rules)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=str(prefix),
            **{**TRAINING, **options},
        )
        return f"{prefix}.model"

    return run


@pytest.fixture(scope="module")
def nmt_nfkc_file(train) -> str:
    return train("nmt_nfkc", **KINDS["nmt_nfkc"])


@pytest.fixture(scope="module", params=KINDS)
def check(request, train, nmt_nfkc_file):
    """Compares rows of (source, candidates); the policy speaks bytes."""
    file = nmt_nfkc_file if request.param == "nmt_nfkc" else train(request.param, **KINDS[request.param])
    return checker(Retokenizer(file, TEMPLATE, MAX_TOKENS, max_characters=2 * LENGTH + 50), BYTES)


@pytest.fixture(scope="module")
def nmt_nfkc_params(nmt_nfkc_file) -> RetokenizerParams:
    return Retokenizer(nmt_nfkc_file, TEMPLATE, MAX_TOKENS).init(BYTES)


def checker(retokenizer: Retokenizer, policy: Vocabulary, params: RetokenizerParams | None = None):
    params = params or retokenizer.init(policy)
    library = sentencepiece.SentencePieceProcessor(model_file=retokenizer.sentencepiece_model_file)
    in_graph = jax.jit(retokenizer)

    def run(sources: list[list[int]], samples: list[list[list[int]]]):
        tokens = {"source": padded(sources)[:, None], "candidate": jnp.stack([padded(rows) for rows in samples])}
        ids, lengths = jax.device_get(in_graph(params, tokens))
        for row_ids, row_lengths, source, candidates in zip(ids, lengths, sources, samples, strict=True):
            for row, length, candidate in zip(row_ids, row_lengths, candidates, strict=True):
                text = retokenizer.template.format(source=policy.decode(source), candidate=policy.decode(candidate))
                expected = library.encode(text)
                if retokenizer.append_eos:
                    expected = [*expected[: retokenizer.max_tokens - 1], library.eos_id()]
                assert row[:length].tolist() == expected[: retokenizer.max_tokens], repr(text)
                assert not row[length:].any()

    return run


def padded(rows: list[list[int]]) -> jax.Array:
    tokens = np.zeros((len(rows), LENGTH), np.int32)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row
    return jnp.asarray(tokens)


def byte_rows(texts: list[str]) -> list[list[int]]:
    return [[*BYTES.encode(text)[: LENGTH - 1], BYTES.eos_id] for text in texts]


def test_real_sentences(check, demo_pairs):
    pairs = demo_pairs[5000:5064]
    samples = byte_rows([target for _, target in pairs] * NUM_SAMPLES)
    check(byte_rows([source for source, _ in pairs]), [samples[index :: len(pairs)] for index in range(len(pairs))])


SPECIAL = " \u2581\u3000\u00a0\t\nabenäÄß<xy>fi\ufb01\u00a8\u0301\u0302\u1100\u1161\uff21½…\u200b⁇\ufffd好🙂"
TEXT = st.text(
    alphabet=st.one_of(st.sampled_from(SPECIAL), st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    max_size=20,
)


@given(st.lists(TEXT, min_size=NUM_SAMPLES + 1, max_size=NUM_SAMPLES + 1))
@settings(max_examples=30, deadline=None)
def test_any_text(check, texts):
    source, *candidates = byte_rows(texts)
    check([source], [candidates])


@pytest.fixture(scope="module")
def check_any_ids(nmt_nfkc_file, small_vocabulary):
    """No space between the template and the text: the one that decoding drops counts."""
    return checker(
        Retokenizer(nmt_nfkc_file, "[{candidate}]({source})", 512, append_eos=True, max_characters=512),
        small_vocabulary,
    )


@given(st.lists(st.lists(st.integers(0, 1005), max_size=20), min_size=NUM_SAMPLES + 1, max_size=NUM_SAMPLES + 1))
@settings(max_examples=30, deadline=None)
def test_any_ids(check_any_ids, rows):
    source, *candidates = rows
    check_any_ids([source], [candidates])


def test_text_that_grows_past_its_array(nmt_nfkc_file, nmt_nfkc_params):
    grown = "\ufdfa" * 16  # 18 characters each
    check = checker(Retokenizer(nmt_nfkc_file, "{source}{candidate}", 600, max_characters=600), BYTES, nmt_nfkc_params)
    check(byte_rows([grown, "a"]), [byte_rows(["b", grown]), byte_rows(["", "c"])])


@pytest.mark.parametrize("append_eos", [False, True])
def test_long_text_loses_its_end(nmt_nfkc_file, nmt_nfkc_params, demo_pairs, append_eos):
    retokenizer = Retokenizer(nmt_nfkc_file, TEMPLATE, 20, append_eos=append_eos, max_characters=256)
    check = checker(retokenizer, BYTES, nmt_nfkc_params)
    source, *candidates = byte_rows([target for _, target in demo_pairs[:5]])
    check([source], [candidates])


def test_result_does_not_depend_on_company(nmt_nfkc_file, nmt_nfkc_params, demo_pairs):
    in_graph = jax.jit(Retokenizer(nmt_nfkc_file, "{candidate}", MAX_TOKENS, max_characters=100))
    tokens = padded(byte_rows([target for _, target in demo_pairs[:8]]))[:, None]
    together, lengths = in_graph(nmt_nfkc_params, {"candidate": tokens})
    alone, length = in_graph(nmt_nfkc_params, {"candidate": jnp.pad(tokens[5:6], ((0, 0), (0, 0), (0, 9)))})
    np.testing.assert_array_equal(alone[0], together[5])
    np.testing.assert_array_equal(length[0], lengths[5])


def test_join_cuts_the_sample_first():
    ids = jnp.asarray([[[5, 6, 0], [7, 0, 0]], [[8, 9, 10], [11, 12, 0]]])
    lengths = jnp.asarray([[2, 1], [3, 2]])
    prefixes, prefix_lengths = jnp.asarray([[1, 2, 3], [4, 0, 0]]), jnp.asarray([3, 1])
    joined = join(prefixes, prefix_lengths, ids, lengths, total_length=4)
    np.testing.assert_array_equal(joined.ids, [[[1, 2, 3, 5], [1, 2, 3, 7]], [[4, 8, 9, 10], [4, 11, 12, 0]]])
    np.testing.assert_array_equal(joined.lengths, [[4, 4], [4, 3]])
    no_samples = join(prefixes, prefix_lengths, ids, lengths, total_length=2)
    np.testing.assert_array_equal(no_samples.ids[0], [[1, 2], [1, 2]])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "bpe"}, "is a BPE model"),
        ({"model_type": "char"}, "is a CHAR model"),
        ({"treat_whitespace_as_suffix": True}, "writes spaces behind words"),
    ],
)
def test_other_segmentations_are_refused(train, options, reason):
    file = train("other", **{"vocab_size": 120, "hard_vocab_limit": False, **options})
    with pytest.raises(UserError, match=reason):
        Retokenizer(file, TEMPLATE, MAX_TOKENS).init(BYTES)


def test_missing_or_damaged_file_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="no such SentencePiece model"):
        Retokenizer(str(tmp_path / "none.model"), TEMPLATE, MAX_TOKENS).init(BYTES)
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(b"no model")
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        Retokenizer(str(damaged), TEMPLATE, MAX_TOKENS).init(BYTES)


def test_eos_that_is_not_there_is_refused(train):
    file = train("no_eos", normalization_rule_name="identity", control_symbols=["<s>"], user_defined_symbols=["</t>"])
    model = pathlib.Path(file).read_bytes().replace(b"</s>", b"</u>")
    pathlib.Path(file).write_bytes(model)
    with pytest.raises(UserError, match="has no EOS"):
        Retokenizer(file, TEMPLATE, MAX_TOKENS, append_eos=True).init(BYTES)


@pytest.mark.parametrize("template", ["no fields", "open {source", "{}"])
def test_template_must_name_its_fields(template):
    with pytest.raises(UserError, match=r"Retokenizer\.template"):
        Retokenizer("any.model", template, MAX_TOKENS)


def test_sizes_must_hold_something():
    with pytest.raises(UserError, match="max_tokens is 1"):
        Retokenizer("any.model", TEMPLATE, 1, append_eos=True)
    with pytest.raises(UserError, match="max_characters is 0"):
        Retokenizer("any.model", TEMPLATE, MAX_TOKENS, max_characters=0)
