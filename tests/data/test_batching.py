import time
from collections import Counter
from dataclasses import dataclass

import grain
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.data.batching import (
    Batch,
    BatchPlan,
    MixtureSpec,
    length_groups,
)
from rest_jax.data.packing import pack_rows
from rest_jax.errors import UserError

PACKED = {"encoder_segment_ids", "encoder_positions", "decoder_segment_ids", "decoder_positions"}


@dataclass(frozen=True)
class ListExamples:
    """Examples whose tokens name themselves: every token of example i but EOS is first_token + i."""

    source_lengths: npt.NDArray[np.int32]
    target_lengths: npt.NDArray[np.int32]
    first_token: int = 10
    first_id: int = 0

    @property
    def source_ids(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self.source_lengths), dtype=np.int64) + self.first_id

    def inputs(self, index: int) -> npt.NDArray[np.int32]:
        return self._tokens(index, int(self.source_lengths[index]))

    def targets(self, index: int) -> npt.NDArray[np.int32]:
        return self._tokens(index, int(self.target_lengths[index]))

    def _tokens(self, index: int, length: int) -> npt.NDArray[np.int32]:
        return np.array([self.first_token + index] * (length - 1) + [1], np.int32)


def examples(size: int, *, max_length: int = 12, seed: int = 0, first_token: int = 10) -> ListExamples:
    rng = np.random.default_rng(seed)
    source, target = rng.integers(2, max_length + 1, (2, size)).astype(np.int32)
    return ListExamples(source, target, first_token, first_id=first_token - 10)


def plan(mixture: MixtureSpec | None = None, **overrides: object) -> BatchPlan:
    arguments: dict[str, object] = dict(batch_size=4, source_length=16, target_length=20, pack=True, seed=3)
    return BatchPlan(mixture or MixtureSpec.single(examples(50)), **{**arguments, **overrides})  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and (a[name] == b[name]).all() for name in a)


def segments(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    """(inputs, targets, decoder inputs) of each packed example, row after row."""
    found = []
    for row in range(len(batch["encoder_input_tokens"])):
        for segment in range(1, batch["encoder_segment_ids"][row].max() + 1):
            encoder = batch["encoder_segment_ids"][row] == segment
            decoder = batch["decoder_segment_ids"][row] == segment
            assert batch["encoder_positions"][row][encoder].tolist() == list(range(encoder.sum()))
            assert batch["decoder_positions"][row][decoder].tolist() == list(range(decoder.sum()))
            found.append(
                (
                    batch["encoder_input_tokens"][row][encoder].tolist(),
                    batch["decoder_target_tokens"][row][decoder].tolist(),
                    batch["decoder_input_tokens"][row][decoder].tolist(),
                )
            )
    return found


def test_features_shapes_and_types() -> None:
    for pack in (False, True):
        batch = plan(pack=pack).batch(0)
        for name, values in batch.items():
            assert values.shape == (4, 16 if name.startswith("encoder") else 20), name
            assert values.dtype == (np.float32 if name == "decoder_loss_weights" else np.int32), name
        assert (PACKED <= batch.keys()) == pack
        assert len(batch) == (8 if pack else 4)


def test_a_packed_row_worked_by_hand() -> None:
    two = ListExamples(np.array([3, 2], np.int32), np.array([2, 4], np.int32))
    batch = plan(MixtureSpec.single(two), batch_size=1, source_length=6, target_length=7).batch(0)
    # The example of the larger share, 4 of 7 target columns, comes first.
    assert batch["encoder_input_tokens"].tolist() == [[11, 1, 10, 10, 1, 0]]
    assert batch["encoder_segment_ids"].tolist() == [[1, 1, 2, 2, 2, 0]]
    assert batch["encoder_positions"].tolist() == [[0, 1, 0, 1, 2, 0]]
    assert batch["decoder_target_tokens"].tolist() == [[11, 11, 11, 1, 10, 1, 0]]
    assert batch["decoder_input_tokens"].tolist() == [[0, 11, 11, 11, 0, 10, 0]]
    assert batch["decoder_segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 0]]
    assert batch["decoder_positions"].tolist() == [[0, 1, 2, 3, 0, 1, 0]]
    assert batch["decoder_loss_weights"].tolist() == [[1, 1, 1, 1, 1, 1, 0]]


def test_an_unpacked_row_worked_by_hand() -> None:
    one = ListExamples(np.array([3], np.int32), np.array([2], np.int32))
    batch = plan(MixtureSpec.single(one), batch_size=2, source_length=4, target_length=3, pack=False).batch(0)
    assert batch["encoder_input_tokens"].tolist() == [[10, 10, 1, 0], [0, 0, 0, 0]]
    assert batch["decoder_input_tokens"].tolist() == [[0, 10, 0], [0, 0, 0]]
    assert batch["decoder_target_tokens"].tolist() == [[10, 1, 0], [0, 0, 0]]
    assert batch["decoder_loss_weights"].tolist() == [[1, 1, 0], [0, 0, 0]]


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 60), batch_size=st.integers(1, 5), seed=st.integers(0, 10), epoch=st.integers(0, 3))
def test_every_example_once_an_epoch(size: int, batch_size: int, seed: int, epoch: int) -> None:
    data = examples(size, seed=seed)
    batches = plan(MixtureSpec.single(data), batch_size=batch_size, seed=seed)
    first = sum(batches.steps_in_epoch(e) for e in range(epoch))
    found = []
    for step in range(first, first + batches.steps_in_epoch(epoch)):
        batch = batches.batch(step)
        found += segments(batch)
        assert len(batches.batch_example_ids(step)) == len(segments(batch))
        assert batch["decoder_loss_weights"].sum() == (batch["decoder_target_tokens"] != 0).sum()
    expected = [
        (data.inputs(i).tolist(), data.targets(i).tolist(), [0, *data.targets(i)[:-1].tolist()]) for i in range(size)
    ]
    assert sorted(found) == sorted(expected)


@dataclass(frozen=True)
class Labelled(ListExamples):
    """Labelled with half their number."""

    @property
    def labels(self) -> npt.NDArray[np.float32]:
        return (np.arange(len(self.source_lengths)) / 2).astype(np.float32)


@pytest.mark.parametrize("pack", [True, False])
def test_labels_stand_at_the_target_tokens_of_their_examples(pack: bool) -> None:
    base = examples(50)
    labelled = plan(MixtureSpec.single(Labelled(base.source_lengths, base.target_lengths)), pack=pack)
    for step in range(5):
        batch = labelled.batch(step)
        targets, labels = batch["decoder_target_tokens"], batch.pop("decoder_target_labels")
        assert labels.dtype == np.float32
        words = targets >= 10  # all but EOS and padding
        np.testing.assert_array_equal(labels[words], (targets[words] - 10) / 2)
        assert not labels[targets == 0].any()
        assert same(batch, plan(MixtureSpec.single(base), pack=pack).batch(step))


def test_example_ids_follow_the_rows() -> None:
    batches = plan()
    for step in range(5):
        tokens = [inputs[0] for inputs, _, _ in segments(batches.batch(step))]
        assert batches.batch_example_ids(step).tolist() == [token - 10 for token in tokens]


def test_rows_are_dealt_evenly() -> None:
    batches = plan(MixtureSpec.single(examples(201)), batch_size=8, pack=False)
    assert batches.steps_in_epoch(0) == 26
    filled = [(batches.batch(step)["encoder_input_tokens"][:, 0] != 0).sum() for step in range(26)]
    assert sum(filled) == 201
    assert set(filled) <= {7, 8}


def test_epochs_and_seeds_differ() -> None:
    batches = plan()
    steps = batches.steps_in_epoch(0)
    assert not same(batches.batch(0), batches.batch(steps))
    assert not same(batches.batch(0), plan(seed=4).batch(0))


def test_a_batch_depends_on_the_step_alone() -> None:
    forward = plan()
    expected = [forward.batch(step) for step in range(40)]
    for step in (39, 0, 17, 3):
        assert same(plan().batch(step), expected[step])
    backward = plan()
    assert all(same(backward.batch(step), expected[step]) for step in reversed(range(40)))


def test_batches_are_stable() -> None:
    # A resumed run must see the data of the run that was stopped, also after an upgrade of NumPy.
    assert plan().batch_example_ids(0).tolist() == [11, 41, 2, 35, 42, 45, 7]


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_iterator_starts_anywhere_and_resumes(num_threads: int) -> None:
    expected = plan()
    mixture = MixtureSpec.single(examples(50))

    def start(step: int) -> grain.DatasetIterator:
        again = BatchPlan(mixture, batch_size=4, source_length=16, target_length=20, pack=True, seed=3)
        return again.iterator(start_step=step, num_threads=num_threads)

    iterator = start(5)
    for step in range(5, 20):
        number, batch = next(iterator)
        assert number == step
        assert same(batch, expected.batch(step))
    state = iterator.get_state()
    next(iterator)
    resumed = start(0)
    resumed.set_state(state)
    number, batch = next(resumed)
    assert number == 20
    assert same(batch, expected.batch(20))


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_processes_share_the_global_batch(process_count: int) -> None:
    whole = plan()
    parts = [plan(process_index=i, process_count=process_count) for i in range(process_count)]
    # The last step of an epoch has empty rows.
    for step in (0, 7, whole.steps_in_epoch(0) - 1):
        pieces = [part.batch(step) for part in parts]
        assert all(piece["encoder_input_tokens"].shape == (4 // process_count, 16) for piece in pieces)
        assert same({name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}, whole.batch(step))


def test_a_mixture_gives_each_part_its_share_without_repeats() -> None:
    many, few = examples(100, first_token=10), examples(7, first_token=1000)
    batches = plan(MixtureSpec(parts=(many, few), examples_per_epoch=(30, 10)), pack=False)
    ids = []
    step = 0
    for epoch in range(10):
        end = step + batches.steps_in_epoch(epoch)
        ids.append(np.concatenate([batches.batch_example_ids(k) for k in range(step, end)]))
        assert (ids[-1] < 900).sum() == 30
        assert (ids[-1] >= 900).sum() == 10
        step = end
    of_many = np.concatenate([epoch[epoch < 900] for epoch in ids])
    of_few = np.concatenate([epoch[epoch >= 900] for epoch in ids])
    # 300 draws of 100 examples and 100 draws of 7: as even as can be at the end of every full walk.
    assert set(Counter(of_many.tolist()).values()) == {3}
    assert set(Counter(of_few.tolist()).values()) == {14, 15}
    # The first epoch mixes the parts rather than setting one after the other.
    assert len(set((ids[0] < 900)[:20].tolist())) == 2


def test_a_part_may_give_nothing() -> None:
    nothing = examples(0)
    batches = plan(MixtureSpec(parts=(nothing, examples(5)), examples_per_epoch=(0, 5)))
    ids = [batches.batch_example_ids(step).tolist() for step in range(batches.steps_in_epoch(0))]
    assert sorted(sum(ids, [])) == [0, 1, 2, 3, 4]


def test_long_examples_are_cut_and_keep_eos() -> None:
    long = ListExamples(np.array([30], np.int32), np.array([40], np.int32))
    batch = plan(MixtureSpec.single(long), batch_size=1, source_length=4, target_length=5).batch(0)
    assert batch["encoder_input_tokens"].tolist() == [[10, 10, 10, 1]]
    assert batch["decoder_target_tokens"].tolist() == [[10, 10, 10, 10, 1]]
    assert batch["decoder_input_tokens"].tolist() == [[0, 10, 10, 10, 10]]
    other = plan(MixtureSpec.single(long), batch_size=1, source_length=4, target_length=5, eos_id=2).batch(0)
    assert other["decoder_target_tokens"].tolist() == [[10, 10, 10, 10, 10]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "6 does not divide over 4"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"source_length": 0}, "source_length"),
        ({"target_length": -1}, "target_length"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments_are_named(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(**overrides)


@pytest.mark.parametrize(("size", "count"), [(0, 0), (0, 3), (3, 0)])
def test_an_empty_mixture_says_to_loosen_the_filter(size: int, count: int) -> None:
    with pytest.raises(UserError, match="loosen the filter"):
        MixtureSpec(parts=(examples(size),), examples_per_epoch=(count,))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=60),
)
def test_packed_rows_hold_every_example_and_never_overflow(
    source_length: int, target_length: int, shares: list[tuple[float, float]]
) -> None:
    source = np.array([round(share * source_length) for share, _ in shares], np.int64)
    target = np.array([round(share * target_length) for _, share in shares], np.int64)
    members, starts = pack_rows(source, target, source_length=source_length, target_length=target_length)
    assert sorted(members.tolist()) == list(range(len(shares)))
    assert starts[0] == 0
    assert starts[-1] == len(shares)
    for begin, end in zip(starts[:-1], starts[1:], strict=True):
        assert begin < end
        row = members[begin:end]
        assert source[row].sum() <= source_length
        assert target[row].sum() <= target_length


def test_packing_fills_exact_fits() -> None:
    # 7 columns hold 4 + 3 exactly, though neither is a round share of the row.
    lengths = np.array([4, 3, 3, 4], np.int64)
    _, starts = pack_rows(lengths, lengths, source_length=7, target_length=7)
    assert len(starts) - 1 == 2


def corpus_lengths(size: int, *, seed: int = 0) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Lengths as in a web corpus of software text: mean about 20 tokens, the target within about a quarter."""
    rng = np.random.default_rng(seed)
    source = rng.lognormal(2.8, 0.7, size)
    target = source * rng.lognormal(0, 0.25, size)
    return np.clip(source, 2, 128).astype(np.int64), np.clip(target, 2, 128).astype(np.int64)


def test_packing_is_dense() -> None:
    source, target = corpus_lengths(20_000)
    _, starts = pack_rows(source, target, source_length=128, target_length=128)
    least = max(source.sum(), target.sum()) / 128
    assert len(starts) - 1 < 1.07 * least


@pytest.mark.slow
def test_a_large_epoch_is_planned_in_two_seconds() -> None:
    source, target = corpus_lengths(340_000)
    data = ListExamples(source.astype(np.int32), target.astype(np.int32))
    batches = plan(MixtureSpec.single(data), batch_size=64, source_length=128, target_length=128)
    start = time.process_time()
    batches.steps_in_epoch(0)
    assert time.process_time() - start < 2


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 70), max_size=60),
    st.integers(1, 9),
    st.integers(1, 64),
    st.integers(1, 32),
)
def test_length_groups_cover_each_index_once(
    lengths: list[int], batch_size: int, max_length: int, multiple: int
) -> None:
    groups = length_groups(lengths, batch_size=batch_size, max_length=max_length, multiple=multiple)
    order = np.concatenate([np.zeros(0, np.int64), *(group.indices for group in groups)])
    assert sorted(order.tolist()) == list(range(len(lengths)))
    clipped = [min(length, max_length) for length in lengths]
    keys = [(clipped[index], index) for index in order]
    assert keys == sorted(keys)
    for group in groups:
        longest = max(clipped[index] for index in group.indices)
        assert group.indices.dtype == np.int64
        assert longest <= group.padded_length < max(longest, 1) + multiple
        assert group.padded_length % multiple == 0 or group.padded_length == max_length
    assert all(len(group.indices) == batch_size for group in groups[:-1])
    assert len({group.padded_length for group in groups}) <= -(-max_length // multiple)


def test_length_groups_reject_bad_sizes() -> None:
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        length_groups([1], batch_size=0, max_length=4)
