"""What losses need of logits [B, T, V], with a gradient that makes one pass over them and stores nothing else."""

import dataclasses
import math

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TargetStatistics:
    """Per-token reductions of logits over the vocabulary; all float32 [...], all differentiable in the logits.

    Attributes:
      log_z: logsumexp of the logits; log p(target) = target_logit - log_z.
      target_logit: the target's logit.
      logit_sum: sum of the logits.
      max_logit: largest logit; its gradient is taken as zero (it only counts correct predictions).
    """

    log_z: Array
    target_logit: Array
    logit_sum: Array
    max_logit: Array


@jax.custom_vjp
def target_statistics(logits: Array, targets: Array) -> TargetStatistics:
    """Reductions of float32 logits [..., V] at int targets [...]; see TargetStatistics."""
    max_logit = jnp.max(logits, axis=-1)
    log_z = max_logit + jnp.log(jnp.sum(jnp.exp(logits - max_logit[..., None]), axis=-1))
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
    return TargetStatistics(log_z, target_logit, jnp.sum(logits, axis=-1), max_logit)


def _forward(logits: Array, targets: Array) -> tuple[TargetStatistics, tuple[Array, Array, Array]]:
    statistics = target_statistics(logits, targets)
    return statistics, (logits, targets, statistics.log_z)


def _backward(residuals: tuple[Array, Array, Array], cotangent: TargetStatistics) -> tuple[Array, None]:
    # d log_z = softmax, d target_logit = one-hot, d logit_sum = 1: one fused pass. Autodiff of the gather would scatter
    # into a second array of zeros of the logits' size.
    logits, targets, log_z = residuals
    gradient = cotangent.log_z[..., None] * jnp.exp(logits - log_z[..., None]) + cotangent.logit_sum[..., None]
    is_target = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    return gradient + jnp.where(is_target, cotangent.target_logit[..., None], 0.0), None


target_statistics.defvjp(_forward, _backward)


def token_log_probs(logits: Array, targets: Array) -> Array:
    """log p(target) of each token. float32 [..., V], int [...] -> float32 [...], at most 0."""
    statistics = target_statistics(logits, targets)
    return statistics.target_logit - statistics.log_z


def smoothed_cross_entropy(
    statistics: TargetStatistics, vocab_size: int, *, label_smoothing: float, z_loss: float
) -> tuple[Array, Array]:
    """T5X's loss of each token and the z-loss in it, both float32 [...].

    The label distribution q gives 1 - label_smoothing to the target and spreads the rest over the other V - 1 entries.
    loss = H(q, p) - H(q) + z_loss * log_z**2, so that a perfect prediction costs 0 for any smoothing (Szegedy et al.
    2016; z-loss: Mesh TensorFlow).
    """
    confidence = 1.0 - label_smoothing
    low = label_smoothing / (vocab_size - 1)
    entropy = -(confidence * math.log(confidence) + (vocab_size - 1) * low * math.log(low + 1e-20))
    cross_entropy = statistics.log_z - (confidence - low) * statistics.target_logit - low * statistics.logit_sum
    penalty = z_loss * jnp.square(statistics.log_z)
    return cross_entropy - entropy + penalty, penalty
