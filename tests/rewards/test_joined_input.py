"""Joining ids: the graph does what the host does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.data.vocabulary import ByteVocabulary
from rest_jax.errors import UserError
from rest_jax.rewards.joined_input import IN_DECODER, WITH_REFERENCE, JoinedInput, split

BYTES = ByteVocabulary()
EOS, LENGTH = 1, 6
texts = st.lists(st.integers(2, 258), max_size=LENGTH)


def test_a_template_is_cut_into_constants_and_fields():
    joined = JoinedInput.from_template("candidate: {sample} source: {source}", BYTES)
    assert joined.fields == ("sample", "source")
    found = joined.join({"sample": BYTES.encode("ja"), "source": BYTES.encode("da")})
    assert BYTES.decode(found) == "candidate:jasource:da"
    assert joined.num_constant_tokens == len("candidate:source:")


@pytest.mark.parametrize("template", ["{sample} {sample}", "{sample} {target}", "no fields"])
def test_a_template_without_fields_or_with_others_is_refused(template):
    with pytest.raises(UserError, match="TEMPLATE"):
        JoinedInput.from_template(template, BYTES)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(texts, texts, texts), min_size=3, max_size=3))
def test_rows_are_joined_in_the_graph_as_on_the_host(rows):
    joined = JoinedInput.from_template(WITH_REFERENCE, BYTES)
    in_decoder = JoinedInput.from_template(IN_DECODER, BYTES)

    def padded(column: int) -> np.ndarray:
        """With EOS where it fits, and something behind it that must not be read."""
        found = np.zeros((len(rows), LENGTH), np.int32)
        for out, row in zip(found, rows, strict=True):
            tokens = [*row[column], EOS, 9][:LENGTH]
            out[: len(tokens)] = tokens
        return found

    found = np.asarray(joined.join_rows({"source": padded(0), "sample": padded(1), "reference": padded(2)}, eos_id=EOS))
    for row, (source, sample, reference) in zip(found, rows, strict=True):
        expected = joined.join({"source": source, "sample": sample, "reference": reference})
        np.testing.assert_array_equal(row[: len(expected)], expected)
        assert not row[len(expected) :].any()

    whole = in_decoder.join_rows({"source": padded(0), "sample": padded(1)}, eos_id=EOS)
    sources, samples, last = map(np.asarray, split(whole, eos_id=EOS))
    for row, (source, sample, _) in enumerate(rows):
        assert sources[row].tolist() == source + [0] * (sources.shape[1] - len(source))
        assert samples[row].tolist() == [0, *sample] + [0] * (samples.shape[1] - len(sample) - 1)
        assert last[row] == len(sample)
