"""The language guard: right on real text, and equal on the host and in the graph whatever stands beside or behind."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax import cli
from rest_jax.data.vocabulary import ByteVocabulary
from rest_jax.errors import UserError
from rest_jax.rewards import language
from rest_jax.rewards.base import check_reward
from rest_jax.rewards.language import RightLanguage

BYTES = ByteVocabulary()


@pytest.fixture(scope="module")
def texts(demo_pairs) -> dict[str, list[str]]:
    return {name: [pair[column] for pair in demo_pairs[:2000]] for column, name in enumerate(("de", "en"))}


@pytest.fixture(scope="module")
def identifier_file(texts, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("language") / "de_en.npz"
    language.write(path, language.train(texts))
    return str(path)


def tokens(samples: list[str], length: int) -> np.ndarray:
    rows = np.zeros((len(samples), length), np.int32)
    for row, text in zip(rows, samples, strict=True):
        ids = [*BYTES.encode(text), BYTES.eos_id][:length]
        row[: len(ids)] = ids
    return rows


def scored(guard: RightLanguage, samples: list[str], *, length: int = 128) -> list[bool]:
    """Whether each sample passes."""
    rows = tokens(samples, length)
    batch = {"samples": rows[None], "references": rows[:1], "sources": rows[:1]}
    return np.asarray(jax.jit(guard.score)(guard.init(BYTES), batch)[guard.name])[0].astype(bool).tolist()


def test_held_out_sentences_are_told_apart(identifier_file, demo_pairs):
    held_out = {"de": [pair[0] for pair in demo_pairs[-400:]], "en": [pair[1] for pair in demo_pairs[-400:]]}
    found = language.accuracy_by_length(language.read(identifier_file), held_out)
    assert set(found) == {"de", "en"}
    for lengths in found.values():
        assert sum(part["sentences"] for part in lengths.values()) == 400
        assert all(part["accuracy"] > 0.99 and part["refused"] < 0.01 for part in lengths.values())


def test_another_language_is_refused_and_what_may_be_both_is_not(identifier_file):
    german, english = RightLanguage(identifier_file, "de"), RightLanguage(identifier_file, "en")
    samples = ["And God said: Let there be light!", "Und Gott sprach: Es werde Licht!", "David", "", "1. 2. 3."]
    assert scored(english, samples) == [True, False, True, True, True]
    assert scored(german, samples) == [False, True, True, True, True]
    assert scored(RightLanguage(identifier_file, "de", margin=1e4), samples) == [True] * 5


CHARACTERS = st.text(st.sampled_from("abcdehinrst äöüß.,地Ж"), max_size=24)


@settings(max_examples=30)
@given(data=st.data())
def test_a_score_is_the_texts_alone(identifier_file, data):
    """The sum over n-grams, in a fresh and slow computation, in any array and company."""
    table = language.read(identifier_file).table
    samples = data.draw(st.lists(CHARACTERS, min_size=4, max_size=4))
    program = jax.jit(language.language_scores)

    def of(chosen: list[str], width: int) -> np.ndarray:
        codes = np.zeros((len(chosen), width), np.int32)
        for row, text in zip(codes, chosen, strict=True):
            row[: len(text)] = [ord(character) for character in text]
        return np.asarray(program(table, codes))

    whole = of(samples, 32)
    np.testing.assert_array_equal(of(samples, 40), whole)
    np.testing.assert_array_equal(of(samples[2:3], 32), whole[2:3])
    by_hand = sum(
        (table[_bucket(samples[0][start : start + order])].astype(int)
         for order in language.ORDERS for start in range(len(samples[0]) - order + 1)),
        start=np.zeros(2, int),
    )  # fmt: skip
    np.testing.assert_array_equal(whole[0], by_hand)


def _bucket(ngram: str) -> int:
    hashed = 0
    for order, character in enumerate(ngram, start=1):
        hashed = ((hashed ^ ord(character)) * 16777619 + order) % 2**32
    folded = (hashed ^ (hashed >> 15)) * 2246822519 % 2**32
    return (folded ^ (folded >> 13)) % language.BUCKETS


def test_a_guard_declares_its_language(identifier_file):
    guard = RightLanguage(identifier_file, "en")
    check_reward(guard, has_references=True, languages=("de", "en"))
    with pytest.raises(UserError, match=r"guard/right_language.*LANGUAGES"):
        check_reward(guard, has_references=True, languages=("en", "de"))


def test_the_amount_of_text_does_not_matter(texts):
    """What neither language ever had tells nothing, though one has much less text."""
    identifier = language.train({"de": texts["de"], "en": texts["en"][:200]})
    unseen = [text * 3 for text in ("地球", "Ж")]
    assert np.ptp(language._scores(identifier, unseen), axis=1).max() < language.SCALE  # but for the blank before them


def test_faults_are_named(identifier_file, tmp_path):
    for make, match in (
        (lambda: RightLanguage(identifier_file, "en", margin=-1), "margin"),
        (lambda: RightLanguage(identifier_file, "fr").init(BYTES), "knows de, en"),
        (lambda: RightLanguage(str(tmp_path / "none.npz"), "en").init(BYTES), "train_language_id"),
    ):
        with pytest.raises(UserError, match=match):
            make()
    np.savez(tmp_path / "other.npz", table=np.zeros((4, 2), np.int16), facts=np.array('{"languages": ["a", "b"]}'))
    with pytest.raises(UserError, match="no language identifier"):
        language.read(str(tmp_path / "other.npz"))


def test_the_command(texts, tmp_path, capsys):
    for name, lines in texts.items():
        (tmp_path / name).write_text("\n".join(lines[:400]) + "\n", encoding="utf-8")
    options = [f"--text={name}={tmp_path / name}" for name in texts]
    output = tmp_path / "made" / "id.npz"
    assert cli.main(["train_language_id", *options, f"--output={output}"]) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said and said.count("\nde ") >= 2 and f"Identifier: {output}" in said
    assert scored(RightLanguage(str(output), "en"), ["And the people said to Moses."]) == [True]
    for arguments, words in (
        (options[:1], "two languages"),
        ([options[0], options[0]], "two languages"),
        ([options[0], f"--text=en={tmp_path / 'missing'}"], "missing"),
        ([*options, "--held_out=1"], "--held_out"),
    ):
        assert cli.main(["train_language_id", *arguments, f"--output={tmp_path / 'x.npz'}"]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "de").write_text("Nur dies.\n", encoding="utf-8")
    assert cli.main(["train_language_id", *options, f"--output={tmp_path / 'x.npz'}"]) == 2
    assert "at least 100" in capsys.readouterr().err
