"""How many slots fit: the memory that sampling takes on a device, from shapes alone, before anything is compiled."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rest_jax import chips
from rest_jax.errors import UserError
from rest_jax.models import t5
from rest_jax.partitioning import BATCH_AXES
from rest_jax.sampling import cache as cache_lib
from rest_jax.sampling.engine import Layout

MIB = 2**20
# Slots that a device's matrix products need to run at their full rate (docs/performance.md). Where fewer samples are to
# be drawn, or fewer fit, there are fewer. A CPU's are for large models; it takes more of a small one, whose step costs
# more in beginning its many small operations than in doing them.
_FULL_RATE_SLOTS = 256
_FULL_RATE_SLOTS_ELSEWHERE = 2048
_CPU_STEP_FLOPS, _CPU_MOST_SLOTS = 4e9, 1024
_SLOTS_PER_GROUP = 64
# With fewer rows XLA's CPU backend takes other programs, whose sums run in another order, and a sample's bits would
# depend on how many others there are; from so many on they do not (docs/performance.md). Some may have nothing to do.
_FEWEST_SLOTS = {"cpu": 64}
_FEWEST_SLOTS_ELSEWHERE = 2
# Slots per group to which the loop goes down at the end, as shares of those at first, and how few slots are worth it. A
# CPU's step takes as long as it has slots; other devices' take nearly as long with few. Each is a loop more to compile,
# which a small model's run does not earn back.
_SHRUNK = {"cpu": (3 / 4, 1 / 2, 3 / 8, 1 / 4)}
_SHRUNK_ELSEWHERE = (1 / 2, 1 / 4)
_SHRUNK_SMALL = (1 / 2,)
_SHRUNK_FEWEST_SLOTS = 64  # no fewer than _FEWEST_SLOTS
# The compiler has 15.75 of a v5e's 16 GiB.
_TPU_USABLE = 63 / 64
# A branch for each number of blocks makes XLA's TPU backend copy the cache of all layers into another memory layout, in
# every layer; and with slots that are filled again, some slot is nearly always in the last block. Heads side by side
# are multiplied on its matrix units, in a group for each device of 'model' (docs/pods.md).
_CACHE_BLOCKS = {"tpu": 1}
# Of the logits: themselves, what is drawn from, and what the compiler keeps beside them.
_LOGITS_COPIES = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What was chosen for one device, and the bytes that it takes there.

    Attributes:
      layout: slots, groups and places.
      parts: bytes by what they are for.
      budget: bytes that there are.
    """

    layout: Layout
    parts: dict[str, int]
    budget: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        layout = self.layout
        parts = ", ".join(f"{name} {size / MIB:.0f}" for name, size in self.parts.items())
        return (
            f"{layout.slots} slots ({layout.groups} groups of {layout.slots_per_group}, {layout.places} sources each); "
            f"{self.total / MIB:.0f} MiB of {self.budget / MIB:.0f} on each device: {parts}"
        )


def choose_layout(
    *, batch: int, num_samples: int, slots: int, platform: str = "cpu", shares: Sequence[float] = _SHRUNK_SMALL
) -> Layout:
    """About `slots` slots for N samples of each of `batch` sources, or fewer where there is less to draw.

    On a device of `platform`; a CPU never has fewer than 64. `shares` of the slots are what the loop goes down to.
    """
    slots = min(slots, batch * num_samples)
    fewest = _FEWEST_SLOTS.get(platform, _FEWEST_SLOTS_ELSEWHERE)
    # A group's slots are the rows of its attention's products; with 2 N it seldom waits for a source's last sample.
    per_group = max(2, min(2 * num_samples, _SLOTS_PER_GROUP, slots))
    groups = min(batch, math.ceil(slots / per_group))
    per_group = max(2, math.ceil(max(slots, fewest) / groups))
    # One more than the slots need, so that they go on with it while the last samples of the others end.
    places = math.ceil(slots / groups / num_samples) + (num_samples > 1)
    shrunk = (round(share * per_group) for share in shares)
    return Layout(
        groups=groups,
        slots_per_group=per_group,
        places=min(places, math.ceil(batch / groups)),
        shrunk=tuple(fewer for fewer in shrunk if groups * fewer >= _SHRUNK_FEWEST_SLOTS),
        cache_blocks=_CACHE_BLOCKS.get(platform, cache_lib.MAX_BLOCKS),
    )


def plan(
    config: t5.T5Config,
    *,
    batch: int,
    num_samples: int,
    source_length: int,
    max_length: int,
    slots: int | None = None,
    beam_size: int = 0,
    cache_dtype: str | None = None,
    mesh: Mesh | None = None,
    kernel_dtype: Any = "float32",
    reward_bytes: int = 0,
    budget: int | None = None,
) -> Plan:
    """The layout of each data shard.

    Args:
      config: the network's shape.
      batch: sources of a chunk, over all shards.
      num_samples: N.
      source_length, max_length: tokens of a source, and most tokens of a sample.
      slots: how many; None for as many as are of use and fit.
      beam_size: of beam search, whose hypotheses all have a slot; 0 for samples.
      cache_dtype: of the self-attention cache; None for the activations'.
      mesh: of the shards; None for the first device alone.
      kernel_dtype: of the layers' parameters, see `t5.narrow_kernels`.
      reward_bytes: what the parameters of a reward take of each device.
      budget: bytes on each; None for what the device has (`device_bytes`).

    Raises:
      UserError: not even the fewest slots fit; names the numbers.
    """
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    batch //= shards
    budget = device_bytes(device) if budget is None else budget
    useful = _useful_slots(config, platform=device.platform)
    is_small = device.platform == "cpu" and useful > _FULL_RATE_SLOTS
    shares = _SHRUNK_SMALL if is_small else _SHRUNK.get(device.platform, _SHRUNK_ELSEWHERE)

    model_parallel = 1 if mesh is None else mesh.shape["model"]

    def planned(layout: Layout) -> Plan:
        if device.platform == "tpu" and not beam_size:
            layout = dataclasses.replace(layout, head_groups=model_parallel)
        parts = _bytes(
            config,
            layout=layout,
            batch=batch,
            num_samples=num_samples,
            source_length=source_length,
            max_length=max_length,
            cache_dtype=cache_dtype or config.dtype,
            kernel_dtype=kernel_dtype,
            model_parallel=model_parallel,
        )
        if reward_bytes:
            parts["reward's parameters"] = reward_bytes
        return Plan(layout=layout, parts=parts, budget=budget)

    if beam_size:
        layouts = [Layout(groups=batch, slots_per_group=beam_size, places=1)]
    else:
        fewest = _FEWEST_SLOTS.get(device.platform, _FEWEST_SLOTS_ELSEWHERE)
        halvings = range((useful // fewest).bit_length())
        layouts = [
            choose_layout(batch=batch, num_samples=num_samples, slots=count, platform=device.platform, shares=shares)
            for count in ([useful >> number for number in halvings] if slots is None else [slots])
        ]
    for candidate in map(planned, layouts):
        if candidate.total <= budget:
            return candidate
    raise UserError(
        f"Sampling does not fit into {budget / MIB:.0f} MiB of memory on a device: {candidate}. Choose a smaller "
        "sources_per_chunk (SOURCES_PER_CHUNK), fewer slots, a narrower cache_dtype, shorter lengths, or split the "
        "model over more devices (MODEL_PARALLEL)."
    )


def kernel_dtype(params: Any) -> Any:
    """The type of the layers' kernels in T5X's tree, or in one of its shapes."""
    kernels = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params["encoder"])
        if path[-1] == jax.tree_util.DictKey("kernel")
    ]
    return kernels[0].dtype


def device_bytes(device: Any) -> int:
    """Bytes that may be used on a device: its own limit, or for a CPU its host's memory, evenly shared.

    Not what is free at the moment: all processes of a run must compile the same program, today and tomorrow.
    """
    chip = chips.of_device(device)
    if device.platform == "tpu" and chip is not None:
        # From the table: other hosts' devices tell nothing, nor do those of a topology that is compiled for.
        return int(chip.hbm_bytes * _TPU_USABLE)
    if device.process_index != jax.process_index():
        device = jax.local_devices()[0]  # another host's tells nothing; all hosts' are alike
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // len([other for other in jax.local_devices() if other.platform == device.platform])


def _useful_slots(config: t5.T5Config, *, platform: str) -> int:
    if platform != "cpu":
        return _FULL_RATE_SLOTS_ELSEWHERE
    slots = _FULL_RATE_SLOTS
    while slots < _CPU_MOST_SLOTS and 2 * slots * _flops_per_token(config) <= _CPU_STEP_FLOPS:
        slots *= 2
    return slots


def _flops_per_token(config: t5.T5Config) -> float:
    """Of the products with weights."""
    parameters = config.num_decoder_layers * _layer_parameters(config, attentions=2)
    return 2.0 * (parameters + (config.vocab_size or 0) * config.emb_dim)


def _layer_parameters(config: t5.T5Config, *, attentions: int) -> int:
    attention = 4 * config.emb_dim * config.num_heads * config.head_dim
    return attentions * attention + (len(config.mlp_activations) + 1) * config.emb_dim * config.mlp_dim


def _bytes(
    config: t5.T5Config,
    *,
    layout: Layout,
    batch: int,
    num_samples: int,
    source_length: int,
    max_length: int,
    cache_dtype: str,
    kernel_dtype: Any,
    model_parallel: int,
) -> dict[str, int]:
    """Bytes on one device, by what they are for."""
    item, cached = jnp.dtype(config.dtype).itemsize, jnp.dtype(cache_dtype).itemsize
    width, mlp, vocab = config.num_heads * config.head_dim, config.mlp_dim, config.vocab_size or 0
    activations = len(config.mlp_activations)
    encoder = config.num_encoder_layers * _layer_parameters(config, attentions=1)
    decoder = config.num_decoder_layers * _layer_parameters(config, attentions=2)
    embeddings = vocab * config.emb_dim * (1 if config.logits_via_embedding else 2)
    per_token = 2 * config.num_decoder_layers * width  # keys and values
    scales = 2 * config.num_decoder_layers * config.num_heads * 4 if cache_dtype == "int8" else 0
    # Where the loop goes down to fewer slots, their cache is copied from the whole one.
    slots = layout.slots + layout.groups * max(layout.shrunk, default=0)
    encoding = batch * source_length * ((activations + 1) * mlp + 4 * width) * item
    encoding += batch * config.num_heads * source_length**2 * 4
    columns = cache_lib.num_columns(max_length, max_blocks=layout.cache_blocks)
    shared = {
        "parameters": jnp.dtype(kernel_dtype).itemsize * (encoder + decoder) + 4 * embeddings,
        "weights packed for decoding": item * decoder + 4 * vocab * config.emb_dim,
        "sources": batch * source_length * per_token * item,
        "sources in groups": layout.groups * layout.places * source_length * per_token * item,
        "self-attention cache": slots * columns * (per_token * cached + scales),
        "logits": _LOGITS_COPIES * layout.slots * vocab * 4,
        "encoding": encoding,
    }
    parts = {name: size // model_parallel for name, size in shared.items()}
    return parts | {"samples": 2 * batch * num_samples * max_length * 4}
