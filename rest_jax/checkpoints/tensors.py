"""Tensors that lie in files and are read when they are asked for, one at a time or in part.

A checkpoint of any format is a mapping from a parameter's name, 'encoder/encoder_norm/scale', to its tensor. Names and
layout are those of our own tree whatever the file's are, so that a conversion is a copy.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from rest_jax.errors import UserError
from rest_jax.models.t5 import SCAN_AXIS

Index = tuple[slice, ...]
Tree = Any
FLOATS = ("float64", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """Shape and dtype of a tensor, and how to read it.

    `read_slice` takes one slice for each dimension, with start and stop and without step.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read_slice: Callable[[Index], npt.NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> npt.NDArray[Any]:
        return self.read_slice(tuple(slice(0, size) for size in self.shape))

    def __getitem__(self, index: Index) -> npt.NDArray[Any]:
        """Slices as JAX gives them, with None for an end."""
        return self.read_slice(tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True)))


Tensors = Mapping[str, LazyTensor]


def of_array(array: npt.ArrayLike) -> LazyTensor:
    """A tensor that is in memory already."""
    values = np.asarray(array)
    return LazyTensor(values.shape, values.dtype, lambda index: values[index])


def transposed(tensor: LazyTensor) -> LazyTensor:
    """[a, b] -> [b, a]."""
    return LazyTensor(tensor.shape[::-1], tensor.dtype, lambda index: tensor.read_slice(index[::-1]).T)


def with_dtype(tensor: LazyTensor, dtype: npt.DTypeLike) -> LazyTensor:
    """Cast as it is read."""
    wanted = np.dtype(dtype)
    return LazyTensor(tensor.shape, wanted, lambda index: tensor.read_slice(index).astype(wanted))


def column(tensor: LazyTensor, number: int) -> LazyTensor:
    """[a, b] -> [a, 1]; nothing else is read."""
    if not 0 <= number < tensor.shape[1]:
        raise IndexError(f"column {number} of {tensor.shape[1]}")

    def read(index: Index) -> npt.NDArray[Any]:
        return tensor.read_slice((index[0], slice(number, number + 1)))[:, index[1]]

    return LazyTensor((tensor.shape[0], 1), tensor.dtype, read)


def flat_shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a tree of nested mappings whose leaves have a `shape`."""
    return {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()}


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> 'a/b/c' -> leaf."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= flatten(value, f"{name}/") if isinstance(value, Mapping) else {name: value}
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """'a/b/c' -> leaf to nested dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = leaf
    return tree


def is_scanned(names: Mapping[str, Any]) -> bool:
    """Whether the layers of each stack lie in one tensor, see `models.layer_stacking`."""
    return any(name.startswith(("encoder/encoder/", "decoder/decoder/")) for name in names)


def stacked(tensors: Tensors) -> dict[str, LazyTensor]:
    """The scanned tree of separate layers, as `layer_stacking.stack_layers` makes it, without reading anything.

    A parameter that not every layer has, with one shape and dtype, stays where it is: the comparison with the model's
    tree then names it.
    """
    layers: dict[tuple[str, str], dict[int, LazyTensor]] = {}
    for name, tensor in tensors.items():
        if (parts := _layer_of(name)) is not None:
            stack, index, rest = parts
            layers.setdefault((stack, rest), {})[index] = tensor
    result = dict(tensors)
    for (stack, rest), by_index in layers.items():
        ordered = [by_index[index] for index in sorted(by_index)]
        if sorted(by_index) != list(range(len(ordered))) or len({(t.shape, t.dtype) for t in ordered}) > 1:
            continue
        for index in by_index:
            del result[f"{stack}/layers_{index}/{rest}"]
        result[f"{stack}/{stack}/{rest}"] = _stack(ordered)
    return result


def unstacked(tensors: Tensors) -> dict[str, LazyTensor]:
    """The tree of separate layers of a scanned one: the inverse of `stacked`."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        stack, _, rest = name.partition("/")
        inner, _, rest = rest.partition("/")
        if inner != stack or stack not in ("encoder", "decoder") or len(tensor.shape) <= SCAN_AXIS:
            result[name] = tensor
            continue
        for index in range(tensor.shape[SCAN_AXIS]):
            result[f"{stack}/layers_{index}/{rest}"] = _take(tensor, index)
    return result


def _layer_of(name: str) -> tuple[str, int, str] | None:
    """'encoder/layers_3/mlp/wo/kernel' -> ('encoder', 3, 'mlp/wo/kernel')."""
    stack, _, rest = name.partition("/")
    layer, _, rest = rest.partition("/")
    number = layer.removeprefix("layers_")
    return (stack, int(number), rest) if layer.startswith("layers_") and number.isdecimal() else None


def _stack(layers: Sequence[LazyTensor]) -> LazyTensor:
    first = layers[0]

    def read(index: Index) -> npt.NDArray[Any]:
        inner = (*index[:SCAN_AXIS], *index[SCAN_AXIS + 1 :])
        return np.stack([layer.read_slice(inner) for layer in layers[index[SCAN_AXIS]]], axis=SCAN_AXIS)

    shape = (*first.shape[:SCAN_AXIS], len(layers), *first.shape[SCAN_AXIS:])
    return LazyTensor(shape, first.dtype, read)


def _take(tensor: LazyTensor, layer: int) -> LazyTensor:
    def read(index: Index) -> npt.NDArray[Any]:
        outer = (*index[:SCAN_AXIS], slice(layer, layer + 1), *index[SCAN_AXIS:])
        return tensor.read_slice(outer).squeeze(SCAN_AXIS)

    shape = (*tensor.shape[:SCAN_AXIS], *tensor.shape[SCAN_AXIS + 1 :])
    return LazyTensor(shape, tensor.dtype, read)


def check_same_names_and_shapes(
    *, have: Mapping[str, tuple[int, ...]], want: Mapping[str, tuple[int, ...]], what: str, advice: str
) -> None:
    """Raises UserError that names what is missing, unexpected or of another shape: eight of them, and counts the rest.

    Args:
      have: name -> shape in the checkpoint.
      want: name -> shape of the model.
      what: how the message begins, e.g. the path.
      advice: how it ends.
    """
    problems = [f"missing {name} {want[name]}" for name in sorted(want.keys() - have.keys())]
    problems += [f"unexpected {name} {have[name]}" for name in sorted(have.keys() - want.keys())]
    problems += [
        f"{name} is {have[name]}, the model's is {want[name]}"
        for name in sorted(have.keys() & want.keys())
        if have[name] != want[name]
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise UserError(f"{what} does not fit the model: {shown}. {advice}")
