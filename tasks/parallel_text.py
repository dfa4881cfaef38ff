"""Register parallel text in files as a seqio task: the one function that a project needs for its own corpus.

```
from rest_jax.tasks import parallel_text

parallel_text.register_parallel_text(
    "my_de_en",
    splits={"train": "/data/train.tsv.gz", "validation": ("/data/dev.de", "/data/dev.en")},
    vocabulary="/data/vocab.model",
)
```
Then name the module that makes this call, and the task, in the gin file.
"""

import functools
import os
from collections.abc import Mapping
from typing import cast

import seqio
import tensorflow as tf

from rest_jax import paths
from rest_jax.data import seqio_tasks
from rest_jax.data.vocabulary import Vocabulary
from rest_jax.errors import UserError
from rest_jax.tasks import text_sources

FilePath = str | os.PathLike[str]
SplitFiles = FilePath | tuple[FilePath, FilePath]
AnyVocabulary = FilePath | Vocabulary | seqio.Vocabulary


def register_parallel_text(
    name: str,
    *,
    splits: Mapping[str, SplitFiles],
    vocabulary: AnyVocabulary,
    prefix: str = "",
    source_column: int = 0,
    target_column: int = 1,
    reverse: bool = False,
) -> seqio.Task:
    """Registers parallel text as the seqio task `name`, with features `inputs` and `targets` that end in EOS.

    Files are local, UTF-8, plain or gzip (told apart by their first bytes). They are opened when a split is read, not
    here, so a module may register tasks whose files come later. A pair with an empty side is left out.

    Args:
      name: task name, unique in seqio's registry.
      splits: split name -> one TSV file, or (source file, target file) aligned line by line.
      vocabulary: shared by both sides: path of a SentencePiece model, a vocabulary of rest_jax.data.vocabulary, such as
        ByT5's `ByteVocabulary(extra_ids=125)`, or any of seqio's.
      prefix: put before each source text, e.g. "translate German to English: ", or "<2en> " for MADLAD-400.
      source_column: column of the source text in a TSV file, from 0; further columns are ignored.
      target_column: column of the target text.
      reverse: translate the other way: swaps the columns, or the two files.

    Raises:
      UserError: no splits, or columns that are negative or the same.  Reading a split raises it for a missing or
        damaged file, a line with too few columns, text that is not UTF-8, aligned files of different lengths: with file
        and line.
    """
    if not splits:
        raise UserError(f"{name}: splits is empty; name at least one split, e.g. splits={{'train': 'train.tsv.gz'}}")
    columns = (source_column, target_column)
    if min(columns) < 0 or source_column == target_column:
        raise UserError(
            f"{name}: source_column, target_column are {columns}; legal are two different columns, counted from 0"
        )
    text_splits = {
        split: text_sources.TextFiles(_paths(files, task=name, reverse=reverse), columns[::-1] if reverse else columns)
        for split, files in splits.items()
    }
    return register_translation(name, splits=text_splits, vocabulary=vocabulary, prefix=prefix)


def register_translation(
    name: str,
    *,
    splits: Mapping[str, text_sources.TextSplit],
    vocabulary: AnyVocabulary,
    prefix: str = "",
) -> seqio.Task:
    """As `register_parallel_text`, for splits that may come from files, TFDS or sacreBLEU."""
    feature = seqio.Feature(vocabulary=as_vocabulary(vocabulary), add_eos=True)
    return seqio.TaskRegistry.add(
        name,
        source=text_sources.TextSource(splits),
        preprocessors=[
            *([functools.partial(prepend_prefix, prefix=prefix)] if prefix else []),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={"inputs": feature, "targets": feature},
    )


def as_vocabulary(vocabulary: AnyVocabulary) -> seqio.Vocabulary:
    """A seqio vocabulary as it is, ours as seqio's, a path as the SentencePiece model there, opened when first used."""
    if isinstance(vocabulary, seqio.Vocabulary):
        return vocabulary
    if isinstance(vocabulary, str | os.PathLike):
        return seqio.SentencePieceVocabulary(os.fspath(paths.resolve(vocabulary)))
    return seqio_tasks.seqio_vocabulary(vocabulary)


@seqio.map_over_dataset
def prepend_prefix(example: Mapping[str, tf.Tensor], prefix: str) -> dict[str, tf.Tensor]:
    """Puts `prefix` before the source text."""
    return {**example, "inputs": tf.strings.join([prefix, example["inputs"]])}


def _paths(files: SplitFiles, *, task: str, reverse: bool) -> tuple[str, ...]:
    if isinstance(files, tuple | list):
        if len(files) != 2:
            raise UserError(
                f"{task}: a split has {len(files)} files {files!r}; legal are one TSV file or two line-aligned files "
                "(source, target)"
            )
        source, target = (os.fspath(paths.resolve(path)) for path in files)
        return (target, source) if reverse else (source, target)
    return (os.fspath(paths.resolve(cast(FilePath, files))),)
