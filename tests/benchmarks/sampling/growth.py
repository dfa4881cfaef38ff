"""Our engine alone, as what is asked of it grows."""

import functools
import itertools
import math
import re
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
    """Bytes of all arrays with the source's length that the decode loop holds, for N of 1, 32 and 256.

    They are read off the compiled program, whose loops name all that they carry or read from outside: cross-attention's
    keys and values, and the mask. What keys and values need, once and tiled N times, stands beside it.
    """
    config = model.module.config
    length = _unmistakable_length(setting)
    width = config.num_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    once = 2 * config.num_decoder_layers * width * setting.sources * length
    rows = []
    for num_samples in SAMPLES_PER_SOURCE:
        compiled = _lowered(setting, model, num_samples=num_samples, source_length=length).compile()
        analysis, text = compiled.memory_analysis(), compiled.as_text()
        assert analysis is not None and text is not None
        rows.append({
            "num_samples": num_samples,
            "source_length": length,
            "source_bytes": loop_bytes(text, length=length),
            "keys_and_values_once": once,
            "keys_and_values_tiled": once * num_samples,
            "temporary_bytes": analysis.temp_size_in_bytes,
        })  # fmt: skip
    return {
        "rows": rows,
        "lines": [
            f"N = {row['num_samples']:3d}: {row['source_bytes'] / 1e6:.2f} MB of sources of {length} (keys and values "
            f"once {once / 1e6:.2f} MB, tiled {row['keys_and_values_tiled'] / 1e6:.2f} MB); all temporaries "
            f"{row['temporary_bytes'] / 1e6:.0f} MB"
            for row in rows
        ],
    }


def loop_bytes(compiled: str, *, length: int) -> int:
    """Bytes of the arrays with a dimension of `length`, or of some lengths side by side, in the loop that holds most.

    Args:
      compiled: text of a compiled program (HLO).
      length: that no other dimension of the program is a multiple of.

    Raises:
      ValueError: there are none, so that this finds nothing out.
    """
    most = 0
    for line in compiled.splitlines():
        before, found, _ = line.partition(" while(")
        if found:
            arrays = [(name, dims.split(",")) for name, dims in re.findall(r"\b([a-z]+\d+)\[([\d,]+)\]", before)]
            # f32, bf16, s8: the bits stand in the name
            sizes = [
                int(re.sub(r"\D", "", name)) // 8 * math.prod(map(int, dims))
                for name, dims in arrays
                if any(int(size) % length == 0 for size in dims)
            ]
            most = max(most, sum(sizes))
    if not most:
        raise ValueError(f"no loop of the program holds an array with a dimension of {length}")
    return most


def _unmistakable_length(setting: Setting) -> int:
    """The next prime to the source's length: sizes of models and numbers of slots are no multiples of it."""
    at_least = max(setting.source_length, 64)
    return next(n for n in itertools.count(at_least) if all(n % d for d in range(2, math.isqrt(n) + 1)))


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
