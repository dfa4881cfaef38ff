"""Corruptions on texts with words, without spaces, and too short to be spoilt."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.rewards import corruptions

SOURCES = ["Am Anfang schuf Gott Himmel und Erde.", "Und Gott sprach: Es werde Licht!", "Kein Wort."]
TRANSLATIONS = [
    "In the beginning God created the heaven and the earth.",
    "And God said, Let there be light!",
    "No word.",
]
CHINESE = ["起初神创造天地", "神说要有光"]


def variants(kind: str, translations=TRANSLATIONS, sources=SOURCES, seed: int = 0) -> list[str]:
    return corruptions.CORRUPTIONS[kind](sources, translations, np.random.default_rng(seed))


@pytest.mark.parametrize("kind", corruptions.CORRUPTIONS)
def test_each_kind_changes_every_text_of_words_and_of_characters(kind):
    for translations, sources in ((TRANSLATIONS, SOURCES), (CHINESE, SOURCES[:2])):
        for seed in range(20):
            spoilt = variants(kind, translations, sources, seed)
            assert len(spoilt) == len(translations)
            assert all(variant != text for variant, text in zip(spoilt, translations, strict=True)) or (
                kind == "gibberish"  # may draw the same again, of two units
            )


def test_the_kinds_do_what_their_names_say():
    words = TRANSLATIONS[0].split()
    for seed in range(20):
        repeated = variants("repeated", seed=seed)[0].split()
        assert repeated[: len(words)] == words and len(words) < len(repeated) <= 4 * len(words)
        truncated = variants("truncated", seed=seed)[0].split()
        assert truncated == words[: len(truncated)] and 2 <= len(truncated) <= 8
        left = iter(words)
        assert all(word in left for word in variants("with_omissions", seed=seed)[0].split())  # in order
        assert sorted(variants("permuted", seed=seed)[0].split()) == sorted(words)
        assert set(variants("unrelated", seed=seed)[0].split()) in (
            set(TRANSLATIONS[1].split()),
            set(TRANSLATIONS[2].split()),
        )
        assert len(variants("gibberish", seed=seed)[0].split()) == len(words)
    assert variants("copied_source") == SOURCES
    assert variants("half_untranslated")[1] == "And God said, Let Es werde Licht!"
    assert set("".join(variants("permuted", CHINESE, SOURCES[:2])[0])) == set(CHINESE[0])


@settings(max_examples=50)
@given(texts=st.lists(st.text(max_size=12), max_size=6), kind=st.sampled_from(sorted(corruptions.CORRUPTIONS)))
def test_any_text_is_taken_and_a_seed_gives_the_same_again(texts, kind):
    first = variants(kind, texts, texts, seed=3)
    assert len(first) == len(texts)
    assert first == variants(kind, texts, texts, seed=3)


def test_length_agreement():
    assert corruptions.length_agreement("a b c d", "a b") == 0.5
    assert corruptions.length_agreement("神说要有光", "神说要有") == 0.8
    assert corruptions.length_agreement("", "") == 1.0
    assert corruptions.length_agreement("a b", "") == 0.0
