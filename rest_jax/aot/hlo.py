"""What a compiled program costs, read from XLA's text of it: bytes, the compiler's cycles, collectives, loop by loop.

XLA's own `cost_analysis` counts a loop's body once, however often it runs. Here a loop whose number of iterations the
compiler knows (the layers of a stack) counts that often, and one that it does not know (decoding) stands by itself, at
one iteration.
"""

import dataclasses
import math
import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
# The layout of what does not lie in HBM names its memory: S(1) is the core's own.
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LITERAL = re.compile(r"^\s*(\d+)\s*$")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_IOTA_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_MESH_GROUPS = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:\{[^{}]*\})?(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^{}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{\{(\d+),(\d+)\}")
# Between slices the hosts carry the data: what a device hands to its host is a `send` that says what is done with it.
_BETWEEN_SLICES = re.compile(
    r'_xla_megascale_target=(?:"\{([\d,:]+)\}x|\{\{([\d,]+)\}).*?_xla_megascale_transfer_type="(\w+)"'
)
_SLICE_STRIDE = 100_000  # of the numbers that devices of several slices have there
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ASYNCHRONOUS = 'custom_call_target="AsyncCollective'
_STARTS = f'{_ASYNCHRONOUS}Start"'
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Devices that exchange data, `count` times.

    Attributes:
      kind: one of COLLECTIVES.
      size: bytes that each device has of the larger side, input or output.
      group: devices that exchange with each other.
      across_slices: some of them are in different slices, so the data centre's network carries it.
      count: how often.
    """

    kind: str
    size: int
    group: int
    across_slices: bool
    count: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Of a piece of a program on one device.

    Attributes:
      cycles: the compiler's estimate, without collectives.
      hbm_bytes: read and written.
      collectives: in no order.
    """

    cycles: int = 0
    hbm_bytes: int = 0
    collectives: tuple[Collective, ...] = ()

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            cycles=self.cycles + other.cycles,
            hbm_bytes=self.hbm_bytes + other.hbm_bytes,
            collectives=merged((*self.collectives, *other.collectives)),
        )

    def __mul__(self, times: int) -> "Costs":
        return Costs(
            cycles=self.cycles * times,
            hbm_bytes=self.hbm_bytes * times,
            collectives=tuple(dataclasses.replace(each, count=each.count * times) for each in self.collectives),
        )


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of unknown length: one iteration, its condition included; of loops inside it too."""

    name: str
    costs: Costs


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A program: what runs once, and its loops of unknown length."""

    once: Costs
    loops: tuple[Loop, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    number: int | None = None  # a constant's, or which parameter it is
    is_root: bool = False


_Computation = dict[str, _Instruction]


def analyse(text: str, *, devices_per_slice: int) -> Analysis:
    """Costs of the program that `jax.stages.Compiled.as_text` shows.

    Args:
      text: optimised HLO.
      devices_per_slice: devices whose numbers in the program stand beside each other in one slice.
    """
    computations, entry = _parse(text)
    return _Reader(computations, devices_per_slice).read(entry)


def merged(collectives: Iterable[Collective]) -> tuple[Collective, ...]:
    """The same, those that are alike counted together."""
    counts: dict[Collective, int] = {}
    for each in collectives:
        key = dataclasses.replace(each, count=1)
        counts[key] = counts.get(key, 0) + each.count
    return tuple(dataclasses.replace(key, count=count) for key, count in counts.items())


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    current: _Computation | None = None
    entry = ""
    for line in text.splitlines():
        if current is None:
            header = _COMPUTATION.match(line)
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found)
            if instruction is not None:
                current[instruction.name] = instruction
    return computations, entry


def _instruction(found: re.Match[str]) -> _Instruction | None:
    rest = re.sub(r"/\*.*?\*/", "", found[3])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return None
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close]
    literal = _LITERAL.match(inside)
    return _Instruction(
        name=found[2],
        shape=rest[:end],
        opcode=opcode[1],
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
        attributes=rest[close + 1 :],
        number=int(literal[1]) if literal else None,
        is_root=bool(found[1]),
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position
    return len(text) - 1


def _array_bytes(shape: str) -> list[tuple[int, bool]]:
    """Of each array of a shape or a tuple's: its bytes, and whether it lies in HBM."""
    sizes = []
    for kind, dims, layout in _ARRAY.findall(shape):
        bits = _BITS[kind] if kind in _BITS else int((re.findall(r"\d+", kind) or ["0"])[0])
        count = math.prod(int(dim) for dim in dims.split(",") if dim)
        sizes.append((count * bits // 8, "S(" not in layout))
    return sizes


def _hbm_bytes(shape: str) -> int:
    return sum(size for size, in_hbm in _array_bytes(shape) if in_hbm)


def _total_bytes(shape: str) -> int:
    return sum(size for size, _ in _array_bytes(shape))


class _Reader:
    def __init__(self, computations: dict[str, _Computation], devices_per_slice: int) -> None:
        self._computations = computations
        self._devices_per_slice = devices_per_slice
        self._known: dict[str, Analysis] = {}
        # Of collectives that one fusion starts; many others, whose work goes on meanwhile, each show it again.
        self._started = {
            channel for body in computations.values() if _starts(body) for channel in map(_channel, body.values())
        } - {None}

    def read(self, name: str) -> Analysis:
        if name not in self._known:
            once = Costs()
            loops: list[Loop] = []
            computation = self._computations[name]
            for instruction in computation.values():
                part = self._instruction(instruction, computation)
                once += part.once
                loops += part.loops
            self._known[name] = Analysis(once, tuple(loops))
        return self._known[name]

    def _instruction(self, instruction: _Instruction, computation: _Computation) -> Analysis:
        opcode, attributes = instruction.opcode, instruction.attributes
        if opcode in _FREE or opcode.endswith("-done") or opcode == "recv":
            return Analysis(Costs())
        if opcode == "send":
            return Analysis(Costs(collectives=(self._between_slices(instruction, computation),)))
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            if _channel(instruction) in self._started and not _starts(computation):
                return Analysis(Costs())
            return Analysis(Costs(collectives=(self._collective(kind, instruction, computation),)))
        called = _CALLED.findall(attributes)
        if opcode == "while":
            return self._loop(instruction, called[0], re.findall(r"condition=%?([\w.\-]+)", attributes)[0])
        if opcode == "conditional":
            found = _BRANCHES.search(attributes)
            names = re.findall(r"%?([\w.\-]+)", found[1]) if found else called
            # What runs is known at run time; the dearest branch bounds it.
            return max(map(self.read, names), key=lambda each: (each.once.cycles, each.once.hbm_bytes))
        if opcode in ("call", "async-start"):
            return self.read(called[0])
        own = Costs(cycles=sum(map(int, _CYCLES.findall(attributes))), hbm_bytes=self._bytes(instruction, computation))
        if opcode == "fusion" and called:
            own += Costs(collectives=self.read(called[0]).once.collectives)
        return Analysis(own)

    def _loop(self, instruction: _Instruction, body: str, condition: str) -> Analysis:
        parts = [self.read(body), self.read(condition)]
        once = parts[0].once + parts[1].once
        loops = tuple(loop for part in parts for loop in part.loops)
        trips = self._trips(instruction, condition)
        if trips is not None:
            return Analysis(once * trips, loops)
        op_name = _OP_NAME.search(instruction.attributes)
        return Analysis(Costs(), (Loop(op_name[1] if op_name else instruction.name, once), *loops))

    def _trips(self, instruction: _Instruction, condition: str) -> int | None:
        """Iterations of a loop that counts to a constant, as `jax.lax.scan` and `fori_loop` do; None for others."""
        known = _TRIPS.search(instruction.attributes)
        if known:
            return int(known[1])
        body = self._computations[condition]
        root = next((each for each in body.values() if each.is_root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.attributes:
            return None
        counter, limit = (body[name] for name in root.operands)
        is_count = counter.opcode == "get-tuple-element" and limit.opcode == "constant"
        return limit.number if is_count else None

    def _collective(self, kind: str, instruction: _Instruction, computation: _Computation) -> Collective:
        given = sum(_total_bytes(computation[name].shape) for name in instruction.operands if name in computation)
        made = [size for size, _ in _array_bytes(instruction.shape)]
        # The start of an asynchronous one shows what goes in beside what comes out.
        size = max(given, max(made) if instruction.opcode.endswith("-start") and len(made) > 1 else sum(made))
        members = _group(instruction.attributes)
        slices = {number // self._devices_per_slice for number in members}
        return Collective(kind=kind, size=size, group=len(members), across_slices=len(slices) > 1)

    def _between_slices(self, instruction: _Instruction, computation: _Computation) -> Collective:
        """What a device exchanges with those in its place in the other slices."""
        found = _BETWEEN_SLICES.search(instruction.attributes)
        if found is None:
            raise ValueError(f"A device sends to its host what is not known here: {instruction.attributes}")
        members = len(found[1].split(",")) if found[1] else len({int(n) // _SLICE_STRIDE for n in found[2].split(",")})
        kind = found[3].lower().replace("_", "-")
        size = _total_bytes(computation[instruction.operands[0]].shape)
        # The larger side, as of the others.
        return Collective(
            kind=kind, size=size * members if kind == "all-gather" else size, group=members, across_slices=True
        )

    def _bytes(self, instruction: _Instruction, computation: _Computation) -> int:
        """HBM bytes that an instruction reads and writes; of a large array of which it takes a slice, the slice."""
        opcode, shapes = instruction.opcode, [computation[name].shape for name in instruction.operands]
        if opcode == "fusion":
            return self._fusion_bytes(instruction, shapes)
        if opcode.endswith("-start"):
            # To and from, of which a slice's origin is the larger; then what only the hardware reads.
            ends = _array_bytes(instruction.shape)[:2]
            return min(size for size, _ in ends) * sum(in_hbm for _, in_hbm in ends)
        if opcode in ("dynamic-slice", "gather"):
            return _hbm_bytes(instruction.shape) + _total_bytes(instruction.shape) * bool(_hbm_bytes(shapes[0]))
        if opcode in ("dynamic-update-slice", "scatter"):
            update = shapes[1] if opcode == "dynamic-update-slice" else shapes[-1]
            return _hbm_bytes(update) + _total_bytes(update) * bool(_hbm_bytes(instruction.shape))
        return _hbm_bytes(instruction.shape) + sum(map(_hbm_bytes, shapes))

    def _fusion_bytes(self, instruction: _Instruction, shapes: list[str]) -> int:
        body = self._computations[_CALLED.findall(instruction.attributes)[0]]
        updated = _updated(body)
        total = 0
        for parameter in body.values():
            if parameter.opcode != "parameter" or parameter.number is None:
                continue
            shape = shapes[parameter.number]
            if not _hbm_bytes(shape) or parameter.name in updated:
                continue
            total += min(self._read(body, parameter.name), _total_bytes(shape))
        written = [each for k, each in enumerate(_array_bytes(instruction.shape)) if k not in _carried(body)]
        if updated:
            return total + 2 * sum(updated.values()) + sum(sizes for sizes, hbm in written[len(updated) :] if hbm)
        return total + sum(size for size, in_hbm in written if in_hbm)

    def _read(self, body: _Computation, name: str) -> int:
        """Bytes that a fusion reads of the array `name`: where it takes a slice, also by a fusion inside, the slice."""
        total = 0
        for each in body.values():
            for position in (number for number, operand in enumerate(each.operands) if operand == name):
                if each.opcode == "tuple" or _exchanges(each):
                    continue
                if each.opcode in ("dynamic-slice", "gather") and position == 0:
                    total += _total_bytes(each.shape)
                elif each.opcode == "bitcast":
                    total += self._read(body, each.name)
                elif each.opcode == "fusion":
                    inner = self._computations[_CALLED.findall(each.attributes)[0]]
                    parameters = [x for x in inner.values() if x.opcode == "parameter" and x.number == position]
                    total += sum(self._read(inner, parameter.name) for parameter in parameters)
                else:
                    total += _total_bytes(body[name].shape)
        return total


def _starts(body: _Computation) -> bool:
    return any(_STARTS in each.attributes for each in body.values())


def _exchanges(instruction: _Instruction) -> bool:
    return instruction.opcode in COLLECTIVES or _ASYNCHRONOUS in instruction.attributes


def _carried(body: _Computation) -> set[int]:
    """Which of a fusion's results it only hands on: what goes on beside it in a collective."""
    root = next(each for each in body.values() if each.is_root)
    if _exchanges(root):
        return set(range(len(_array_bytes(root.shape))))
    sources = [body.get(name) for name in root.operands] if root.opcode == "tuple" else []
    return {k for k, each in enumerate(sources) if each and (each.opcode == "parameter" or _exchanges(each))}


def _channel(instruction: _Instruction) -> str | None:
    found = _CHANNEL.search(instruction.attributes)
    return found[1] if found else None


def _updated(body: _Computation) -> dict[str, int]:
    """Parameters of a fusion that it changes in place, and the bytes that it writes into each."""
    found: dict[str, int] = {}
    for each in body.values():
        if each.opcode not in ("dynamic-update-slice", "scatter"):
            continue
        origin = body.get(each.operands[0])
        while origin is not None and origin.opcode in ("bitcast", "copy", "reshape") and origin.operands:
            origin = body.get(origin.operands[0])
        update = body.get(each.operands[1] if each.opcode == "dynamic-update-slice" else each.operands[-1])
        if origin is not None and origin.opcode == "parameter" and update is not None:
            found[origin.name] = _total_bytes(update.shape)
    return found


def _group(attributes: str) -> list[int]:
    """Numbers of the first group of devices that exchange with each other."""
    if found := _IOTA_GROUPS.search(attributes):
        numbers = _device_numbers(found[3], found[4]).reshape(int(found[1]), int(found[2]))
        return [int(number) for number in numbers[0]]
    if found := _MESH_GROUPS.search(attributes):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        exchanged = re.findall(r"'(\w+)'", found[4])
        numbers = _device_numbers(found[2] or str(math.prod(axes.values())), found[3]).reshape(tuple(axes.values()))
        first = tuple(slice(None) if name in exchanged else 0 for name in axes)
        return [int(number) for number in numbers[first].ravel()]
    if found := _LISTED_GROUPS.search(attributes):
        return [int(number) for number in found[1].split(",")]
    if found := _PAIRS.search(attributes):
        return [int(found[1]), int(found[2])]
    # Counted as one device it would take no time.
    raise ValueError(f"Which devices exchange is written in a way that is not known here: {attributes}")


def _device_numbers(dims: str, order: str | None) -> npt.NDArray[np.int64]:
    """`[2,4]T(1,0)`: numbers from 0 in an array of these dimensions, transposed."""
    sizes = [int(size) for size in dims.split(",")]
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return numbers.transpose([int(axis) for axis in order.split(",")]) if order else numbers
