"""What `compile` prints and writes about a run's programs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rest_jax.aot import hlo
from rest_jax.aot.measure import Measured, Part

GIB, MIB, KIB = 2**30, 2**20, 2**10


def describe(measured: Measured, *, devices: int) -> str:
    """A program's lines."""
    lines = [f"{measured.program}: compiled in {measured.compile_seconds:.0f} s"]
    if not measured.fits:
        needed = "more than that" if measured.total is None else f"{measured.total / GIB:.2f} GiB"
        lines[0] = f"{measured.program}: does not fit"
        lines.append(f"  HBM          {needed} needed of {measured.hbm / GIB:.2f} GiB on each device")
        return "\n".join([*lines, *_buffers(measured)])
    assert measured.once is not None
    assert measured.total is not None
    lines += [
        f"  HBM          {measured.total / GIB:.2f} of {measured.hbm / GIB:.2f} GiB on each device: arguments "
        f"{measured.arguments / GIB:.2f}, outputs {measured.outputs / GIB:.2f}, temporaries "
        f"{measured.temporaries / GIB:.2f}, code {measured.code / GIB:.2f}",
        f"  work         {measured.flops / 1e12:.3f} TFLOP and {measured.hbm_bytes / 1e9:.2f} GB on each device in a "
        f"call of {measured.tokens:,} tokens",
        f"  time         {_time(measured, devices)}",
    ]
    if measured.step is not None:
        duration = f" of {measured.step.seconds * 1e3:.3f} ms" if measured.timed else ""
        lines += [
            f"  decoding     {measured.slots} slots on each data shard, {measured.steps} steps{duration} "
            f"({measured.step.flops / 1e9:.2f} GFLOP, {measured.step.hbm_bytes / 1e6:.1f} MB)",
            f"  in its body  {_collectives(measured.step.collectives)}",
        ]
    lines.append(f"  outside      {_collectives(measured.once.collectives)}")
    for name, seconds in measured.other_loops:
        duration = f"{seconds * 1e3:.3f} ms in each iteration" if measured.timed else "each iteration"
        lines.append(f"  not counted  {duration} of {name}")
    return "\n".join(lines)


def hbm_text(measured: Measured) -> str:
    """Memory taken of memory there is."""
    return f"{(measured.total or 0) / GIB:.2f} of {measured.hbm / GIB:.2f} GiB"


def as_json(measured: Measured, *, devices: int) -> dict[str, Any]:
    """All of it, with what follows from it."""
    found = dataclasses.asdict(measured)
    if measured.fits:
        found |= {"flops": measured.flops, "hbm_bytes": measured.hbm_bytes}
    if measured.timed:
        found |= {
            "seconds": measured.seconds,
            "tokens_per_second": _tokens_per_second(measured),
            "tokens_per_second_per_device": _tokens_per_second(measured) / devices,
            "roofline_share": _share(measured),
        }
    return found


def advice(measured: Measured, *, is_training: bool) -> str:
    """What to change where a program does not fit."""
    if is_training:
        return (
            "more MICROBATCHES; REMAT_POLICY = 'full'; PARAMETER_PARTITIONING_DIMS = 2 "
            "(parameters and optimiser state over 'data'); a larger MODEL_PARALLEL"
        )
    return (
        f"fewer scored.Sampling.slots (now {measured.slots}); a smaller SOURCES_PER_CHUNK; a narrower "
        "scored.Sampling.cache_dtype; a larger MODEL_PARALLEL"
    )


def too_large(measured: Measured, *, is_training: bool) -> str:
    """The error for a program that does not fit."""
    largest = ", ".join(f"{name} {_size(size)}" for name, size in measured.buffers[:3])
    return (
        f"{measured.program} does not fit into {measured.hbm / GIB:.2f} GiB on each device; largest: {largest}. "
        f"Change one of: {advice(measured, is_training=is_training)}."
    )


def _buffers(measured: Measured) -> list[str]:
    lines = [f"  largest      {_size(size)}  {name}" for name, size in measured.buffers]
    return lines + [f"  planned      {_size(size)}  {name}" for name, size in measured.sampling_parts[:4]]


def _collectives(collectives: Sequence[hlo.Collective]) -> str:
    if not collectives:
        return "no collectives"
    shown = []
    for kind in dict.fromkeys(each.kind for each in collectives):
        for across in (False, True):
            same = [each for each in collectives if each.kind == kind and each.across_slices == across]
            if same:
                groups = "/".join(str(group) for group in sorted({each.group for each in same}))
                total = sum(each.count * each.size for each in same)
                where = " across slices" if across else ""
                shown.append(f"{sum(each.count for each in same)} {kind} of {groups}{where}, {_size(total)}")
    return "; ".join(shown)


def _parts(measured: Measured) -> list[tuple[Part, int]]:
    assert measured.once is not None
    return [(measured.once, 1)] + ([(measured.step, measured.steps)] if measured.step else [])


def _collective_seconds(measured: Measured) -> float:
    return sum(part.collective_seconds * times for part, times in _parts(measured))


def _tokens_per_second(measured: Measured) -> float:
    return measured.tokens / measured.seconds if measured.seconds else 0.0


def _time(measured: Measured, devices: int) -> str:
    roofline = f"roofline {measured.roofline_seconds * 1e3:.2f} ms"
    if not measured.timed:
        return f"not known: the clock of this chip, or the rate of a network that is used, is not published; {roofline}"
    return (
        f"{measured.seconds * 1e3:.2f} ms by the compiler, of which collectives "
        f"{_collective_seconds(measured) * 1e3:.2f} ms; {_rate(measured, devices)}; {roofline}, a share of "
        f"{_share(measured):.0%}"
    )


def _rate(measured: Measured, devices: int) -> str:
    rate = _tokens_per_second(measured)
    return f"{rate:,.0f} tokens/s, {rate / devices:,.0f} on each device"


def _share(measured: Measured) -> float:
    return measured.roofline_seconds / measured.seconds if measured.seconds else 0.0


def _size(size: int) -> str:
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"
