"""The memory plan: slots that fit, what the compiler says they take, and requests that cannot fit."""

import jax
import numpy as np
import pytest

from rest_jax.errors import UserError
from rest_jax.models import t5
from rest_jax.partitioning import make_mesh
from rest_jax.sampling import LogitProcessing, memory
from rest_jax.sampling.sampler import decode
from tests.sampling.conftest import make_tiny, padded_sources

CONFIG = t5.T5Config(
    vocab_size=32128, emb_dim=512, num_heads=6, num_encoder_layers=8, num_decoder_layers=8, head_dim=64, mlp_dim=1024
)
REQUEST = dict(batch=64, num_samples=32, source_length=64, max_length=128)


def test_less_memory_means_fewer_slots_and_the_plan_says_so():
    plans = [memory.plan(CONFIG, **REQUEST, budget=size * memory.MIB) for size in (16_000, 1_600, 1_150)]
    slots = [plan.layout.slots for plan in plans]
    assert slots[0] == 256 and slots == sorted(slots, reverse=True) and slots[-1] < 256
    for plan in plans:
        assert plan.total <= plan.budget
        assert f"{plan.layout.slots} slots" in str(plan) and f"{plan.budget // memory.MIB} on each device" in str(plan)


@pytest.mark.parametrize("settings", [{}, dict(slots=4096), dict(beam_size=100)])
def test_what_cannot_fit_is_refused_with_the_numbers(settings):
    with pytest.raises(UserError, match=r"does not fit into 500 MiB .* self-attention cache \d+.*sources_per_chunk"):
        memory.plan(CONFIG, **REQUEST, **settings, budget=500 * memory.MIB)


def test_a_rewards_parameters_take_their_place():
    budget = 1_600 * memory.MIB
    alone, beside = (memory.plan(CONFIG, **REQUEST, reward_bytes=size, budget=budget) for size in (0, 450 * memory.MIB))
    assert beside.layout.slots < alone.layout.slots and beside.total <= budget
    assert "reward's parameters 450" in str(beside) and "reward's" not in str(alone)


def test_narrow_parameters_leave_room_for_slots():
    budget = memory.plan(CONFIG, **REQUEST, kernel_dtype="bfloat16", slots=256, budget=2**50).total
    wide, narrow = (
        memory.plan(CONFIG, **REQUEST, kernel_dtype=dtype, budget=budget) for dtype in ("float32", "bfloat16")
    )
    assert narrow.parts["parameters"] < wide.parts["parameters"] and wide.layout.slots < narrow.layout.slots == 256


def test_narrow_caches_and_more_devices_take_less():
    def cache(**settings):
        return memory.plan(CONFIG, **REQUEST, **settings, slots=256, budget=2**50).parts["self-attention cache"]

    assert cache(cache_dtype="bfloat16") * 2 == cache()
    assert 0.25 < cache(cache_dtype="int8") / cache() < 0.3
    assert cache(mesh=make_mesh(data=1, model=2, devices=jax.devices()[:2])) * 2 == cache()


@pytest.mark.parametrize(
    ("batch", "num_samples", "slots"),
    [(1, 1, 256), (32, 1, 256), (3, 5, 7), (8, 32, 256), (1, 1000, 256), (64, 4, 2), (64, 4, 70)],
)
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_layouts_have_about_the_slots_that_were_asked_for_and_work_for_all(batch, num_samples, slots, platform):
    layout = memory.choose_layout(batch=batch, num_samples=num_samples, slots=slots, platform=platform)
    asked = min(slots, batch * num_samples)
    least = max(asked, 64 if platform == "cpu" else 2)
    assert least <= layout.slots < least + layout.groups
    assert layout.groups <= batch
    # Every slot finds a sample at the start.
    assert min(layout.groups * layout.places, batch) * num_samples >= asked
    assert list(layout.shrunk) == sorted(layout.shrunk, reverse=True)


@pytest.mark.slow
def test_the_plan_is_near_what_the_compiler_says():
    tiny = make_tiny(vocab=4000, embedding=4096, emb_dim=64, num_heads=4, head_dim=32, mlp_dim=128)
    sources = padded_sources((96,) * 8, vocab=4000)

    def run(params):
        return decode(
            tiny.model,
            params,
            encoder_input_tokens=sources,
            source_ids=np.arange(8),
            num_samples=32,
            max_length=96,
            processing=LogitProcessing(),
        )

    analysis = jax.jit(run).lower(tiny.params).compile().memory_analysis()
    used = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
    planned = memory.plan(tiny.config, batch=8, num_samples=32, source_length=96, max_length=96, budget=2**50).total
    # The plan adds up what is not all needed at the same time: at most twice too much, and never too little.
    assert used < planned < 2 * used
