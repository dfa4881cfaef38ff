"""Training batches as a pure function of (examples, seed, step), and length groups for sampling.

A `BatchPlan` says which examples stand in which row of which batch; its `iterator` reads it through Grain, whose whole
state is the next step. Nothing depends on how many processes read or how often a run was stopped.

An epoch shuffles the mixture's examples by (seed, epoch), packs them into rows, shuffles the rows and deals them evenly
over the epoch's batches (all have the same number of filled rows, give or take one; empty rows have weight 0).
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import numpy as np
import numpy.typing as npt

from rest_jax.data.packing import pack_rows
from rest_jax.data.vocabulary import EOS_ID
from rest_jax.errors import UserError

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Batch = dict[str, npt.NDArray[Any]]

# Tags that keep the random streams of examples, epochs and rows apart.
_PART_STREAM, _EPOCH_STREAM, _ROW_STREAM = 1, 2, 3
_MAX_STEPS = 2**40


class Examples(Protocol):
    """Random access to tokenised pairs; lengths count EOS."""

    @property
    def source_ids(self) -> Int64Array: ...

    @property
    def source_lengths(self) -> Int32Array: ...

    @property
    def target_lengths(self) -> Int32Array: ...

    def inputs(self, index: int, /) -> Int32Array: ...

    def targets(self, index: int, /) -> Int32Array: ...


class LabelledExamples(Examples, Protocol):
    """Examples with a number each, which batches have at each of its target tokens: `decoder_target_labels`."""

    @property
    def labels(self) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class MixtureSpec:
    """What one epoch holds: `examples_per_epoch[p]` examples of `parts[p]`, labelled all or none.

    A part is walked in a random order, keyed by (seed, part), without repeating an example until all have been seen,
    then in a new order; an epoch takes up where the one before stopped.
    """

    parts: tuple[Examples, ...]
    examples_per_epoch: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.parts) != len(self.examples_per_epoch):
            raise ValueError(f"{len(self.parts)} parts but {len(self.examples_per_epoch)} examples_per_epoch")
        for number, (part, count) in enumerate(zip(self.parts, self.examples_per_epoch, strict=True)):
            if count < 0 or (count > 0 and len(part.source_lengths) == 0):
                raise UserError(
                    f"training data: part {number} has {len(part.source_lengths)} examples and cannot give {count} an "
                    "epoch; if a filter made it, loosen the filter"
                )
        if sum(self.examples_per_epoch) == 0:
            raise UserError(
                "training data: the mixture is empty; if a filter made it, loosen the filter so that some samples pass"
            )

    @classmethod
    def single(cls, examples: Examples) -> "MixtureSpec":
        """Every example once an epoch."""
        return cls(parts=(examples,), examples_per_epoch=(len(examples.source_lengths),))


@dataclass(frozen=True)
class _EpochPlan:
    """Which example stands where.

    Row r holds examples `parts[k], indices[k]` for k in [row_starts[r], row_starts[r + 1]); batch b of the epoch holds
    rows [batch_starts[b], batch_starts[b + 1]).
    """

    parts: Int32Array
    indices: Int64Array
    row_starts: Int64Array
    batch_starts: Int64Array

    @property
    def num_batches(self) -> int:
        return len(self.batch_starts) - 1


def _random_order(size: int, *key: int) -> Int64Array:
    """A permutation of range(size) that is a function of `key`, on every platform and NumPy version.

    NumPy promises the raw stream of a bit generator, not the algorithm of `Generator.permutation`.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(raw, kind="stable")


class BatchPlan:
    """Batch `step` as a function of (mixture, sizes, seed, step): see the module's docstring.

    Args:
      mixture: the examples.
      batch_size: rows of the global batch; a multiple of `process_count`.
      source_length, target_length: columns. A longer sequence is cut, its final EOS kept.
      pack: several examples in a row, told apart by segment ids.
      seed: the run's data seed, at least 0.
      eos_id: the vocabulary's.
      process_index, process_count: this process takes its contiguous share of the rows of every global batch.
    """

    def __init__(
        self,
        mixture: MixtureSpec,
        *,
        batch_size: int,
        source_length: int,
        target_length: int,
        pack: bool,
        seed: int,
        eos_id: int = EOS_ID,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        sizes = {"batch_size": batch_size, "source_length": source_length, "target_length": target_length}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if seed < 0:
            raise UserError(f"seed must be at least 0, got {seed}")
        if batch_size % process_count:
            raise UserError(
                f"batch size {batch_size} does not divide over {process_count} processes; "
                f"choose a multiple of {process_count}"
            )
        self._mixture = mixture
        self._labelled = all(hasattr(part, "labels") for part in mixture.parts)
        self._batch_size = batch_size
        self._lengths = (source_length, target_length)
        self._pack = pack
        self._seed = seed
        self._eos_id = eos_id
        rows = batch_size // process_count
        self._rows = slice(process_index * rows, (process_index + 1) * rows)
        self._lock = threading.Lock()
        self._first_steps = [0]  # first step of epochs 0, 1, ...: as far as they are known
        self._epochs: OrderedDict[int, _EpochPlan] = OrderedDict()  # the two last used

    def steps_in_epoch(self, epoch: int) -> int:
        """Batches of one epoch."""
        with self._lock:
            return self._epoch_plan(epoch).num_batches

    def batch(self, step: int) -> Batch:
        """This process's rows of batch `step`, [rows, length] each; features as in T5X."""
        plan, rows = self._locate(step)
        local = rows[self._rows.start : self._rows.stop]
        return self._assemble(plan, local, num_rows=self._rows.stop - self._rows.start)

    def batch_example_ids(self, step: int) -> Int64Array:
        """Source ids of all examples in the global batch `step`, row after row."""
        plan, rows = self._locate(step)
        members = slice(plan.row_starts[rows.start], plan.row_starts[rows.stop]) if len(rows) else slice(0, 0)
        pairs = zip(plan.parts[members], plan.indices[members], strict=True)
        return np.asarray(
            [self._mixture.parts[part].source_ids[index] for part, index in pairs],
            np.int64,
        )

    def iterator(self, *, start_step: int = 0, num_threads: int = 1, prefetch: int = 4) -> grain.DatasetIterator:
        """(step, batch) from `start_step` on, without end, read ahead by `num_threads` threads.

        `get_state` and `set_state` are Grain's; the state is the next step.
        """
        dataset = grain.MapDataset.range(_MAX_STEPS).map(lambda step: (int(step), self.batch(int(step))))
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        iterator = iter(dataset.to_iter_dataset(options))
        state = iterator.get_state()
        iterator.set_state({**state, "next_index": start_step})
        return iterator

    def _locate(self, step: int) -> tuple[_EpochPlan, range]:
        """The plan of the step's epoch, and the rows of the step's global batch in it."""
        if step < 0:
            raise IndexError(f"step {step}")
        with self._lock:
            # Packed epochs differ by a few batches, so the epochs before must be planned to know where one starts.
            while self._first_steps[-1] <= step:
                self._epoch_plan(len(self._first_steps) - 1)
            epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
            plan = self._epoch_plan(epoch)
            number = step - self._first_steps[epoch]
        return plan, range(int(plan.batch_starts[number]), int(plan.batch_starts[number + 1]))

    def _epoch_plan(self, epoch: int) -> _EpochPlan:
        plan = self._epochs.get(epoch)
        if plan is None:
            plan = self._make_epoch_plan(epoch)
            self._epochs[epoch] = plan
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        if len(self._first_steps) == epoch + 1:
            self._first_steps.append(self._first_steps[-1] + plan.num_batches)
        return plan

    def _make_epoch_plan(self, epoch: int) -> _EpochPlan:
        counts = self._mixture.examples_per_epoch
        parts = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        indices = np.concatenate([self._part_indices(part, epoch) for part in range(len(counts))])
        order = _random_order(len(parts), self._seed, _EPOCH_STREAM, epoch)
        parts, indices = parts[order], indices[order]
        if self._pack:
            source_length, target_length = self._lengths
            members, row_starts = pack_rows(
                *self._example_lengths(parts, indices), source_length=source_length, target_length=target_length
            )
            parts, indices = parts[members], indices[members]
            row_order = _random_order(len(row_starts) - 1, self._seed, _ROW_STREAM, epoch)
            parts, indices, row_starts = _reorder_rows(parts, indices, row_starts, row_order)
        else:
            row_starts = np.arange(len(parts) + 1, dtype=np.int64)
        num_rows = len(row_starts) - 1
        num_batches = -(-num_rows // self._batch_size)
        batch_starts = np.arange(num_batches + 1, dtype=np.int64) * num_rows // num_batches
        return _EpochPlan(
            parts=parts,
            indices=indices,
            row_starts=row_starts,
            batch_starts=batch_starts,
        )

    def _part_indices(self, part: int, epoch: int) -> Int64Array:
        """The next `examples_per_epoch[part]` examples of the part's endless walk."""
        size = len(self._mixture.parts[part].source_lengths)
        position = epoch * self._mixture.examples_per_epoch[part]
        end = position + self._mixture.examples_per_epoch[part]
        pieces = [np.zeros(0, np.int64)]
        while position < end:
            walk, offset = divmod(position, size)
            piece = _random_order(size, self._seed, _PART_STREAM, part, walk)[offset : offset + end - position]
            pieces.append(piece)
            position += len(piece)
        return np.concatenate(pieces)

    def _example_lengths(self, parts: Int32Array, indices: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Source and target lengths after cutting, [examples] each."""
        source, target = np.zeros(len(parts), np.int64), np.zeros(len(parts), np.int64)
        for number, part in enumerate(self._mixture.parts):
            chosen = parts == number
            source[chosen] = part.source_lengths[indices[chosen]]
            target[chosen] = part.target_lengths[indices[chosen]]
        return np.minimum(source, self._lengths[0]), np.minimum(target, self._lengths[1])

    def _assemble(self, plan: _EpochPlan, rows: range, *, num_rows: int) -> Batch:
        source_length, target_length = self._lengths
        row_of: list[int] = []
        inputs: list[Int32Array] = []
        targets: list[Int32Array] = []
        labels: list[npt.NDArray[np.float32]] = []
        for number, row in enumerate(rows):
            for k in range(plan.row_starts[row], plan.row_starts[row + 1]):
                examples, index = (
                    self._mixture.parts[plan.parts[k]],
                    int(plan.indices[k]),
                )
                inputs.append(_cut(examples.inputs(index), source_length, eos_id=self._eos_id))
                targets.append(_cut(examples.targets(index), target_length, eos_id=self._eos_id))
                if self._labelled:
                    labels.append(np.full(len(targets[-1]), examples.labels[index], np.float32))
                row_of.append(number)
        encoder = _Scatter.build(inputs, row_of, shape=(num_rows, source_length))
        decoder = _Scatter.build(targets, row_of, shape=(num_rows, target_length))
        # shift right within each segment: BOS is the pad id
        shifted = np.where(decoder.positions > 0, np.roll(decoder.tokens, 1), 0)
        batch: Batch = {
            "encoder_input_tokens": encoder.fill(encoder.tokens),
            "decoder_input_tokens": decoder.fill(shifted),
            "decoder_target_tokens": decoder.fill(decoder.tokens),
            "decoder_loss_weights": decoder.fill(np.ones_like(decoder.tokens)).astype(np.float32),
        }
        if self._labelled:
            batch["decoder_target_labels"] = decoder.fill(np.concatenate([np.zeros(0, np.float32), *labels]))
        if self._pack:
            batch["encoder_segment_ids"] = encoder.fill(encoder.segments)
            batch["encoder_positions"] = encoder.fill(encoder.positions)
            batch["decoder_segment_ids"] = decoder.fill(decoder.segments)
            batch["decoder_positions"] = decoder.fill(decoder.positions)
        return batch


def _cut(tokens: Int32Array, length: int, *, eos_id: int) -> Int32Array:
    """The first `length` tokens; a final EOS stays final, as seqio's append_eos_after_trim has it."""
    if len(tokens) <= length:
        return tokens
    cut = tokens[:length]
    if tokens[-1] == eos_id:
        cut = cut.copy()
        cut[-1] = eos_id
    return cut


@dataclass(frozen=True)
class _Scatter:
    """Ragged sequences laid one after another in rows: everything is [total tokens], `places` indexes the flat rows."""

    tokens: Int32Array
    segments: Int32Array
    positions: Int32Array
    places: Int64Array
    shape: tuple[int, int]

    @classmethod
    def build(
        cls,
        sequences: list[Int32Array],
        row_of: Sequence[int],
        *,
        shape: tuple[int, int],
    ) -> "_Scatter":
        lengths = np.asarray([len(sequence) for sequence in sequences], np.int64)
        rows = np.asarray(row_of, np.int64)
        starts = np.cumsum(lengths) - lengths  # where each sequence starts in `tokens`
        is_first = np.diff(rows, prepend=-1) != 0  # rows are in order: the first sequence of each
        first = np.maximum.accumulate(np.where(is_first, np.arange(len(rows)), 0)) if len(rows) else rows
        segments = np.arange(len(rows)) - first + 1
        positions = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        columns = np.repeat(starts - starts[first], lengths) + positions
        return cls(
            tokens=np.concatenate([np.zeros(0, np.int32), *sequences]),
            segments=np.repeat(segments, lengths).astype(np.int32),
            positions=positions.astype(np.int32),
            places=np.repeat(rows, lengths) * shape[1] + columns,
            shape=shape,
        )

    def fill(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[total tokens] -> [rows, length] of the same type, 0 elsewhere."""
        flat = np.zeros(self.shape[0] * self.shape[1], values.dtype)
        flat[self.places] = values
        return flat.reshape(self.shape)


def _reorder_rows(
    parts: Int32Array,
    indices: Int64Array,
    row_starts: Int64Array,
    row_order: Int64Array,
) -> tuple[Int32Array, Int64Array, Int64Array]:
    """Rows in a new order, each with its examples as they were."""
    lengths = np.diff(row_starts)[row_order]
    new_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    old = np.repeat(row_starts[:-1][row_order] - new_starts[:-1], lengths) + np.arange(len(parts))
    return parts[old], indices[old], new_starts


@dataclass(frozen=True)
class LengthGroup:
    """One sampling chunk: `indices` [at most batch_size] int64 into the lengths, and the columns that hold them all."""

    indices: Int64Array
    padded_length: int


def length_groups(lengths: npt.ArrayLike, *, batch_size: int, max_length: int, multiple: int = 16) -> list[LengthGroup]:
    """Cuts examples into chunks of like length, so that little is padding and few shapes are compiled.

    Args:
      lengths: [examples] tokens; a longer one than `max_length` counts as that (its reader cuts it).
      batch_size: examples in a chunk; the last one may hold fewer.
      max_length: the largest `padded_length`.
      multiple: `padded_length` is a multiple of this (or `max_length`): at most max_length / multiple shapes.

    Returns:
      Chunks in order of (length, index); every index stands in exactly one.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("max_length", max_length),
        ("multiple", multiple),
    ):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    clipped = np.minimum(np.asarray(lengths, np.int64), max_length)
    order = np.argsort(clipped, kind="stable")
    groups = []
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        longest = max(int(clipped[indices[-1]]), 1)
        groups.append(
            LengthGroup(
                indices=indices,
                padded_length=min(-(-longest // multiple) * multiple, max_length),
            )
        )
    return groups
