"""Compiles a program for its mesh and says what it takes there: memory, work, collectives, time by the compiler."""

import dataclasses
import math
import re
import time
from typing import Any

import jax

from rest_jax import chips
from rest_jax.aot import flops as flops_lib
from rest_jax.aot import hlo, values
from rest_jax.aot.programs import Program
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.partitioning import path_name
from rest_jax.sampling import memory

_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"
# "Used 20.00G of 15.75G hbm", or "... required for HLO temporaries (20.00G) exceeds available HBM (15.75G)".
_NEEDED = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT])\)?.*?(?:of |HBM \()([\d.]+)([KMGT])", re.DOTALL)
_ALLOCATION = re.compile(r"Size: ([\d.]+[KMGT])\s*\n(?:.*\n)*?.*?Shape: (\S+).*?\n(?:.*\n)*?.*?Allocation type: (.+)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A program's work on one device, or one iteration of its decode loop."""

    flops: float
    hbm_bytes: int
    compute_seconds: float  # the compiler's cycles at the chip's clock
    collective_seconds: float  # bytes over the links' rate
    collectives: tuple[hlo.Collective, ...]

    @property
    def seconds(self) -> float:
        """As if nothing was exchanged while something is computed."""
        return self.compute_seconds + self.collective_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One program on one topology; bytes, FLOP and seconds of one device and one call.

    Attributes:
      program: its name.
      fits: it compiled within the device's memory.
      hbm: bytes that there are.
      arguments, outputs, temporaries, code: bytes; outputs without those that reuse an argument's memory.
      total: bytes at the worst moment, code included, which can be less than their sum. Where it does not fit, what the
        compiler asked for, None if it did not say.
      buffers: (what, bytes), the largest first: where it failed named by the compiler, or if it gave
        no list the traced program's; else the arguments.
      sampling_parts: (what, bytes) of the memory plan of sampling.
      slots: of each data shard; None for a train step.
      samples, tokens: that one call draws or trains on, on all devices, at most.
      once, step: what runs once, and one step of the decode loop at all its slots.
      steps: of the decode loop, if every sample has as many tokens as it may.
      other_loops: loops of unknown length beside decoding, with the compiler's seconds of one iteration.
      compile_seconds: wall time.
      timed: the chip's clock is known, and the rate of every link that is used; `seconds` are 0 where not.
    """

    program: str
    fits: bool
    hbm: int
    compile_seconds: float
    arguments: int = 0
    outputs: int = 0
    temporaries: int = 0
    code: int = 0
    total: int | None = None
    buffers: tuple[tuple[str, int], ...] = ()
    sampling_parts: tuple[tuple[str, int], ...] = ()
    slots: int | None = None
    tokens: int = 0
    once: Part | None = None
    step: Part | None = None
    steps: int = 0
    other_loops: tuple[tuple[str, float], ...] = ()
    roofline_seconds: float = 0.0
    timed: bool = False

    @property
    def seconds(self) -> float:
        """By the compiler, of one call."""
        assert self.once is not None
        if not self.timed:
            return 0.0
        return self.once.seconds + (self.step.seconds * self.steps if self.step else 0.0)

    @property
    def flops(self) -> float:
        assert self.once is not None
        return self.once.flops + (self.step.flops * self.steps if self.step else 0.0)

    @property
    def hbm_bytes(self) -> int:
        assert self.once is not None
        return self.once.hbm_bytes + (self.step.hbm_bytes * self.steps if self.step else 0)


def measure(program: Program, *, model: Any, lengths: dict[str, int]) -> Measured:
    """Compiles `program`. What does not fit comes back with `fits` False; any other failure of the compiler is raised.

    Args:
      program: of `programs.programs`.
      model: the run's.
      lengths: `{'inputs': S, 'targets': T}`.
    """
    mesh = program.partitioner.mesh
    device = mesh.devices.flat[0]
    chip = chips.of_device(device)
    hbm = memory.device_bytes(device)
    plan = _plan(program, model=model, lengths=lengths)
    common: dict[str, Any] = {
        "program": program.name,
        "hbm": hbm,
        "slots": plan.layout.slots if plan else None,
        "sampling_parts": tuple(sorted(plan.parts.items(), key=lambda item: -item[1])) if plan else (),
        "tokens": _tokens(program, lengths=lengths),
    }
    traced = program.trace()
    started = time.monotonic()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        needed, buffers = read_out_of_memory(str(error))
        return Measured(
            **common,
            fits=False,
            compile_seconds=time.monotonic() - started,
            total=needed,
            arguments=sum(size for _, size in _arguments(program)),
            buffers=buffers or _largest(program, traced.jaxpr.jaxpr),
        )
    seconds = time.monotonic() - started
    slices = {getattr(each, "slice_index", 0) for each in mesh.devices.flat}
    analysis = hlo.analyse(compiled.as_text(), devices_per_slice=mesh.devices.size // len(slices))
    work = flops_lib.count(traced.jaxpr.jaxpr) * (1 / mesh.devices.size)
    decoding = sorted((loop for loop in analysis.loops if "shard_map" in loop.name), key=lambda loop: loop.costs.cycles)
    once = _part(analysis.once, flops=work.once, chip=chip)
    step = _part(decoding[-1].costs, flops=max(work.loops), chip=chip) if plan and decoding else None
    steps = _steps(program, slots=plan.layout.slots, lengths=lengths) if plan and step else 0
    rest = [loop for loop in analysis.loops if loop not in decoding]
    stats = compiled.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    # At the worst moment; temporaries that are never there together add up to more.
    peak = stats.peak_memory_in_bytes + stats.generated_code_size_in_bytes
    return Measured(
        **common,
        fits=True,
        compile_seconds=seconds,
        arguments=stats.argument_size_in_bytes,
        outputs=outputs,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        total=peak,
        buffers=_arguments(program)[:6],
        once=once,
        step=step,
        steps=steps,
        other_loops=tuple((loop.name, _seconds(loop.costs.cycles, chip)) for loop in rest),
        roofline_seconds=_roofline(once, chip) + (_roofline(step, chip) * steps if step else 0.0),
        timed=_timed(once, chip) and (step is None or _timed(step, chip)),
    )


def read_out_of_memory(message: str) -> tuple[int | None, tuple[tuple[str, int], ...]]:
    """What the TPU's compiler says that it needed, and its largest buffers as (shape and kind, bytes)."""
    found = _NEEDED.search(message)
    needed = int(float(found[1]) * _UNITS[found[2]]) if found else None
    buffers = [
        (f"{shape} ({kind.strip()})", int(float(size[:-1]) * _UNITS[size[-1]]))
        for size, shape, kind in _ALLOCATION.findall(message)
    ]
    return needed, tuple(sorted(buffers, key=lambda item: -item[1])[:6])


def _part(costs: hlo.Costs, *, flops: float, chip: chips.Chip | None) -> Part:
    return Part(
        flops=flops,
        hbm_bytes=costs.hbm_bytes,
        compute_seconds=_seconds(costs.cycles, chip),
        collective_seconds=sum(_exchange_seconds(each, chip) for each in costs.collectives),
        collectives=costs.collectives,
    )


def _timed(part: Part, chip: chips.Chip | None) -> bool:
    if chip is None or chip.clock is None:
        return False
    return chip.dcn_bandwidth is not None or not any(each.across_slices for each in part.collectives)


def _seconds(cycles: int, chip: chips.Chip | None) -> float:
    return cycles / chip.clock if chip is not None and chip.clock else 0.0


def _exchange_seconds(collective: hlo.Collective, chip: chips.Chip | None) -> float:
    """A ring's time, both directions at once: an all-reduce moves its bytes twice, the others once."""
    if chip is None or collective.group < 2:
        return 0.0
    rate = chip.dcn_bandwidth if collective.across_slices else chip.link_bandwidth
    if rate is None:
        return 0.0
    passes = 2 if collective.kind == "all-reduce" else 1
    return collective.count * passes * collective.size * (collective.group - 1) / collective.group / rate


def _roofline(part: Part, chip: chips.Chip | None) -> float:
    """The least time: whichever is longer, the products at peak rate or the bytes at full bandwidth."""
    return 0.0 if chip is None else max(part.flops / chip.flops, part.hbm_bytes / chip.hbm_bandwidth)


def _plan(program: Program, *, model: Any, lengths: dict[str, int]) -> memory.Plan | None:
    sampling = program.sampling
    if sampling is None or not isinstance(model, EncoderDecoderModel):
        return None
    return memory.plan(
        model.module.config,
        batch=sampling.sources_per_chunk,
        num_samples=sampling.num_samples,
        source_length=lengths["inputs"],
        max_length=lengths["targets"],
        slots=sampling.slots,
        beam_size=sampling.beam_size,
        cache_dtype=sampling.cache_dtype,
        mesh=program.partitioner.mesh,
        kernel_dtype=memory.kernel_dtype(program.arguments[0]),
        reward_bytes=program.reward_bytes,
    )


def _tokens(program: Program, *, lengths: dict[str, int]) -> int:
    if program.training is not None:
        return program.training.batch_size * lengths["targets"]
    assert program.sampling is not None
    return program.sampling.sources_per_chunk * program.sampling.num_samples * lengths["targets"]


def _steps(program: Program, *, slots: int, lengths: dict[str, int]) -> int:
    assert program.sampling is not None
    sources = program.sampling.sources_per_chunk // program.partitioner.num_batch_shards
    if program.sampling.beam_size:
        return lengths["targets"]
    return math.ceil(sources * program.sampling.num_samples * lengths["targets"] / slots)


def _largest(program: Program, jaxpr: Any) -> tuple[tuple[str, int], ...]:
    """Arguments and the program's own values together."""
    made = values.largest(jaxpr, shards=program.partitioner.num_batch_shards)
    return tuple(sorted((*made, *_arguments(program)), key=lambda item: -item[1])[:6])


def _arguments(program: Program) -> tuple[tuple[str, int], ...]:
    """Arguments with their bytes on one device, the largest first."""
    leaves = jax.tree_util.tree_leaves_with_path(program.arguments)
    sizes = [
        (
            path_name(path[1:]) or path_name(path),
            math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize,
        )
        for path, leaf in leaves
    ]
    return tuple(sorted(sizes, key=lambda item: -item[1]))
