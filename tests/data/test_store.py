import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.feather
import pytest

from rest_jax.data.batching import BatchPlan, MixtureSpec
from rest_jax.data.store import ChunkRows, ChunkSources, ScoredStore, StoreWriter, filter_report
from rest_jax.data.store_files import read_batch
from rest_jax.errors import UserError

NUM_SAMPLES = 4
GROW_THRESHOLD = 0.3
# Two processes' parts of two chunks; ids neither dense nor in order, as a shuffled or subsampled corpus has them.
CHUNKS = {(0, 0): [7, 2, 11], (0, 1): [5, 30], (1, 0): [3, 4, 1]}
SOURCES = {0: 6, 1: 2}


def sample(source_id: int, sample_id: int) -> tuple[float, list[int]]:
    """Reward and tokens of a sample, as a function of its name alone."""
    rng = np.random.default_rng([source_id, sample_id])
    return float(np.float32(rng.random())), [*rng.integers(3, 99, rng.integers(0, 6)).tolist(), 1]


def chunk(
    source_ids: list[int], *, grow_threshold: float = GROW_THRESHOLD, num_samples: int = NUM_SAMPLES
) -> tuple[ChunkRows, ChunkSources]:
    rewards = np.array([[sample(i, n)[0] for n in range(num_samples)] for i in source_ids], np.float32)
    valid = np.ones_like(rewards, np.bool_)
    valid[:, 1] = False
    s, n = np.nonzero((rewards > grow_threshold) & valid)
    ids = np.array(source_ids)[s]
    targets = [np.array(sample(i, k)[1]) for i, k in zip(ids.tolist(), n.tolist(), strict=True)]
    rows = ChunkRows(
        source_ids=ids,
        sample_ids=n,
        inputs=[np.array([i + 2] * 3 + [1]) for i in ids],
        targets=targets,
        log_probs=-rewards[s, n],
        rewards={"chrf": rewards[s, n], "adequacy": rewards[s, n] / 2},
        total_rewards=rewards[s, n],
        hit_eos=n != 3,
        policy_step=120,
    )
    reference_rewards = np.full(len(source_ids), 0.9, np.float32)
    return rows, ChunkSources(
        source_ids=source_ids,
        rewards=rewards,
        valid=valid,
        reference_rewards=reference_rewards,
        components={"chrf": rewards, "adequacy": rewards / 2},
        reference_components={"chrf": reference_rewards, "adequacy": reference_rewards / 2},
    )


def statistics(source_ids: list[int]) -> dict[str, Any]:
    return {"count": np.int32(4 * len(source_ids)), "reward_sum": np.float32(0.1), "histogram": np.array(source_ids)}


def write_store(directory: Path, *, chunks: dict[tuple[int, int], list[int]] = CHUNKS, done: bool = True) -> Path:
    for (process, number), source_ids in chunks.items():
        StoreWriter(directory, process_index=process).write(number, *chunk(source_ids), statistics(source_ids))
    if done:
        StoreWriter(directory, process_index=0).finish({"count": np.int64(32), "mean": 0.5})
    return directory


def kept(store: ScoredStore, threshold: float) -> npt.NDArray[np.bool_]:
    return (store.rewards > threshold) & store.valid


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_statistics_of_all_samples(tmp_path: Path) -> None:
    store = ScoredStore.open(write_store(tmp_path / "g"))
    assert store.source_ids.tolist() == [1, 2, 3, 4, 5, 7, 11, 30]
    assert store.num_samples == NUM_SAMPLES
    for row, source_id in enumerate(store.source_ids.tolist()):
        assert store.rewards[row].tolist() == [sample(source_id, n)[0] for n in range(NUM_SAMPLES)]
    assert store.rewards.dtype == store.reference_rewards.dtype == np.float32
    assert store.valid.tolist() == [[True, False, True, True]] * 8
    assert store.reference_rewards.tolist() == [np.float32(0.9)] * 8
    assert store.stats == {"count": 32, "mean": 0.5}
    assert (store.stored == kept(store, GROW_THRESHOLD)).all()


@pytest.mark.parametrize("threshold", [GROW_THRESHOLD, 0.5, 0.8, 1.0])
def test_select_is_in_order_and_whole(tmp_path: Path, threshold: float) -> None:
    store = ScoredStore.open(write_store(tmp_path / "g"))
    keep = kept(store, threshold)
    rows = store.select(keep)
    expected = [(int(store.source_ids[s]), int(n)) for s, n in zip(*np.nonzero(keep), strict=True)]
    assert list(zip(rows.source_ids.tolist(), rows.sample_ids.tolist(), strict=True)) == expected
    assert len(rows) == len(expected)
    for index, (source_id, sample_id) in enumerate(expected):
        reward, tokens = sample(source_id, sample_id)
        assert rows.inputs(index).tolist() == [source_id + 2] * 3 + [1]
        assert rows.targets(index).tolist() == tokens
        assert rows.source_lengths[index] == 4
        assert rows.target_lengths[index] == len(tokens)
        assert rows.rewards[index] == np.float32(reward)
        assert rows.log_probs[index] == np.float32(-reward)
        assert rows.hit_eos[index] == (sample_id != 3)
        assert rows.policy_steps[index] == 120
    assert rows.targets(0).dtype == np.int32 if expected else len(rows.source_lengths) == 0


def test_selecting_what_grow_dropped_says_how_many_and_what_to_do(tmp_path: Path) -> None:
    store = ScoredStore.open(write_store(tmp_path / "g"))
    keep = kept(store, 0.1)
    dropped = int((keep & (store.rewards <= GROW_THRESHOLD)).sum())
    assert dropped > 0
    with pytest.raises(UserError, match=rf"keeps {keep.sum()} samples.*dropped {dropped} of them.*loosen the Grow"):
        store.select(keep)


def test_keep_of_another_shape_is_refused(tmp_path: Path) -> None:
    store = ScoredStore.open(write_store(tmp_path / "g"))
    with pytest.raises(ValueError, match=r"keep is \(4, 8\), the store \(8, 4\)"):
        store.select(np.ones((4, 8)))


def test_selection_trains(tmp_path: Path) -> None:
    store = ScoredStore.open(write_store(tmp_path / "g"))
    rows = store.select(kept(store, 0.5))
    plan = BatchPlan(MixtureSpec.single(rows), batch_size=2, source_length=8, target_length=8, pack=True, seed=0)
    steps = plan.steps_in_epoch(0)
    assert sum(plan.batch(step)["decoder_loss_weights"].sum() for step in range(steps)) == rows.target_lengths.sum()
    ids = np.concatenate([plan.batch_example_ids(step) for step in range(steps)])
    assert sorted(ids.tolist()) == rows.source_ids.tolist()


def test_filter_report(tmp_path: Path) -> None:
    store = ScoredStore.open(write_store(tmp_path / "g"))
    keep = kept(store, 0.5)
    report = filter_report(store, keep)
    named = [(int(store.source_ids[s]), int(n)) for s, n in zip(*np.nonzero(keep), strict=True)]
    rewards, tokens = zip(*(sample(*name) for name in named), strict=True)
    lengths = [len(sequence) for sequence in tokens]
    assert report == {
        "samples": 32,
        "distinct": 24,
        "pairs": len(named),
        "sources": len({source for source, _ in named}),
        "kept_share": len(named) / 32,
        "tokens": sum(lengths),
        "mean_reward": pytest.approx(np.mean(rewards)),
        "min_reward": min(rewards),
        "mean_length": pytest.approx(np.mean(lengths)),
        "hit_eos": pytest.approx(np.mean([n != 3 for _, n in named])),
    }


def test_filter_report_of_nothing(tmp_path: Path) -> None:
    store = ScoredStore.open(write_store(tmp_path / "g"))
    report = filter_report(store, kept(store, 1.0))
    assert report["pairs"] == report["sources"] == report["tokens"] == 0
    assert math.isnan(report["mean_reward"])
    assert math.isnan(report["min_reward"])


def test_a_chunk_without_survivors(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "g", process_index=0)
    writer.write(0, *chunk([1, 2], grow_threshold=1.0), {})
    writer.write(1, *chunk([3, 4]), {})
    writer.write(2, *chunk([5], grow_threshold=1.0), {})
    assert writer.committed_chunks({0: 2, 1: 2, 2: 1}) == {0, 1, 2}
    writer.finish({})
    store = ScoredStore.open(tmp_path / "g")
    rows = store.select(store.stored)
    assert len(rows) > 0
    assert set(rows.source_ids.tolist()) <= {3, 4}
    assert rows.targets(0).tolist() == sample(int(rows.source_ids[0]), int(rows.sample_ids[0]))[1]


def test_no_survivors_at_all(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "g", process_index=0)
    writer.write(0, *chunk([1, 2], grow_threshold=1.0), {})
    writer.finish({})
    store = ScoredStore.open(tmp_path / "g")
    rows = store.select(np.zeros((2, NUM_SAMPLES)))
    assert len(rows) == 0
    with pytest.raises(UserError, match="loosen the filter"):
        MixtureSpec.single(rows)


def test_a_run_that_was_stopped_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole = files(write_store(tmp_path / "whole"))
    stopped = tmp_path / "stopped"
    write_store(stopped, chunks={(0, 0): CHUNKS[0, 0], (0, 1): CHUNKS[0, 1]}, done=False)
    # Killed between the two renames of chunk 1, and while the next process wrote.
    (stopped / "sources-00000-00001.arrow").unlink()
    (stopped / "part-00001-00000.arrow.tmp").write_bytes(b"ARROW1")
    # Of chunk 0 the part of process 1 is missing.
    assert StoreWriter(stopped, process_index=0).committed_chunks(SOURCES) == set()
    assert os.listdir(stopped) == []
    write_store(stopped, chunks={key: ids for key, ids in CHUNKS.items() if key != (1, 0)}, done=False)
    write_store(stopped, chunks={(1, 0): CHUNKS[1, 0]})
    assert files(stopped) == whole


def test_a_chunk_is_whole_whoever_wrote_it_and_drawn_again_if_a_part_is_missing(tmp_path: Path) -> None:
    write_store(tmp_path / "g", done=False)
    assert StoreWriter(tmp_path / "g", process_index=3).committed_chunks(SOURCES) == {0, 1}
    (tmp_path / "g" / "sources-00001-00000.arrow").unlink()
    assert StoreWriter(tmp_path / "g", process_index=3).committed_chunks(SOURCES) == {1}
    assert sorted(os.listdir(tmp_path / "g")) == ["part-00000-00001.arrow", "sources-00000-00001.arrow"]


@pytest.mark.parametrize("name", ["part-00000-00001.arrow", "sources-00000-00001.arrow"])
@pytest.mark.parametrize("kind", ["truncate", "flip", "empty"])
def test_a_damaged_chunk_is_named_and_drawn_again(tmp_path: Path, name: str, kind: str) -> None:
    whole = files(write_store(tmp_path / "g"))
    damage(tmp_path / "g" / name, kind)
    with pytest.raises(UserError, match=rf"{name}.*(truncated|damaged).*delete"):
        ScoredStore.open(tmp_path / "g").select(np.zeros((8, NUM_SAMPLES)))
    writer = StoreWriter(tmp_path / "g", process_index=0)
    assert writer.committed_chunks(SOURCES) == {0}
    with pytest.raises(UserError, match="not finished"):
        ScoredStore.open(tmp_path / "g")
    writer.write(1, *chunk(CHUNKS[0, 1]), statistics(CHUNKS[0, 1]))
    writer.finish({"count": 32, "mean": 0.5})
    assert files(tmp_path / "g") == whole


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    batch = pa.ipc.open_file(pa.BufferReader(bytes(content))).get_batch(0)
    match kind:
        case "truncate":
            os.truncate(path, len(content) - 8)
        case "flip":
            # One bit of one value: what only the hash can see.
            at = content.index(batch.column("source_id").to_numpy().tobytes())
            content[at] ^= 1
            path.write_bytes(content)
        case "empty":
            os.truncate(path, 0)


def test_no_damaged_byte_is_read_as_content(tmp_path: Path) -> None:
    write_store(tmp_path / "g", chunks={(0, 0): [7, 2]})
    path = tmp_path / "g" / "part-00000-00000.arrow"
    content = path.read_bytes()
    rows = read_batch(path).to_pylist()
    damaged = [content[:size] for size in range(len(content))]
    damaged += [content[:i] + bytes([content[i] ^ 0x80]) + content[i + 1 :] for i in range(len(content))]
    refused = 0
    for number, variant in enumerate(damaged):
        # A new file each time: the one before is still mapped.
        path = tmp_path / f"{number}.arrow"
        path.write_bytes(variant)
        try:
            # Padding and unused fields may change without harm.
            assert read_batch(path).to_pylist() == rows
        except UserError:
            refused += 1
        path.unlink()
    assert refused > len(content)


@pytest.mark.parametrize("name", ["part-00000-00001.arrow", "sources-00000-00001.arrow"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    write_store(tmp_path / "g")
    (tmp_path / "g" / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing"):
        ScoredStore.open(tmp_path / "g")


def test_done_does_not_vouch_for_another_file(tmp_path: Path) -> None:
    write_store(tmp_path / "g")
    write_store(tmp_path / "other", chunks={(0, 1): [6, 31]})
    for kind in ("part", "sources"):
        name = f"{kind}-00000-00001.arrow"
        os.replace(tmp_path / "other" / name, tmp_path / "g" / name)
    with pytest.raises(UserError, match="sources-00000-00001.arrow: not the file that DONE lists"):
        ScoredStore.open(tmp_path / "g")


@pytest.mark.parametrize("name", ["DONE", "stats.json"])
@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_json_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    write_store(tmp_path / "g")
    (tmp_path / "g" / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}: damaged"):
        ScoredStore.open(tmp_path / "g")


def test_a_foreign_arrow_file_is_named(tmp_path: Path) -> None:
    write_store(tmp_path / "g", done=False)
    table = pa.table({"source_id": [1]})
    pa.feather.write_feather(table, str(tmp_path / "g" / "sources-00009-00000.arrow"), compression="uncompressed")
    with pytest.raises(UserError, match="sources-00009-00000.arrow: not a file of a scored-sample store"):
        ScoredStore.open(tmp_path / "g", require_done=False)


def test_a_running_grow_opens_when_asked(tmp_path: Path) -> None:
    write_store(tmp_path / "g", done=False)
    (tmp_path / "g" / "part-00000-00002.arrow.tmp").write_bytes(b"ARROW1")
    with pytest.raises(UserError, match="not finished.*run the same grow command again"):
        ScoredStore.open(tmp_path / "g")
    store = ScoredStore.open(tmp_path / "g", require_done=False)
    assert len(store.select(store.stored)) == store.stored.sum()
    assert store.stats == {}


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        ScoredStore.open(tmp_path / "g")
    (tmp_path / "g").mkdir()
    with pytest.raises(UserError, match="no chunks"):
        ScoredStore.open(tmp_path / "g", require_done=False)


def test_a_source_in_two_chunks_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "g", chunks={(0, 0): [1, 2], (0, 1): [2, 3]})
    with pytest.raises(UserError, match=r"1 sources stand in two chunks \(the first: 2\)"):
        ScoredStore.open(tmp_path / "g")


def test_another_number_of_samples_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "g", process_index=0)
    writer.write(0, *chunk([1, 2]), {})
    writer.write(1, *chunk([3], num_samples=2), {})
    writer.finish({})
    with pytest.raises(UserError, match="sources-00000-00001.arrow: 2 samples a source.*has 4"):
        ScoredStore.open(tmp_path / "g")


def test_another_reward_is_refused(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path / "g", process_index=0)
    writer.write(0, *chunk([1, 2]), {})
    rows, sources = chunk([3])
    writer.write(1, ChunkRows(**{**vars(rows), "rewards": {"bleu": rows.total_rewards}}), sources, {})
    writer.finish({})
    with pytest.raises(UserError, match="part-00000-00001.arrow.*the reward must not change"):
        _ = ScoredStore.open(tmp_path / "g").rows


def test_statistics_of_chunks_outlive_the_process(tmp_path: Path) -> None:
    write_store(tmp_path / "g", done=False)
    assert StoreWriter(tmp_path / "g", process_index=0).chunk_statistics() == [
        {"count": 4 * len(ids), "reward_sum": float(np.float32(0.1)), "histogram": ids}
        for ids in (CHUNKS[0, 0], CHUNKS[1, 0], CHUNKS[0, 1])
    ]


def test_changed_statistics_are_damage(tmp_path: Path) -> None:
    path = write_store(tmp_path / "g", done=False) / "sources-00000-00001.arrow"
    content = path.read_bytes()
    path.unlink()
    # Arrow keeps the schema twice: at the front, and in the footer, which is what readers use.
    path.write_bytes(content.replace(b'"count": 8', b'"count": 9'))
    assert StoreWriter(tmp_path / "g", process_index=0).committed_chunks(SOURCES) == {0}


def test_a_finished_store_takes_no_more(tmp_path: Path) -> None:
    write_store(tmp_path / "g")
    with pytest.raises(ValueError, match="finished"):
        StoreWriter(tmp_path / "g", process_index=0).write(2, *chunk([99]), {})


def test_a_survivor_of_a_foreign_source_is_refused(tmp_path: Path) -> None:
    rows, _ = chunk([1, 2])
    _, sources = chunk([3, 4])
    with pytest.raises(ValueError, match="not among the chunk's sources"):
        StoreWriter(tmp_path / "g", process_index=0).write(0, rows, sources, {})
    assert os.listdir(tmp_path / "g") == []


def test_stats_are_plain_json(tmp_path: Path) -> None:
    stats: dict[str, Any] = {
        "mean": np.float32(0.5),
        "reference_mean": math.nan,
        "histogram": np.arange(3),
        "thresholds": [{"tau": np.float64("inf"), "description": "τ"}],
    }
    write_store(tmp_path / "g", done=False)
    StoreWriter(tmp_path / "g", process_index=0).finish(stats)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads((tmp_path / "g" / "stats.json").read_text(), parse_constant=refuse) == {
        "mean": 0.5,
        "reference_mean": None,
        "histogram": [0, 1, 2],
        "thresholds": [{"tau": None, "description": "τ"}],
    }


COLUMNS = [
    "source_id",
    "sample_id",
    "inputs",
    "targets",
    "log_prob",
    "reward/adequacy",
    "reward/chrf",
    "reward",
    "length",
    "hit_eos",
    "policy_step",
]


def test_files_open_in_pyarrow_as_they_are(tmp_path: Path) -> None:
    write_store(tmp_path / "g", chunks={(0, 0): [7, 2]})
    table = pa.feather.read_table(str(tmp_path / "g" / "part-00000-00000.arrow"))
    assert table.column_names == COLUMNS
    row = table.to_pylist()[0]
    reward, tokens = sample(row["source_id"], row["sample_id"])
    assert row["targets"] == tokens
    assert row["length"] == len(tokens)
    assert row["reward"] == row["reward/chrf"] == reward
    sources = pa.feather.read_table(str(tmp_path / "g" / "sources-00000-00000.arrow")).to_pylist()
    assert [row["source_id"] for row in sources] == [7, 2]
    assert sources[1]["rewards"] == [sample(2, n)[0] for n in range(NUM_SAMPLES)]
    assert sources[1]["valid"] == [True, False, True, True]


def test_files_open_in_pandas_as_they_are(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    write_store(tmp_path / "g", chunks={(0, 0): [7, 2]})
    frame = pandas.read_feather(tmp_path / "g" / "part-00000-00000.arrow")
    assert list(frame.columns) == COLUMNS
    assert frame["targets"][0].tolist() == sample(int(frame["source_id"][0]), int(frame["sample_id"][0]))[1]


def test_files_open_in_polars_as_they_are(tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    write_store(tmp_path / "g", chunks={(0, 0): [7, 2]})
    frame = polars.read_ipc(tmp_path / "g" / "part-00000-00000.arrow")
    assert frame.columns == COLUMNS
    assert frame["targets"][0].to_list() == sample(frame["source_id"][0], frame["sample_id"][0])[1]
