"""Abstract devices of a named TPU topology, as the compiler in the libtpu wheel makes them."""

import functools
import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from rest_jax.errors import UserError

EXAMPLES = "'v5e:16x16' (256 chips), 'v5e:2x4' (one host), 'v5p:4x8x8', 'v6e:16x16', 'tpu7x:4x4x4'"


@functools.cache  # Gin asks for each mesh that it builds; the compiler shall see the same devices.
def devices(*, name: str, slices: int = 1) -> tuple[Any, ...]:
    """All devices of a topology: what `partitioning.make_mesh` takes in place of `jax.devices()`.

    Args:
      name: generation and shape of one slice, such as 'v5e:16x16'.
      slices: how many of them; more than one are joined by the data centre's network.

    Raises:
      UserError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology {name!r} needs libtpu, the TPU's compiler, which runs without a TPU: "
            "pip install 'rest_jax[tpu-compile]'"
        )
    if slices < 1:
        raise UserError(f"--slices is {slices}; it must be at least 1.")
    # Else libtpu asks the cloud's metadata server, which a machine outside has not, for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # No TPU is used, so several compilations may go on at once.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {} if slices == 1 else {"num_slices": slices}
    if name.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device of a chip's two cores, as JAX has it on real ones
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology {name!r}: {reason}. Legal are names such as {EXAMPLES}.") from error
    return tuple(description.devices)
