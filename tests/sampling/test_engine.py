"""The slot loop: which slot decodes a sample, and when, changes nothing; what it costs is counted."""

import functools
import heapq

import jax
import numpy as np
import pytest

from rest_jax.sampling import LogitProcessing, decode
from rest_jax.sampling.memory import choose_layout
from tests.sampling.conftest import compiled_decode, make_tiny, padded_sources

LENGTHS = (7, 3, 12, 5, 9, 12, 1, 6, 4)
IDS = np.arange(10, 19, dtype=np.uint32)
TEMPERED = LogitProcessing(temperature=0.8)


@functools.cache
def wide():
    """Large enough for the matrix products that real models use; samples end early or late."""
    return make_tiny(
        vocab=500, embedding=512, emb_dim=128, num_heads=6, head_dim=16, mlp_dim=128, eos_scale=6.0, seed=7
    )


def run(tiny, sources, ids, *, num_samples=30, max_length=12, **settings):
    settings = {"processing": TEMPERED, **settings}
    program = compiled_decode(tiny.model, num_samples=num_samples, max_length=max_length, **settings)
    return jax.device_get(program(tiny.params, sources, ids, np.uint32(0), np.uint32(0)))


@pytest.fixture(scope="module")
def drawn():
    return run(wide(), padded_sources(LENGTHS, vocab=500), IDS)


def assert_same(samples, expected):
    """The same, bit for bit."""
    for name in ("tokens", "log_probs", "lengths", "hit_eos"):
        np.testing.assert_array_equal(getattr(samples, name), getattr(expected, name), err_msg=name)


def test_samples_end_at_many_lengths(drawn):
    # Guards the tests below: slots are refilled at different times.
    assert len(np.unique(drawn.lengths)) > 6 and 0.1 < drawn.hit_eos.mean() < 0.95


@pytest.mark.parametrize("slots", [64, 100, 1000])
def test_the_number_of_slots_changes_nothing(drawn, slots):
    samples = run(wide(), padded_sources(LENGTHS, vocab=500), IDS, slots=slots)
    assert_same(samples, drawn)


@pytest.mark.parametrize("slots", [64, None])
def test_the_order_of_the_sources_changes_nothing(drawn, slots):
    order = np.random.default_rng(0).permutation(len(LENGTHS))
    samples = run(wide(), padded_sources(LENGTHS, vocab=500)[order], IDS[order], slots=slots)
    assert_same(samples, jax.tree.map(lambda leaf: leaf[order], drawn))


def test_going_down_to_fewer_slots_changes_nothing(drawn):
    # 256 slots at first, and fewer at the end; 64 never go down.
    layouts = [choose_layout(batch=9, num_samples=30, slots=slots) for slots in (256, 64)]
    assert layouts[0].shrunk and not layouts[1].shrunk
    sources = padded_sources(LENGTHS, vocab=500)
    assert_same(run(wide(), sources, IDS, slots=256), run(wide(), sources, IDS, slots=64))


def test_slot_steps_are_those_of_a_list_schedule(drawn):
    # Two sources, both at hand from the start: each slot takes the next sample as soon as it is free.
    sources = padded_sources((12, 5), vocab=500)
    samples = run(wide(), sources, IDS[:2], num_samples=100, slots=64)
    free = [0] * 64
    assert choose_layout(batch=2, num_samples=100, slots=64).places == 2
    for length in samples.lengths.ravel():  # the longer source first
        heapq.heappush(free, heapq.heappop(free) + int(length))
    assert samples.slot_steps.sum() == 64 * max(free)
    assert len(set(samples.lengths.ravel())) > 3


def test_slot_steps_are_spread_over_real_sources():
    sources = np.insert(padded_sources(LENGTHS, vocab=500), [0, 5], 0, axis=0)
    samples = run(wide(), sources, np.insert(IDS, [0, 5], 0), slots=64)
    real = sources.any(axis=1)
    layout_slots = choose_layout(batch=11, num_samples=30, slots=64).slots
    assert not samples.slot_steps[~real].any()
    assert np.ptp(samples.slot_steps[real]) <= 1
    assert samples.lengths.sum() <= samples.slot_steps.sum() < 2 * samples.lengths.sum()
    assert samples.slot_steps.sum() % layout_slots == 0


PREFIX = np.array([[5, 0], [7, 9], [0, 0], [3, 0], [2, 2], [8, 0], [4, 6], [0, 0], [9, 9]], np.int32)


@pytest.mark.parametrize("beam_size", [0, 3], ids=["samples", "beam"])
def test_a_prefix_is_forced_and_not_counted(beam_size):
    tiny = make_tiny(seed=5)
    sources = padded_sources(LENGTHS)

    @jax.jit
    def forced(params, prefix):
        return decode(
            tiny.model,
            params,
            encoder_input_tokens=sources,
            source_ids=IDS,
            num_samples=3,
            max_length=8,
            processing=TEMPERED,
            beam_size=beam_size,
            beam_alpha=0.0,
            prefix_tokens=prefix,
        )

    samples = jax.device_get(forced(tiny.params, PREFIX))
    for row, prefix in enumerate(PREFIX):
        size = np.count_nonzero(prefix)
        assert (samples.tokens[row, :, :size] == prefix[:size]).all()
        head = np.zeros_like(samples.tokens[row : row + 1])
        head[:, :, :size] = prefix[:size]
        whole = tiny.score(sources[row : row + 1], samples.tokens[row : row + 1])
        np.testing.assert_allclose(
            samples.log_probs[row], (whole - tiny.score(sources[row : row + 1], head))[0], atol=1e-4
        )
    free = jax.device_get(forced(tiny.params, np.zeros_like(PREFIX)))
    np.testing.assert_array_equal(samples.tokens[[2, 7]], free.tokens[[2, 7]])


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.05), ("int8", 0.05)])
def test_narrow_caches_give_nearly_the_policys_own_log_probs(dtype, error):
    tiny = make_tiny(seed=6)
    sources = padded_sources(LENGTHS)
    samples = run(tiny, sources, IDS, cache_dtype=dtype, slots=64)
    difference = np.abs(samples.log_probs - tiny.score(sources, samples.tokens))
    assert 1e-6 < difference.max() < error * np.abs(samples.log_probs).max()
