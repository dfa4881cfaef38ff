"""From logits to a draw: temperature, truncation, and one uniform number per row."""

import dataclasses

import jax
import jax.numpy as jnp

from rest_jax.errors import UserError

NEGATIVE_INFINITY = -1e30  # Finite, so that differences of two masked logits are not NaN.
_BLOCK = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitProcessing:
    """How the distribution that is sampled from differs from the policy's own.

    Truncations apply to the tempered distribution, in the order of the fields. Log-probabilities that the sampler
    returns are always the policy's own, before any of this.

    Attributes:
      temperature: logits are divided by it; the paper uses 0.8. 0 means greedy: the most probable token.
      top_k: keep the k most probable tokens (ties with the k-th are kept too); 0 keeps all.
      top_p: keep the smallest set of most probable tokens whose probability reaches p (Holtzman et al. 2020), and ties
        with its least probable; 1 keeps all.
      epsilon: drop tokens less probable than this (Hewitt et al. 2022), never the most probable; 0 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        legal = {
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1], 1 being off"),
            "epsilon": (0 <= self.epsilon < 1, "in [0, 1), 0 being off"),
        }
        for name, (ok, expected) in legal.items():
            if not ok:
                raise UserError(f"LogitProcessing.{name} is {getattr(self, name)!r}; it must be {expected}.")

    def __call__(self, logits: jax.Array) -> jax.Array:
        """Logits `[..., vocab]` of the distribution to draw from; dropped tokens get a very negative one."""
        logits = logits / self.temperature
        vocab = logits.shape[-1]
        if 0 < self.top_k < vocab:
            kth = jax.lax.top_k(logits, self.top_k)[0][..., -1:]
            logits = jnp.where(logits >= kth, logits, NEGATIVE_INFINITY)
        if self.top_p < 1:
            # Sorted probabilities [..., vocab]; a token stays when those before it have not yet reached p.
            descending = jnp.sort(logits, axis=-1, descending=True)
            probabilities = jax.nn.softmax(descending, axis=-1)
            stays = jnp.cumsum(probabilities, axis=-1) - probabilities < self.top_p
            smallest = jnp.min(jnp.where(stays, descending, jnp.inf), axis=-1, keepdims=True)
            logits = jnp.where(logits >= smallest, logits, NEGATIVE_INFINITY)
        if self.epsilon > 0:
            probabilities = jax.nn.softmax(logits, axis=-1)
            largest = jnp.max(probabilities, axis=-1, keepdims=True)
            logits = jnp.where(probabilities >= jnp.minimum(self.epsilon, largest), logits, NEGATIVE_INFINITY)
        return logits


def draw(logits: jax.Array, uniform: jax.Array) -> jax.Array:
    """One token per row by inverting the cumulative distribution: exact, and with one random number a row.

    The sum runs over blocks first and then inside the chosen block, so the cost is one pass over the vocabulary.

    Args:
      logits: `[..., vocab]` float32.
      uniform: `[...]` in [0, 1).

    Returns:
      Token ids `[...]` int32. A token of probability zero is never drawn, however the sums round.
    """
    *rows, vocab = logits.shape
    blocks = -(-vocab // _BLOCK)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, [(0, 0)] * len(rows) + [(0, blocks * _BLOCK - vocab)])
    weights = weights.reshape(*rows, blocks, _BLOCK)
    sums = jnp.sum(weights, axis=-1)  # [..., blocks]
    block_ends = _ends(sums)
    total = jnp.max(block_ends, axis=-1)
    target = _below(uniform * total, total)
    block = jnp.argmax(block_ends > target[..., None], axis=-1)[..., None]  # first block whose end lies past the target
    before = jnp.take_along_axis(block_ends - sums, block, axis=-1)[..., 0]
    chosen = jnp.take_along_axis(weights, block[..., None], axis=-2)[..., 0, :]  # [..., _BLOCK]
    ends = _ends(chosen)
    inside = jnp.argmax(ends > _below(target - before, jnp.max(ends, axis=-1))[..., None], axis=-1)
    return (block[..., 0] * _BLOCK + inside).astype(jnp.int32)


def _ends(weights: jax.Array) -> jax.Array:
    """Running sums, negative where the weight is zero.

    A parallel sum groups its terms differently at each place, so it can rise, by rounding, where nothing was added.
    """
    return jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), -1.0)


def _below(value: jax.Array, limit: jax.Array) -> jax.Array:
    """`value`, but strictly less than `limit`, so that some cumulative sum always lies past it."""
    return jnp.minimum(value, jnp.nextafter(limit, jnp.zeros_like(limit)))


def legal_tokens(embedding_size: int, vocab_size: int) -> jax.Array:
    """`[embedding_size]` bool: everything the vocabulary has but padding, which may only follow EOS."""
    ids = jnp.arange(embedding_size)
    return (ids != 0) & (ids < vocab_size)
