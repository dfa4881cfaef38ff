"""Our engine alone, as what is asked of it grows."""

import functools
import math
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.models.initial_params import initial_params
from rest_jax.sampling import LogitProcessing, Sampling
from rest_jax.sampling.scored import draw_samples
from tests.benchmarks.sampling.setting import Setting, make_params, random_sources

SAMPLES = (1_000, 10_000, 100_000)
SAMPLES_PER_SOURCE = (1, 32, 256)


def scaling(setting: Setting, model: EncoderDecoderModel) -> dict[str, Any]:
    """Time per token of 1,000 to 100,000 samples, in calls of `setting.sources` sources as Grow makes them.

    Samples, tokens too, are copied to the host and dropped. Sizes take turns, so that the machine's mood is in each.
    """
    params = jax.device_put(make_params(setting, model))
    sources = random_sources(setting, vocab_size=model.module.config.vocab_size)
    program = _lowered(setting, model, num_samples=setting.samples, source_length=setting.source_length).compile()

    def run(total: int) -> float:
        """Seconds a token."""
        tokens, start = 0, time.perf_counter()
        for call in range(math.ceil(total / (setting.sources * setting.samples))):
            source_ids = np.arange(len(sources), dtype=np.uint32) + np.uint32(call * len(sources))
            batch = {"encoder_input_tokens": sources, "source_ids": source_ids}
            samples = jax.device_get(program(params, batch, np.uint32(setting.seed), np.uint32(0)))
            tokens += int(np.sum(samples.lengths - samples.hit_eos))
        return (time.perf_counter() - start) / tokens

    run(1)
    seconds: dict[int, list[float]] = {total: [] for total in SAMPLES}
    for _ in range(setting.rounds):
        for total in SAMPLES:
            seconds[total].append(run(total))
    medians = {total: statistics.median(values) for total, values in seconds.items()}
    spread = max(medians.values()) / min(medians.values()) - 1
    return {
        "seconds_per_token": seconds,
        "spread": spread,
        "lines": [
            *(f"{total:7d} samples: {median * 1e6:8.2f} us a token, {1 / median:8.0f} tokens/s"
              for total, median in medians.items()),
            f"slowest over fastest: {spread:+.1%}",
        ],
    }  # fmt: skip


def memory(setting: Setting, model: EncoderDecoderModel) -> dict[str, Any]:
    """Bytes of the compiled program that come with the source's length, per source and position, for N of 1, 32, 256.

    Its temporaries at twice the source's length less those at the length itself: cross-attention's keys and values, and
    scores and weights of the layer at work. Beside it, what keys and values need once, and tiled N times.
    """
    config = model.module.config
    itemsize = jnp.dtype(config.dtype).itemsize
    once = 2 * config.num_decoder_layers * config.num_heads * config.head_dim * itemsize
    rows = []
    for num_samples in SAMPLES_PER_SOURCE:
        temporaries = [
            _lowered(setting, model, num_samples=num_samples, source_length=length)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
            for length in (setting.source_length, 2 * setting.source_length)
        ]
        growth = (temporaries[1] - temporaries[0]) / (setting.sources * setting.source_length)
        rows.append({
            "num_samples": num_samples,
            "temporary_bytes": temporaries[0],
            "bytes_per_source_position": growth,
            "keys_and_values_once": once,
            "keys_and_values_tiled": once * num_samples,
        })  # fmt: skip
    return {
        "rows": rows,
        "lines": [
            f"N = {row['num_samples']:3d}: {row['bytes_per_source_position']:8.0f} B per source position (keys and "
            f"values once: {once}, tiled: {row['keys_and_values_tiled']}); all temporaries "
            f"{row['temporary_bytes'] / 1e6:.0f} MB"
            for row in rows
        ],
    }


def compile_time(setting: Setting, model: EncoderDecoderModel) -> dict[str, Any]:
    """Seconds to trace and compile the program; nothing comes from a cache."""
    jax.config.update("jax_enable_compilation_cache", False)
    start = time.perf_counter()
    lowered = _lowered(setting, model, num_samples=setting.samples, source_length=setting.source_length)
    traced = time.perf_counter()
    lowered.compile()
    seconds = {"trace_seconds": traced - start, "compile_seconds": time.perf_counter() - traced}
    return {
        **seconds,
        "lines": [f"{setting.model}: traced in {traced - start:.1f} s, compiled in {seconds['compile_seconds']:.1f} s"],
    }


def _lowered(
    setting: Setting, model: EncoderDecoderModel, *, num_samples: int, source_length: int
) -> jax.stages.Lowered:
    """The program of one call, from shapes alone."""
    sampling = Sampling(
        num_samples=num_samples, sources_per_chunk=setting.sources,
        processing=LogitProcessing(temperature=setting.temperature), **dict(setting.sampling),
    )  # fmt: skip
    params = jax.eval_shape(functools.partial(initial_params, model), jax.random.key(0))
    batch = {
        "encoder_input_tokens": jax.ShapeDtypeStruct((setting.sources, source_length), jnp.int32),
        "source_ids": jax.ShapeDtypeStruct((setting.sources,), jnp.uint32),
    }
    program = functools.partial(draw_samples, model=model, sampling=sampling, max_length=setting.target_length)
    return jax.jit(program).lower(params, batch, np.uint32(0), np.uint32(0))
