"""The command `compile`: every program of a run, compiled for a TPU topology on a machine without a TPU."""

import os
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
    sub.add_argument("--json", metavar="FILE", help="also write everything that was found there")


def _compile(options: Any) -> None:
    # The host only compiles: another accelerator of this machine has nothing to do.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from rest_jax import config
    from rest_jax.aot import command
    from rest_jax.rest import ReST

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
