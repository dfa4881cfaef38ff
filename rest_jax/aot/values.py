"""The largest values of a traced program: what memory goes to where the compiler gives up without a list."""

import math
from typing import Any

from jax.extend import core

from rest_jax.aot.flops import inner_jaxprs


def largest(jaxpr: core.Jaxpr, *, shards: int, count: int = 6) -> tuple[tuple[str, int], ...]:
    """Values that equations make, as (type, shape and where it comes from, bytes on a device), the largest first.

    Before the compiler has fused or reused any; as if each was split over the data shards as the batch is.

    Args:
      jaxpr: traced.
      shards: of the batch.
      count: how many of different types and shapes.
    """
    found: dict[str, tuple[str, int]] = {}
    pending = [jaxpr]
    while pending:
        inside = pending.pop()
        for equation in inside.eqns:
            pending += inner_jaxprs(equation.params)
            for variable in equation.outvars:
                aval: Any = variable.aval
                if not hasattr(aval, "shape") or not hasattr(aval.dtype, "itemsize"):
                    continue  # a token of effects, or a random key
                shape = f"{aval.dtype}[{','.join(map(str, aval.shape))}]"
                size = math.prod(aval.shape) * aval.dtype.itemsize // shards
                name = f"{shape} of {equation.primitive.name}, over {shards} data shards"
                found.setdefault(shape, (name, size))
    return tuple(sorted(found.values(), key=lambda each: -each[1])[:count])
