"""Characters in the graph against SentencePiece's own decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from rest_jax.rewards import characters

LENGTH = 24
BYTES = ByteVocabulary(extra_ids=5)


@pytest.fixture(scope="module")
def read(small_vocabulary: SentencePieceVocabulary):
    return reader(small_vocabulary)


@pytest.fixture(scope="module")
def read_bytes():
    return reader(BYTES)


def reader(vocabulary: Vocabulary, whitespace: characters.Whitespace = "dropped"):
    """Token ids -> text through the graph."""
    table = characters.character_table(vocabulary, whitespace=whitespace)
    width = table.codes.shape[1] * LENGTH

    @jax.jit
    def run(tokens):
        spelling = characters.spell(table, tokens)
        return characters.characters(table, spelling, max_characters=width), spelling.num_characters

    def texts(rows: list[list[int]]) -> list[str]:
        tokens = np.zeros((len(rows), LENGTH), np.int32)
        for target, row in zip(tokens, rows, strict=True):
            target[: len(row)] = row
        codes, lengths = jax.device_get(run(jnp.asarray(tokens)))
        assert not any(row[length:].any() for row, length in zip(codes, lengths, strict=True))
        return [
            "".join(chr(code % characters.NUL) for code in row[:length])
            for row, length in zip(codes, lengths, strict=True)
        ]

    return texts


def shown(vocabulary: Vocabulary, tokens: list[int]) -> str:
    return "".join(vocabulary.decode(tokens).split())


def byte_ids(vocabulary: SentencePieceVocabulary, values: bytes) -> list[int]:
    ids = {int(vocabulary.id_to_piece(i)[3:5], 16): i for i in range(vocabulary.vocab_size) if vocabulary.is_byte(i)}
    return [ids[value] for value in values]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        " ",
        "In the beginning God created",
        "Größe",
        "你好，世界",
        "🙂 \U0001f469\u200d\U0001f467 e\u0301",
        "a\u3000b\u00a0c\u2003d",
        "▁ ▁▁",
        "⁇",
    ],
)
def test_text_survives(read, small_vocabulary, text):
    tokens = small_vocabulary.encode(text)[:LENGTH]
    assert read([tokens]) == [shown(small_vocabulary, tokens)]


@pytest.mark.parametrize(
    "values",
    [
        b"\x80", b"\xc3", b"\xc3\xa9", b"\xc3\xc3\xa9", b"\xe4\xbd\xa0", b"\xe4\xbd", b"\xbd\xa0\xe4",
        b"\xf0\x9f\x99\x82", b"\xf0\x9f\x99", b"\xf0\x9f\x99\xf0\x9f\x99\x82", b"\xed\xa0\x80",
        b"\xc0\x80", b"\xe0\x80\x80", b"\xf4\x90\x80\x80", b"\xff\xfe", b"a\n\xe2\x80\x83b",
        b"a\0b\0", b"\xef\xbf\xbd", b"\xe2\x96\x81", b"\xf0\x80\x80\x80",
    ],
)  # fmt: skip
def test_byte_runs_read_as_sentencepiece_reads_them(read, small_vocabulary, values):
    tokens = byte_ids(small_vocabulary, values)
    assert read([tokens]) == [shown(small_vocabulary, tokens)]


def test_text_ends_at_the_first_eos(read, small_vocabulary):
    first, second = small_vocabulary.encode("light"), small_vocabulary.encode("darkness")
    assert read([[*first, 1, *second, 1]]) == ["light"]
    assert read([[1, *second]]) == [""]


def test_ids_outside_of_the_vocabulary_read_as_unknown(read, small_vocabulary):
    unknown = shown(small_vocabulary, [small_vocabulary.unk_id])
    assert unknown
    assert read([[2], [small_vocabulary.vocab_size], [10**6], [-1]]) == [unknown] * 4


@given(data=st.data())
def test_any_tokens_read_as_decoded(read, small_vocabulary, data):
    # Bytes are drawn as often as everything else together, else few runs would come out.
    bytes_first = [i for i in range(small_vocabulary.vocab_size) if small_vocabulary.is_byte(i)]
    token = st.sampled_from(bytes_first) | st.integers(2, small_vocabulary.vocab_size - 1)
    rows = data.draw(st.lists(st.lists(token, max_size=LENGTH), min_size=8, max_size=8))
    assert read(rows) == [shown(small_vocabulary, row) for row in rows]


def test_byte_vocabulary_leaves_invalid_bytes_out(read_bytes):
    assert read_bytes([BYTES.encode("Größe 東京"), [byte + 3 for byte in b"a\xe6\x9d b\xff"], [1, 70]]) == [
        "Größe東京", "ab", "",
    ]  # fmt: skip


@given(data=st.data())
def test_any_tokens_of_the_byte_vocabulary_read_as_decoded(read_bytes, data):
    # Leads and trails of long sequences are drawn as often as the rest, special ids among them.
    token = st.sampled_from([byte + 3 for byte in b"\xc3\xa9\xe6\x9d\xb1\xf0\x9f\x99\x82"]) | st.integers(0, 270)
    rows = data.draw(st.lists(st.lists(token, max_size=LENGTH), min_size=8, max_size=8))
    assert read_bytes(rows) == [shown(BYTES, row) for row in rows]


def test_text_ends_at_the_vocabularys_own_eos():
    class LaterEos(ByteVocabulary):
        eos_id = 2

    assert reader(LaterEos())([[*BYTES.encode("ab"), 2, *BYTES.encode("c")]]) == ["ab"]


@pytest.fixture(scope="module", params=["spaces_kept", "extra_spaces_removed", "bytes"])
def verbatim(request, small_vocabulary):
    """(vocabulary, its reader with whitespace as it is decoded)."""
    vocabulary = {
        "spaces_kept": small_vocabulary,
        "extra_spaces_removed": SentencePieceVocabulary("rest_jax://tasks/demo_data/vocab.model"),
        "bytes": BYTES,
    }[request.param]
    return vocabulary, reader(vocabulary, "verbatim")


@given(data=st.data())
def test_verbatim_text_is_the_decoded_one(verbatim, data):
    vocabulary, read = verbatim
    # Spaces in bytes and in pieces, alone and before a word, are drawn as often as everything else.
    spaces = st.sampled_from(vocabulary.encode("  a  in the\t\u3000\n ") + [vocabulary.unk_id])
    token = spaces | st.integers(0, vocabulary.vocab_size - 1)
    rows = data.draw(st.lists(st.lists(token, max_size=LENGTH), min_size=8, max_size=8))
    assert read(rows) == [vocabulary.decode(row) for row in rows]


def test_constants_and_texts_stand_behind_each_other(small_vocabulary):
    table = characters.character_table(small_vocabulary, whitespace="verbatim")
    texts = ["In the beginning", "Größe 東京"]
    tokens = np.zeros((2, LENGTH), np.int32)
    for target, text in zip(tokens, texts, strict=True):
        ids = small_vocabulary.encode(text)
        target[: len(ids)] = ids
    spelled = characters.spell(table, jnp.asarray(tokens))
    joined = characters.concatenate(
        [characters.constant("<好>"), spelled, characters.constant(" | "), characters.spell(table, tokens[:1])]
    )
    codes = np.asarray(characters.characters(table, joined, max_characters=64))
    found = ["".join(map(chr, row[:length])) for row, length in zip(codes, joined.num_characters, strict=True)]
    assert found == [f"<好>{text} | {texts[0]}" for text in texts]
