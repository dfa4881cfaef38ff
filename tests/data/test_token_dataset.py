import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_jax.data.token_dataset import TokenDataset, TokenRow, dataset_key, write_token_dataset
from rest_jax.errors import UserError

ROWS = [
    TokenRow([5, 6, 1], [7, 1], "ein Satz", "a sentence"),
    TokenRow([1], [8, 9, 10, 1], "", "löss ☃"),
    TokenRow(np.array([11, 1], np.int64), [1], "x", ""),
]


def write(directory: Path, rows: list[TokenRow] = ROWS, *, rows_per_shard: int = 2) -> Path:
    write_token_dataset(directory, rows, info={"task": "t"}, rows_per_shard=rows_per_shard)
    return directory


@pytest.mark.parametrize("rows_per_shard", [1, 2, 3, 100])
def test_round_trip(tmp_path: Path, rows_per_shard: int) -> None:
    dataset = TokenDataset.open(write(tmp_path / "d", rows_per_shard=rows_per_shard))
    assert len(dataset) == len(ROWS)
    assert dataset.source_ids.tolist() == [0, 1, 2]
    assert dataset.source_lengths.tolist() == [3, 1, 2]
    assert dataset.target_lengths.tolist() == [2, 4, 1]
    assert dataset.source_lengths.dtype == dataset.target_lengths.dtype == np.int32
    for index, row in enumerate(ROWS):
        assert dataset.inputs(index).dtype == np.int32
        assert dataset.inputs(index).tolist() == np.asarray(row.inputs).tolist()
        assert dataset.targets(index).tolist() == np.asarray(row.targets).tolist()
        assert dataset.inputs_text(index) == row.inputs_text
        assert dataset.targets_text(index) == row.targets_text
    assert dataset.info["task"] == "t"
    assert dataset.info["num_examples"] == 3
    assert dataset.info["num_shards"] == -(-3 // rows_per_shard)


@pytest.mark.parametrize("index", [-1, 3])
def test_index_outside_raises(tmp_path: Path, index: int) -> None:
    dataset = TokenDataset.open(write(tmp_path / "d"))
    with pytest.raises(IndexError, match="3 rows"):
        dataset.inputs(index)


def test_views_cannot_change_the_file(tmp_path: Path) -> None:
    dataset = TokenDataset.open(write(tmp_path / "d"))
    with pytest.raises(ValueError, match="read-only"):
        dataset.inputs(0)[0] = 3


def test_shards_open_in_pyarrow_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "d")
    with pa.OSFile(str(tmp_path / "d" / "shard-00001.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    assert table.to_pylist() == [
        {
            "source_id": 2,
            "inputs": [11, 1],
            "targets": [1],
            "inputs_pretokenized": "x",
            "targets_pretokenized": "",
        }
    ]


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    names = sorted(os.listdir(first))
    assert names == sorted(os.listdir(second)) == ["info.json", "shard-00000.arrow", "shard-00001.arrow"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_no_rows_is_the_users_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no examples"):
        write(tmp_path / "d", [])
    assert os.listdir(tmp_path) == []


def test_interrupted_writing_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> Iterator[TokenRow]:
        yield from ROWS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_token_dataset(tmp_path / "d", rows(), info={}, rows_per_shard=2)
    assert os.listdir(tmp_path) == []


def test_the_first_to_finish_wins(tmp_path: Path) -> None:
    write(tmp_path / "d")
    write(tmp_path / "d", ROWS[:1])
    assert len(TokenDataset.open(tmp_path / "d")) == 3
    assert os.listdir(tmp_path) == ["d"]


def test_a_directory_that_is_no_data_set_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        write(tmp_path / "d")
    assert os.listdir(tmp_path / "d") == ["mine.txt"]


def test_nothing_there_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no token data set"):
        TokenDataset.open(tmp_path / "d")


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove"])
def test_damage_names_the_file(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "d")
    path = tmp_path / "d" / "shard-00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    match damage:
        case "truncate":
            os.truncate(path, path.stat().st_size - 8)
        case "flip":
            path.write_bytes(content)
        case "empty":
            os.truncate(path, 0)
        case "remove":
            path.unlink()
    with pytest.raises(UserError, match="shard-00001.arrow.*delete"):
        TokenDataset.open(tmp_path / "d")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shards": [{}]}'])
def test_damaged_info_names_the_file(tmp_path: Path, text: str) -> None:
    write(tmp_path / "d")
    (tmp_path / "d" / "info.json").write_text(text)
    with pytest.raises(UserError, match=r"info\.json.*delete"):
        TokenDataset.open(tmp_path / "d")


def test_info_and_shards_must_agree_on_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "d") / "info.json"
    info = json.loads(path.read_text())
    info["shards"][0]["rows"] = 5
    path.write_text(json.dumps(info))
    with pytest.raises(UserError, match="shard-00000.arrow.*5 rows"):
        TokenDataset.open(tmp_path / "d")


def test_key_is_stable() -> None:
    # Changing this value throws away every user's token cache.
    assert dataset_key(task="demo", lengths={"inputs": 128}) == "f258a967f12f5ce865f6"


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=4))
def test_key_depends_on_content_alone(fields: dict[str, int | str]) -> None:
    assert dataset_key(x=fields) == dataset_key(x=dict(reversed(fields.items())))
    assert dataset_key(x=fields) != dataset_key(x={**fields, "another field": 0})
