"""The same samples, bit for bit, from a trained policy on real text, however they are drawn (contract 4).

Of 96 sources by default; DETERMINISM_SOURCES=1000 in the environment takes as many as that.
"""

import functools
import gzip
import os

import jax
import numpy as np
import pytest

from rest_jax import config, paths, run_files
from rest_jax.checkpoints import checkpointer
from rest_jax.models.initial_params import initial_params
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.rest import ReST
from rest_jax.sampling import LogitProcessing, Sampling
from rest_jax.sampling.scored import draw_samples

NUM_SOURCES = int(os.environ.get("DETERMINISM_SOURCES", "96"))
NUM_SAMPLES, CHUNK, MAX_LENGTH = 8, 32, 64
POLICY = "rest_jax://tasks/demo_policy"


@functools.cache
def policy():
    config.load(gin_files=[run_files.TRANSLATE, str(paths.resolve(POLICY) / "config.gin")], bindings=["MODEL_DIR=''"])
    rest = config.build(ReST)
    abstract = jax.eval_shape(functools.partial(initial_params, rest.model), jax.random.key(0))
    one = Partitioner(make_mesh(devices=jax.devices()[:1]))
    params = checkpointer.load_params(str(paths.resolve(POLICY)), abstract_params=abstract, partitioner=one)
    return rest.model, jax.device_get(params)


@functools.cache
def sources():
    """`[NUM_SOURCES, length]`: validation text and, for more of it, training text."""
    vocabulary = policy()[0].input_vocabulary
    rows = []
    for name in ("valid", "train"):
        with gzip.open(paths.resolve(f"rest_jax://tasks/demo_data/{name}.tsv.gz"), "rt", encoding="utf-8") as file:
            rows += [[*vocabulary.encode(line.split("\t")[0]), vocabulary.eos_id] for line in file]
    rows = [row for row in rows if len(row) <= MAX_LENGTH][:NUM_SOURCES]
    assert len(rows) == NUM_SOURCES
    return np.array([row + [0] * (MAX_LENGTH - len(row)) for row in rows], np.int32)


def draw(*, order=None, devices=1, **settings):
    """All samples, in the order of the text; drawn in chunks of `order`."""
    model, params = policy()
    partitioner = Partitioner(make_mesh(devices=jax.devices()[:devices]))
    sampling = Sampling(
        num_samples=NUM_SAMPLES, sources_per_chunk=CHUNK, processing=LogitProcessing(temperature=0.8), **settings
    )
    program = jax.jit(
        functools.partial(draw_samples, model=model, sampling=sampling, max_length=MAX_LENGTH, mesh=partitioner.mesh)
    )
    order = np.arange(NUM_SOURCES) if order is None else order
    tokens = np.zeros((NUM_SOURCES, NUM_SAMPLES, MAX_LENGTH), np.int32)
    log_probs = np.zeros((NUM_SOURCES, NUM_SAMPLES), np.float32)
    for first in range(0, NUM_SOURCES, CHUNK):
        rows = order[first : first + CHUNK]
        batch = {
            "encoder_input_tokens": np.zeros((CHUNK, MAX_LENGTH), np.int32),
            "source_ids": np.zeros(CHUNK, np.uint32),
        }
        batch["encoder_input_tokens"][: len(rows)] = sources()[rows]
        batch["source_ids"][: len(rows)] = rows
        drawn = jax.device_get(program(params, partitioner.put_batch(batch), np.uint32(0), np.uint32(1)))
        tokens[rows], log_probs[rows] = drawn.tokens[: len(rows)], drawn.log_probs[: len(rows)]
    return tokens, log_probs


@functools.cache
def expected():
    return draw()


ORDERS = {"reversed": np.arange(NUM_SOURCES)[::-1], "shuffled": np.random.default_rng(0).permutation(NUM_SOURCES)}


@pytest.mark.parametrize(
    "how",
    [
        {"slots": 64},
        pytest.param({"slots": 100, "order": ORDERS["shuffled"]}, marks=pytest.mark.slow),
        pytest.param({"order": ORDERS["reversed"], "devices": 2}, marks=pytest.mark.slow),
        {"order": ORDERS["shuffled"], "devices": 8},
    ],
    ids=["64 slots", "100 slots, shuffled", "2 devices, reversed", "8 devices, shuffled"],
)
def test_slots_orders_and_devices_change_nothing(how):
    tokens, log_probs = expected()
    assert len(np.unique((tokens > 0).sum(axis=-1))) > 10  # samples end where real ones do
    other_tokens, other_log_probs = draw(**how)
    np.testing.assert_array_equal(other_tokens, tokens)
    np.testing.assert_array_equal(other_log_probs, log_probs)
