"""Trees of separate layers <-> trees of `scan_layers`, where each parameter is that of all layers of a stack.

    {encoder,decoder}/layers_i/<parameter> [a, ...]   <->   {encoder,decoder}/{encoder,decoder}/<parameter> [a, L, ...]

L layers lie on axis 1. All else has the same place in both. The names and the axis are those of T5X's scalable_t5,
whose attention kernels have a dimension for heads besides (`checkpoints/attention_heads.py`). The leaves are arrays of
numpy or JAX; numpy's stay on the host.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.errors import UserError
from rest_jax.models.t5 import SCAN_AXIS, T5Config

Params = Mapping[str, Any]


def stack_layers(params: Params, config: T5Config) -> dict[str, Any]:
    """The scanned tree of a tree of separate layers.

    Args:
      params: T5X's tree with `layers_0`, `layers_1`, ...
      config: of the network; only its numbers of layers are read.

    Raises:
      UserError: the tree has other layers than `config`, or layers with different parameters.
    """

    def stack(name: str, stack_params: Params, num_layers: int) -> dict[str, Any]:
        names = [f"layers_{index}" for index in range(num_layers)]
        found = sorted(key for key in stack_params if key.startswith("layers_"))
        if found != sorted(names):
            raise UserError(
                f"parameters of the {name} have {len(found)} layers {found}; the model has {num_layers}. Correct "
                f"T5Config.num_{name}_layers."
            )
        layers = [stack_params[key] for key in names]
        for key, layer in zip(names, layers, strict=True):
            if different := _shapes(layer) ^ _shapes(layers[0]):
                raise UserError(
                    f"parameters of the {name}: {key} differs from layers_0 in {sorted(different)}; only layers of "
                    "equal names and shapes can be stacked. Set T5Config.scan_layers=False."
                )
        rest = {key: value for key, value in stack_params.items() if key not in names}
        return {**rest, name: jax.tree.map(_stack, *layers)}

    return _of_stacks(params, config, stack)


def unstack_layers(params: Params, config: T5Config) -> dict[str, Any]:
    """The tree of separate layers of a scanned tree: the inverse of `stack_layers`.

    Args:
      params: a tree of `scan_layers`.
      config: of the network; only its numbers of layers are read.

    Raises:
      UserError: the tree is not scanned, or has another number of layers than `config`.
    """

    def unstack(name: str, stack_params: Params, num_layers: int) -> dict[str, Any]:
        if name not in stack_params:
            raise UserError(f"parameters of the {name}: no {name}/{name}, so its layers are not stacked.")
        layers = stack_params[name]
        found = {leaf.shape[SCAN_AXIS] for leaf in jax.tree.leaves(layers)}
        if found != {num_layers}:
            raise UserError(
                f"parameters of the {name} stack {sorted(found)} layers; the model has {num_layers}. Correct "
                f"T5Config.num_{name}_layers."
            )
        rest = {key: value for key, value in stack_params.items() if key != name}
        separate = {f"layers_{index}": _layer(layers, index) for index in range(num_layers)}
        return {**rest, **separate}

    return _of_stacks(params, config, unstack)


def _of_stacks(
    params: Params, config: T5Config, convert: Callable[[str, Params, int], dict[str, Any]]
) -> dict[str, Any]:
    sizes = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    missing = [name for name in sizes if name not in params]
    if missing:
        raise UserError(f"the parameters have no {missing}; they have {sorted(params)}. Give the whole tree.")
    return {**params, **{name: convert(name, params[name], size) for name, size in sizes.items()}}


def _stack(*leaves: Any) -> Any:
    stack: Callable[..., Any] = jnp.stack if isinstance(leaves[0], jax.Array) else np.stack
    return stack(leaves, axis=SCAN_AXIS)


def _layer(layers: Params, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[:, index], layers)


def _shapes(layer: Params) -> set[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each parameter."""
    flat, _ = jax.tree_util.tree_flatten_with_path(layer)
    return {(jax.tree_util.keystr(path, simple=True, separator="/"), tuple(leaf.shape)) for path, leaf in flat}
