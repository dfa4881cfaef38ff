"""WMT and IWSLT through the real registrations: TFDS's mock data, sacreBLEU's folder layout, and local files."""

import gzip
import importlib
from pathlib import Path

import pytest
import seqio
import tensorflow_datasets as tfds
from sacrebleu.dataset import DATASETS

from rest_jax.data import seqio_tasks
from rest_jax.data.token_dataset import TokenDataset
from rest_jax.errors import UserError
from rest_jax.tasks import corpus_folder, demo, iwslt, wmt  # noqa: F401  (demo registers its task)

LENGTHS = {"inputs": 32, "targets": 32}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's corpus folder; the modules read its place when they are imported, so they are imported again."""
    monkeypatch.setenv("REST_JAX_DATA_DIR", str(tmp_path))
    _register_again()
    yield tmp_path
    monkeypatch.undo()
    _register_again()


def _register_again() -> None:
    for name in [name for name in seqio.TaskRegistry.names() if name.startswith(("wmt", "iwslt"))]:
        seqio.TaskRegistry.remove(name)
    importlib.reload(wmt)
    importlib.reload(iwslt)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("vocabulary") / "vocab.model"
    return seqio_tasks.train_vocabulary("demo_de_en", output=output, size=500, split="test")


def texts(task: str, split: str) -> list[tuple[str, str]]:
    dataset = seqio.TaskRegistry.get(task).source.get_dataset(split, shuffle=False)
    batches = dataset.batch(1000).as_numpy_iterator()  # one by one, the demo's 30,000 would take seconds
    return [
        (source.decode(), target.decode())
        for batch in batches
        for source, target in zip(batch["inputs"], batch["targets"], strict=True)
    ]


def test_both_directions_are_registered_with_their_splits() -> None:
    names = set(seqio.TaskRegistry.names())
    for corpus in ("wmt14", "wmt16", "wmt19", "wmt20", "iwslt14", "iwslt17"):
        assert {f"{corpus}_de_en", f"{corpus}_en_de"} <= names
    every = {"train", "validation", "test"}
    for name in (
        "wmt14_fr_en",
        "wmt16_en_ro",
        "wmt19_zh_en",
        "wmt20_zh_en",
        "wmt20_en_zh",
        "iwslt14_de_en",
        "iwslt17_en_ja",
    ):
        assert set(seqio.TaskRegistry.get(name).splits) == every, name
    # Czech to English was not in the campaign of 2019.
    assert set(seqio.TaskRegistry.get("wmt19_cs_en").splits) == {"train", "validation"}


@pytest.mark.parametrize("corpus", ["wmt14", "wmt16", "wmt19"])
def test_tfds_knows_every_set_that_is_registered(corpus: str) -> None:
    known = {config.name for config in tfds.builder_cls(f"{corpus}_translate").BUILDER_CONFIGS}
    versions = {str(config.version) for config in tfds.builder_cls(f"{corpus}_translate").BUILDER_CONFIGS}
    registered = {"-".join(languages) for languages in wmt._TFDS_PAIRS[corpus]}
    assert registered == {f"{a}-{b}" for a, b in (name.split("-") for name in known)}
    assert versions == {wmt._TFDS_VERSION}


@pytest.mark.parametrize("corpus", ["wmt19", "wmt20", "iwslt17"])
def test_sacrebleu_knows_every_test_set_that_is_registered(corpus: str) -> None:
    for name in seqio.TaskRegistry.names():
        if name.startswith(corpus) and "test" in seqio.TaskRegistry.get(name).splits:
            assert name.removeprefix(f"{corpus}_").replace("_", "-") in DATASETS[corpus].langpairs, name


def test_tfds_set_is_tokenised_in_both_directions(folder: Path, model: Path, tmp_path: Path) -> None:
    vocabulary = corpus_folder.vocabulary("wmt14", ("de", "en"))
    vocabulary.parent.mkdir()
    vocabulary.write_bytes(model.read_bytes())
    pairs = {}
    with tfds.testing.mock_data(num_examples=7):
        for name in ("wmt14_de_en", "wmt14_en_de"):
            directory = seqio_tasks.tokenize_task(name, split="train", lengths=LENGTHS, cache_dir=tmp_path / "cache")
            data = TokenDataset.open(directory)
            pairs[name] = [(data.inputs_text(row), data.targets_text(row)) for row in range(len(data))]
    assert len(pairs["wmt14_de_en"]) == 7
    assert all(source and target for source, target in pairs["wmt14_de_en"])
    assert pairs["wmt14_en_de"] == [pair[::-1] for pair in pairs["wmt14_de_en"]]


def test_unprepared_tfds_set_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*arguments: object, **keywords: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds, "load", no_network)
    with pytest.raises(UserError, match=r"wmt16_translate/ro-en.*TFDS can neither read nor.*TFDS_DATA_DIR.*no route"):
        texts("wmt16_ro_en", "train")


def test_sacrebleu_test_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What sacreBLEU leaves after a download: one text file a field.
    monkeypatch.setattr(DATASETS["wmt20"], "_outdir", str(tmp_path))
    fields = {"src": "你好\n再见\n", "ref": "Hello.\nGoodbye.\n"}
    for field in DATASETS["wmt20"].fieldnames("zh-en"):
        (tmp_path / f"wmt20.zh-en.{field}").write_text(fields.get(field, "-\n-\n"), encoding="utf-8")
    assert texts("wmt20_zh_en", "test") == [("你好", "Hello."), ("再见", "Goodbye.")]


@pytest.mark.parametrize("error", [OSError("no route to host"), SystemExit(1)])
def test_missing_sacrebleu_test_set_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def no_network(langpair: str) -> None:
        raise error

    monkeypatch.setattr(DATASETS["iwslt17"], "_outdir", str(tmp_path))
    monkeypatch.setattr(DATASETS["iwslt17"], "process_to_text", no_network)
    with pytest.raises(UserError, match="iwslt17 de-en: sacreBLEU can neither read nor download"):
        texts("iwslt17_de_en", "test")


@pytest.mark.parametrize("compress", [False, True])
def test_iwslt_from_the_users_folder(folder: Path, compress: bool) -> None:
    corpus = folder / "iwslt14.de-en"
    corpus.mkdir()
    for split in ("train", "valid", "test"):
        for language, text in (("de", "ja\nnein\n"), ("en", f"yes {split}\nno\n")):
            if compress:
                (corpus / f"{split}.{language}.gz").write_bytes(gzip.compress(text.encode()))
            else:
                (corpus / f"{split}.{language}").write_text(text)
    _register_again()
    assert texts("iwslt14_de_en", "validation") == [("ja", "yes valid"), ("nein", "no")]
    assert texts("iwslt14_en_de", "test") == [("yes test", "ja"), ("no", "nein")]


def test_missing_folder_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"iwslt17\.fr-en/train\.fr: the parallel text cannot be read"):
        texts("iwslt17_fr_en", "train")


def test_demo_has_its_splits_and_no_sentence_twice_across_them() -> None:
    sides = {}
    for split, count in (("train", 28_600), ("validation", 1_016), ("test", 1_005)):
        pairs = texts("demo_de_en", split)
        assert len(pairs) == count
        sides[split] = [set(side) for side in zip(*pairs, strict=True)]
    for held_out in ("validation", "test"):
        for side in range(2):
            assert not sides[held_out][side] & sides["train"][side]


def test_demo_text_passes_the_check() -> None:
    lengths = {"inputs": 64, "targets": 64}
    seqio_tasks.check_task("demo_de_en", splits=("train", "validation", "test"), lengths=lengths)
