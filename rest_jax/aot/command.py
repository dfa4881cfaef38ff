"""What the command `compile` does."""

import json
from pathlib import Path
from typing import Any

from rest_jax import chips
from rest_jax.aot import report
from rest_jax.aot.auto import Choice, candidates
from rest_jax.aot.measure import Measured, measure
from rest_jax.aot.programs import PHASES, Program, has, programs
from rest_jax.errors import UserError
from rest_jax.rest import ReST

__all__ = ["PHASES", "run", "search"]


def run(config: ReST, *, phases: tuple[str, ...], json_file: str | None) -> None:
    """Compiles the programs of `phases` and prints what each takes.

    Raises:
      UserError: one does not fit; after all were tried.
    """
    print(_header(config), flush=True)
    found: list[dict[str, Any]] = []
    failed: list[str] = []
    for program in programs(config, phases=phases):
        try:
            measured = _measure(config, program)
        except UserError as error:  # the memory plan found no room before anything was compiled
            print(f"{program.name}: {error}", flush=True)
            found.append({"program": program.name, "fits": False, "reason": str(error)})
            failed.append(f"{program.name} does not fit: {error}")
            continue
        print(report.describe(measured, devices=_devices(config)), flush=True)
        found.append(_as_json(config, measured))
        if not measured.fits:
            failed.append(report.too_large(measured, is_training=program.training is not None))
    _write(json_file, {**_facts(config), "programs": found})
    if failed:
        raise UserError(" ".join(failed))


def search(config: ReST, *, phases: tuple[str, ...], json_file: str | None) -> None:
    """Tries meshes and slots, and prints those that fit for each program, the fastest by the compiler first, or by the
    roofline where a chip's clock is not known.

    Raises:
      UserError: for some program there is none.
    """
    print(_header(config), flush=True)
    ranked: dict[str, list[tuple[Choice, Measured]]] = {}
    wanted = tuple(phase for phase in phases if has(config, phase))
    made_for: set[str] = set()
    for choice in candidates(config, phases=wanted):
        try:
            made = programs(choice.config, phases=(choice.phase,))
        except UserError as error:  # heads, widths or a batch that this mesh can not divide
            print(f"{choice}: {error}", flush=True)
            continue
        made_for.add(choice.phase)
        for program in made:
            ranked.setdefault(program.name, [])
            try:
                measured = _measure(choice.config, program)
            except UserError as error:  # the memory plan found no room before anything was compiled
                print(f"{choice}: {program.name}: {error}", flush=True)
                continue
            print(f"{choice}\n{report.describe(measured, devices=_devices(config))}", flush=True)
            if measured.fits:
                ranked[program.name].append((choice, measured))
    missing = [phase for phase in wanted if phase not in made_for]
    missing += [name for name, choices in ranked.items() if not choices]
    lines = []
    for name, choices in ranked.items():
        timed = all(measured.timed for _, measured in choices)
        choices.sort(key=lambda each: _seconds(each[1], timed) / each[1].tokens)
        for rank, (choice, measured) in enumerate(choices, start=1):
            per_token = _seconds(measured, timed) / measured.tokens * 1e9
            by = "" if timed else " at the roofline"
            lines.append(f"{name} {rank}. {choice}: {per_token:.2f} ns a token{by}, {report.hbm_text(measured)}")
    print("\n".join(["", *lines]))
    _write(
        json_file,
        {
            **_facts(config),
            "ranked": {
                name: [{"choice": str(choice), **_as_json(choice.config, measured)} for choice, measured in choices]
                for name, choices in ranked.items()
            },
        },
    )
    if missing or not ranked:
        raise UserError(
            f"No mesh of {_devices(config)} devices was found that holds {', '.join(missing) or 'any program'}: take a "
            "larger topology, a smaller SOURCES_PER_CHUNK, more MICROBATCHES or REMAT_POLICY = 'full'."
        )


def _seconds(measured: Measured, timed: bool) -> float:
    return measured.seconds if timed else measured.roofline_seconds


def _measure(config: ReST, program: Program) -> Measured:
    return measure(program, model=config.model, lengths=dict(config.data.lengths))


def _devices(config: ReST) -> int:
    return int(config.partitioner.mesh.devices.size)


def _facts(config: ReST) -> dict[str, Any]:
    mesh = config.partitioner.mesh
    return {"device_kind": mesh.devices.flat[0].device_kind, "devices": _devices(config), "mesh": dict(mesh.shape)}


def _as_json(config: ReST, measured: Measured) -> dict[str, Any]:
    return report.as_json(measured, devices=_devices(config))


def _header(config: ReST) -> str:
    mesh = config.partitioner.mesh
    device = mesh.devices.flat[0]
    hosts = len({each.process_index for each in mesh.devices.flat})
    shape = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    chip = chips.of_device(device)
    rates = (
        "not in the table of chips: no times"
        if chip is None
        else f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.hbm_bandwidth / 1e9:.0f} GB/s"
    )
    return f"{mesh.devices.size} x {device.device_kind} on {hosts} hosts ({rates}); mesh {shape}"


def _write(json_file: str | None, found: dict[str, Any]) -> None:
    if json_file is not None:
        Path(json_file).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
