"""Words in the graph against sacreBLEU's own splitting."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from rest_jax.data.vocabulary import ByteVocabulary
from rest_jax.rewards import characters, words

LENGTH = 96
BYTES = ByteVocabulary()
SPLITTINGS = {
    words.chrf_words: CHRF()._remove_punctuation,
    words.tokens_13a: lambda text: BLEU(effective_order=True)._preprocess_segment(text).split(),
}


@pytest.fixture(scope="module", params=SPLITTINGS, ids=lambda splitting: splitting.__name__)
def splitting(request):
    """A splitting in the graph, of texts; and sacreBLEU's of the same text."""
    table = characters.character_table(BYTES, whitespace="folded")

    @jax.jit
    def run(tokens):
        return request.param(characters.characters(table, characters.spell(table, tokens), max_characters=LENGTH))

    def split(texts: list[str]) -> list[list[str]]:
        tokens = np.zeros((len(texts), LENGTH), np.int32)
        for target, text in zip(tokens, texts, strict=True):
            target[: len(BYTES.encode(text))] = BYTES.encode(text)
        found = jax.device_get(run(tokens))
        result = []
        for codes, starts, length in zip(found.codes, found.starts, np.asarray(found.num_characters), strict=True):
            assert codes[:length].all() and not codes[length:].any() and not starts[length:].any()
            texts_of_words = "".join(
                ("\n" if start else "") + chr(code) for code, start in zip(codes[:length], starts[:length], strict=True)
            )
            result.append(texts_of_words.split("\n")[1:])
        assert np.asarray(found.num_words).tolist() == [len(row) for row in result]
        return result

    return split, SPLITTINGS[request.param]


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "a", ".", "..", "1.", ".1", "1.5", "1,000.50", "a.5", "5.a", "1..2", "1...2", "a..2", "a...2",
        "1.,,.2", "3-4", "-3", "3 -4", "a-b", "3--4", "3.-4", "3-.4", "(hi)", "(hi", "hi)", "((hi))", "()", "( )",
        "don't", "'tis'", "«ja»", "&amp;lt;", "&&quot;", "&qu<skipped>ot;", "<skip<skipped>ped>", "a-\nb",
        "a-\n", "a-\n b",
        "a--\n\nb", "a -\n\n", "a-\n<skipped>", "x\u3000y\u00a0z", "$5%.", "{a}[b]\\c^d_e`f|g~h", "١.٢", "é.5", "😀.",
    ],
)  # fmt: skip
def test_hard_cases_split_as_in_sacrebleu(splitting, text):
    ours, theirs = splitting
    assert ours([text]) == [theirs(text)]


PIECES = [*"aA1 2..,,--&;(\"/\tü'", "\u3000", "&quot;", "&amp;", "lt;", "<skipped>", "\n", "-\n"]


@given(texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=10).map("".join), min_size=16, max_size=16))
def test_any_text_splits_as_in_sacrebleu(splitting, texts):
    ours, theirs = splitting
    assert ours(texts) == [theirs(text) for text in texts]
