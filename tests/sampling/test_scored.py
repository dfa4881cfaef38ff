"""Chunks of a data set: every source once, scored as they are drawn, whatever chunk they stand in."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.data.token_dataset import TokenDataset, TokenRow, write_token_dataset
from rest_jax.errors import UserError
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.sampling import Sampling
from rest_jax.sampling.scored import choose_sources, chunk_batch, chunks, run_chunks, sample_and_score
from tests.sampling.conftest import VOCAB

SAMPLING = Sampling(num_samples=3, sources_per_chunk=4, length_multiple=12)


class SumReward:
    """Two components: overlap with the reference's and with the source's tokens; the total is their mean."""

    name = "sum"
    requires_reference = True

    def score(self, params, batch):
        def overlap(others):  # share of a sample's tokens that are among `others` [batch, length]
            samples = batch["samples"]
            hit = (samples[..., None] == others[:, None, None, :]).any(-1) & (samples > 0)
            return hit.sum(-1) / jnp.maximum((samples > 0).sum(-1), 1) * params

        return {"reference": overlap(batch["references"]), "source": overlap(batch["sources"])}

    def combine(self, components):
        return (components["reference"] + components["source"]) / 2


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rng = np.random.default_rng(0)
    ids = lambda longest: [*rng.integers(2, VOCAB, rng.integers(1, longest)), 1]  # noqa: E731
    rows = [TokenRow(ids(20), ids(9), "", "") for _ in range(30)]
    directory = tmp_path_factory.mktemp("data") / "train"
    write_token_dataset(directory, rows, info={})
    return TokenDataset.open(directory)


@hypothesis.given(st.data())
def test_chunks_cover_each_chosen_source_once(dataset, data):
    indices = np.array(sorted(data.draw(st.sets(st.integers(0, 29), min_size=1))))
    sampling = dataclasses.replace(
        SAMPLING,
        sources_per_chunk=data.draw(st.integers(1, 12)),
        length_multiple=data.draw(st.integers(1, 16)),
    )
    max_length = data.draw(st.integers(1, 24))
    groups = chunks(dataset, indices=indices, sampling=sampling, max_source_length=max_length)
    np.testing.assert_array_equal(np.sort(np.concatenate([group.indices for group in groups])), indices)
    assert all(len(group.indices) == sampling.sources_per_chunk for group in groups[:-1])
    for group in groups:
        assert group.padded_length <= max_length
        assert group.padded_length % sampling.length_multiple == 0 or group.padded_length == max_length
        assert group.padded_length >= min(max_length, dataset.source_lengths[group.indices].max())


def test_batches_hold_sources_references_and_fillers(dataset):
    groups = chunks(dataset, indices=np.arange(30), sampling=SAMPLING, max_source_length=16)
    for group in groups:
        batch = chunk_batch(dataset, group, rows=np.arange(4), target_length=5)
        assert batch["encoder_input_tokens"].shape == (4, group.padded_length)
        assert batch["references"].shape == (4, 5)
        for row, index in enumerate(group.indices):
            source, reference = dataset.inputs(int(index))[:16], dataset.targets(int(index))[:5]
            np.testing.assert_array_equal(np.trim_zeros(batch["encoder_input_tokens"][row], "b"), source)
            np.testing.assert_array_equal(np.trim_zeros(batch["references"][row], "b"), reference)
            assert batch["source_ids"][row] == index
        assert not any(values[len(group.indices) :].any() for values in batch.values())


@hypothesis.given(st.integers(1, 200), st.integers(1, 250), st.integers(0, 2**31), st.integers(0, 100))
def test_chosen_sources_are_different_in_order_and_as_many_as_asked(num_sources, max_sources, seed, stream):
    chosen = choose_sources(num_sources=num_sources, max_sources=max_sources, seed=seed, stream=stream)
    assert len(chosen) == min(num_sources, max_sources)
    assert (np.diff(chosen) > 0).all() and chosen[0] >= 0 and chosen[-1] < num_sources


def test_every_source_may_be_chosen_and_each_grow_step_chooses_anew():
    choose = lambda seed, stream: choose_sources(num_sources=50, max_sources=10, seed=seed, stream=stream)  # noqa: E731
    np.testing.assert_array_equal(choose(0, 1), choose(0, 1))
    assert not np.array_equal(choose(0, 1), choose(0, 2)) and not np.array_equal(choose(0, 1), choose(1, 1))
    counts = np.zeros(50)
    for stream in range(400):
        counts[choose(0, stream)] += 1
    # Each is chosen 80 times in the mean, a standard deviation of 8 (binomial): 5 of them are never left.
    assert np.abs(counts - 80).max() < 40
    np.testing.assert_array_equal(choose_sources(num_sources=7, max_sources=None, seed=0, stream=0), np.arange(7))


def score_all(tiny, dataset, sampling, *, mesh=None):
    """`[30, N]` tokens, log-probabilities and rewards, and `[30]` reference rewards, in order of the sources."""
    partitioner = Partitioner(make_mesh(**(mesh or dict(data=1, devices=jax.devices()[:1]))))
    calls = []

    @jax.jit
    def program(params, reward_params, batch, seed, stream):
        return sample_and_score(
            params,
            reward_params,
            batch,
            seed,
            stream,
            model=tiny.model,
            reward=SumReward(),
            sampling=sampling,
            max_length=6,
        )

    def counted(*args):
        calls.append(args)
        return program(*args)

    groups = chunks(dataset, indices=np.arange(30), sampling=sampling, max_source_length=24)
    found = {}
    for number, group, result in run_chunks(
        list(enumerate(groups)),
        program=counted,
        params=jax.device_put(tiny.params, partitioner.replicated()),
        reward_params=np.float32(0.5),
        dataset=dataset,
        sampling=sampling,
        target_length=9,
        partitioner=partitioner,
        seed=1,
        stream=2,
    ):
        assert len(calls) == min(number + 2, len(groups))  # one call ahead of the reader, no more
        result = jax.device_get(result)
        real = len(group.indices)
        np.testing.assert_array_equal(result["real"], np.arange(sampling.sources_per_chunk) < real)
        for row, index in enumerate(group.indices):
            assert int(index) not in found
            found[int(index)] = jax.tree.map(lambda leaf: leaf[row], result)  # noqa: B023
    ordered = [found[index] for index in range(30)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *ordered)


@pytest.fixture(scope="module")
def scored(tiny, dataset):
    return score_all(tiny, dataset, SAMPLING)


def test_rewards_are_of_the_samples_and_of_the_source_they_stand_with(scored, dataset):
    for index in range(30):
        source, reference = (set(ids.tolist()) for ids in (dataset.inputs(index), dataset.targets(index)))
        for sample in range(3):
            tokens = [token for token in scored["samples"].tokens[index, sample].tolist() if token]
            shares = {
                name: 0.5 * sum(token in others for token in tokens) / len(tokens)
                for name, others in (("reference", reference), ("source", source))
            }
            for name, share in shares.items():
                np.testing.assert_allclose(scored["components"][name][index, sample], share, atol=1e-6)
            np.testing.assert_allclose(scored["rewards"][index, sample], sum(shares.values()) / 2, atol=1e-6)
        shared = np.mean([token in source for token in dataset.targets(index)])
        np.testing.assert_allclose(scored["reference_rewards"][index], (0.5 + 0.5 * shared) / 2, atol=1e-6)


CHUNKINGS = {
    "larger chunks": (dict(sources_per_chunk=7, length_multiple=24), None),
    "data=4, model=2": (dict(sources_per_chunk=8, length_multiple=24), dict(model=2)),
}


@pytest.mark.parametrize("name", CHUNKINGS)
def test_the_chunking_and_the_mesh_change_nothing(scored, tiny, dataset, name):
    changes, mesh = CHUNKINGS[name]
    other = score_all(tiny, dataset, dataclasses.replace(SAMPLING, **changes), mesh=mesh)
    np.testing.assert_array_equal(other["samples"].tokens, scored["samples"].tokens)
    for result in (other, scored):  # what decoding took is a chunk's, not a sample's
        result["samples"] = result["samples"].replace(slot_steps=None)
    for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(scored), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)  # log-probabilities: float32 sums over other shapes


def test_beam_hypotheses_take_the_place_of_samples(tiny, dataset):
    sampling = Sampling(num_samples=2, sources_per_chunk=30, beam_size=3, length_multiple=24)
    found = score_all(tiny, dataset, sampling)
    assert found["rewards"].shape == (30, 2)
    assert (found["samples"].tokens[:, 0] != found["samples"].tokens[:, 1]).any(axis=1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_samples=0), "num_samples is 0"),
        (dict(sources_per_chunk=0), "sources_per_chunk is 0"),
        (dict(length_multiple=-1), "length_multiple is -1"),
        (dict(beam_size=2), "beam_size is 2"),
    ],
)
def test_illegal_settings_are_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SAMPLING, **change)
