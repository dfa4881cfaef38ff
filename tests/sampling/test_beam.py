"""Beam search against exhaustive enumeration, and against a plain beam search that never stops early."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
import scipy.special

from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.models.layer_stacking import stack_layers
from rest_jax.sampling import LogitProcessing
from rest_jax.sampling.beam import length_penalty
from rest_jax.sampling.sampler import decode
from tests.sampling.conftest import VOCAB, Tiny, make_tiny, padded_sources

ALPHAS = [0.0, 0.6]


def search(tiny, sources, *, beam_size, num_best=None, alpha=0.0, max_length=8):
    def run(params, sources):
        return decode(
            tiny.model,
            params,
            encoder_input_tokens=sources,
            source_ids=np.arange(len(sources), dtype=np.uint32),
            num_samples=beam_size if num_best is None else num_best,
            max_length=max_length,
            processing=LogitProcessing(),
            beam_size=beam_size,
            beam_alpha=alpha,
        )

    return jax.device_get(jax.jit(run)(tiny.params, sources))


def penalised(log_probs, lengths, alpha):
    return np.asarray(log_probs, np.float64) / ((5 + np.asarray(lengths)) / 6) ** alpha


def all_translations(vocab, max_length):
    """Those that end, and those that `max_length` cuts: int32 `[count, max_length]` each."""
    words = range(2, vocab)
    ended = [(*w, 1) for n in range(max_length) for w in itertools.product(words, repeat=n)]
    cut = list(itertools.product(words, repeat=max_length))
    return tuple(np.array([row + (0,) * (max_length - len(row)) for row in rows], np.int32) for rows in (ended, cut))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_beam_that_holds_all_hypotheses_enumerates_them(alpha):
    # 3 words and EOS, at most 4 tokens: 40 translations that end and 81 that are cut.
    tiny = make_tiny(vocab=5, embedding=8)
    sources = padded_sources((4, 7), vocab=5)
    ended, cut = all_translations(5, 4)
    samples = search(tiny, sources, beam_size=128, alpha=alpha, max_length=4)
    for row in range(2):
        log_probs = tiny.score(sources[row : row + 1], np.concatenate([ended, cut])[None])[0]
        lengths = (np.concatenate([ended, cut]) > 0).sum(1)
        scores = penalised(log_probs, lengths, alpha)
        # Neighbours closer than float32's rounding may swap: compare the sorted scores, and each translation's own.
        expected = np.concatenate([np.sort(scores[:40])[::-1], np.sort(scores[40:])[::-1]])
        found = penalised(samples.log_probs[row], samples.lengths[row], alpha)
        np.testing.assert_allclose(found[:121], expected, atol=1e-4)
        assert samples.hit_eos[row, :40].all() and not samples.hit_eos[row, 40:].any()
        found = {tuple(t): p for t, p in zip(samples.tokens[row, :121], samples.log_probs[row, :121], strict=True)}
        truth = {tuple(t): p for t, p in zip(np.concatenate([ended, cut]), log_probs, strict=True)}
        assert found.keys() == truth.keys()
        for tokens, log_prob in truth.items():
            np.testing.assert_allclose(found[tokens], log_prob, atol=1e-4)
        # There are no more: the other places are empty.
        assert not samples.tokens[row, 121:].any() and (samples.log_probs[row, 121:] < -1e29).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_impossible_hypotheses_never_count_as_ended_however_long_the_search(alpha):
    # The beam has more places than there are first tokens, and the length penalty exceeds 2 past 14 tokens.
    tiny = make_tiny(vocab=4, embedding=8, seed=1)
    samples = search(tiny, padded_sources((5,), vocab=4), beam_size=12, alpha=alpha, max_length=24)
    assert (samples.log_probs > -1e3).all()
    assert (samples.tokens[samples.tokens > 0] < 4).all()
    assert len({tuple(row) for row in samples.tokens[0]}) == 12


def plain_beam(tiny, source, *, beam_size, num_best, alpha, max_length):
    """One source, hypotheses as lists, every position to the last: `[(penalised score, log_prob, tokens)]`."""
    live, ended = [(0.0, ())], []
    for position in range(max_length):
        inputs = np.zeros((beam_size, max_length), np.int32)
        for row, (_, tokens) in enumerate(live):
            inputs[row, 1 : position + 1] = tokens
        batch = {
            "encoder_input_tokens": np.repeat(source[None], beam_size, axis=0),
            "decoder_input_tokens": inputs,
            "decoder_target_tokens": np.ones_like(inputs),
        }
        logits = np.asarray(tiny.logits(tiny.params, batch))[:, position]
        step = scipy.special.log_softmax(logits, axis=-1)[:, 1:VOCAB]
        extended = [
            (log_prob + float(step[row, token - 1]), (*tokens, token))
            for row, (log_prob, tokens) in enumerate(live)
            for token in range(1, VOCAB)
        ]
        extended.sort(reverse=True)
        ended += [(p / float(length_penalty(position + 1, alpha)), p, t) for p, t in extended[:beam_size] if t[-1] == 1]
        live = [(p, t) for p, t in extended if t[-1] != 1][:beam_size]
    cut = [(p / float(length_penalty(max_length, alpha)), p, t) for p, t in live]
    return (sorted(ended, reverse=True)[:beam_size] + cut)[:num_best]


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("eos_scale", [1.0, 4.0])
def test_beams_are_those_of_a_search_that_never_stops_early(alpha, eos_scale):
    # With scaled EOS searches end early, without it translations are cut; rows end at different positions.
    tiny = make_tiny(eos_scale=eos_scale)
    sources = padded_sources((3, 9, 6, 12))
    samples = search(tiny, sources, beam_size=5, num_best=3, alpha=alpha)
    for row, source in enumerate(sources):
        expected = plain_beam(tiny, source, beam_size=5, num_best=3, alpha=alpha, max_length=8)
        for rank, (_, log_prob, tokens) in enumerate(expected):
            assert tuple(samples.tokens[row, rank][samples.tokens[row, rank] > 0]) == tokens
            np.testing.assert_allclose(samples.log_probs[row, rank], log_prob, atol=1e-4)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_beams_have_the_policys_log_probs_and_fall_in_score(tiny, alpha):
    sources = padded_sources((3, 9, 6, 12))
    samples = search(tiny, sources, beam_size=6, num_best=4, alpha=alpha, max_length=12)
    np.testing.assert_allclose(samples.log_probs, tiny.score(sources, samples.tokens), atol=1e-4)
    scores = penalised(samples.log_probs, samples.lengths, alpha)
    # Ended ones first; each group falls.
    order = np.where(samples.hit_eos, scores, scores - 1e6)
    assert (np.diff(order, axis=1) <= 1e-5).all()
    assert all(len({tuple(t) for t in row}) == 4 for row in samples.tokens)


def test_the_length_penalty_prefers_longer_translations(tiny):
    sources = padded_sources((3, 9, 6, 12, 8, 5))
    mean_length = [
        search(tiny, sources, beam_size=6, num_best=1, alpha=a, max_length=12).lengths.mean() for a in (0, 2)
    ]
    assert mean_length[1] > mean_length[0]


@pytest.mark.parametrize("eos_scale", [1.0, 4.0])
def test_a_beam_of_one_is_greedy(eos_scale):
    tiny = make_tiny(eos_scale=eos_scale, seed=2)
    sources = padded_sources((3, 9, 6, 12, 8, 5, 1, 10))
    beam = search(tiny, sources, beam_size=1, alpha=0.0, max_length=12)

    def greedy(params, sources):
        return decode(
            tiny.model,
            params,
            encoder_input_tokens=sources,
            source_ids=np.arange(8, dtype=np.uint32),
            num_samples=1,
            max_length=12,
            processing=LogitProcessing(temperature=0),
        )

    expected = jax.device_get(jax.jit(greedy)(tiny.params, sources))
    np.testing.assert_array_equal(beam.tokens, expected.tokens)
    np.testing.assert_allclose(beam.log_probs, expected.log_probs, atol=1e-4)
    if eos_scale > 1:
        assert expected.hit_eos.any()


def test_fillers_are_empty_and_other_sources_change_nothing(tiny):
    sources = padded_sources((3, 9, 6, 12))
    alone = search(tiny, sources[1:3], beam_size=4)
    with_fillers = search(tiny, np.insert(sources, [1, 4], 0, axis=0), beam_size=4)
    np.testing.assert_array_equal(with_fillers.tokens[[2, 3]], alone.tokens)
    for leaf in jax.tree.leaves(jax.tree.map(lambda leaf: leaf[[1, 5]], with_fillers)):
        assert not leaf.any()


def test_scanned_layers_find_the_same():
    plain = make_tiny(num_decoder_layers=3)
    sources = padded_sources((4, 7, 9))
    expected = search(plain, sources, beam_size=4, alpha=0.6)
    config = dataclasses.replace(plain.config, scan_layers=True)
    model = EncoderDecoderModel(t5.Transformer(config), None, plain.model.output_vocabulary)
    found = search(Tiny(model, stack_layers(plain.params, config)), sources, beam_size=4, alpha=0.6)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)
