"""Optimisers and learning-rate schedules by name, all from optax.

A phase makes its own optimiser from its own schedule (Improve steps have lower rates than BC), so gin binds the
functions here unevaluated: `OPTIMIZER = @optimizers.adamw`, `LEARNING_RATE = @optimizers.rsqrt`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

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
    """Adafactor as T5 uses it: no momentum, update clipping, rate relative to the parameters' scale."""
    return optax.adafactor(
        learning_rate,
        decay_rate=decay_rate,
        clipping_threshold=clipping_threshold,
        multiply_by_parameter_scale=True,
    )


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
