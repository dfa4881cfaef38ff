"""Registering files as a task: the pairs, in order, and one clear message for each way in which a file can be wrong."""

import gzip
from collections.abc import Iterator
from pathlib import Path

import pytest
import seqio

from rest_jax.errors import UserError
from rest_jax.tasks import parallel_text

PAIRS = [("Guten Morgen.", "Good morning."), ("Straße, 東京", "Street, Tokyo"), ("drei", "three")]
TEXT = seqio.PassThroughVocabulary(size=1)


@pytest.fixture(autouse=True)
def _fresh_registry() -> Iterator[None]:
    before = set(seqio.TaskRegistry.names())
    yield
    for name in set(seqio.TaskRegistry.names()) - before:
        seqio.TaskRegistry.remove(name)


def texts(task: seqio.Task, split: str = "train") -> list[tuple[str, str]]:
    """The pairs as the source gives them, before tokens."""
    examples = task.source.get_dataset(split, shuffle=False).as_numpy_iterator()
    return [(example["inputs"].decode(), example["targets"].decode()) for example in examples]


def write_tsv(path: Path, rows: list[tuple[str, ...]], newline: str = "\n") -> Path:
    text = "".join("\t".join(row) + newline for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["train.tsv", "train.tsv.gz"])
def test_tsv_plain_or_gzip(tmp_path: Path, name: str) -> None:
    path = write_tsv(tmp_path / name, [(*pair, "origin:1") for pair in PAIRS])
    task = parallel_text.register_parallel_text("pt", splits={"train": path}, vocabulary=TEXT)
    assert texts(task) == PAIRS
    assert seqio.TaskRegistry.get("pt") is task


def test_gzip_is_told_by_content(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "train.tsv.gz", PAIRS).rename(tmp_path / "train.tsv")
    assert texts(parallel_text.register_parallel_text("pt", splits={"train": path}, vocabulary=TEXT)) == PAIRS


def test_two_aligned_files_of_different_kind(tmp_path: Path) -> None:
    source, target = tmp_path / "a.de", tmp_path / "a.en.gz"
    source.write_text("".join(f"{pair[0]}\n" for pair in PAIRS))
    target.write_bytes(gzip.compress("".join(f"{pair[1]}\n" for pair in PAIRS).encode()))
    task = parallel_text.register_parallel_text("pt", splits={"train": (source, target)}, vocabulary=TEXT)
    assert texts(task) == PAIRS


def test_columns_and_reverse(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "x.tsv", [("id", target, source) for source, target in PAIRS])
    forward = parallel_text.register_parallel_text(
        "forward", splits={"train": path}, vocabulary=TEXT, source_column=2, target_column=1
    )
    backward = parallel_text.register_parallel_text(
        "backward", splits={"train": path}, vocabulary=TEXT, source_column=2, target_column=1, reverse=True
    )
    assert texts(forward) == PAIRS
    assert texts(backward) == [pair[::-1] for pair in PAIRS]


def test_reverse_swaps_two_files(tmp_path: Path) -> None:
    for side, language in enumerate(("de", "en")):
        (tmp_path / language).write_text("".join(f"{pair[side]}\n" for pair in PAIRS))
    task = parallel_text.register_parallel_text(
        "pt", splits={"train": (tmp_path / "de", tmp_path / "en")}, vocabulary=TEXT, reverse=True
    )
    assert texts(task) == [pair[::-1] for pair in PAIRS]


def test_windows_text_and_empty_sides(tmp_path: Path) -> None:
    rows = [("\ufeffeins", "one"), ("", "lost"), ("verloren", "  "), ("zwei", "two")]
    path = write_tsv(tmp_path / "x.tsv", rows, newline="\r\n")
    task = parallel_text.register_parallel_text("pt", splits={"train": path}, vocabulary=TEXT)
    assert texts(task) == [("eins", "one"), ("zwei", "two")]


def test_fingerprint_follows_text_and_columns_but_not_the_path(tmp_path: Path) -> None:
    first, copy, other = (write_tsv(tmp_path / f"{n}.tsv", PAIRS[: 2 + (n == "c")]) for n in "abc")
    marks = [
        parallel_text.register_parallel_text(
            f"pt{n}", splits={"train": path}, vocabulary=TEXT, reverse=n == 3
        ).source.fingerprint("train")
        for n, path in enumerate((first, copy, other, first))
    ]
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3


def test_one_column_names_file_and_line(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "bad.tsv", [PAIRS[0], ("only German",)])
    task = parallel_text.register_parallel_text("pt", splits={"train": path}, vocabulary=TEXT)
    with pytest.raises(UserError, match=r"bad\.tsv:2: 1 tab-separated column, but at least 2 .* 'only German'"):
        texts(task)


@pytest.mark.parametrize("compress", [False, True])
def test_not_utf8_names_file_and_line(tmp_path: Path, compress: bool) -> None:
    data = "gut\tgood\nStraße\tstreet\n".encode("latin-1")
    path = tmp_path / "latin.tsv"
    path.write_bytes(gzip.compress(data) if compress else data)
    task = parallel_text.register_parallel_text("pt", splits={"train": path}, vocabulary=TEXT)
    with pytest.raises(UserError, match=r"latin\.tsv:2: text that is not UTF-8 \(byte 5 of the line is 0xdf\).*iconv"):
        texts(task)


@pytest.mark.parametrize("shorter", [0, 1])
def test_misaligned_files_name_the_shorter_one(tmp_path: Path, shorter: int) -> None:
    paths = (tmp_path / "side0", tmp_path / "side1")
    for side, path in enumerate(paths):
        path.write_text("a\nb\n" if side == shorter else "a\nb\nc\n")
    task = parallel_text.register_parallel_text("pt", splits={"train": paths}, vocabulary=TEXT)
    with pytest.raises(UserError, match=rf"side{shorter}:3: the file ends, but .*side{1 - shorter} goes on"):
        texts(task)


def test_cut_off_gzip_is_named(tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "x.tsv.gz", [(f"Satz {n}", f"sentence {n}") for n in range(2000)])
    path.write_bytes(path.read_bytes()[:-200])
    task = parallel_text.register_parallel_text("pt", splits={"train": path}, vocabulary=TEXT)
    with pytest.raises(UserError, match=r"x\.tsv\.gz:\d+: the gzip file is damaged or cut off"):
        texts(task)


def test_missing_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    task = parallel_text.register_parallel_text("pt", splits={"train": tmp_path / "no.tsv"}, vocabulary=TEXT)
    with pytest.raises(UserError, match=r"no\.tsv: the parallel text cannot be read \(No such file"):
        texts(task)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"splits": {}}, "splits is empty"),
        ({"splits": {"train": "x"}, "target_column": 0}, r"\(0, 0\); legal are two different columns"),
        ({"splits": {"train": "x"}, "source_column": -1}, r"\(-1, 1\); legal are two different columns"),
        ({"splits": {"train": ("a", "b", "c")}}, "a split has 3 files"),
    ],
)
def test_faulty_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parallel_text.register_parallel_text("pt", vocabulary=TEXT, **arguments)
