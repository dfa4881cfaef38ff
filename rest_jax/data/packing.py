"""Packing examples of two lengths, source and target, into rows of two lengths."""

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

# Examples packed together. Larger windows pack a little denser; this bounds the planner's Python lists.
_PACK_WINDOW = 32_768
# Resolution of the packer's size scale, and how many misfits it looks past before it takes a sure fit.
_SIZE_STEPS = 1024
_MAX_TRIES = 8


def pack_rows(
    source_lengths: Int64Array,
    target_lengths: Int64Array,
    *,
    source_length: int,
    target_length: int,
) -> tuple[Int64Array, Int64Array]:
    """Packs examples into rows so that neither side overflows.

    Row after row: the largest example left, then again and again the largest that still fits. The size of an example is
    the larger of its two shares of a row. Examples of one size go in their given order, so a shuffled order packs anew.

    Args:
      source_lengths, target_lengths: [examples], at most `source_length` and `target_length`.

    Returns:
      members: [examples] int64, the examples in the order of the rows.
      row_starts: [rows + 1] int64, where each row starts in `members`.
    """
    members: list[int] = []
    row_starts = [0]
    for start in range(0, len(source_lengths), _PACK_WINDOW):
        window = slice(start, start + _PACK_WINDOW)
        for row in _pack_window(
            source_lengths[window], target_lengths[window], source_length=source_length, target_length=target_length
        ):
            members.extend(start + k for k in row)
            row_starts.append(len(members))
    return np.asarray(members, np.int64), np.asarray(row_starts, np.int64)


def _pack_window(
    source_lengths: Int64Array,
    target_lengths: Int64Array,
    *,
    source_length: int,
    target_length: int,
) -> list[list[int]]:
    source_sizes = -(-source_lengths * _SIZE_STEPS // source_length)
    target_sizes = -(-target_lengths * _SIZE_STEPS // target_length)
    sizes = np.maximum(source_sizes, target_sizes)
    # One stack of examples for each size; bit `size` of `filled` says that the stack is not empty.
    stacks: dict[int, list[int]] = {}
    for k, size in zip(range(len(sizes) - 1, -1, -1), sizes[::-1].tolist(), strict=True):
        stacks.setdefault(size, []).append(k)
    filled = sum(1 << size for size in stacks)
    sources, targets = source_lengths.tolist(), target_lengths.tolist()
    rows: list[list[int]] = []
    while filled:
        row: list[int] = []
        source_left, target_left = source_length, target_length
        while True:
            # What fits is no larger than the roomier side's rounded-up share; what is no larger than the tighter side's
            # rounded-down share fits for sure.
            source_room, target_room = (
                source_left * _SIZE_STEPS,
                target_left * _SIZE_STEPS,
            )
            roomy = max(-(-source_room // source_length), -(-target_room // target_length))
            sure = min(source_room // source_length, target_room // target_length)
            candidates = filled & ((2 << roomy) - 1)
            tries = 0
            size = candidates.bit_length() - 1
            while size > sure:
                k = stacks[size][-1]
                if sources[k] <= source_left and targets[k] <= target_left:
                    break
                tries += 1
                candidates &= (1 << (size if tries < _MAX_TRIES else sure + 1)) - 1
                size = candidates.bit_length() - 1
            if size < 0:
                break
            stack = stacks[size]
            k = stack.pop()
            if not stack:
                filled &= ~(1 << size)
            row.append(k)
            source_left -= sources[k]
            target_left -= targets[k]
        rows.append(row)
    return rows
