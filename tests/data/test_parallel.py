"""Tokenised splits: found without seqio once they are there, made anew when what they come from has changed."""

import dataclasses
import gzip
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import seqio

from rest_jax.data.parallel import ParallelData, UnreadData
from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.errors import UserError
from rest_jax.tasks import demo

VOCABULARY = demo.DATA_DIR / "vocab.model"
MODULE = """
from rest_jax.tasks import parallel_text
parallel_text.register_parallel_text(
    "parallel_demo", splits={{"train": "{text}", "validation": "{text}", "test": "{text}"}}, vocabulary="{vocabulary}"
)
"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ParallelData]:
    """20 demo lines, registered by a module of the user's."""
    with gzip.open(demo.DATA_DIR / "test.tsv.gz", "rt", encoding="utf-8") as file:
        (tmp_path / "text.tsv").write_text("".join(next(file) for _ in range(20)), encoding="utf-8")
    (tmp_path / "my_parallel_tasks.py").write_text(MODULE.format(text=tmp_path / "text.tsv", vocabulary=VOCABULARY))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield ParallelData(
        task="parallel_demo",
        vocabulary=SentencePieceVocabulary(str(VOCABULARY)),
        lengths={"inputs": 32, "targets": 32},
        task_modules=("my_parallel_tasks",),
        cache_dir=str(tmp_path / "cache"),
    )
    sys.modules.pop("my_parallel_tasks", None)
    seqio.TaskRegistry.remove("parallel_demo")


@pytest.fixture
def tokenised_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Splits for which seqio was asked, since the last look."""
    from rest_jax.data import seqio_tasks

    calls: list[str] = []
    original = seqio_tasks.tokenize_task

    def tokenize(*args: object, **kwargs: object) -> Path:
        calls.append(str(kwargs["split"]))
        return original(*args, **kwargs)

    monkeypatch.setattr(seqio_tasks, "tokenize_task", tokenize)
    return calls


def test_second_opening_asks_nobody(data: ParallelData, tokenised_by: list[str]) -> None:
    first, second = data.open("test"), data.open("test")
    assert tokenised_by == ["test"] and len(first) == len(second) == 20
    assert dict(first.info) == dict(second.info)


def test_tokenised_data_open_without_seqio_or_tensorflow(data: ParallelData, tmp_path: Path) -> None:
    for split in data.splits:
        data.open(split)
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"):
            raise ModuleNotFoundError(f"there is no {{name}} on this machine", name=name)
sys.meta_path.insert(0, Refuse())
from rest_jax.data.parallel import ParallelData
from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.errors import UserError
def data(**lengths):
    return ParallelData(
        task="parallel_demo", vocabulary=SentencePieceVocabulary({str(VOCABULARY)!r}), lengths=lengths,
        task_modules=("my_parallel_tasks",), cache_dir={str(tmp_path / "cache")!r},
    )
data(inputs=32, targets=32).check()
print(sum(len(data(inputs=32, targets=32).open(split)) for split in ("train", "validation", "test")))
try:
    data(inputs=32, targets=31).open("train")
except UserError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    count, message = done.stdout.strip().split("\n", 1)
    assert count == "60"
    assert "rest_jax[seqio]" in message and "CACHE_DIR" in message and "parallel_demo" in message


def test_changed_text_is_tokenised_again(data: ParallelData, tokenised_by: list[str], tmp_path: Path) -> None:
    data.open("test")
    text = tmp_path / "text.tsv"
    text.write_text(text.read_text() + "eins\tone\n")
    assert len(data.open("test")) == 21
    # Of the same size: the time tells, and then the content.
    text.write_text(text.read_text().replace("one\n", "two\n"))
    os.utime(text, ns=(1, 1))
    assert data.open("test").targets_text(20) == "two"
    assert tokenised_by == ["test"] * 3


def test_copied_text_is_not_tokenised_again(data: ParallelData, tokenised_by: list[str], tmp_path: Path) -> None:
    data.open("test")
    os.utime(tmp_path / "text.tsv", ns=(1, 1))
    data.open("test")
    (tmp_path / "text.tsv").unlink()  # as on a machine that got the cache alone
    assert len(data.open("test")) == 20
    assert tokenised_by == ["test"]


@pytest.mark.parametrize("way", ["working directory", "REST_JAX_DATA_DIR"])
def test_a_copy_of_the_project_reads_its_own_text(
    data: ParallelData, tokenised_by: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.tsv").write_text((tmp_path / "text.tsv").read_text())

    def go_to(name: str) -> None:
        if way == "working directory":
            monkeypatch.chdir(tmp_path / name)
        else:
            monkeypatch.setenv("REST_JAX_DATA_DIR", str(tmp_path / name))

    text = '"text.tsv"' if way == "working directory" else 'os.path.join(os.environ["REST_JAX_DATA_DIR"], "text.tsv")'
    module = MODULE.format(text="TEXT", vocabulary=VOCABULARY).replace('"TEXT"', text)
    (tmp_path / "my_parallel_tasks.py").write_text("import os\n" + module)
    go_to("one")
    data.open("test")
    go_to("two")
    data.open("test")
    assert tokenised_by == ["test"]  # the same text
    (tmp_path / "two" / "text.tsv").write_text("eins\tone\n")
    # A new process would import the module anew.
    seqio.TaskRegistry.remove("parallel_demo")
    del sys.modules["my_parallel_tasks"]
    assert len(data.open("test")) == 1
    assert tokenised_by == ["test"] * 2


def test_changed_registration_is_tokenised_again(data: ParallelData, tokenised_by: list[str], tmp_path: Path) -> None:
    english = data.open("test").targets_text(0)
    module = tmp_path / "my_parallel_tasks.py"
    module.write_text(module.read_text().replace('.model"', '.model", reverse=True'))
    # A new process would import it anew.
    seqio.TaskRegistry.remove("parallel_demo")
    del sys.modules["my_parallel_tasks"]
    importlib.invalidate_caches()
    for cached in (tmp_path / "__pycache__").glob("*"):
        cached.unlink()
    assert data.open("test").inputs_text(0) == english
    assert tokenised_by == ["test"] * 2


def test_damaged_index_is_no_obstacle(data: ParallelData, tokenised_by: list[str]) -> None:
    data.open("test")
    (entry,) = (data.cache / "index").iterdir()
    entry.write_text(entry.read_text()[:50])
    assert len(data.open("test")) == 20
    assert tokenised_by == ["test"] * 2
    assert list((data.cache / "index").iterdir()) == [entry]


def test_vocabulary_must_be_the_tasks(data: ParallelData, tmp_path: Path) -> None:
    from rest_jax.data import seqio_tasks

    other = tmp_path / "other.model"
    seqio_tasks.train_vocabulary("demo_de_en", output=other, size=400, split="test")
    wrong = dataclasses.replace(data, vocabulary=SentencePieceVocabulary(str(other)))
    for act in (wrong.check, lambda: wrong.open("train")):
        with pytest.raises(UserError, match=r"VOCABULARY is .*other.model.*'parallel_demo'"):
            act()
    assert not (tmp_path / "cache").exists()


def test_check_writes_nothing_and_unread_data_have_no_rows(data: ParallelData, tmp_path: Path) -> None:
    data.check()
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    assert len(UnreadData(**fields).open("train")) == 0
    assert not (tmp_path / "cache").exists()


def test_task_modules_as_a_string() -> None:
    with pytest.raises(UserError, match=r"must be a tuple: \('rest_jax.tasks.demo',\)"):
        ParallelData(
            task="demo_de_en",
            vocabulary=SentencePieceVocabulary(str(VOCABULARY)),
            lengths={"inputs": 8, "targets": 8},
            task_modules="rest_jax.tasks.demo",  # type: ignore[arg-type]
        )
