"""Floating-point operations of a traced program: of its matrix products, which are nearly all, from shapes alone."""

import dataclasses
import math
from typing import Any

from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of a whole mesh: what runs once, and one iteration of each loop of unknown length, outermost first."""

    once: float = 0.0
    loops: tuple[float, ...] = ()

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.once + other.once, (*self.loops, *other.loops))

    def __mul__(self, times: float) -> "Flops":
        return Flops(self.once * times, tuple(each * times for each in self.loops))


def count(jaxpr: core.Jaxpr) -> Flops:
    """Two for each product and sum of a matrix product. A branch counts as its dearest."""
    total = Flops()
    for equation in jaxpr.eqns:
        total += _equation(equation)
    return total


def _equation(equation: core.JaxprEqn) -> Flops:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left, product = (_shape(variable) for variable in (equation.invars[0], equation.outvars[0]))
        return Flops(2.0 * math.prod(product) * math.prod(left[axis] for axis in contracted))
    if name == "while":
        body = count(parameters["body_jaxpr"].jaxpr) + count(parameters["cond_jaxpr"].jaxpr)
        return Flops(0.0, (body.once, *body.loops))
    if name == "cond":
        return max((count(branch.jaxpr) for branch in parameters["branches"]), key=lambda each: each.once)
    inside = sum((count(each) for each in inner_jaxprs(parameters)), Flops())
    if name == "scan":
        return Flops(inside.once * parameters["length"], inside.loops)
    if name == "shard_map":  # shapes inside are one shard's
        mesh = parameters["mesh"]
        return inside * math.prod(mesh.shape[axis] for axis in parameters["newly_manual_axes"])
    return inside


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def inner_jaxprs(parameters: dict[str, Any]) -> list[core.Jaxpr]:
    """The programs among an equation's parameters."""
    values = [each for value in parameters.values() for each in (value if isinstance(value, tuple) else (value,))]
    return [each.jaxpr if isinstance(each, core.ClosedJaxpr) else each for each in values if _is_jaxpr(each)]


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (core.ClosedJaxpr, core.Jaxpr))
