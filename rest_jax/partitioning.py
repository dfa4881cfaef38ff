"""The device mesh ('replica', 'data', 'model') and where parameters, optimiser state and batches lie on it."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rest_jax.errors import UserError
from rest_jax.models.t5 import PARAM_LOGICAL_AXES, SCAN_AXIS, SCANNED_STACK

MESH_AXES = ("replica", "data", "model")
BATCH_AXES = ("replica", "data")
# Of the last two dimensions of an array in a TPU's memory, the last first: what is less is padded.
_TPU_TILE = (128, 8)
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
      UserError: the three do not multiply to the number of devices, or a replica would lie in several slices.
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
    if replica % len(slices):
        raise UserError(
            f"mesh replica={replica}, but the devices are of {len(slices)} slices, between which the network is slow: "
            f"only gradients should cross it. Set replica (REPLICAS) to a multiple of {len(slices)}."
        )
    if len(slices) > 1:
        inner = (replica // len(slices), data, model)
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, (len(slices), 1, 1), devices=devices, allow_split_physical_axes=True
        )
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

    def param_formats(self, tree: Any) -> Any:
        """`param_shardings` for what is trained; on TPUs with the order in memory of layers that are scanned.

        There each layer lies in one piece, though T5X's axis of layers is the second. In the order of the axes a train
        step would copy all gradients from the one order into the other (docs/pods.md). Where a device's part of a layer
        does not fill tiles, the order is the compiler's. What arrays hold, and what checkpoints store, is the same.
        """
        if not _keeps_layers_in_one_piece(self.mesh):
            return self.param_shardings(tree)
        return jax.tree_util.tree_map_with_path(self._leaf_format, tree)

    def _leaf_format(self, path: tuple[Any, ...], leaf: Any) -> NamedSharding | Format:
        sharding, rank = self._leaf_sharding(path, leaf), len(leaf.shape)
        axes = param_logical_axes(path_name(path), rank=rank) or ()
        if len(axes) != rank or "layers" not in axes:
            return sharding
        others = [axis for axis in range(rank) if axis != SCAN_AXIS]
        part = sharding.shard_shape(leaf.shape)
        if any(part[axis] % tile for axis, tile in zip(reversed(others), _TPU_TILE, strict=False)):
            return sharding
        return Format(Layout(major_to_minor=(SCAN_AXIS, *others)), sharding)

    def with_shardings(self, tree: Any) -> Any:
        """A tree of arrays or shapes -> ShapeDtypeStructs with `param_shardings`, what a checkpoint restores to."""
        return placed(tree, self.param_shardings(tree))

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

    def check_batch_divisible(self, batch_size: int, name: str, *, microbatches: int = 1) -> None:
        """Raises UserError naming `name` (the gin macro) unless each microbatch can be split over the mesh."""
        shards = self.num_batch_shards
        unit = shards * microbatches
        if batch_size < 1 or batch_size % unit:
            legal = max(unit, round(batch_size / unit) * unit)
            in_parts = f" in {microbatches} microbatches" if microbatches > 1 else ""
            raise UserError(
                f"{name}={batch_size}{in_parts} cannot be divided over the {shards} devices of mesh axes 'replica' x "
                f"'data' ({self._mesh_text()}). Give a positive multiple of {unit}, e.g. {legal}"
                f"{', or fewer microbatches' if microbatches > 1 else ''}."
            )

    def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows (`local_rows`) [rows, ...] -> global arrays of all rows, split by `batch_sharding`."""
        sharding = self.batch_sharding()
        shards = self.local_rows(self.num_batch_shards)

        def put(local: np.ndarray) -> jax.Array:
            per_shard = len(local) // len(shards)

            def part(index: Any) -> np.ndarray:
                start = int(np.searchsorted(shards, (index[0].start or 0) // per_shard)) * per_shard
                return local[start : start + per_shard]

            return jax.make_array_from_callback((per_shard * self.num_batch_shards, *local.shape[1:]), sharding, part)

        return {name: put(rows) for name, rows in batch.items()}

    def local_rows(self, num_rows: int) -> np.ndarray:
        """Which of the rows of a global batch lie on this process's devices, in rising order."""
        slices = self.batch_sharding().addressable_devices_indices_map((num_rows,)).values()
        return np.unique(np.concatenate([np.arange(num_rows)[index] for index in slices]))

    def put_everywhere(self, tree: Any) -> Any:
        """Arrays that every process has -> the same, whole, on every device."""
        sharding = self.replicated()

        def put(leaf: Any) -> jax.Array:
            local = np.asarray(leaf)
            return jax.make_array_from_callback(local.shape, sharding, lambda index: local[index])

        return jax.tree.map(put, tree)

    def fetch(self, tree: Any) -> Any:
        """Global arrays -> all of them on the host of every process."""
        if jax.process_count() > 1:
            tree = _everywhere(self.replicated())(tree)
        return jax.device_get(tree)

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


def placed(tree: Any, formats: Any) -> Any:
    """Arrays or shapes -> ShapeDtypeStructs that lie as a tree of shardings or formats says, or one for all."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        tree,
        jax.tree.broadcast(formats, tree),
    )


def _keeps_layers_in_one_piece(mesh: Mesh) -> bool:
    return bool(mesh.devices.flat[0].platform == "tpu")


@functools.cache
def _everywhere(replicated: NamedSharding) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=replicated)


def fetch_owned(tree: Any) -> tuple[np.ndarray, Any]:
    """The rows of global arrays, split along their first axis alone, that this process is the one to keep.

    A row that several processes hold, of a 'model' axis across hosts, is one's alone.

    Returns:
      Which rows, `[rows]`, rising; and the tree of them, on the host.
    """
    leaves, structure = jax.tree.flatten(tree)
    shards = [
        sorted((s for s in leaf.addressable_shards if s.replica_id == 0), key=lambda s: s.index[0].start or 0)
        for leaf in leaves
    ]
    parts = jax.device_get([[shard.data for shard in of_leaf] for of_leaf in shards])
    rows = np.arange(leaves[0].shape[0])
    owned = [rows[shard.index[0]] for shard in shards[0]]
    fetched = [
        np.concatenate([np.zeros((0, *leaf.shape[1:]), leaf.dtype), *of_leaf])
        for leaf, of_leaf in zip(leaves, parts, strict=True)
    ]
    return np.concatenate([np.zeros(0, rows.dtype), *owned]), jax.tree.unflatten(structure, fetched)


def trace_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """While a part of a program is traced in here, it knows its mesh (`num_trace_shards`, `over_batch_axes`,
    `devices_of_trace`)."""
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


def devices_of_trace() -> tuple[str, int]:
    """Platform and number of the devices for which a function is being traced: those of `trace_mesh`, else JAX's own.

    What is chosen by them must follow the mesh: a program can be compiled for devices that this machine has not.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend(), jax.device_count()
    return mesh.abstract_device.platform, mesh.size


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
