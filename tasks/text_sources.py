"""Where the text of one split comes from: files, TFDS, or sacreBLEU's test sets.

Each gives {'inputs', 'targets'} strings in a fixed order.
"""

import gzip
import hashlib
import itertools
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Protocol, cast

import sacrebleu
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from rest_jax.errors import UserError

_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = "\ufeff"


class TextSplit(Protocol):
    """One split of a parallel corpus."""

    def dataset(self) -> tf.data.Dataset:
        """{'inputs': string, 'targets': string} pairs; UserError when they cannot be read."""
        ...

    def fingerprint(self) -> str:
        """Changes when the pairs change: tokenised copies of other text must not be used."""
        ...

    def check(self) -> None:
        """Raises UserError for faults that can be found without a download."""
        ...

    def files(self) -> tuple[str, ...]:
        """The files that the pairs are read from, where they may change; none where the name carries a version."""
        ...


class TextSource(seqio.FunctionDataSource):
    """A seqio source whose splits may come from different places."""

    def __init__(self, splits: Mapping[str, TextSplit]):
        self._text_splits = dict(splits)
        super().__init__(self._read, splits=tuple(splits))

    def fingerprint(self, split: str) -> str:
        return self._text_splits[split].fingerprint()

    def check(self, split: str) -> None:
        self._text_splits[split].check()

    def files(self, split: str) -> tuple[str, ...]:
        return self._text_splits[split].files()

    def _read(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed  # The order is part of the contract: a row's number is its source id.
        return self._text_splits[split].dataset()


@dataclass(frozen=True)
class TextFiles:
    """One TSV file, or two files aligned line by line. A pair with an empty side is left out.

    Plain or gzip is told by the first bytes, not by the name.

    Attributes:
      paths: (file,) or (source file, target file).
      columns: (source, target) columns of a TSV file, from 0; not used for two files.
    """

    paths: tuple[str, ...]
    columns: tuple[int, int] = (0, 1)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.columns, len(self.paths))).encode())
        for path in self.paths:
            with _open(path) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def check(self) -> None:
        """Reads it all; UserError with file and line at the first fault, or when there is no line at all."""
        if len(self.paths) == 1:
            lines = _check_tsv(self.paths[0], columns_needed=max(self.columns) + 1)
        else:
            lines = _check_aligned(*self.paths)
        if not lines:
            raise UserError(f"{self.paths[0]}: the corpus is empty; give text with at least one pair")

    def files(self) -> tuple[str, ...]:
        return self.paths

    def dataset(self) -> tf.data.Dataset:
        # TensorFlow can neither say in which line it failed nor that text is not UTF-8, so Python reads the file first.
        self.check()
        if len(self.paths) == 1:
            pairs = _lines(self.paths[0]).map(self._split_columns, num_parallel_calls=tf.data.AUTOTUNE)
        else:
            pairs = tf.data.Dataset.zip(tuple(_lines(path) for path in self.paths)).map(
                _pair, num_parallel_calls=tf.data.AUTOTUNE
            )
        return pairs.filter(_has_both_sides)

    def _split_columns(self, line: tf.Tensor) -> dict[str, tf.Tensor]:
        columns = tf.strings.split(line, "\t")
        return _pair(columns[self.columns[0]], columns[self.columns[1]])


@dataclass(frozen=True)
class TfdsSplit:
    """A split of a TFDS translation data set, which TFDS downloads and prepares at the first use.

    Attributes:
      name: data set, config and version, e.g. 'wmt14_translate/de-en:1.0.0'.
      split: TFDS's name of the split; slices such as 'train[:10%]' too.
      source: language code of the source side.
      target: language code of the target side.
    """

    name: str
    split: str
    source: str
    target: str

    def fingerprint(self) -> str:
        return repr(self)

    def check(self) -> None:
        """Nothing: even to look at the set may download it."""

    def files(self) -> tuple[str, ...]:
        return ()

    def dataset(self) -> tf.data.Dataset:
        try:
            pairs = tfds.load(self.name, split=self.split, shuffle_files=False)
        except (tfds.core.DatasetNotFoundError, OSError, AssertionError, ValueError, tf.errors.OpError) as error:
            raise UserError(
                f"{self.name}, split {self.split!r}: TFDS can neither read nor download and prepare it; its "
                f"folder is TFDS_DATA_DIR ({os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')}): {error}"
            ) from error
        # TFDS's WMT sets hold pairs with an empty side.
        return pairs.map(lambda pair: _pair(pair[self.source], pair[self.target])).filter(_has_both_sides)


@dataclass(frozen=True)
class SacrebleuTestSet:
    """An official test set as sacreBLEU distributes it (first reference), downloaded at the first use to SACREBLEU's
    folder.

    Attributes:
      name: sacreBLEU's name, e.g. 'wmt20'.
      languages: e.g. 'zh-en'.
    """

    name: str
    languages: str

    def fingerprint(self) -> str:
        return self._files().fingerprint()

    def check(self) -> None:
        """Nothing: to look at the set may download it."""

    def files(self) -> tuple[str, ...]:
        return ()

    def dataset(self) -> tf.data.Dataset:
        return self._files().dataset()

    def _files(self) -> TextFiles:
        try:
            source = sacrebleu.get_source_file(self.name, self.languages)
            reference = sacrebleu.get_reference_files(self.name, self.languages)[0]
        except (OSError, SystemExit) as error:
            raise UserError(
                f"{self.name} {self.languages}: sacreBLEU can neither read nor download the test set; without "
                f"a network, copy its folder ({os.environ.get('SACREBLEU', '~/.sacrebleu')}) from elsewhere: {error}"
            ) from error
        return TextFiles((source, reference))


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
            for line in file:
                number += 1
                yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: text that is not UTF-8 (byte {error.start + 1} of the line is "
                f"0x{error.object[error.start]:02x}); convert the file, e.g. with `iconv -f latin1 -t utf-8`"
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
                f"{path}:{count}: {columns} tab-separated column{'s' if columns > 1 else ''}, but at least "
                f"{columns_needed} are needed (source<TAB>target); the line begins {line[:60]!r}"
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
