"""What every way of decoding returns."""

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

    @classmethod
    def of(cls, tokens: jax.Array, log_probs: jax.Array, *, eos_id: int) -> "Samples":
        return cls(
            tokens=tokens,
            log_probs=log_probs,
            lengths=jnp.sum(tokens != PAD_ID, axis=-1, dtype=jnp.int32),
            hit_eos=jnp.any(tokens == eos_id, axis=-1),
        )
