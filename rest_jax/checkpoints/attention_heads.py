"""Kernels of attention as T5X's two networks keep them.

    t5x/examples/t5, and here       [emb_dim, H * K]                        out [H * K, emb_dim]
    t5x/examples/scalable_t5        [emb_dim, H, K]                         out [H, K, emb_dim]
      with scanned layers           [emb_dim, L, H, K]                      out [H, L, K, emb_dim]

H heads of K, L layers. scalable_t5 is also the one with a table of position biases in each layer: UMT5's.
"""

import functools
import re
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from rest_jax.checkpoints.tensors import Index, LazyTensor, Tensors, is_scanned

_SPLIT_RANK = 3
_KERNEL = re.compile(r".*attention/(?P<projection>query|key|value|out)/kernel")


def with_heads_of(tensors: Tensors, wanted: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Tensors with heads as the shapes of `wanted` have them; layers are together, or apart, in both."""
    scanned = is_scanned(tensors)
    for name, shape in wanted.items():
        axes = _head_axes(name, scanned=scanned)
        if axes is not None:
            split = len(shape) == _SPLIT_RANK + scanned
            return split_heads(tensors, num_heads=shape[axes[0]]) if split else joined_heads(tensors)
    return tensors


def joined_heads(tensors: Tensors) -> dict[str, LazyTensor]:
    """Tensors of either network with our shapes; nothing is read."""
    return _convert(tensors, _join, rank=_SPLIT_RANK)


def split_heads(tensors: Tensors, *, num_heads: int) -> dict[str, LazyTensor]:
    """Tensors of either network with scalable_t5's shapes; nothing is read."""
    return _convert(tensors, functools.partial(_split, num_heads=num_heads), rank=_SPLIT_RANK - 1)


def _convert(
    tensors: Tensors, change: Callable[[LazyTensor, int, int], LazyTensor], *, rank: int
) -> dict[str, LazyTensor]:
    """Changes the kernels of attention that have `rank` dimensions besides layers'."""
    scanned = is_scanned(tensors)

    def convert(name: str, tensor: LazyTensor) -> LazyTensor:
        axes = _head_axes(name, scanned=scanned)
        return tensor if axes is None or len(tensor.shape) != rank + scanned else change(tensor, *axes)

    return {name: convert(name, tensor) for name, tensor in tensors.items()}


def _head_axes(name: str, *, scanned: bool) -> tuple[int, int] | None:
    """Of a kernel of attention, the axes of H and K in scalable_t5's tensor."""
    match = _KERNEL.fullmatch(name)
    if match is None:
        return None
    if match["projection"] == "out":
        return (0, 2) if scanned else (0, 1)
    return (2, 3) if scanned else (1, 2)


def _join(tensor: LazyTensor, heads_axis: int, dim_axis: int) -> LazyTensor:
    head_dim = tensor.shape[dim_axis]
    shape = [size for axis, size in enumerate(tensor.shape) if axis != dim_axis]
    shape[heads_axis] *= head_dim

    def read(index: Index) -> npt.NDArray[np.generic]:
        asked = index[heads_axis]
        first, last = asked.start // head_dim, -(-asked.stop // head_dim)  # the heads that it touches
        inner = [*index[:heads_axis], slice(first, last), *index[heads_axis + 1 :]]
        inner.insert(dim_axis, slice(0, head_dim))
        values = np.moveaxis(tensor.read_slice(tuple(inner)), dim_axis, heads_axis + 1)
        values = values.reshape(*values.shape[:heads_axis], -1, *values.shape[heads_axis + 2 :])
        start = asked.start - first * head_dim
        return values.take(range(start, start + asked.stop - asked.start), axis=heads_axis)

    return LazyTensor(tuple(shape), tensor.dtype, read)


def _split(tensor: LazyTensor, heads_axis: int, dim_axis: int, *, num_heads: int) -> LazyTensor:
    head_dim = tensor.shape[heads_axis] // num_heads
    shape = [*tensor.shape]
    shape[heads_axis] = num_heads
    shape.insert(dim_axis, head_dim)

    def read(index: Index) -> npt.NDArray[np.generic]:
        outer = [*index]
        dims = outer.pop(dim_axis)
        heads = outer[heads_axis]
        outer[heads_axis] = slice(heads.start * head_dim, heads.stop * head_dim)
        values = tensor.read_slice(tuple(outer))
        values = values.reshape(*values.shape[:heads_axis], -1, head_dim, *values.shape[heads_axis + 1 :])
        values = values.take(range(dims.start, dims.stop), axis=heads_axis + 1)
        return np.moveaxis(values, heads_axis + 1, dim_axis)

    return LazyTensor(tuple(shape), tensor.dtype, read)
