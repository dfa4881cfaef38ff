"""Samples: their log-probabilities, their form, and what they are a function of."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.sampling import LogitProcessing, sampling_shapes
from rest_jax.sampling.sampler import decode, source_keys
from tests.sampling.conftest import EMBEDDING, VOCAB, compiled_decode, make_tiny, padded_sources

LENGTHS = (7, 3, 12, 5, 9, 12, 1, 6)
# Also ids past 2^31, which a cast to int32 would wrap.
SOURCE_IDS = np.array([3, 10, 7, 2**31 + 5, 0, 11, 2**32 - 1, 4], np.uint32)
MAX_LENGTH = 10
TEMPERED = LogitProcessing(temperature=0.8)


def draw_samples(
    tiny, sources, source_ids, *, num_samples=5, max_length=MAX_LENGTH, processing=TEMPERED, seed=0, stream=0
):
    run = compiled_decode(tiny.model, num_samples=num_samples, max_length=max_length, processing=processing)
    return jax.device_get(run(tiny.params, sources, source_ids, np.uint32(seed), np.uint32(stream)))


@pytest.fixture(scope="module")
def drawn(tiny):
    """The samples that others are compared with: 8 sources, 5 samples each."""
    return draw_samples(tiny, padded_sources(LENGTHS), SOURCE_IDS)


PROCESSINGS = {
    "tempered": TEMPERED,
    "truncated": LogitProcessing(temperature=0.7, top_k=8, top_p=0.9, epsilon=0.01),
    "hot": LogitProcessing(temperature=3.0),
    "greedy": LogitProcessing(temperature=0.0),
}


@pytest.mark.parametrize("name", PROCESSINGS)
def test_log_probs_are_the_policys_own_whatever_the_samples_were_drawn_from(tiny, name):
    sources = padded_sources(LENGTHS)
    samples = draw_samples(tiny, sources, SOURCE_IDS, processing=PROCESSINGS[name])
    # float32, and sums of at most 10 terms in two programs.
    np.testing.assert_allclose(samples.log_probs, tiny.score(sources, samples.tokens), atol=1e-4)


def check_form(samples, vocab=VOCAB):
    """Legal ids, then padding alone after EOS; lengths and hit_eos say where that is."""
    num_tokens = samples.tokens.shape[2]
    positions = np.arange(num_tokens)
    inside = positions < samples.lengths[..., None]
    assert ((samples.tokens > 0) & (samples.tokens < vocab))[inside].all()
    assert (samples.tokens[~inside] == 0).all()
    is_eos = samples.tokens == 1
    last = positions == samples.lengths[..., None] - 1
    np.testing.assert_array_equal(is_eos, last & samples.hit_eos[..., None])
    assert (samples.lengths[~samples.hit_eos] == num_tokens).all()


def test_samples_end_in_eos_or_at_max_length(drawn):
    check_form(drawn)
    assert 0 < drawn.hit_eos.mean() < 1  # both happen
    assert len(np.unique(drawn.lengths)) > 3


@pytest.mark.parametrize("name", ["tempered", "greedy"])
def test_padding_and_ids_past_the_vocabulary_are_never_drawn_however_probable(name):
    tiny = make_tiny(seed=3)
    params = jax.tree.map(lambda leaf: leaf, tiny.params)
    kernel = params["decoder"]["logits_dense"]["kernel"]
    illegal = np.r_[0, VOCAB:EMBEDDING]
    params["decoder"]["logits_dense"]["kernel"] = kernel.at[:, illegal].multiply(8.0)
    tiny = type(tiny)(tiny.model, params)
    sources = padded_sources(LENGTHS)
    samples = draw_samples(tiny, sources, SOURCE_IDS, processing=PROCESSINGS[name])
    check_form(samples)
    # The policy's probability counts the illegal ids, as training does, so that it is below the chance to draw.
    np.testing.assert_allclose(samples.log_probs, tiny.score(sources, samples.tokens), rtol=1e-5, atol=1e-4)
    legal_only = make_tiny(seed=3).score(sources, samples.tokens)
    assert (samples.log_probs < legal_only - 1).mean() > 0.9


def test_samples_follow_the_policys_distribution():
    # All translations of at most two tokens, 1 + 5 + 25 prefixes, and how often each is drawn.
    tiny = make_tiny(vocab=7, embedding=8)
    sources, count = padded_sources((6,), vocab=7), 20_000
    samples = draw_samples(tiny, sources, np.zeros(1, np.uint32), num_samples=count, max_length=2, processing=TEMPERED)
    batch = {
        "encoder_input_tokens": np.repeat(sources, 8, axis=0),
        "decoder_input_tokens": np.stack([np.zeros(8, np.int32), np.arange(8, dtype=np.int32)], axis=1),
        "decoder_target_tokens": np.ones((8, 2), np.int32),
    }
    logits = np.asarray(tiny.logits(tiny.params, batch), np.float64) / 0.8
    logits[..., [0, 7]] = -np.inf
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = p[0, 0][:, None] * p[:, 1]
    expected[1] = 0
    expected[1, 0] = p[0, 0, 1]  # EOS, then padding
    observed = np.zeros((8, 8))
    np.add.at(observed, (samples.tokens[0, :, 0], samples.tokens[0, :, 1]), 1)
    assert not observed[expected == 0].any()
    enough = expected * count >= 5
    rest = lambda values: np.append(values[enough], values[~enough].sum())  # noqa: E731
    assert scipy.stats.chisquare(rest(observed), rest(expected * count)).pvalue > 1e-3


def test_temperature_zero_is_the_argmax_rollout(tiny):
    sources = padded_sources(LENGTHS)
    samples = draw_samples(tiny, sources, SOURCE_IDS, num_samples=2, processing=PROCESSINGS["greedy"])
    np.testing.assert_array_equal(samples.tokens[:, 0], samples.tokens[:, 1])
    rows = np.zeros((len(LENGTHS), MAX_LENGTH), np.int32)
    ended = np.zeros(len(LENGTHS), bool)
    for position in range(MAX_LENGTH):
        batch = {
            "encoder_input_tokens": sources,
            "decoder_input_tokens": np.pad(rows[:, :-1], ((0, 0), (1, 0))),
            "decoder_target_tokens": np.ones_like(rows),
        }
        best = 1 + np.argmax(np.asarray(tiny.logits(tiny.params, batch))[:, position, 1:VOCAB], axis=-1)
        rows[:, position] = np.where(ended, 0, best)
        ended |= best == 1
    np.testing.assert_array_equal(samples.tokens[:, 0], rows)


def assert_same(samples, expected):
    """The same tokens; log-probabilities to float32's rounding, as sums of another batch may run in another order."""
    np.testing.assert_array_equal(samples.tokens, expected.tokens)
    np.testing.assert_array_equal(samples.lengths, expected.lengths)
    np.testing.assert_array_equal(samples.hit_eos, expected.hit_eos)
    np.testing.assert_allclose(samples.log_probs, expected.log_probs, atol=1e-4)


def take(samples, index):
    """Some of the samples; what decoding took is all samples' together."""
    return jax.tree.map(lambda leaf: leaf[index], samples.replace(slot_steps=None))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_policy_that_only_samples_may_be_narrow(scan_layers):
    half = make_tiny(dtype="bfloat16", scan_layers=scan_layers)
    shapes = sampling_shapes(half.model, half.params)
    narrow = dataclasses.replace(
        half, params=jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), half.params, shapes)
    )
    types = {leaf.dtype for leaf in jax.tree.leaves(narrow.params["decoder"])}
    assert types == {jnp.dtype("bfloat16"), jnp.dtype("float32")}  # kernels; scales, logits and biases of positions
    samples, expected = (draw_samples(each, padded_sources(LENGTHS), SOURCE_IDS) for each in (narrow, half))
    np.testing.assert_array_equal(samples.tokens, expected.tokens)
    np.testing.assert_array_equal(samples.log_probs, expected.log_probs)
    whole = make_tiny(scan_layers=scan_layers)
    assert sampling_shapes(whole.model, whole.params) == jax.eval_shape(lambda: whole.params)


def test_the_same_call_gives_the_same_bits(tiny, drawn):
    again = draw_samples(tiny, padded_sources(LENGTHS), SOURCE_IDS)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(drawn), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_order_of_the_sources_changes_nothing(tiny, drawn):
    order = np.array([5, 0, 7, 3, 1, 6, 2, 4])
    assert_same(draw_samples(tiny, padded_sources(LENGTHS)[order], SOURCE_IDS[order]), take(drawn, order))


def test_the_other_sources_change_nothing(tiny, drawn):
    few = np.array([6, 3, 0])
    assert_same(draw_samples(tiny, padded_sources(LENGTHS)[few], SOURCE_IDS[few]), take(drawn, few))


def test_the_padding_of_the_sources_changes_nothing(tiny, drawn):
    assert_same(draw_samples(tiny, padded_sources(LENGTHS, width=33), SOURCE_IDS), drawn)


def test_the_number_of_samples_changes_none_of_them(tiny, drawn):
    assert_same(draw_samples(tiny, padded_sources(LENGTHS), SOURCE_IDS, num_samples=2), take(drawn, np.s_[:, :2]))


def test_max_length_only_cuts(tiny, drawn):
    shorter = draw_samples(tiny, padded_sources(LENGTHS), SOURCE_IDS, max_length=6)
    np.testing.assert_array_equal(shorter.tokens, drawn.tokens[:, :, :6])


def test_fillers_are_empty_and_change_nothing(tiny, drawn):
    sources = np.insert(padded_sources(LENGTHS), [0, 4, 8], 0, axis=0)
    ids = np.insert(SOURCE_IDS, [0, 4, 8], 0)
    samples = draw_samples(tiny, sources, ids)
    real = sources.any(axis=1)
    assert_same(take(samples, real), drawn)
    for leaf in jax.tree.leaves(take(samples, ~real)):
        assert not leaf.any()


def test_fillers_alone_cost_no_step(tiny):
    samples = draw_samples(tiny, np.zeros((2, 5), np.int32), SOURCE_IDS[:2])
    assert not any(leaf.any() for leaf in jax.tree.leaves(samples))


@pytest.mark.parametrize("change", [dict(seed=1), dict(stream=1)])
def test_seed_and_stream_change_the_samples(tiny, drawn, change):
    other = draw_samples(tiny, padded_sources(LENGTHS), SOURCE_IDS, **change)
    assert (other.tokens != drawn.tokens).any(axis=2).mean() > 0.8


def test_samples_of_one_source_and_equal_sources_differ(tiny, drawn):
    assert len({tuple(row) for row in drawn.tokens[2]}) > 1
    sources = np.repeat(padded_sources((12,)), 2, axis=0)
    samples = draw_samples(tiny, sources, np.array([1, 2], np.uint32))
    assert (samples.tokens[0] != samples.tokens[1]).any()


def test_keys_are_different_and_depend_on_nothing_else():
    ids = np.arange(50, dtype=np.uint32)
    keys = {
        (seed, stream): np.asarray(jax.random.key_data(source_keys(seed=seed, stream=stream, source_ids=ids)))
        for seed in (0, 1)
        for stream in (0, 1)
    }
    assert len(np.unique(np.concatenate(list(keys.values())), axis=0)) == 4 * 50
    some = jax.random.key_data(source_keys(seed=1, stream=1, source_ids=ids[[7, 3]]))
    np.testing.assert_array_equal(some, keys[1, 1][[7, 3]])


MESHES = {"data=8": dict(), "data=4, model=2": dict(model=2), "replica=2, data=2, model=2": dict(replica=2, model=2)}


@functools.cache
def on_mesh(tiny, name):
    """A compiled sampler of the 8 sources on a mesh of 8 devices, and its arguments."""
    partitioner = Partitioner(make_mesh(**MESHES[name]))
    params = jax.device_put(tiny.params, partitioner.param_shardings(tiny.params))
    batch = partitioner.put_batch({"sources": padded_sources(LENGTHS), "source_ids": SOURCE_IDS})

    def run(params, batch):
        return decode(
            tiny.model,
            params,
            encoder_input_tokens=batch["sources"],
            source_ids=batch["source_ids"],
            num_samples=5,
            max_length=MAX_LENGTH,
            processing=TEMPERED,
            mesh=partitioner.mesh,
        )

    return jax.jit(run).lower(params, batch).compile(), (params, batch)


@pytest.mark.parametrize("name", MESHES)
def test_the_number_of_devices_changes_nothing(tiny, drawn, name):
    compiled, arguments = on_mesh(tiny, name)
    assert_same(jax.device_get(compiled(*arguments)), drawn)


COLLECTIVE = re.compile(r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)[\w-]*\(")


def loop_collectives(text):
    """Lines of the compiled text's while loops, conditions and what they call included, that speak to other devices."""
    computations, name = {}, None
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            name = header[1]
            computations[name] = []
        elif name is not None:
            computations[name].append(line)
    called = lambda line: re.findall(r"(?:body|condition|to_apply|calls)=%?([\w.-]+)", line)  # noqa: E731
    loops = [line for lines in computations.values() for line in lines if re.search(r"\bwhile\(", line)]
    waiting, seen = [name for line in loops for name in called(line)], set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += [other for line in computations[name] for other in called(line)]
    assert seen
    return [line.strip() for name in sorted(seen) for line in computations[name] if COLLECTIVE.search(line)]


def test_data_parallel_devices_never_meet_while_they_decode(tiny):
    found = loop_collectives(on_mesh(tiny, "data=8")[0].as_text())
    assert not found, "\n".join(found)


def test_the_search_for_collectives_finds_those_of_tensor_parallelism(tiny):
    # Guards the test above: split kernels need a sum over devices in each layer.
    assert len(loop_collectives(on_mesh(tiny, "data=4, model=2")[0].as_text())) > 3


def test_samples_stay_on_the_device_of_their_source(tiny):
    compiled, arguments = on_mesh(tiny, "data=8")
    samples = compiled(*arguments)
    for leaf in jax.tree.leaves(samples):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 1
    assert jnp.all(samples.lengths > 0)


@pytest.mark.parametrize("beam_size", [0, 4], ids=["samples", "beam"])
def test_samples_end_with_the_vocabularys_own_eos(beam_size):
    tiny = make_tiny(eos=2, eos_scale=3.0)
    sources = padded_sources(LENGTHS)

    def run(params, sources):
        return decode(
            tiny.model,
            params,
            encoder_input_tokens=sources,
            source_ids=SOURCE_IDS,
            num_samples=4,
            max_length=MAX_LENGTH,
            processing=LogitProcessing(),
            beam_size=beam_size,
        )

    samples = jax.device_get(jax.jit(run)(tiny.params, sources))
    ends = samples.tokens == 2
    np.testing.assert_array_equal(samples.hit_eos, ends.any(-1))
    assert samples.hit_eos.any() and not samples.hit_eos.all()
    # Nothing follows it, and 1 is a token like others.
    np.testing.assert_array_equal(samples.lengths[samples.hit_eos], ends.argmax(-1)[samples.hit_eos] + 1)
    assert (samples.tokens == 1).any()
    np.testing.assert_allclose(samples.log_probs, tiny.score(sources, samples.tokens), atol=1e-4)
