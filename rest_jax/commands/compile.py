"""The command `compile`: every program of a run, compiled for a TPU topology on a machine without a TPU."""

from typing import Any

from rest_jax.commands.options import AddCommand, add_gin_options, load_config
from rest_jax.errors import UserError

PHASES = ("bc", "grow", "improve", "evaluate", "all")
COMPILE_GIN = "compile.gin"


def register(add: AddCommand) -> None:
    sub = add(
        "compile", _compile, "Compile a run for a TPU topology, without a TPU, weights or data; say what it takes."
    )
    add_gin_options(sub)
    sub.add_argument("--topology", required=True, help="of one slice, e.g. v5e:16x16")
    sub.add_argument("--slices", type=int, default=1, help="slices of that topology; REPLICAS is a multiple of it")
    sub.add_argument("--phase", choices=PHASES, default="all", help="whose programs")
    sub.add_argument("--auto", action="store_true", help="search the meshes and slots that fit, and rank them")
    sub.add_argument(
        "--effort",
        type=float,
        default=0.0,
        help="of the compiler, -1 to 1; below 0 it takes less time, for a program that is several times slower",
    )
    sub.add_argument("--json", metavar="FILE", help="also write everything that was found there")


def _compile(options: Any) -> None:
    import jax

    # The host only compiles: an accelerator of this machine has nothing to do.
    jax.config.update("jax_platforms", "cpu")

    from rest_jax import config
    from rest_jax.aot import command
    from rest_jax.rest import ReST

    if not -1.0 <= options.effort <= 1.0:
        raise UserError(f"--effort is {options.effort}; it must be from -1 to 1, and is 0 where a run compiles.")
    jax.config.update("jax_exec_time_optimization_effort", options.effort)
    # What was compiled for devices that are not here can be stored, but not read back.
    jax.config.update("jax_enable_compilation_cache", False)
    options.bindings = [f"TOPOLOGY={options.topology!r}", f"SLICES={options.slices}", *options.bindings]
    load_config(options, fallbacks={"MODEL_DIR": "''"}, also=[COMPILE_GIN])
    rest = config.build(ReST)
    if options.slices > 1 and rest.partitioner.mesh.shape["replica"] % options.slices:
        raise UserError(
            f"--slices {options.slices}: REPLICAS is {rest.partitioner.mesh.shape['replica']}; it must be a multiple "
            f"of the slices, so that only gradients travel between them. Set --gin.REPLICAS={options.slices}."
        )
    phases = command.PHASES if options.phase == "all" else (options.phase,)
    if options.auto:
        command.search(rest, phases=phases, json_file=options.json)
    else:
        command.run(rest, phases=phases, json_file=options.json)
