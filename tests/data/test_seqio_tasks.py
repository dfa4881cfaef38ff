"""The bridge from seqio, on a thousand real pairs: what is written, what its name depends on, what it refuses."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
import seqio

from rest_jax.data import seqio_tasks
from rest_jax.data.token_dataset import TokenDataset
from rest_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary
from rest_jax.errors import UserError
from rest_jax.tasks import demo, parallel_text

LENGTHS = {"inputs": 96, "targets": 80}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("vocabulary") / "new" / "vocab.model"
    modules = ["rest_jax.tasks.demo"]
    return seqio_tasks.train_vocabulary("demo_de_en", output=output, size=600, split="test", module_imports=modules)


@pytest.fixture
def register(vocabulary: Path) -> Iterator:
    """Registers tasks on the demo's test split, under names that are free again afterwards."""
    names = []

    def _register(name: str = "bridge", **arguments) -> str:
        names.append(name)
        arguments = {"splits": {"test": demo.DATA_DIR / "test.tsv.gz"}, "vocabulary": vocabulary, **arguments}
        parallel_text.register_parallel_text(name, **arguments)
        return name

    yield _register
    for name in names:
        seqio.TaskRegistry.remove(name)


def demo_pairs() -> list[tuple[str, str]]:
    with gzip.open(demo.DATA_DIR / "test.tsv.gz", "rt", encoding="utf-8") as file:
        return [tuple(line.split("\t")[:2]) for line in file]


def test_vocabulary_has_the_t5_ids_bytes_and_keeps_text(vocabulary: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    assert (model.pad_id(), model.eos_id(), model.unk_id(), model.bos_id()) == (0, 1, 2, -1)
    assert model.get_piece_size() == 600
    assert sum(model.is_byte(piece) for piece in range(600)) == 256
    for text in ("Ａ… ½ ﬁ 東京", "Straße – „so“"):  # NFKC would rewrite some of these characters
        assert model.decode(model.encode(text)) == text


def test_vocabulary_is_the_same_file_each_time(vocabulary: Path, tmp_path: Path) -> None:
    again = seqio_tasks.train_vocabulary("demo_de_en", output=tmp_path / "again.model", size=600, split="test")
    assert again.read_bytes() == vocabulary.read_bytes()
    assert list(tmp_path.iterdir()) == [again]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "vocab.txt"}, "ends in '.model'"),
        ({"size": 100}, "at least 260"),
        ({"size": 200_000}, "SentencePiece refuses 200000 pieces"),
        ({"split": "dev"}, r"no split 'dev'; legal are \['test', 'train', 'validation'\]"),
    ],
)
def test_vocabulary_refuses(tmp_path: Path, arguments: dict, message: str) -> None:
    arguments = {"output": tmp_path / "v.model", "size": 600, "split": "test", **arguments}
    with pytest.raises(UserError, match=message):
        seqio_tasks.train_vocabulary("demo_de_en", **arguments)
    assert not list(tmp_path.iterdir())


def test_text_pairs_need_no_vocabulary_and_carry_the_prefix(register, tmp_path: Path) -> None:
    name = register(vocabulary=tmp_path / "not there.model", prefix="de: ")
    pairs = list(seqio_tasks.task_text_pairs(name, split="test"))
    assert pairs == [(f"de: {source}", target) for source, target in demo_pairs()]


def test_rows_are_the_tasks_own_examples(register, tmp_path: Path, vocabulary: Path) -> None:
    directory = seqio_tasks.tokenize_task(register(), split="test", lengths=LENGTHS, cache_dir=tmp_path)
    data = TokenDataset.open(directory)
    pairs = demo_pairs()
    assert len(data) == len(pairs) == 1005
    model = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary))
    trimmed = 0
    for row, (source, target) in enumerate(pairs):
        assert (data.inputs_text(row), data.targets_text(row)) == (source, target)
        for ids, text, limit in ((data.inputs(row), source, 96), (data.targets(row), target, 80)):
            expected = model.encode(text)[: limit - 1] + [1]
            assert ids.tolist() == expected
            trimmed += len(model.encode(text)) >= limit
    assert trimmed  # the lengths above do cut something


def test_a_finished_data_set_is_used_again(register, tmp_path: Path) -> None:
    first = seqio_tasks.tokenize_task(register(), split="test", lengths=LENGTHS, cache_dir=tmp_path / "new")
    stamps = {path: path.stat().st_mtime_ns for path in first.iterdir()}
    assert seqio_tasks.tokenize_task("bridge", split="test", lengths=LENGTHS, cache_dir=tmp_path / "new") == first
    assert {path: path.stat().st_mtime_ns for path in first.iterdir()} == stamps
    info = json.loads((first / "info.json").read_text())
    assert (info["task"], info["split"], info["lengths"], info["num_examples"]) == ("bridge", "test", LENGTHS, 1005)


def test_the_name_follows_everything_that_changes_the_rows(register, tmp_path: Path, vocabulary: Path) -> None:
    text, other_text = tmp_path / "a.tsv", tmp_path / "b.tsv"
    text.write_text("ja\tyes\n")
    other_text.write_text("nein\tno\n")
    small = seqio_tasks.train_vocabulary("demo_de_en", output=tmp_path / "s.model", size=500, split="test")
    same_copy = tmp_path / "copy.model"
    same_copy.write_bytes(vocabulary.read_bytes())

    def key(lengths: dict[str, int] = LENGTHS, **arguments) -> str:
        # The task's name is a part of the key as well, so each of them registers under the same one.
        name = register("keyed", **{"splits": {"test": text}, **arguments})
        directory = seqio_tasks.tokenize_task(name, split="test", lengths=lengths, cache_dir=tmp_path / "cache")
        seqio.TaskRegistry.remove(name)
        return directory.name

    base = key()
    assert key(vocabulary=same_copy) == base
    changed = [
        key(splits={"test": other_text}),
        key(vocabulary=small),
        key(prefix="de: "),
        key(prefix="en: "),
        key(reverse=True),
        key(lengths={"inputs": 96, "targets": 96}),
    ]
    assert len({base, *changed}) == 1 + len(changed)


def test_mixtures_are_tokenised_and_the_rows_are_the_same_each_time(register, tmp_path: Path) -> None:
    register("one")
    register("two", prefix="again: ")
    seqio.MixtureRegistry.add("both", [("one", 1.0), ("two", 2.0)])
    try:
        rows = []
        for cache in ("a", "b"):
            directory = seqio_tasks.tokenize_task("both", split="test", lengths=LENGTHS, cache_dir=tmp_path / cache)
            data = TokenDataset.open(directory)
            rows.append([data.inputs_text(row) for row in range(len(data))])
    finally:
        seqio.MixtureRegistry.remove("both")
    assert rows[0] == rows[1]
    assert any(text.startswith("again: ") for text in rows[0]) and any(not text.startswith("again") for text in rows[0])


def test_text_is_decoded_where_the_task_keeps_none(register, tmp_path: Path, vocabulary: Path) -> None:
    feature = seqio.Feature(seqio.SentencePieceVocabulary(str(vocabulary)), add_eos=True)
    source = seqio.TaskRegistry.get(register()).source
    without_copies = seqio.map_over_dataset(
        lambda example: {side: feature.vocabulary.encode_tf(example[side]) for side in ("inputs", "targets")}
    )
    seqio.TaskRegistry.add(
        "bare",
        source=source,
        preprocessors=[without_copies, seqio.preprocessors.append_eos_after_trim],
        output_features={"inputs": feature, "targets": feature},
    )
    try:
        directory = seqio_tasks.tokenize_task(
            "bare", split="test", lengths={"inputs": 999, "targets": 999}, cache_dir=tmp_path
        )
        with pytest.raises(UserError, match="bare: has no step seqio.preprocessors.tokenize"):
            list(seqio_tasks.task_text_pairs("bare", split="test"))
    finally:
        seqio.TaskRegistry.remove("bare")
    data = TokenDataset.open(directory)
    assert [data.targets_text(row) for row in range(5)] == [target for _, target in demo_pairs()[:5]]


def test_unknown_task_is_answered_with_a_near_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no task or mixture 'demo_de_eng'.*did you mean 'demo_de_en'"):
        seqio_tasks.tokenize_task(
            "demo_de_eng", split="test", lengths=LENGTHS, cache_dir=tmp_path, module_imports=["rest_jax.tasks.demo"]
        )


def test_unknown_module_is_named() -> None:
    with pytest.raises(UserError, match=r"TASK_MODULES \(--task_module\): cannot import 'rest_jax.tasks.nothing'"):
        seqio_tasks.get_task("demo_de_en", module_imports=["rest_jax.tasks.nothing"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, r"bridge: has no split 'dev'; legal are \['test'\]"),
        ({"lengths": {"inputs": 96}}, "TASK_FEATURE_LENGTHS: got {'inputs': 96}"),
        ({"lengths": {"inputs": 96, "targets": 1}}, r"TASK_FEATURE_LENGTHS\['targets'\]: got 1"),
    ],
)
def test_faulty_arguments_write_nothing(register, tmp_path: Path, arguments: dict, message: str) -> None:
    arguments = {"split": "test", "lengths": LENGTHS, "cache_dir": tmp_path / "cache", **arguments}
    with pytest.raises(UserError, match=message):
        seqio_tasks.tokenize_task(register(), **arguments)
    assert not (tmp_path / "cache").exists()


def test_check_finds_the_faults_of_every_split_and_writes_nothing(register, tmp_path: Path, vocabulary: Path) -> None:
    digest = hashlib.sha256(vocabulary.read_bytes()).hexdigest()
    good = register("good")
    assert seqio_tasks.check_task(good, splits=["test"], lengths=LENGTHS) == {"inputs": digest, "targets": digest}
    (tmp_path / "bad.tsv").write_text("ja\tyes\nnein\n")
    splits = {"train": demo.DATA_DIR / "test.tsv.gz", "test": tmp_path / "bad.tsv"}
    bad = register("bad", splits=splits)
    seqio_tasks.check_task(bad, splits=["train"], lengths=LENGTHS)
    with pytest.raises(UserError, match=r"bad\.tsv:2: 1 tab-separated column"):
        seqio_tasks.check_task(bad, splits=["train", "test"], lengths=LENGTHS)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tsv"]


def test_missing_vocabulary_says_how_to_make_one(register, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"vocabulary: the file .*none\.model does not exist.*rest_jax vocab"):
        seqio_tasks.tokenize_task(
            register(vocabulary=tmp_path / "none.model"), split="test", lengths=LENGTHS, cache_dir=tmp_path / "cache"
        )


@pytest.mark.parametrize(
    ("content", "message"), [("", "the corpus is empty"), ("\tx\n", "the corpus is empty"), ("x\n", r"bad\.tsv:1")]
)
def test_faulty_text_leaves_no_data_set(register, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text(content)
    name = register(splits={"test": path})
    with pytest.raises(UserError, match=message):
        seqio_tasks.tokenize_task(name, split="test", lengths=LENGTHS, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_byte_tasks_have_bytes_and_the_policys_fingerprint(register, tmp_path: Path) -> None:
    vocabulary = ByteVocabulary(extra_ids=125)
    name = register(vocabulary=vocabulary, prefix="<2en> ")
    lengths = {"inputs": 512, "targets": 512}
    fingerprints = seqio_tasks.check_task(name, splits=["test"], lengths=lengths)
    assert set(fingerprints.values()) == {vocabulary.sha256}
    directory = seqio_tasks.tokenize_task(name, split="test", lengths=lengths, cache_dir=tmp_path / "cache")
    dataset = TokenDataset.open(directory)
    for row, (source, target) in zip(range(20), demo_pairs(), strict=False):
        assert dataset.inputs(row).tolist() == [*vocabulary.encode(f"<2en> {source}"), 1]
        assert vocabulary.decode(dataset.targets(row).tolist()) == target.rstrip("\n")


def test_a_vocabulary_of_ours_serves_a_task(register, vocabulary: Path, tmp_path: Path) -> None:
    ours = SentencePieceVocabulary(str(vocabulary), extra_ids=7)
    fingerprints = seqio_tasks.check_task(register(vocabulary=ours), splits=["test"], lengths=LENGTHS)
    assert set(fingerprints.values()) == {ours.sha256}
    with pytest.raises(UserError, match="legal are SentencePieceVocabulary and ByteVocabulary"):
        seqio_tasks.seqio_vocabulary(object())
