"""Grow: compaction and statistics against numpy, and the whole step on meshes, killed and resumed."""

import dataclasses
import functools
import io
import shutil
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.data.store import ScoredStore
from rest_jax.data.token_dataset import TokenDataset, TokenRow, write_token_dataset
from rest_jax.errors import Preempted, UserError
from rest_jax.filters import Threshold, TopK, distinct
from rest_jax.grow import (
    Growing,
    chunk_statistics,
    compact,
    compile_grow,
    fetch_survivors,
    grow,
    summarise,
)
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.processes import Processes
from rest_jax.reporting.metrics_writer import MetricsWriter
from rest_jax.reporting.progress import ProgressLine
from rest_jax.rewards.base import Reward
from rest_jax.sampling import LogitProcessing, Sampling
from rest_jax.sampling.samples import Samples

VOCAB, LENGTHS = 20, {"inputs": 24, "targets": 6}
NUM_SOURCES, PER_CHUNK, NUM_SAMPLES = 45, 16, 4  # 3 chunks, the last one in part fillers
CONFIG = t5.T5Config(
    vocab_size=24, emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=8, mlp_dim=24
)
MODEL = EncoderDecoderModel(t5.Transformer(CONFIG), None, SimpleNamespace(vocab_size=VOCAB, eos_id=1))


@dataclasses.dataclass(frozen=True)
class TableReward(Reward):
    """Mean of a table's entries over a sample's tokens; a second component counts them."""

    @property
    def name(self) -> str:
        return "table"

    def init(self, vocabulary):
        return jnp.asarray(np.random.default_rng(0).random(VOCAB), jnp.float32)

    def score(self, params, batch):
        tokens = batch["samples"]
        count = jnp.sum(tokens > 0, axis=-1)
        total = jnp.sum(jnp.where(tokens > 0, params[tokens], 0.0), axis=-1)
        return {"table": total / count, "length": count.astype(jnp.float32)}  # NaN for a filler's empty sample

    def combine(self, components):
        return components["table"]


REWARD = TableReward()
SAMPLING = Sampling(
    num_samples=NUM_SAMPLES,
    sources_per_chunk=PER_CHUNK,
    processing=LogitProcessing(temperature=0.8),
    length_multiple=24,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rng = np.random.default_rng(0)
    rows = [
        TokenRow([*rng.integers(2, VOCAB, rng.integers(1, 23)), 1], [*rng.integers(2, VOCAB, 3), 1], "source", "target")
        for _ in range(NUM_SOURCES)
    ]
    directory = tmp_path_factory.mktemp("data") / "train"
    write_token_dataset(directory, rows, info={})
    return TokenDataset.open(directory)


@functools.cache
def params():
    shapes = {"encoder_input_tokens": (1, 1), "decoder_input_tokens": (1, 1)}
    return jax.jit(lambda key: MODEL.get_initial_variables(key, shapes)["params"])(jax.random.key(0))


ONE_DEVICE = "one device"
MESHES = {
    ONE_DEVICE: dict(data=1, devices=jax.devices()[:1]),
    "data=8": dict(),
    "data=4, model=2": dict(model=2),
}
KEEP = Threshold(0.45)


@functools.cache
def compiled(mesh, keep_filter=KEEP):
    """Partitioner, Growing and program."""
    partitioner = Partitioner(make_mesh(**MESHES[mesh]))
    growing = Growing(sampling=SAMPLING, filter=keep_filter)
    program = compile_grow(
        growing=growing, model=MODEL, reward=REWARD, partitioner=partitioner, max_length=LENGTHS["targets"]
    )
    return partitioner, growing, program


def run_grow(
    directory, dataset, *, mesh=ONE_DEVICE, keep_filter=KEEP, program=None, stop_requested=lambda: False, **changes
):
    partitioner, growing, default_program = compiled(mesh, keep_filter)
    program = program or default_program
    return grow(
        processes=Processes(),
        directory=directory,
        growing=dataclasses.replace(growing, **changes),
        program=program,
        params=jax.device_put(params(), partitioner.param_shardings(params())),
        reward_params=REWARD.init(None),
        policy_step=7,
        dataset=dataset,
        lengths=LENGTHS,
        partitioner=partitioner,
        seed=0,
        grow_step=1,
        progress=ProgressLine("grow", stream=io.StringIO()),
        metrics_writer=MetricsWriter(directory, enabled=False),
        phase="grow_1",
        stop_requested=stop_requested,
        preview=lambda store: [],
        facts={"reward": REWARD.name},
    )


@pytest.fixture(scope="module")
def grown(dataset, tmp_path_factory):
    """A Grow step on one device: its directory and its statistics."""
    directory = tmp_path_factory.mktemp("grown") / "grow_1"
    return directory, run_grow(directory, dataset)


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# compact


jitted_compact = jax.jit(compact, static_argnames="data_shards")


@hypothesis.given(st.data())
def test_compact_moves_kept_rows_to_the_front_of_their_shard(data):
    shards, rows, samples = data.draw(st.sampled_from([(1, 3, 4), (2, 4, 3), (4, 4, 1)]))
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=rows * samples, max_size=rows * samples)))
    keep = keep.reshape(rows, samples)
    values = np.arange(1, rows * samples + 1, dtype=np.float32).reshape(rows, samples)
    fields = {
        "number": values,
        "flag": values > 0,
        "tokens": values[..., None].astype(np.int32) * np.array([1, 10], np.int32),
    }
    moved, kept = jax.device_get(jitted_compact(fields, keep, data_shards=shards))
    parts = lambda array: array.reshape(shards, -1, *array.shape[2:])  # noqa: E731
    np.testing.assert_array_equal(kept, parts(keep).sum(1))
    for name, field in fields.items():
        assert moved[name].dtype == field.dtype
        for shard in range(shards):
            expected = parts(field)[shard][parts(keep)[shard]]  # in order
            np.testing.assert_array_equal(moved[name][shard, : kept[shard]], expected)
            assert not moved[name][shard, kept[shard] :].any()
    fetched = fetch_survivors({name: jnp.asarray(field) for name, field in moved.items()}, kept)
    for name, field in fields.items():
        np.testing.assert_array_equal(fetched[name], field[keep])
        assert fetched[name].dtype == field.dtype


def test_compact_moves_no_row_between_devices():
    partitioner = Partitioner(make_mesh())
    batch = partitioner.put_batch(
        {"tokens": np.ones((16, 4, 6), np.int32), "keep": np.random.default_rng(0).random((16, 4)) < 0.5}
    )
    run = jax.jit(lambda batch: compact({"tokens": batch["tokens"]}, batch["keep"], data_shards=8))
    text = run.lower(batch).compile().as_text()
    for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert collective not in text


def test_only_kept_rows_are_fetched(monkeypatch):
    # 8 shards of 64 rows: what is copied to the host is bounded by the fullest shard, rounded up to 1/16 of its rows.
    copied = []
    fetch = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: copied.append(jax.tree.leaves(tree)) or fetch(tree))
    survivors = {"tokens": jnp.ones((8, 64, 6), jnp.int32), "reward": jnp.ones((8, 64))}
    kept = np.array([3, 0, 1, 5, 2, 0, 0, 4])
    fetched = fetch_survivors(survivors, kept)
    assert fetched["tokens"].shape == (15, 6) and fetched["reward"].shape == (15,)
    assert sorted(leaf.shape for leaf in copied[0]) == [(8, 8), (8, 8, 6)] and len(copied) == 1
    assert fetch_survivors(survivors, np.zeros(8, np.int32))["tokens"].shape == (0, 6)
    assert fetch_survivors(survivors, np.full(8, 64))["tokens"].shape == (512, 6)


# Statistics


def test_statistics_are_those_of_numpy():
    rng = np.random.default_rng(0)
    chunk_sums, everything = [], []
    for real_rows in (6, 3):
        # Rewards in the middle of the histogram's bins, and its ends; some sources of equal rewards.
        rewards = ((rng.integers(0, 100, (6, 5)) + 0.5) / 100).astype(np.float32)
        rewards[0, :2] = 0.0, 1.0
        rewards[1] = 0.25
        real = np.arange(6) < real_rows
        rewards[~real] = np.nan  # whatever a reward makes of an empty sample
        tokens = rng.integers(0, 3, (6, 5, 4)).astype(np.int32)
        samples = Samples.of(jnp.asarray(tokens), jnp.zeros((6, 5)), eos_id=1, slot_steps=np.where(real, 20, 0))
        first = np.asarray(distinct(tokens)) & real[:, None]
        valid = first & (tokens == 1).any(-1)
        sums = jax.jit(chunk_statistics)(samples=samples, rewards=rewards, real=real, first=first, valid=valid)
        chunk_sums.append({name: np.asarray(value).tolist() for name, value in sums.items()})
        everything.append((rewards[real], tokens[real], first[real], valid[real]))
    statistics = summarise(chunk_sums)
    rewards, tokens, first, valid = (np.concatenate(parts) for parts in zip(*everything, strict=True))
    assert statistics["count"] == rewards.size and statistics["sources"] == 9
    assert statistics["distinct"] == first.sum()
    assert statistics["refused"] == (first & ~valid).sum() > 0
    # Sums of a chunk are float32.
    np.testing.assert_allclose(statistics["mean"], rewards.mean(dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(statistics["variance"], rewards.var(dtype=np.float64), rtol=1e-5)
    np.testing.assert_allclose(statistics["mean_length"], (tokens > 0).sum(-1).mean())
    np.testing.assert_allclose(statistics["utilisation"], (tokens > 0).sum() / (9 * 20))
    np.testing.assert_allclose(statistics["hit_eos"], (tokens == 1).any(-1).mean())
    np.testing.assert_allclose(statistics["zero_variance_sources"], (np.ptp(rewards, axis=1) == 0).mean())
    np.testing.assert_array_equal(statistics["histogram"], np.histogram(rewards, bins=100, range=(0, 1))[0])


def test_unfinished_samples_are_not_valid_where_they_are_refused(grown, dataset, tmp_path):
    partitioner, growing, _ = compiled(ONE_DEVICE)
    program = compile_grow(
        growing=dataclasses.replace(growing, refuse_unfinished=True, max_repeated_ngrams=0),
        model=MODEL,
        reward=REWARD,
        partitioner=partitioner,
        max_length=LENGTHS["targets"],
    )
    statistics = run_grow(tmp_path / "grow_1", dataset, program=program)
    strict = ScoredStore.open(tmp_path / "grow_1").rows.to_pylist()
    loose = ScoredStore.open(grown[0]).rows.to_pylist()
    assert strict == [row for row in loose if row["hit_eos"] and not _has_loop(row)] and 0 < len(strict) < len(loose)
    assert statistics["refused"] > 0


def _has_loop(row):
    ngrams = [tuple(row["targets"][i : i + 4]) for i in range(len(row["targets"]) - 3)]
    return len(set(ngrams)) < len(ngrams)


def test_statistics_of_nothing_are_refused():
    with pytest.raises(UserError, match="no source"):
        summarise([])


# The whole step


def test_the_store_holds_what_the_filter_kept_and_the_rewards_of_all(grown, dataset):
    directory, statistics = grown
    store = ScoredStore.open(directory)
    np.testing.assert_array_equal(store.source_ids, np.arange(NUM_SOURCES))
    np.testing.assert_array_equal(store.stored, KEEP(store.rewards, store.valid))
    assert 0 < store.stored.sum() < store.valid.sum() < store.valid.size  # each filter has work
    rows = store.select(store.stored)
    table = np.asarray(REWARD.init(None), np.float64)
    for index in range(len(rows)):
        source, tokens = rows.source_ids[index], rows.targets(index)
        np.testing.assert_array_equal(rows.inputs(index), dataset.inputs(int(source)))
        assert (tokens > 0).all() and (tokens < VOCAB).all()
        assert bool(rows.hit_eos[index]) == (tokens[-1] == 1) and not (tokens[:-1] == 1).any()
        np.testing.assert_allclose(rows.rewards[index], table[tokens].mean(), atol=1e-6)
    table = store.rows
    np.testing.assert_array_equal(table["length"], [len(tokens) for tokens in table["targets"].to_pylist()])
    np.testing.assert_array_equal(table["reward/length"], table["length"])
    np.testing.assert_array_equal(table["reward/table"], table["reward"])
    assert set(table["policy_step"].to_pylist()) == {7}
    # float32 in another program; scores of at most 6 tokens.
    stack = lambda ids, width: np.stack([np.pad(ids(i), (0, width - len(ids(i)))) for i in range(len(rows))])  # noqa: E731
    targets = stack(rows.targets, LENGTHS["targets"])
    batch = {
        "encoder_input_tokens": np.stack(
            [np.pad(rows.inputs(i), (0, 24 - len(rows.inputs(i)))) for i in range(len(rows))]
        ),
        "decoder_input_tokens": np.pad(targets[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": targets,
    }
    np.testing.assert_allclose(rows.log_probs, jax.jit(MODEL.score_batch)(params(), batch), atol=1e-4)
    assert statistics == store.stats
    assert statistics["kept"] == len(rows) and statistics["distinct"] == store.valid.sum()
    assert statistics["count"] == store.rewards.size and statistics["sources"] == NUM_SOURCES
    np.testing.assert_allclose(statistics["mean"], store.rewards.mean(dtype=np.float64), rtol=1e-6)
    assert sum(statistics["histogram"]) == store.rewards.size
    assert statistics["kept_by_threshold"][45] == pytest.approx(len(rows), abs=1)
    assert statistics["reward"] == "table"


@pytest.mark.parametrize("mesh", [name for name in MESHES if name != ONE_DEVICE])
def test_eight_devices_grow_the_same_store(grown, dataset, tmp_path, mesh):
    run_grow(tmp_path / "grow_1", dataset, mesh=mesh)
    one, many = ScoredStore.open(grown[0]), ScoredStore.open(tmp_path / "grow_1")
    assert one.rows.schema == many.rows.schema
    for name in ("source_id", "sample_id", "inputs", "targets", "length", "hit_eos", "policy_step"):
        assert one.rows[name].to_pylist() == many.rows[name].to_pylist(), name
    for name in ("reward", "reward/table", "log_prob"):  # float32, sums over other shapes
        np.testing.assert_allclose(one.rows[name], many.rows[name], atol=1e-4, err_msg=name)
    np.testing.assert_array_equal(one.valid, many.valid)
    np.testing.assert_allclose(one.rewards, many.rewards, atol=1e-6)
    np.testing.assert_allclose(one.reference_rewards, many.reference_rewards, atol=1e-6)


def stop_after(calls):
    counter = iter(range(calls))
    return lambda: next(counter, None) is None


def test_a_stopped_step_keeps_its_chunks_and_goes_on_to_the_same_bytes(grown, dataset, tmp_path):
    directory = tmp_path / "grow_1"
    with pytest.raises(Preempted, match="grow_1: stopped at chunk 2 of 3"):
        run_grow(directory, dataset, stop_requested=stop_after(1))
    whole = contents(grown[0])
    saved = contents(directory)
    assert sorted(saved) == [f"{kind}-00000-0000{n}.arrow" for kind in ("part", "sources") for n in (0, 1)]
    assert all(whole[name] == data for name, data in saved.items())
    assert run_grow(directory, dataset) == grown[1]
    assert contents(directory) == whole


@pytest.mark.parametrize("damage", ["no sources file", "cut part", "temporary file"])
def test_a_half_written_chunk_is_drawn_again(grown, dataset, tmp_path, damage):
    directory = tmp_path / "grow_1"
    shutil.copytree(grown[0], directory)
    for name in ("DONE", "stats.json"):
        (directory / name).unlink()
    if damage == "no sources file":
        (directory / "sources-00000-00001.arrow").unlink()
    elif damage == "cut part":
        part = directory / "part-00000-00001.arrow"
        part.write_bytes(part.read_bytes()[:-100])
    else:
        (directory / "sources-00000-00001.arrow").rename(directory / "sources-00000-00001.arrow.tmp")
    run_grow(directory, dataset)
    assert contents(directory) == contents(grown[0])


def test_finished_chunks_are_not_drawn_again(grown, dataset, tmp_path, monkeypatch):
    directory = tmp_path / "grow_1"
    shutil.copytree(grown[0], directory)
    partitioner, growing, _ = compiled(ONE_DEVICE)

    def refuse(*args):
        raise AssertionError("the program ran")

    monkeypatch.setitem(run_grow.__globals__, "compiled", lambda *args: (partitioner, growing, refuse))
    assert run_grow(directory, dataset) == grown[1]


@pytest.mark.parametrize(
    ("keep_filter", "mesh", "expected"),
    [(Threshold(2.0), "data=8", 0), (Threshold(-1.0), ONE_DEVICE, None), (TopK(1), ONE_DEVICE, NUM_SOURCES)],
)
def test_no_survivor_all_survivors_and_one_each(dataset, tmp_path, keep_filter, mesh, expected):
    statistics = run_grow(tmp_path / "grow_1", dataset, keep_filter=keep_filter, mesh=mesh)
    store = ScoredStore.open(tmp_path / "grow_1")
    expected = int(store.valid.sum()) if expected is None else expected
    assert statistics["kept"] == store.stored.sum() == len(store.rows) == expected
    assert len(store.select(store.stored)) == expected
    assert store.rewards.shape == (NUM_SOURCES, NUM_SAMPLES)


def test_a_subset_of_the_sources_has_the_samples_that_it_has_in_all_of_them(grown, dataset, tmp_path):
    run_grow(tmp_path / "grow_1", dataset, max_sources=20)
    few, all_of_them = ScoredStore.open(tmp_path / "grow_1"), ScoredStore.open(grown[0])
    assert len(few.source_ids) == 20 and set(few.source_ids) < set(all_of_them.source_ids)
    # Rewards are means of float32 over at most 6 tokens, and a function of the tokens alone.
    np.testing.assert_allclose(few.rewards, all_of_them.rewards[few.source_ids], atol=1e-6)


def test_a_chunk_that_the_mesh_cannot_divide_is_refused_before_compilation():
    growing = Growing(sampling=dataclasses.replace(SAMPLING, sources_per_chunk=12))
    with pytest.raises(UserError, match="SOURCES_PER_CHUNK=12"):
        compile_grow(growing=growing, model=MODEL, reward=REWARD, partitioner=Partitioner(make_mesh()), max_length=6)
