"""Vocabularies against seqio's of the same kind: ids, text and fingerprints are the same."""

import gzip
from pathlib import Path

import pytest
import sentencepiece
import seqio

from rest_jax.data import seqio_tasks
from rest_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, adopt
from rest_jax.errors import UserError

DEMO_DATA = Path(__file__).parents[2] / "tasks" / "demo_data"
T5 = dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
UMT5 = dict(pad_id=0, eos_id=1, bos_id=2, unk_id=3)
MADLAD = dict(unk_id=0, bos_id=1, eos_id=2, pad_id=-1)
TEXTS = ["", "In the beginning", "Größe 東京 🙂", "a\tb\nc", "<2en> und sprach"]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory):
    with gzip.open(DEMO_DATA / "test.tsv.gz", "rt", encoding="utf-8") as lines:
        texts = [text for line in lines for text in line.rstrip("\n").split("\t")[:2]]

    def _train(**options: object) -> str:
        prefix = tmp_path_factory.mktemp("vocabulary") / "v"
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_prefix=str(prefix),
            vocab_size=500,
            byte_fallback=True,
            num_threads=1,
            minloglevel=2,
            **options,
        )
        return f"{prefix}.model"

    return _train


@pytest.mark.parametrize("ids", [T5, UMT5, MADLAD], ids=["T5", "UMT5", "MADLAD-400"])
@pytest.mark.parametrize("extra_ids", [0, 100])
def test_a_model_file_reads_as_in_seqio(train, ids, extra_ids) -> None:
    path = train(**ids)
    ours, theirs = SentencePieceVocabulary(path, extra_ids), seqio.SentencePieceVocabulary(path, extra_ids)
    assert (ours.vocab_size, ours.eos_id, ours.unk_id) == (theirs.vocab_size, theirs.eos_id, theirs.unk_id)
    assert (ours.vocab_size, ours.pad_id) == (500 + extra_ids, 0)
    assert ours.sha256 == seqio_tasks.vocabulary_sha256(theirs)
    for text in TEXTS:
        tokens = ours.encode(text)
        assert tokens == theirs.encode(text)
        assert ours.decode([*tokens, ours.eos_id, *tokens]) == theirs.decode([*tokens, ours.eos_id, *tokens])
    assert ours.decode_batch([ours.encode("Gott"), [0, 0]]) == ["Gott", ""]


def test_ours_takes_the_place_of_seqios_with_the_same_ids(train) -> None:
    path = train(**T5)
    for theirs in (
        seqio.SentencePieceVocabulary(path),
        seqio.SentencePieceVocabulary(path, 100),
        seqio.ByteVocabulary(),
        seqio.ByteVocabulary(125),
    ):
        ours = adopt(theirs)
        assert ours.sha256 == seqio_tasks.vocabulary_sha256(theirs) and ours.vocab_size == theirs.vocab_size
        assert adopt(ours) is ours
    with pytest.raises(UserError, match="VOCABULARY is .*PassThroughVocabulary"):
        adopt(seqio.PassThroughVocabulary(8))
    with pytest.raises(UserError, match="no such SentencePiece model: '/nonexistent"):
        adopt(seqio.SentencePieceVocabulary("/nonexistent/x.model"))


def test_extra_ids_are_sentinels_behind_the_pieces(train) -> None:
    path = train(**T5)
    ours, theirs = SentencePieceVocabulary(path, 3), seqio.SentencePieceVocabulary(path, 3)
    assert [ours.id_to_piece(token) for token in range(500, 503)] == [f"▁<extra_id_{i}>" for i in (2, 1, 0)]
    text = "In <extra_id_0> the <extra_id_2>"
    assert ours.encode(text) == theirs.encode(text)
    assert {500, 502} < set(ours.encode(text))
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text)) == text
    assert ours.sha256 != SentencePieceVocabulary(path).sha256


def test_madlad_target_tags_are_one_token_each(train) -> None:
    ours = SentencePieceVocabulary(train(**MADLAD, user_defined_symbols=["<2en>", "<2de>"]))
    tokens = ours.encode("<2de> In the beginning")
    assert [ours.id_to_piece(token) for token in tokens].count("<2de>") == 1
    assert tokens != ours.encode("<2en> In the beginning")
    assert ours.eos_id == 2 and ours.decode([*ours.encode("Gott"), 2, 9]) == "Gott"
    # Ids behind the vocabulary read as the unknown token, which here is that of padding and has no text.
    assert ours.decode([10_000]) == ""


@pytest.mark.parametrize(
    "ids", [dict(unk_id=0, eos_id=1, bos_id=-1, pad_id=2), dict(bos_id=0, eos_id=1, unk_id=2, pad_id=-1)]
)
def test_a_model_that_needs_id_0_for_itself_is_refused(train, ids) -> None:
    with pytest.raises(UserError, match=r"\(pad, eos, unk\) ids .*MADLAD-400.*rest_jax vocab"):
        SentencePieceVocabulary(train(**ids))


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        SentencePieceVocabulary(str(tmp_path / "x.model"))
    with pytest.raises(UserError, match="no such SentencePiece model"):
        SentencePieceVocabulary(str(tmp_path / "y.model"))


@pytest.mark.parametrize("extra_ids", [0, 125])
def test_bytes_read_as_in_seqio(extra_ids) -> None:
    ours, theirs = ByteVocabulary(extra_ids), seqio.ByteVocabulary(extra_ids)
    assert (ours.vocab_size, ours.eos_id, ours.unk_id) == (theirs.vocab_size, theirs.eos_id, theirs.unk_id)
    assert (ours.pad_id, ours.vocab_size) == (0, 259 + extra_ids)
    assert ours.sha256 == seqio_tasks.vocabulary_sha256(theirs)
    broken = [[0xE6, 0x9D], [0x41, 0xC3, 0x42], [0xF0, 0x9F, 0x99, 0xE6, 0x9D, 0xB1], [0xED, 0xA0, 0x80]]
    rows = [ours.encode(text) for text in TEXTS] + [[byte + 3 for byte in values] for values in broken]
    for text, row in zip(TEXTS, rows, strict=False):
        assert row == theirs.encode(text)
        assert ours.decode(row) == text
    for row in rows:
        assert ours.decode([*row, 1, *row]) == theirs.decode([*row, 1, *row])
    assert ours.decode([*ours.encode("a"), 2, 0, ours.vocab_size - 1, 999, *ours.encode("b")]) == "ab"


def test_byte_pieces_have_names() -> None:
    vocabulary = ByteVocabulary(extra_ids=2)
    assert [vocabulary.id_to_piece(token) for token in (0, 1, 2, 3, 13, 258)] == [
        "<pad>", "</s>", "<unk>", "<0x00>", "<0x0A>", "<0xFF>",
    ]  # fmt: skip
    assert [vocabulary.id_to_piece(token) for token in (259, 260)] == ["<extra_id_1>", "<extra_id_0>"]
    kinds = [(vocabulary.is_byte(t), vocabulary.is_control(t), vocabulary.is_unknown(t)) for t in (0, 2, 3, 260)]
    assert kinds == [(False, True, False), (False, False, True), (True, False, False), (False, True, False)]


@pytest.mark.parametrize("extra_ids", [-1, 1.5, True])
def test_extra_ids_are_checked(extra_ids) -> None:
    with pytest.raises(UserError, match="extra_ids"):
        ByteVocabulary(extra_ids)
