"""The decoder one position at a time is the network over whole sequences, and never repeats a source per sample."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from rest_jax.sampling import LogitProcessing, decoder
from rest_jax.sampling import cache as cache_lib
from rest_jax.sampling.processors import NEGATIVE_INFINITY
from rest_jax.sampling.sampler import decode
from tests.sampling.conftest import make_tiny, padded_sources

SOURCE_LENGTHS = (9, 4, 12)


def step_by_step(tiny, sources, inputs, *, cache_dtype=None, **cache_layout):
    """Logits `[batch, N, T, V]` of decode_position for decoder inputs `[batch, N, T]`."""
    config, length = tiny.config, inputs.shape[2]
    module = tiny.model.module

    batch, num_samples = inputs.shape[:2]
    slots = batch * num_samples
    bias = np.broadcast_to(np.where(sources > 0, 0, NEGATIVE_INFINITY)[:, None], (batch, num_samples, sources.shape[1]))

    @jax.jit
    def run(params, inputs):
        encoded = module.apply({"params": params}, sources, enable_dropout=False, method=module.encode)
        cross = decoder.cross_attention(params, config, encoded=encoded)
        weights = decoder.pack_weights(params, config)
        cache = decoder.empty_cache(config, max_length=length, slots=slots, dtype=cache_dtype, **cache_layout)
        # Slot i starts i steps late, so that slots stand at different positions.
        late = jnp.arange(slots)

        def step(cache, time):
            positions = jnp.clip(time - late, 0, length - 1)
            logits, cache = decoder.decode_position(
                weights,
                config,
                tokens=inputs.reshape(slots, length)[late, positions],
                positions=positions,
                filled=jnp.max(positions) + 1,
                cache=cache,
                cross=cross,
                cross_bias=bias,
            )
            return cache, logits

        logits = jax.lax.scan(step, cache, jnp.arange(length + slots - 1))[1]  # [time, slots, V]
        return logits[late[:, None] + jnp.arange(length), late[:, None]].reshape(batch, num_samples, length, -1)

    return np.asarray(run(tiny.params, inputs))


def teacher_forced(tiny, sources, inputs):
    """The same from models/t5.py."""
    batch, num_samples, length = inputs.shape
    logits = tiny.logits(
        tiny.params,
        {
            "encoder_input_tokens": np.repeat(sources, num_samples, axis=0),
            "decoder_input_tokens": inputs.reshape(-1, length),
            "decoder_target_tokens": np.ones((batch * num_samples, length), np.int32),
        },
    )
    return np.asarray(logits).reshape(batch, num_samples, length, -1)


def decoder_inputs(*, num_samples, length):
    rng = np.random.default_rng(1)
    inputs = rng.integers(2, 27, (len(SOURCE_LENGTHS), num_samples, length)).astype(np.int32)
    inputs[:, :, 0] = 0
    return inputs


VARIANTS = {
    "T5 1.1": {},
    "T5 1.0": dict(logits_via_embedding=True, mlp_activations=("relu",)),
    "few buckets": dict(relative_attention_num_buckets=8, relative_attention_max_distance=20),
    "UMT5": dict(relative_bias_per_layer=True),
    "scanned": dict(scan_layers=True, num_encoder_layers=2, num_decoder_layers=3),
    "scanned UMT5": dict(scan_layers=True, relative_bias_per_layer=True, num_decoder_layers=3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_positions_have_the_logits_of_the_whole_sequence(variant):
    # 150 positions lie past the last distance that has a bucket of its own, 128.
    tiny = make_tiny(**VARIANTS[variant])
    sources = padded_sources(SOURCE_LENGTHS, width=15)
    inputs = decoder_inputs(num_samples=2, length=150)
    expected = teacher_forced(tiny, sources, inputs)
    assert expected.std() > 0.5
    # float32 sums in another order; logits are of size 10 at most, so 1e-4 is some 100 units in the last place.
    np.testing.assert_allclose(step_by_step(tiny, sources, inputs), expected, atol=1e-4)


def test_heads_side_by_side_give_the_same_logits():
    tiny = make_tiny(num_heads=4, head_dim=8)
    sources = padded_sources(SOURCE_LENGTHS, width=15)
    inputs = decoder_inputs(num_samples=2, length=40)
    expected = step_by_step(tiny, sources, inputs)
    for groups in (1, 2):
        found = step_by_step(tiny, sources, inputs, head_groups=groups, max_blocks=groups)
        # The same products and exact zeros, summed in another order; as above.
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_attention_does_not_depend_on_groups_of_heads(dtype):
    slots, heads, size, filled = 6, 4, 8, 20
    rng = np.random.default_rng(0)
    said = rng.normal(size=(2, filled, slots, heads, size)).astype(np.float32)
    query = rng.normal(size=(slots, heads, size)).astype(np.float32)

    def read(groups):
        shape = dict(layers=1, scanned=False, slots=slots, heads=heads, head_dim=size, max_length=40, dtype=dtype)
        (cache,) = cache_lib.empty(**shape, head_groups=groups)
        for position in range(filled):
            cache = cache_lib.write(cache, *said[:, position], positions=jnp.full(slots, position))
        hidden = np.where(np.arange(cache_lib.columns_of([cache])) < filled, 0, NEGATIVE_INFINITY)
        bias = jnp.broadcast_to(hidden, (slots, heads, len(hidden)))
        return cache_lib.attend(query, cache, bias=bias, filled=jnp.int32(filled))

    for groups in (1, 2):
        # float32 sums of 20 terms of size 1 in another order.
        np.testing.assert_allclose(read(groups), read(None), atol=1e-6)


@pytest.mark.slow
def test_program_of_a_position_does_not_grow_with_the_number_of_scanned_layers():
    def program_size(layers, scan):
        tiny = make_tiny(num_decoder_layers=layers, scan_layers=scan)
        sources = padded_sources(SOURCE_LENGTHS)

        def run(params):
            return decode(
                tiny.model,
                params,
                encoder_input_tokens=sources,
                source_ids=np.arange(len(sources)),
                num_samples=2,
                max_length=4,
                processing=LogitProcessing(),
            )

        return len(jax.jit(run).lower(tiny.params).as_text())

    assert program_size(8, True) < 1.02 * program_size(2, True)
    assert program_size(8, False) > 1.5 * program_size(2, False)


def test_position_biases_reach_past_the_last_bucket():
    # Guards the test above: without the bias of the farthest bucket its logits would differ by far more than it allows.
    tiny = make_tiny()
    sources, inputs = padded_sources(SOURCE_LENGTHS, width=15), decoder_inputs(num_samples=1, length=150)
    changed = jax.tree.map(lambda leaf: leaf, tiny.params)
    table = changed["decoder"]["relpos_bias"]["rel_embedding"]
    changed["decoder"]["relpos_bias"]["rel_embedding"] = table.at[:, -1].add(1.0)
    before = teacher_forced(tiny, sources, inputs)
    after = teacher_forced(type(tiny)(tiny.model, changed), sources, inputs)
    assert np.abs(after - before)[:, :, 140:].max() > 1e-2


def test_bfloat16_activations_follow_the_whole_sequence_as_closely_as_bfloat16_can():
    exact, half = make_tiny(), make_tiny(dtype="bfloat16")
    sources, inputs = padded_sources(SOURCE_LENGTHS), decoder_inputs(num_samples=2, length=20)
    stepped = step_by_step(half, sources, inputs)
    assert stepped.dtype == np.float32
    truth = teacher_forced(exact, sources, inputs)
    # Neither is exact: the decoder's error may not exceed that of the whole sequence in the same type by much.
    error = np.sqrt(np.mean((stepped - truth) ** 2))
    assert error < 1.5 * np.sqrt(np.mean((teacher_forced(half, sources, inputs) - truth) ** 2))
    assert error < 0.02 * np.sqrt(np.mean(truth**2))


def shapes_in(jaxpr):
    """Shapes of every value in a jaxpr and the jaxprs inside it."""
    for equation in jaxpr.eqns:
        for variable in (*equation.invars, *equation.outvars):
            if hasattr(variable.aval, "shape"):
                yield variable.aval.shape
        for parameter in equation.params.values():
            for inner in parameter if isinstance(parameter, (tuple, list)) else (parameter,):
                if isinstance(inner, jax_core.ClosedJaxpr):
                    inner = inner.jaxpr
                if isinstance(inner, jax_core.Jaxpr):
                    yield from shapes_in(inner)


# Sizes such that keys or values repeated per sample, BATCH * SAMPLES * SOURCE * heads * head_dim elements, are larger
# than any array that decoding needs, the cache of 64 slots and the encoder's attention included.
BATCH, SAMPLES, SOURCE, TARGET = 2, 33, 37, 5
REPEATED = BATCH * SAMPLES * SOURCE * 2 * 8


def sampling_function(tiny, beam_size):
    def run(params, sources, source_ids):
        return decode(
            tiny.model,
            params,
            encoder_input_tokens=sources,
            source_ids=source_ids,
            num_samples=SAMPLES,
            max_length=TARGET,
            processing=LogitProcessing(temperature=0.8),
            beam_size=beam_size,
        )

    return run


@pytest.mark.parametrize("beam_size", [0, SAMPLES])
def test_no_array_holds_the_source_once_per_sample(tiny, beam_size):
    sources = padded_sources((SOURCE, 3), width=SOURCE)
    arguments = (tiny.params, sources, np.arange(BATCH, dtype=np.uint32))
    run = sampling_function(tiny, beam_size)
    largest = max(shapes_in(jax.make_jaxpr(run)(*arguments).jaxpr), key=math.prod)
    assert math.prod(largest) < REPEATED, largest
    text = jax.jit(run).lower(*arguments).compile().as_text()
    compiled = {tuple(map(int, dims.split(","))) for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)}
    assert any(math.prod(shape) == BATCH * SOURCE * 16 for shape in compiled)  # the pattern does find arrays
    largest = max(compiled, key=math.prod)
    assert math.prod(largest) < REPEATED, largest


def test_more_samples_cost_less_memory_than_their_sources_would():
    # Keys and values of 2 layers and a source of 512 tokens, repeated for each further sample, would take this much;
    # attention weights [B, H, N, S] and self-attention caches are what may grow.
    tiny = make_tiny(head_dim=32)
    length, config = 512, tiny.config
    repeated = 2 * config.num_decoder_layers * length * config.num_heads * config.head_dim * 4

    def temporary_bytes(num_samples):
        sources = padded_sources((length,))

        def run(params):
            return decode(
                tiny.model,
                params,
                encoder_input_tokens=sources,
                source_ids=np.arange(1),
                num_samples=num_samples,
                max_length=4,
                processing=LogitProcessing(),
            )

        compiled = jax.jit(run).lower(tiny.params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    per_sample = (temporary_bytes(24) - temporary_bytes(8)) / 16
    assert per_sample < repeated / 10
