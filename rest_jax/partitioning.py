"""The device mesh ('replica', 'data', 'model') and where parameters, optimiser state and batches lie on it."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rest_jax.errors import UserError
from rest_jax.models.t5 import PARAM_LOGICAL_AXES, SCAN_AXIS, SCANNED_STACK

MESH_AXES = ("replica", "data", "model")
BATCH_AXES = ("replica", "data")
# (logical axis, mesh axis or axes, None for not sharded); earlier rules go first, a mesh axis serves an array once.
LogicalAxisRules = tuple[tuple[str, str | tuple[str, ...] | None], ...]


def make_mesh(*, replica: int = 1, data: int = -1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of axes ('replica', 'data', 'model').

    Args:
      replica: copies of the parameters across which only gradients travel; the number of slices on multi-slice TPU.
      data: devices over which a replica's batch is split; -1: all that are left.
      model: devices over which a parameter is split (tensor parallelism).
      devices: all of `jax.devices()` where None.

    Raises:
      UserError: the three do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count = len(devices)
    if replica < 1 or model < 1 or (data < 1 and data != -1):
        raise UserError(
            f"mesh replica={replica}, data={data}, model={model}: each must be at least 1 (data may be -1 for all "
            "devices that are left)."
        )
    if data == -1:
        if count % (replica * model):
            raise UserError(
                f"{count} devices cannot be divided by replica={replica} x model={model}; "
                f"choose replica x model among {_divisors(count)}."
            )
        data = count // (replica * model)
    if replica * data * model != count:
        raise UserError(
            f"mesh replica={replica} x data={data} x model={model} = {replica * data * model} devices, but there are "
            f"{count}. Set data=-1 to use all that are left."
        )
    shape = (replica, data, model)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1 and replica % len(slices) == 0:
        inner = (replica // len(slices), data, model)
        grid = mesh_utils.create_hybrid_device_mesh(inner, (len(slices), 1, 1), devices=devices)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def standard_logical_axis_rules(
    *,
    activation_partitioning_dims: int = 1,
    parameter_partitioning_dims: int = 1,
    additional_rules: Iterable[tuple[str, str | tuple[str, ...] | None]] | None = None,
) -> LogicalAxisRules:
    """T5X's rules. batch lies on ('replica', 'data'), vocab, mlp, heads and joined_kv on 'model'.

    Args:
      activation_partitioning_dims: 2 also splits the width of activations over 'model': less memory, more traffic.
      parameter_partitioning_dims: 2 also splits parameters and optimiser state over 'data' (fully sharded).
      additional_rules: rules that go before the standard ones.
    """
    for name, value in (
        ("activation_partitioning_dims", activation_partitioning_dims),
        ("parameter_partitioning_dims", parameter_partitioning_dims),
    ):
        if value not in (1, 2):
            raise UserError(f"{name} must be 1 or 2; got {value!r}.")
    rules: list[tuple[str, str | tuple[str, ...] | None]] = list(additional_rules or ())
    rules += [("batch", BATCH_AXES), ("vocab", "model"), ("mlp", "model"), ("heads", "model"), ("joined_kv", "model")]
    # After the rules above: where another dimension of the array has taken the mesh axis, 'embed' gets the next one.
    if activation_partitioning_dims == 2:
        rules.append(("embed", "model"))
    if parameter_partitioning_dims == 2:
        rules.append(("embed", "data"))
    rules += [(name, None) for name in ("embed", "kv", "layers", "length", "relpos_buckets")]
    return tuple(rules)


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """Shardings on one mesh under one set of rules."""

    mesh: Mesh
    rules: LogicalAxisRules = dataclasses.field(default_factory=standard_logical_axis_rules)

    def __post_init__(self) -> None:
        for logical, target in self.rules:
            unknown = set(_as_tuple(target)) - set(self.mesh.axis_names)
            if unknown:
                raise UserError(
                    f"The rule ({logical!r}, {target!r}) names mesh axes {sorted(unknown)}; the mesh has "
                    f"{self.mesh.axis_names}."
                )

    def _spec(self, logical_axes: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Mesh axes of each dimension, by the first rule whose mesh axes are still free."""
        chosen: list[tuple[str, ...] | None] = [None] * len(logical_axes)
        for logical, target in self.rules:
            for position, axis in enumerate(logical_axes):
                taken = {name for names in chosen if names for name in names}
                if axis == logical and chosen[position] is None and not taken & set(_as_tuple(target)):
                    chosen[position] = _as_tuple(target)
        return tuple(names or () for names in chosen)

    def param_shardings(self, tree: Any) -> Any:
        """The NamedSharding of each leaf of a tree of parameters, or of state that mirrors them (Adam's moments).

        A leaf whose path ends in a parameter's name and that has its rank lies as that parameter does; all else is
        replicated: scalars, Adafactor's factored moments (vectors), unknown names.

        Raises:
          UserError: a dimension cannot be divided by the mesh axes that it is to lie on.
        """
        return jax.tree_util.tree_map_with_path(self._leaf_sharding, tree)

    def _leaf_sharding(self, path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        logical_axes = param_logical_axes(name, rank=len(leaf.shape))
        if logical_axes is None or len(logical_axes) != len(leaf.shape):
            return self.replicated()
        spec: list[tuple[str, ...] | None] = []
        for dim, (size, mesh_axes) in enumerate(zip(leaf.shape, self._spec(logical_axes), strict=True)):
            parts = int(np.prod([self.mesh.shape[axis] for axis in mesh_axes], dtype=int))
            # Size 1 stands for "not used" in factored optimiser state.
            if size == 1 or parts == 1:
                spec.append(None)
            elif size % parts:
                raise UserError(
                    f"Parameter {name}: dimension {dim} ({logical_axes[dim]!r}) has size {size}, which cannot be "
                    f"divided by the {parts} devices of mesh axis {'x'.join(mesh_axes)!r}. Change the mesh "
                    f"({self._mesh_text()}) or the model's size."
                )
            else:
                spec.append(mesh_axes)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def with_shardings(self, tree: Any) -> Any:
        """A tree of arrays or shapes -> ShapeDtypeStructs with `param_shardings`, what a checkpoint restores to."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            tree,
            self.param_shardings(tree),
        )

    def batch_sharding(self) -> NamedSharding:
        """Leading axis over all of ('replica', 'data')."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))

    def replicated(self) -> NamedSharding:
        """The same on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def num_batch_shards(self) -> int:
        """Devices that a batch is split over."""
        return int(np.prod([self.mesh.shape[axis] for axis in BATCH_AXES], dtype=int))

    def check_batch_divisible(self, batch_size: int, name: str) -> None:
        """Raises UserError naming `name` (the gin macro) unless the global batch can be split over the mesh."""
        shards = self.num_batch_shards
        if batch_size < 1 or batch_size % shards:
            legal = max(shards, round(batch_size / shards) * shards)
            raise UserError(
                f"{name}={batch_size} cannot be divided over the {shards} devices of mesh axes 'replica' x 'data' "
                f"({self._mesh_text()}). Give a positive multiple of {shards}, e.g. {legal}."
            )

    def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows [rows, ...] -> global arrays of all processes' rows, split by `batch_sharding`."""
        sharding = self.batch_sharding()
        return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}

    @contextlib.contextmanager
    def activation_rules(self) -> Iterator[None]:
        """While a function is traced in here, the model pins its activations to the mesh.

        Without it the compiler chooses, which is right on one device and for data parallelism; with parameters split
        over 'data' it may choose to split widths rather than the batch.
        """
        with jax.set_mesh(self.mesh), nn.logical_axis_rules(self.rules):
            yield

    def _mesh_text(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.mesh.shape.items())


def trace_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """While a part of a program is traced in here, it knows its mesh (`num_trace_shards`, `over_batch_axes`)."""
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def num_trace_shards() -> int:
    """Into how many parts the batch axis is split on the mesh of the trace; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in BATCH_AXES)


def over_batch_axes(rows: jax.Array, *, axis: int = 0) -> jax.Array:
    """`rows` with one axis split over the batch axes of the mesh of the trace."""
    if num_trace_shards() == 1:
        return rows
    return jax.lax.with_sharding_constraint(rows, PartitionSpec(*(None,) * axis, BATCH_AXES))


def param_logical_axes(path: str, *, rank: int | None = None) -> tuple[str, ...] | None:
    """Logical axis names of the parameter whose name ends the path 'a/b/c'; None for a path of no parameter.

    With a `rank` of one dimension more than ours has, heads and their sizes are two dimensions: as T5X's scalable_t5
    keeps attention's kernels.
    """
    for pattern, axes in PARAM_LOGICAL_AXES:
        if re.search(rf"(?:^|[/_]){pattern}$", path):
            scanned = re.search(SCANNED_STACK, path) is not None
            if rank == len(axes) + scanned + 1:
                axes = tuple(name for axis in axes for name in (("heads", "kv") if axis == "joined_kv" else (axis,)))
            return (*axes[:SCAN_AXIS], "layers", *axes[SCAN_AXIS:]) if scanned else axes
    return None


def path_name(path: Sequence[Any]) -> str:
    """The path of a leaf, as JAX gives it, as 'a/b/c'."""
    return "/".join(_key_name(key) for key in path)


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
