"""Optimisers and learning-rate schedules by name, all from optax.

A phase makes its own optimiser from its own schedule (Improve steps have lower rates than BC), so gin binds the
functions here unevaluated: `OPTIMIZER = @optimizers.adamw`, `bc/training.Training.schedule = @bc/optimizers.rsqrt`.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from rest_jax.models.t5 import SCAN_AXIS

MakeOptimizer = Callable[[optax.ScalarOrSchedule], optax.GradientTransformation]
MakeSchedule = Callable[[float, int], optax.Schedule]


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-9,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay and global-norm clipping; the betas of the public IWSLT recipe."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay),
    )


def adafactor(
    learning_rate: optax.ScalarOrSchedule, *, decay_rate: float = 0.8, clipping_threshold: float = 1.0
) -> optax.GradientTransformation:
    """Adafactor as T5 uses it: no momentum, update clipping, rate relative to the parameters' scale.

    The parameters of a layer are those of that layer alone, scanned or not, as in T5X.
    """
    return _layer_by_layer(
        optax.adafactor(
            learning_rate,
            decay_rate=decay_rate,
            clipping_threshold=clipping_threshold,
            multiply_by_parameter_scale=True,
        )
    )


class _LayerByLayer(NamedTuple):
    """State of a transformation, and of it once more for each scanned stack, with a layer axis at SCAN_AXIS."""

    others: optax.OptState
    stacks: dict[str, optax.OptState]


def _layer_by_layer(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation as it would be on separate layers, where it is given stacked ones (`scan_layers`).

    What it does must not cross parameters, such as clipping by the global norm.
    """

    def state_axes(stack: optax.Params) -> optax.OptState:
        one_layer = jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[:, 0], tree), stack)
        state = jax.eval_shape(transformation.init, one_layer)
        return jax.tree.map(lambda leaf: min(SCAN_AXIS, leaf.ndim), state)

    def init(params: optax.Params) -> optax.OptState:
        others, stacks = _split_off_stacks(params)
        if not stacks:
            return transformation.init(params)
        return _LayerByLayer(
            transformation.init(others),
            {
                name: jax.vmap(transformation.init, SCAN_AXIS, state_axes(stack))(stack)
                for name, stack in stacks.items()
            },
        )

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        other_updates, stacked_updates = _split_off_stacks(updates)
        if not stacked_updates:
            return transformation.update(updates, state, params)
        other_params, stacked_params = _split_off_stacks(params)
        new_updates, others = transformation.update(other_updates, state.others, other_params)
        new_updates, stacks = dict(new_updates), {}
        for name, stack in stacked_updates.items():
            axes = state_axes(stack)
            new_stack, stacks[name] = jax.vmap(transformation.update, (SCAN_AXIS, axes, SCAN_AXIS), (SCAN_AXIS, axes))(
                stack, state.stacks[name], stacked_params[name]
            )
            new_updates[name] = {**new_updates[name], **new_stack[name]}
        return new_updates, _LayerByLayer(others, stacks)

    return optax.GradientTransformation(init, update)


def _split_off_stacks(params: optax.Params) -> tuple[optax.Params, dict[str, optax.Params]]:
    """Parameters without scanned stacks, and the stacks as `{'encoder': {'encoder': {'encoder': ...}}}`."""
    if not isinstance(params, Mapping):
        return params, {}
    names = [name for name in ("encoder", "decoder") if isinstance(params.get(name), Mapping) and name in params[name]]
    others = {name: {key: leaf for key, leaf in params[name].items() if key != name} for name in names}
    return {**params, **others}, {name: {name: {name: params[name][name]}} for name in names}


def constant(peak: float, total_steps: int, *, warmup_steps: int = 0) -> optax.Schedule:
    """Linear warm-up to `peak`, then constant."""
    del total_steps
    return optax.warmup_constant_schedule(0.0 if warmup_steps else peak, peak, warmup_steps)


def rsqrt(peak: float, total_steps: int, *, warmup_steps: int = 4000) -> optax.Schedule:
    """Linear warm-up to `peak`, then peak·sqrt(warmup / step): the public IWSLT recipe."""
    del total_steps
    warm = max(warmup_steps, 1)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        return peak * jnp.minimum((step + 1) / warm, jnp.sqrt(warm / (step + 1)))

    return schedule


def cosine(peak: float, total_steps: int, *, warmup_steps: int = 0, final_fraction: float = 0.1) -> optax.Schedule:
    """Linear warm-up to `peak`, then half a cosine down to `final_fraction`·peak at `total_steps`."""
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else peak, peak, warmup_steps, max(total_steps, warmup_steps + 1), peak * final_fraction
    )


def linear(peak: float, total_steps: int, *, warmup_steps: int = 0, final_fraction: float = 0.0) -> optax.Schedule:
    """Linear warm-up to `peak`, then linearly down to `final_fraction`·peak at `total_steps`."""
    down = optax.linear_schedule(peak, peak * final_fraction, max(total_steps - warmup_steps, 1))
    if not warmup_steps:
        return down
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), down], [warmup_steps])
