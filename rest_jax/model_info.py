"""model-info.txt, as T5X writes it: each parameter's name, size, shape by axes, and where it lies on the mesh."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from rest_jax.partitioning import Partitioner, param_logical_axes, path_name

MODEL_INFO = "model-info.txt"


def describe(abstract_params: Any, partitioner: Partitioner) -> str:
    """The file's text, in T5X's format: a line a parameter, sorted by name, and the total."""
    shardings = jax.tree.leaves(partitioner.param_shardings(abstract_params))
    leaves = jax.tree_util.tree_flatten_with_path(abstract_params)[0]
    lines = [
        f"Variable {name:<80s} size {math.prod(leaf.shape):<12d} shape {_shape(name, leaf.shape):<40s} "
        f"partition spec {_spec(sharding.spec, len(leaf.shape))}"
        for (name, leaf), sharding in zip(((path_name(path), leaf) for path, leaf in leaves), shardings, strict=True)
    ]
    total = sum(math.prod(leaf.shape) for _, leaf in leaves)
    return "\n".join([*sorted(lines), f"Total number of parameters: {total}", ""])


def _shape(name: str, shape: Sequence[int]) -> str:
    """`(embed=512, mlp=1024)`; without names where the parameter has none."""
    axes = param_logical_axes(name, rank=len(shape))
    if axes is None or len(axes) != len(shape):
        return str(tuple(shape))
    return f"({', '.join(f'{axis}={size}' for axis, size in zip(axes, shape, strict=True))})"


def _spec(spec: PartitionSpec, rank: int) -> tuple[Any, ...]:
    """One entry a dimension: None, the mesh axis, or several."""
    entries = [*spec, *[None] * (rank - len(spec))]
    return tuple(entry[0] if isinstance(entry, tuple) and len(entry) == 1 else entry or None for entry in entries)
