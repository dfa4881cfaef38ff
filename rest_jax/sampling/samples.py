"""What every way of decoding returns."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

PAD_ID = 0


@flax.struct.dataclass
class Samples:
    tokens: jax.Array  # [batch, num_samples, max_length] int32; EOS inside, padding after it
    log_probs: jax.Array  # [batch, num_samples] float32: log π(y|x), natural log, over all tokens incl. EOS
    lengths: jax.Array  # [batch, num_samples] int32: tokens incl. EOS
    hit_eos: jax.Array  # [batch, num_samples] bool: False when max_length cut the sample
    # [batch] int32: slot-steps that decoding took, evenly over a data shard's sources, so that they add up; each could
    # have made one token. 0 where it is not known (models of T5X's own).
    slot_steps: jax.Array

    @classmethod
    def of(cls, tokens: jax.Array, log_probs: jax.Array, *, eos_id: int, slot_steps: jax.Array) -> "Samples":
        return cls(
            tokens=tokens,
            log_probs=log_probs,
            lengths=jnp.sum(tokens != PAD_ID, axis=-1, dtype=jnp.int32),
            hit_eos=jnp.any(tokens == eos_id, axis=-1),
            slot_steps=slot_steps,
        )


def spread(total: jax.Array, real: jax.Array) -> jax.Array:
    """A whole number in even parts, `[batch]` int32, that add up to it; none where `real` `[batch]` is False."""
    count = jnp.maximum(jnp.sum(real, dtype=jnp.int32), 1)
    rank = jnp.cumsum(real, dtype=jnp.int32) - 1
    return jnp.where(real, total // count + (rank < total % count), 0).astype(jnp.int32)


def log_probabilities(model: Any, params: Any, *, encoder_input_tokens: jax.Array, tokens: jax.Array) -> jax.Array:
    """log π of samples `[batch, num_samples, length]`, natural log, summed over all tokens incl. EOS. -> `[batch, N]`.

    By teacher forcing with `model.score_batch`, ours or T5X's; one sample of each source at a time, which takes the
    memory of one batch.
    """

    def one_sample(targets: jax.Array) -> jax.Array:  # [batch, length] -> [batch]
        return model.score_batch(
            params,
            {
                "encoder_input_tokens": encoder_input_tokens,
                "decoder_input_tokens": jnp.pad(targets[:, :-1], ((0, 0), (1, 0))),
                "decoder_target_tokens": targets,
                "decoder_loss_weights": (targets != PAD_ID).astype(jnp.float32),
            },
        )

    return jax.lax.map(one_sample, tokens.swapaxes(0, 1)).swapaxes(0, 1)
