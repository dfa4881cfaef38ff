"""Guards on texts of which one sees whether they should pass."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_jax.data.vocabulary import ByteVocabulary
from rest_jax.errors import UserError
from rest_jax.rewards import guards
from rest_jax.rewards.bleu import BLEU
from rest_jax.rewards.chrf import ChrF
from rest_jax.rewards.combinations import Guarded, WeightedSum

BYTES = ByteVocabulary()
LENGTH = 96
SOURCE = "Am Anfang schuf Gott Himmel und Erde."


def tokens(texts: list[str], length: int = LENGTH) -> np.ndarray:
    """`[texts, length]`, with EOS where it fits."""
    rows = np.zeros((len(texts), length), np.int32)
    for row, text in zip(rows, texts, strict=True):
        ids = [*BYTES.encode(text), 1][:length]
        row[: len(ids)] = ids
    return rows


def passed(guard, samples: list[str], source: str = SOURCE) -> list[bool]:
    batch = {"samples": tokens(samples)[None], "sources": tokens([source]), "references": tokens(["unread"])}
    found = jax.jit(guard.score)(guard.init(BYTES), batch)
    assert list(found) == [guard.name] and guard.name.startswith(guards.GUARD_PREFIX)
    values = np.asarray(guard.combine(found))
    assert set(values.ravel().tolist()) <= {0.0, 1.0}
    return values[0].astype(bool).tolist()


@pytest.mark.parametrize(
    ("guard", "good", "bad"),
    [
        (guards.NotEmpty(), ["a", " . "], ["", "  ", "\n\u3000"]),
        (guards.Finished(), ["", "a" * (LENGTH - 1)], ["a" * LENGTH]),
        # The source has 31 characters without whitespace.
        (guards.LengthRatio(0.5, 2.0), ["x" * 16, "x " * 31, "x" * 62], ["", "x" * 15, "x" * 63]),
        (guards.NotRepetitive(allowed=2), ["In the beginning", "ababab"], ["abababab", "la la la la"]),
        (
            guards.NotCopied(order=4, share=0.5),
            ["In the beginning God created", "", "Am", "Gott said in the beginning"],
            [SOURCE, "Am Anfang schuf Gott Himmel und earth.", "AmAnfang schuf"],
        ),
        (guards.NotCopied(order=1, share=0.9), ["GGGG", SOURCE + "x" * 10], ["Gott", SOURCE]),
        (guards.Script(("LATIN",)), ["earth", "", "12.5 %", "Größe Ж", "aЖ"], ["Земля", "地球", "a地球"]),
        (guards.Script(("CJK", "HIRAGANA", "KATAKANA"), share=1.0), ["地球は", "カ 1."], ["地球a"]),
    ],
    ids=lambda value: getattr(value, "name", "texts"),
)
def test_good_samples_pass_and_bad_ones_do_not(guard, good, bad):
    assert passed(guard, good) == [True] * len(good)
    assert passed(guard, bad) == [False] * len(bad)


def test_repetition_that_the_source_has_is_allowed():
    assert passed(guards.NotRepetitive(allowed=0), ["heilig heilig"], source="holy, holy, holy") == [True]
    assert passed(guards.NotRepetitive(allowed=0), ["heilig heilig"], source="holy") == [False]


def test_a_source_without_characters_bounds_no_length():
    assert passed(guards.LengthRatio(0.5, 2.0), ["", "anything"], source=" ") == [True, True]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: guards.LengthRatio(2.0, 0.5), "LengthRatio.low"),
        (lambda: guards.NotRepetitive(order=0), "NotRepetitive.order"),
        (lambda: guards.NotRepetitive(allowed=-1), "NotRepetitive.order"),
        (lambda: guards.NotCopied(order=17), "NotCopied.order"),
        (lambda: guards.NotCopied(share=1.0), "NotCopied.order"),
        (lambda: guards.Script("LATIN"), "Script.scripts"),
        (lambda: guards.Script(("LATIN",), share=0.0), "Script.share"),
        (lambda: guards.Script(("Latin",)).init(BYTES), "Script.scripts"),
    ],
)
def test_bad_settings_name_the_field(make, match):
    with pytest.raises(UserError, match=match):
        make()


EVERYTHING = Guarded(
    WeightedSum((ChrF(), ChrF(word_order=2), BLEU()), (0.25, 0.25, 0.5)),
    (
        guards.NotEmpty(),
        guards.Finished(),
        guards.LengthRatio(0.3, 3.0),
        guards.NotRepetitive(),
        guards.NotCopied(),
        guards.Script(("LATIN",)),
    ),
)
PARAMS = EVERYTHING.init(BYTES)
PROGRAM = jax.jit(EVERYTHING.score)
TEXT = st.text(st.sampled_from("abc äЖ.,1-"), max_size=20)


@given(data=st.data())
def test_rewards_do_not_depend_on_padding_or_company(data):
    """Bit for bit, each component: alone, in a batch, and behind more padding."""
    samples = data.draw(st.lists(st.lists(TEXT, min_size=4, max_size=4), min_size=8, max_size=8))
    sources, references = (data.draw(st.lists(TEXT, min_size=8, max_size=8)) for _ in range(2))

    def score(chosen, *, num_samples, length):
        batch = {
            "samples": np.stack([tokens(samples[i][-num_samples:], length) for i in chosen]),
            "sources": tokens([sources[i] for i in chosen], length),
            "references": tokens([references[i] for i in chosen], length),
        }
        return jax.device_get(PROGRAM(PARAMS, batch))

    whole = score(range(8), num_samples=4, length=48)
    for chosen, num_samples, length in ((range(8), 4, 64), ([5], 1, 48)):
        for name, values in score(chosen, num_samples=num_samples, length=length).items():
            np.testing.assert_array_equal(values, whole[name][list(chosen), -num_samples:], err_msg=name)
