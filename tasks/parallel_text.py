"""Register parallel text in files as a seqio task: the one function that a project needs for its own corpus.

```
from rest_jax.tasks import parallel_text

parallel_text.register_parallel_text(
    "my_de_en",
    splits={"train": "/data/train.tsv.gz", "validation": ("/data/dev.de", "/data/dev.en")},
    vocabulary="/data/vocab.model",
)
```
Name the module that makes the call in `MIXTURE_OR_TASK_MODULES`, and the task in `MIXTURE_OR_TASK_NAME`.
"""

import functools
import gzip
import hashlib
import itertools
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, cast

import seqio
import tensorflow as tf

from rest_jax.errors import UserError

FilePath = str | os.PathLike[str]
SplitFiles = FilePath | tuple[FilePath, FilePath]

_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = "\ufeff"


def register_parallel_text(
    name: str,
    *,
    splits: Mapping[str, SplitFiles],
    vocabulary: FilePath | seqio.Vocabulary,
    prefix: str = "",
    source_column: int = 0,
    target_column: int = 1,
    reverse: bool = False,
) -> seqio.Task:
    """Registers parallel text as the seqio task `name`, with features `inputs` and `targets` that end in EOS.

    Files are local, UTF-8, plain or gzip (told apart by their first bytes). They are opened when a split is read, not here, so a
    module may register tasks whose files come later. A pair with an empty side is left out.

    Args:
      name: task name, unique in seqio's registry.
      splits: split name -> one TSV file, or (source file, target file) aligned line by line.
      vocabulary: path of a SentencePiece model (pad 0, EOS 1, unk 2), shared by both sides, or any seqio vocabulary.
      prefix: put before each source text, e.g. "translate German to English: ".
      source_column: column of the source text in a TSV file, from 0; further columns are ignored.
      target_column: column of the target text.
      reverse: translate the other way: swaps the columns, or the two files.

    Raises:
      UserError: no splits, or columns that are negative or the same.  Reading a split raises it for a missing or damaged file, a
        line with too few columns, text that is not UTF-8, aligned files of different lengths: with file and line.
    """
    source = ParallelTextSource(
        splits=splits, source_column=source_column, target_column=target_column, reverse=reverse
    )
    return register_translation(name, source=source, preprocessors=(), vocabulary=vocabulary, prefix=prefix)


def register_translation(
    name: str,
    *,
    source: seqio.DataSource,
    preprocessors: Sequence[Any],
    vocabulary: FilePath | seqio.Vocabulary,
    prefix: str = "",
) -> seqio.Task:
    """Registers a task whose `source`, after `preprocessors`, gives {'inputs', 'targets'} strings; adds prefix, tokens and EOS."""
    if not isinstance(vocabulary, seqio.Vocabulary):
        vocabulary = seqio.SentencePieceVocabulary(os.fspath(vocabulary))
    feature = seqio.Feature(vocabulary=vocabulary, add_eos=True)
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=[
            *preprocessors,
            *([functools.partial(prepend_prefix, prefix=prefix)] if prefix else []),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={"inputs": feature, "targets": feature},
    )


@seqio.map_over_dataset
def prepend_prefix(example: Mapping[str, tf.Tensor], prefix: str) -> dict[str, tf.Tensor]:
    """Puts `prefix` before the source text."""
    return {**example, "inputs": tf.strings.join([prefix, example["inputs"]])}


class ParallelTextSource(seqio.FunctionDataSource):  # type: ignore[misc]  # seqio ships no types
    """Pairs of lines as {'inputs', 'targets'} strings, in file order. See `register_parallel_text` for the arguments."""

    def __init__(
        self, *, splits: Mapping[str, SplitFiles], source_column: int = 0, target_column: int = 1, reverse: bool = False
    ):
        if not splits:
            raise UserError("splits: is empty; name at least one split, e.g. splits={'train': 'train.tsv.gz'}")
        if source_column < 0 or target_column < 0 or source_column == target_column:
            raise UserError(
                f"source_column, target_column: got {source_column} and {target_column}; legal are two different columns, counted from 0"
            )
        self._files = {split: _normalise(files, reverse=reverse) for split, files in splits.items()}
        self._columns = (target_column, source_column) if reverse else (source_column, target_column)
        super().__init__(self._read, splits=tuple(splits))

    def fingerprint(self, split: str) -> str:
        """SHA-256 of what defines the split's text: its columns and its files' bytes. Changed text must not be read from an old cache."""
        digest = hashlib.sha256(repr((self._columns, len(self._files[split]))).encode())
        for path in self._files[split]:
            with _open(path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def check(self, split: str) -> int:
        """Reads the whole split and returns its number of lines; UserError with file and line at the first fault."""
        files = self._files[split]
        if len(files) == 1:
            return _check_tsv(files[0], columns_needed=max(self._columns) + 1)
        return _check_aligned(*files)

    def _read(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # One file a split: nothing to shuffle at this level.
        # TensorFlow can neither say in which line it failed nor that text is not UTF-8, so the file is checked here first.
        self.check(split)
        files = self._files[split]
        if len(files) == 1:
            pairs = _lines(files[0]).map(self._split_columns, num_parallel_calls=tf.data.AUTOTUNE)
        else:
            pairs = tf.data.Dataset.zip(_lines(files[0]), _lines(files[1])).map(
                _pair, num_parallel_calls=tf.data.AUTOTUNE
            )
        return pairs.filter(_has_both_sides)

    def _split_columns(self, line: tf.Tensor) -> dict[str, tf.Tensor]:
        columns = tf.strings.split(line, "\t")
        return _pair(columns[self._columns[0]], columns[self._columns[1]])


def _normalise(files: SplitFiles, *, reverse: bool) -> tuple[str, ...]:
    if isinstance(files, tuple | list):
        if len(files) != 2:
            raise UserError(
                f"splits: got {len(files)} files {files!r}; legal are one TSV file or two line-aligned files (source, target)"
            )
        source, target = (os.fspath(path) for path in files)
        return (target, source) if reverse else (source, target)
    return (os.fspath(cast(FilePath, files)),)


def _lines(path: str) -> tf.data.Dataset:
    with _open(path) as file:
        is_gzip = file.read(2) == _GZIP_MAGIC
    return tf.data.TextLineDataset(path, compression_type="GZIP" if is_gzip else None)


def _pair(source: tf.Tensor, target: tf.Tensor) -> dict[str, tf.Tensor]:
    return {"inputs": _clean(source), "targets": _clean(target)}


def _clean(text: tf.Tensor) -> tf.Tensor:
    # Editors on Windows put a byte order mark at the start of a file; it is no part of the first sentence.
    return tf.strings.strip(tf.strings.regex_replace(text, f"^{_BYTE_ORDER_MARK}", ""))


def _has_both_sides(pair: Mapping[str, tf.Tensor]) -> tf.Tensor:
    return (tf.strings.length(pair["inputs"]) > 0) & (tf.strings.length(pair["targets"]) > 0)


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(
            f"{path}: the parallel text cannot be read ({error.strerror}); give the path of an existing UTF-8 file"
        ) from error


def _checked_lines(path: str) -> Iterator[str]:
    """Lines of a plain or gzip file without their ends; UserError naming file:line for bytes that are no UTF-8 text."""
    number = 0
    with _open(path) as raw:
        is_gzip = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_gzip else raw
        try:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: text that is not UTF-8 (byte {error.start + 1} of the line, 0x{error.object[error.start]:02x}); "
                "convert the file, e.g. with `iconv -f latin1 -t utf-8`"
            ) from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"{path}:{number + 1}: the gzip file is damaged or cut off ({error}); copy or compress it again"
            ) from error


def _check_tsv(path: str, *, columns_needed: int) -> int:
    count = 0
    for count, line in enumerate(_checked_lines(path), start=1):
        columns = line.count("\t") + 1
        if columns < columns_needed:
            raise UserError(
                f"{path}:{count}: {columns} tab-separated column{'s' if columns > 1 else ''}, but at least {columns_needed} are needed "
                f"(source<TAB>target); the line begins {line[:60]!r}"
            )
    return count


def _check_aligned(source: str, target: str) -> int:
    count = 0
    for count, (first, second) in enumerate(
        itertools.zip_longest(_checked_lines(source), _checked_lines(target)), start=1
    ):
        if first is None or second is None:
            shorter, longer = (source, target) if first is None else (target, source)
            raise UserError(
                f"{shorter}:{count}: the file ends, but {longer} goes on: the two files are not aligned line by line"
            )
    return count
