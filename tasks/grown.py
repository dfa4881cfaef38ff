"""Register a scored-sample store as a seqio task: any seqio project can then train on what a Grow step kept.

```
from rest_jax.tasks import grown

grown.register_grown(
    "my_survivors", store="/runs/rest/grow_1", threshold=0.6, vocabulary="/data/vocab.model"
)
```
"""

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping

import numpy as np
import seqio
import tensorflow as tf

from rest_jax.data.store import ScoredStore, StoreRows
from rest_jax.data.store_files import DONE_FILE
from rest_jax.errors import UserError
from rest_jax.tasks.parallel_text import FilePath, as_vocabulary

SPLIT = "train"


def register_grown(
    name: str, *, store: FilePath, threshold: float, vocabulary: FilePath | seqio.Vocabulary
) -> seqio.Task:
    """Registers the samples of a store whose reward is above `threshold` as the task `name`; its only split is 'train'.

    The token ids are the store's; `inputs_pretokenized` and `targets_pretokenized` are their texts. Examples come in
    order of (source id, sample id). The store is opened when the split is read, not here.

    Args:
      name: task name, unique in seqio's registry.
      store: directory of a finished Grow step.
      threshold: a sample passes when its reward is strictly above; 0 or more.
      vocabulary: the one that the store was made with: a path of a SentencePiece model, or a seqio vocabulary.

    Raises:
      UserError: a threshold outside [0, 1). Reading raises it for a store that is missing, unfinished or damaged, for a
        threshold below what Grow's own filter kept, when nothing passes, and for ids beyond the vocabulary.
    """
    if not 0.0 <= threshold < 1.0:
        raise UserError(f"{name}: threshold is {threshold}; rewards are in [0, 1], legal is 0 <= threshold < 1")
    vocabulary = as_vocabulary(vocabulary)
    feature = seqio.Feature(vocabulary=vocabulary, add_eos=True)
    return seqio.TaskRegistry.add(
        name,
        source=GrownSource(os.fspath(store), threshold=threshold, vocabulary=vocabulary),
        preprocessors=[
            functools.partial(add_texts, vocabulary=vocabulary),
            seqio.CacheDatasetPlaceholder(),
            trim_before_eos,
        ],
        output_features={"inputs": feature, "targets": feature},
    )


class GrownSource(seqio.FunctionDataSource):
    """{'inputs', 'targets'} token ids of the samples whose reward is above `threshold`."""

    def __init__(self, directory: str, *, threshold: float, vocabulary: seqio.Vocabulary):
        self._directory = directory
        self._threshold = threshold
        self._vocabulary = vocabulary
        super().__init__(self._read, splits=(SPLIT,))

    def fingerprint(self, split: str) -> str:
        """Changes with the threshold and with any file of the store, whose checksums all stand in DONE."""
        del split
        files = (ScoredStore.open(self._directory).directory / DONE_FILE).read_bytes()
        return hashlib.sha256(repr(self._threshold).encode() + files).hexdigest()

    def check(self, split: str) -> None:
        """UserError for all that reading would raise; see `register_grown`."""
        del split
        self._select()

    def files(self, split: str) -> tuple[str, ...]:
        """What `fingerprint` reads."""
        del split
        return (os.path.join(self._directory, DONE_FILE),)

    def _read(self, split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed
        rows = self._select()
        ids = tf.TensorSpec([None], tf.int32)

        def examples() -> Iterator[dict[str, np.ndarray]]:
            for row in range(len(rows)):
                yield {"inputs": rows.inputs(row), "targets": rows.targets(row)}

        return tf.data.Dataset.from_generator(examples, output_signature={"inputs": ids, "targets": ids})

    def _select(self) -> StoreRows:
        store = ScoredStore.open(self._directory)
        rows = store.select(store.valid & (store.rewards > self._threshold))
        if not len(rows):
            best = float(np.max(store.rewards, where=store.valid, initial=0.0))
            raise UserError(
                f"{self._directory}: no sample has a reward above threshold {self._threshold}; the best has {best:.4f}"
            )
        largest = max(max(int(rows.inputs(row).max()), int(rows.targets(row).max())) for row in range(len(rows)))
        if largest >= self._vocabulary.vocab_size:
            raise UserError(
                f"{self._directory}: holds token {largest}, but the vocabulary has {self._vocabulary.vocab_size}; give "
                "the vocabulary that the store was made with"
            )
        return rows


@seqio.map_over_dataset
def add_texts(example: Mapping[str, tf.Tensor], vocabulary: seqio.Vocabulary) -> dict[str, tf.Tensor]:
    """Adds `inputs_pretokenized` and `targets_pretokenized`, decoded from the tokens."""
    return {
        **example,
        **{f"{side}_pretokenized": vocabulary.decode_tf(example[side]) for side in ("inputs", "targets")},
    }


def trim_before_eos(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, seqio.Feature],
    sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
    """Cuts sides that are too long, keeping EOS at the end as `seqio.preprocessors.append_eos_after_trim` does.

    A sample that never reached EOS gets none: it would teach the policy to stop there.
    """
    limits = {side: sequence_length[side] for side in ("inputs", "targets") if side in (sequence_length or {})}

    def trim(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        cut = {
            side: _cut(example[side], limit, output_features[side].vocabulary.eos_id) for side, limit in limits.items()
        }
        return {**example, **cut}

    return dataset.map(trim, num_parallel_calls=tf.data.AUTOTUNE)


def _cut(ids: tf.Tensor, limit: int, eos_id: int) -> tf.Tensor:
    """The first `limit` of `ids` [length]; the last of them is EOS if EOS ends `ids`."""
    kept = ids[:limit]
    return tf.concat([kept[:-1], tf.where(ids[-1:] == eos_id, ids[-1:], kept[-1:])], axis=0)
