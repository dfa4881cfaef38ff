"""The rate at which this machine multiplies matrices: the limit that a train step and sampling are measured against."""

import time
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

Shape = tuple[int, int, int]  # [m, k] x [k, n]
SQUARES: tuple[Shape, ...] = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048))
_SECONDS = 0.05  # least time of one measurement


class MatmulRates:
    """Measures products of given shapes, again and again, and keeps the best of each.

    Args:
      shapes: (m, k, n) each.
      dtype: of the operands.
    """

    def __init__(self, shapes: Iterable[Shape], *, dtype: str = "float32") -> None:
        self.best: dict[Shape, float] = dict.fromkeys(shapes, 0.0)  # FLOP/s
        self._operands = {(m, k, n): (jnp.ones((m, k), dtype), jnp.ones((k, n), dtype)) for m, k, n in self.best}
        self._product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
        for operands in self._operands.values():
            self._product(*operands).block_until_ready()

    def measure(self) -> None:
        """One measurement of each shape."""
        for (m, k, n), operands in self._operands.items():
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < _SECONDS or not count:
                self._product(*operands).block_until_ready()
                count += 1
            rate = 2.0 * m * k * n * count / (time.perf_counter() - start)
            self.best[m, k, n] = max(self.best[m, k, n], rate)

    @property
    def limit(self) -> float:
        """The largest rate of all shapes, FLOP/s."""
        return max(self.best.values())


def lines(rates: MatmulRates) -> Sequence[str]:
    """A line per shape."""
    return [f"  {m} x {k} x {n}: {rate / 1e9:.1f} GFLOP/s" for (m, k, n), rate in rates.best.items()]


def main() -> None:
    rates = MatmulRates(SQUARES)
    for _ in range(5):
        rates.measure()
    print("\n".join(lines(rates)))


if __name__ == "__main__":
    main()
