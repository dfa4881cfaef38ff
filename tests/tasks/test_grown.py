"""A store as a seqio task: the survivors above the threshold, their tokens untouched, their texts decoded."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import seqio

from rest_jax.data import seqio_tasks
from rest_jax.data.store import ChunkRows, ChunkSources, StoreWriter
from rest_jax.data.token_dataset import TokenDataset
from rest_jax.errors import UserError
from rest_jax.tasks import grown

REWARDS = np.array([[0.2, 0.6, 0.9], [0.5, 0.8, 0.1]], np.float32)
GROW_THRESHOLD = 0.3
TEXTS = {(0, 1): "one", (0, 2): "two", (1, 0): "three", (1, 1): "four"}
SOURCES = ("eins", "zwei")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("vocabulary") / "vocab.model"
    modules = ["rest_jax.tasks.demo"]
    return seqio_tasks.train_vocabulary("demo_de_en", output=output, size=500, split="test", module_imports=modules)


@pytest.fixture
def store(tmp_path: Path, vocabulary: Path) -> Path:
    """Two sources with three samples; Grow kept those above 0.3; the sample 'four' never reached EOS."""
    encode = seqio.SentencePieceVocabulary(str(vocabulary)).encode
    kept = sorted(TEXTS)
    rewards = np.array([REWARDS[cell] for cell in kept])
    writer = StoreWriter(tmp_path / "grow_1", process_index=0)
    rows = ChunkRows(
        source_ids=[source for source, _ in kept],
        sample_ids=[sample for _, sample in kept],
        inputs=[[*encode(SOURCES[source]), 1] for source, _ in kept],
        targets=[encode(TEXTS[cell]) + ([1] if TEXTS[cell] != "four" else []) for cell in kept],
        log_probs=np.full(len(kept), -3.0),
        rewards={"chrf": rewards},
        total_rewards=rewards,
        hit_eos=[TEXTS[cell] != "four" for cell in kept],
        policy_step=7,
    )
    sources = ChunkSources(
        source_ids=[0, 1],
        rewards=REWARDS,
        valid=np.ones_like(REWARDS, bool),
        reference_rewards=[1.0, 1.0],
        components={"chrf": REWARDS},
        reference_components={"chrf": [1.0, 1.0]},
    )
    writer.write(0, rows, sources, {})
    writer.finish({})
    return tmp_path / "grow_1"


@pytest.fixture
def register(store: Path, vocabulary: Path) -> Iterator:
    names = []

    def _register(threshold: float, **arguments) -> seqio.Task:
        names.append("grown")
        return grown.register_grown(
            "grown", threshold=threshold, **{"store": store, "vocabulary": vocabulary, **arguments}
        )

    yield _register
    for name in names:
        seqio.TaskRegistry.remove(name)


def examples(task: seqio.Task, lengths: dict[str, int] | None = None) -> list[dict]:
    return list(task.get_dataset(lengths, split="train", shuffle=False).as_numpy_iterator())


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.3, ["one", "two", "three", "four"]), (0.5, ["one", "two", "four"]), (0.85, ["two"])]
)
def test_samples_strictly_above_the_threshold(register, threshold: float, expected: list[str]) -> None:
    found = examples(register(threshold))
    assert [example["targets_pretokenized"].decode() for example in found] == expected
    sources = {"one": "eins", "two": "eins", "three": "zwei", "four": "zwei"}
    assert [example["inputs_pretokenized"].decode() for example in found] == [sources[text] for text in expected]


def test_eos_is_kept_where_it_was_and_not_added(register) -> None:
    last = {example["targets_pretokenized"]: example["targets"][-1] for example in examples(register(0.3))}
    assert [last[text] == 1 for text in (b"one", b"two", b"three", b"four")] == [True, True, True, False]


def test_trimming_keeps_eos_as_seqio_does(register, vocabulary: Path) -> None:
    encode = seqio.SentencePieceVocabulary(str(vocabulary)).encode
    found = examples(register(0.3), {"inputs": 2, "targets": 2})
    for example, text in zip(found, ("one", "two", "three", "four"), strict=True):
        ids = encode(text)
        whole = ids if text == "four" else [*ids, 1]
        expected = whole if len(whole) <= 2 else [ids[0], ids[1] if text == "four" else 1]
        assert example["targets"].tolist() == expected


def test_store_goes_through_the_bridge_and_its_key_follows_the_threshold(register, tmp_path: Path) -> None:
    directories = []
    for threshold in (0.3, 0.7):
        register(threshold)
        lengths = {"inputs": 16, "targets": 16}
        directory = seqio_tasks.tokenize_task("grown", split="train", lengths=lengths, cache_dir=tmp_path / "cache")
        directories.append(directory)
        seqio.TaskRegistry.remove("grown")
    assert [len(TokenDataset.open(directory)) for directory in directories] == [4, 2]
    assert TokenDataset.open(directories[1]).targets_text(0) == "two"


def test_refusals(register, store: Path, tmp_path: Path, vocabulary: Path) -> None:
    def message(**arguments) -> str:
        with pytest.raises(UserError) as caught:
            examples(register(**arguments))
        seqio.TaskRegistry.remove("grown")
        return str(caught.value)

    assert "no sample has a reward above threshold 0.95; the best has 0.9000" in message(threshold=0.95)
    assert str(tmp_path / "none") in message(threshold=0.5, store=tmp_path / "none")
    # Grow's filter dropped the sample with 0.2: it cannot come back.
    assert "1" in message(threshold=0.15)
    small = seqio.ByteVocabulary()
    assert "but the vocabulary has" in message(threshold=0.5, vocabulary=small)
    (store / "DONE").unlink()
    assert "not finished" in message(threshold=0.5)


@pytest.mark.parametrize("threshold", [-0.1, 1.0])
def test_threshold_out_of_range(store: Path, vocabulary: Path, threshold: float) -> None:
    with pytest.raises(UserError, match="legal is 0 <= threshold < 1"):
        grown.register_grown("grown", store=store, threshold=threshold, vocabulary=vocabulary)
