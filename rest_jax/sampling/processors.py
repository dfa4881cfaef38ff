"""From logits to a draw: temperature, truncation, and one uniform number per row.

The vocabulary is long, so all that reads it whole reads it as `[rows, blocks, lanes]`, token `block * LANES + lane`,
and reduces over the blocks: lane by lane, which vectorises, and in a fixed order, so that no other row changes a row's
bits.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from rest_jax.errors import UserError

NEGATIVE_INFINITY = -1e30  # Finite, so that differences of two masked logits are not NaN.
# Neighbouring tokens that are reduced side by side. The vocabularies of T5's family have whole numbers of blocks, also
# when split over as many devices as have a power of two.
LANES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitProcessing:
    """How the distribution that is sampled from differs from the policy's own.

    Truncations apply to the tempered distribution, in the order of the fields. Log-probabilities that the sampler
    returns are always the policy's own, before any of this.

    Attributes:
      temperature: logits are divided by it; the paper uses 0.8. 0 means greedy: the most probable token.
      top_k: keep the k most probable tokens (ties with the k-th are kept too); 0 keeps all.
      top_p: keep the smallest set of most probable tokens whose probability reaches p (Holtzman et al. 2020), and ties
        with its least probable (in float32); 1 keeps all.
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

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.epsilon > 0

    def __call__(self, logits: jax.Array) -> jax.Array:
        """Logits `[..., vocab]` of the distribution to draw from; dropped tokens get a very negative one."""
        logits = logits / self.temperature
        least = self.least_kept(logits)[..., None]
        return jnp.where(logits >= least, logits, NEGATIVE_INFINITY)

    def least_kept(self, logits: jax.Array) -> jax.Array:
        """The smallest tempered logit that stays, `[..., vocab] -> [...]`."""
        blocks = _blocks(logits)
        largest = _over_vocabulary(jnp.max, blocks)
        least = jnp.full_like(largest, -jnp.inf)
        if 0 < self.top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, self.top_k)[0][..., -1]
        if self.top_p < 1:
            weights = jnp.where(blocks >= _wide(least), jnp.exp(blocks - _wide(largest)), 0.0)
            smallest_weight = _nucleus(weights, self.top_p)
            least = _over_vocabulary(jnp.min, jnp.where(weights >= _wide(smallest_weight), blocks, jnp.inf))
        if self.epsilon > 0:
            weights = jnp.where(blocks >= _wide(least), jnp.exp(blocks - _wide(largest)), 0.0)
            enough = jnp.minimum(self.epsilon * _over_vocabulary(jnp.sum, weights), 1.0)
            least = _over_vocabulary(jnp.min, jnp.where(weights >= _wide(enough), blocks, jnp.inf))
        return least


def _nucleus(weights: jax.Array, p: float) -> jax.Array:
    """The largest of `weights` `[..., blocks, lanes]` in [0, 1] such that those above it do not reach p of their sum.

    By bisection over the numbers' bits, which rise with the numbers: 30 sums of the vocabulary, where sorting it would
    take some hundred times as long.
    """
    target = p * _over_vocabulary(jnp.sum, weights)

    def halve(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # What lies above `low` reaches p, what lies above `high` does not.
        low, high = bounds
        middle = (low + high) // 2
        value = jax.lax.bitcast_convert_type(middle, jnp.float32)
        reaches = _over_vocabulary(jnp.sum, jnp.where(weights > _wide(value), weights, 0.0)) >= target
        return jnp.where(reaches, middle, low), jnp.where(reaches, high, middle)

    one = jax.lax.bitcast_convert_type(jnp.ones(target.shape, jnp.float32), jnp.int32)
    _, high = jax.lax.fori_loop(0, 30, halve, (jnp.full_like(one, -1), one))
    return jax.lax.bitcast_convert_type(high, jnp.float32)


def draw(
    logits: jax.Array, uniform: jax.Array | None, *, processing: LogitProcessing, legal: npt.NDArray[np.bool_]
) -> tuple[jax.Array, jax.Array]:
    """One token per row, by inverting the cumulative distribution: exact, and with one random number a row.

    The sums run over blocks first, for each lane; then over lanes, which chooses one; then over its blocks. So tokens
    lie on the unit interval in the order of (lane, block).

    Args:
      logits: `[rows, vocab]` float32.
      uniform: `[rows]` in [0, 1); None where the temperature is 0.
      processing: temperature and truncation; with a temperature of 0 the first of the most probable tokens.
      legal: `[vocab]`, what may be drawn.

    Returns:
      Token ids `[rows]` int32, and their log-probability `[rows]` before processing and among all tokens, illegal ones
      included. A token of probability zero is never drawn, however the sums round.
    """
    # What is illegal is masked in each pass: a masked copy of the logits for all of them would cost as much as a pass.
    blocks = _blocks(logits)
    mask = np.pad(legal, (0, -len(legal) % LANES)).reshape(-1, LANES)
    largest = _over_vocabulary(jnp.max, jnp.where(mask, blocks, NEGATIVE_INFINITY))
    sums = jnp.sum(jnp.where(mask, jnp.exp(blocks - _wide(largest)), 0.0), axis=-2)  # [rows, LANES]
    log_total = largest + jnp.log(jnp.sum(sums, axis=-1))
    if not legal.all():
        # Few tokens, and none of them may hide the legal ones by its size: summed by themselves.
        log_total = jnp.logaddexp(log_total, jax.nn.logsumexp(logits[:, np.flatnonzero(~legal)], axis=-1))
    if uniform is None:
        token = _first(jnp.logical_and(blocks == _wide(largest), mask))
    else:
        if processing.temperature != 1 or processing.truncates:
            blocks = blocks / processing.temperature
            largest = largest / processing.temperature
            if processing.truncates:
                blocks = jnp.where(mask, blocks, NEGATIVE_INFINITY)
                least = processing.least_kept(blocks.reshape(logits.shape[0], -1))
                blocks = jnp.where(blocks >= _wide(least), blocks, NEGATIVE_INFINITY)
            sums = jnp.sum(jnp.where(mask, jnp.exp(blocks - _wide(largest)), 0.0), axis=-2)
        token = _invert(blocks, uniform, mask=mask, largest=largest, sums=sums)
    return token, jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - log_total


def _invert(
    blocks: jax.Array, uniform: jax.Array, *, mask: npt.NDArray[np.bool_], largest: jax.Array, sums: jax.Array
) -> jax.Array:
    """Tokens at `uniform` `[rows]` of the distribution with logits `[rows, blocks, LANES]` where `mask` is True.

    Args:
      blocks, uniform, mask: see above.
      largest: `[rows]`, of the logits.
      sums: `[rows, LANES]`, of exp(logits - largest) over the blocks.
    """
    ends = _ends(sums)
    total = jnp.max(ends, axis=-1)
    target = _below(uniform * total, total)
    lane = jnp.argmax(ends > target[:, None], axis=-1)  # the first whose end lies past the target
    before = jnp.take_along_axis(ends - sums, lane[:, None], axis=-1)[:, 0]
    column = jnp.take_along_axis(blocks, lane[:, None, None], axis=-1)[..., 0]  # [rows, blocks]
    weights = jnp.where(jnp.asarray(mask.T)[lane], jnp.exp(column - largest[:, None]), 0.0)
    ends = _ends(weights)
    block = jnp.argmax(ends > _below(target - before, jnp.max(ends, axis=-1))[:, None], axis=-1)
    return (block * LANES + lane).astype(jnp.int32)


def _ends(weights: jax.Array) -> jax.Array:
    """Running sums, negative where the weight is zero.

    A parallel sum groups its terms differently at each place, so it can rise, by rounding, where nothing was added.
    """
    return jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), -1.0)


def _below(value: jax.Array, limit: jax.Array) -> jax.Array:
    """`value`, but strictly less than `limit`, so that some cumulative sum always lies past it."""
    return jnp.minimum(value, jnp.nextafter(limit, jnp.zeros_like(limit)))


def _blocks(logits: jax.Array) -> jax.Array:
    """`[..., vocab]` -> `[..., blocks, LANES]`, filled up with impossible tokens."""
    *rows, vocab = logits.shape
    missing = -vocab % LANES
    if missing:
        logits = jnp.pad(logits, [(0, 0)] * len(rows) + [(0, missing)], constant_values=NEGATIVE_INFINITY)
    return logits.reshape(*rows, -1, LANES)


def _over_vocabulary(reduce: Callable[..., jax.Array], blocks: jax.Array) -> jax.Array:
    """`[..., blocks, LANES] -> [...]`."""
    return reduce(reduce(blocks, axis=-2), axis=-1)


def _wide(values: jax.Array) -> jax.Array:
    """`[...] -> [..., 1, 1]`."""
    return values[..., None, None]


def _first(chosen: jax.Array) -> jax.Array:
    """The first token of each row that is chosen, `[rows, blocks, LANES]` bool -> `[rows]` int32."""
    tokens = np.arange(math.prod(chosen.shape[-2:]), dtype=np.int32).reshape(chosen.shape[-2:])
    return _over_vocabulary(jnp.min, jnp.where(chosen, tokens, np.iinfo(np.int32).max))


def legal_tokens(embedding_size: int, vocab_size: int) -> npt.NDArray[np.bool_]:
    """`[embedding_size]`: everything the vocabulary has but padding, which may only follow EOS."""
    ids = np.arange(embedding_size)
    return (ids != 0) & (ids < vocab_size)
