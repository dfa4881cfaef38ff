"""What drawing N samples is worth: the expected best of n, and how many of them differ."""

from collections.abc import Hashable, Iterable

import numpy as np
import numpy.typing as npt


def best_of_n_curve(rewards: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The expected maximum of n of each source's N samples, for n = 1..N, averaged over the sources.

    The mean over all C(N, n) subsets, not over some drawn ones: with r_(1) <= ... <= r_(N) sorted,

        E[max of n] = sum_i r_(i) * C(i-1, n-1) / C(N, n)

    because r_(i) is the maximum of just those subsets that hold it and n-1 smaller ones. It is unbiased for the
    expected best of n fresh samples; at n = 1 it is the mean, at n = N the maximum.

    Args:
      rewards: `[sources, samples]`, every sample counted, also those that repeat another.

    Returns:
      `[samples]`, float64, the entry n-1 for n.

    Raises:
      ValueError: not a matrix, empty, or a reward is not finite.
    """
    matrix = np.asarray(rewards, np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"rewards must be [sources, samples] and not empty, got shape {matrix.shape}.")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{int((~np.isfinite(matrix)).sum())} rewards are not finite.")
    total = matrix.shape[1]
    # [samples], means over the sources: the curve is linear in the sorted rewards.
    ordered = np.sort(matrix, axis=1).mean(axis=0)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])
    rank = np.arange(1, total + 1)  # i
    size = rank[:, None]  # n
    smaller = rank[None, :] - size  # i - n, negative where r_(i) can not be the largest of n
    # C(i-1, n-1) / C(N, n) in logarithms: the binomials themselves overflow near N = 1000.
    log_choose_smaller = log_factorial[rank - 1] - log_factorial[size - 1] - log_factorial[np.maximum(smaller, 0)]
    log_choose_all = log_factorial[total] - log_factorial[size] - log_factorial[total - size]
    weights = np.where(smaller >= 0, np.exp(log_choose_smaller - log_choose_all), 0.0)  # [n, i]
    return weights @ ordered


def distinct_samples(samples_by_source: Iterable[Iterable[Hashable]]) -> int:
    """How many samples differ from every earlier one of their source; e.g. token tuples, or strings."""
    return sum(len(set(samples)) for samples in samples_by_source)
