"""Is a difference more than the luck of this test set? Paired bootstrap by source (Koehn, 2004)."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from rest_jax.evaluation.metrics import check_pairs, make_metric

# Elements drawn at a time: bounds the memory at some tens of MB for any number of sources.
_CHUNK = 2**21


@dataclasses.dataclass(frozen=True, kw_only=True)
class BootstrapResult:
    """A minus B.

    Attributes:
      difference: on the data itself.
      low, high: the percentile interval of the difference over resamples.
      p_value: two-sided, that the difference is zero: twice the share of resamples on the other side of it.
      num_resamples: how many were drawn.
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_resamples: int

    @property
    def significant(self) -> bool:
        """The interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, *, num_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> BootstrapResult:
    """Compares two systems by the mean over sources of a measure that each source has.

    The sources are resampled, never the samples of a source: those of one source are alike, so resampling them
    separately would give an interval that is too narrow. Average over a source's samples first.

    Args:
      a, b: `[sources]`, e.g. mean reward of each source's samples; the same sources in the same order.
      num_resamples: test sets drawn with replacement.
      seed: of the draws.
      confidence: of the interval.

    Raises:
      ValueError: the shapes differ, or there is no source.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise ValueError(f"a and b must be [sources] of the same sources, got shapes {first.shape} and {second.shape}.")
    difference = first - second
    resampled = np.concatenate(
        [
            difference[drawn].mean(axis=1)
            for drawn in _resamples(difference.size, num_resamples=num_resamples, seed=seed)
        ]
    )
    return _result(float(difference.mean()), resampled, confidence=confidence)


def paired_bootstrap_corpus(
    hypotheses_a: Sequence[str],
    hypotheses_b: Sequence[str],
    references: Sequence[str],
    *,
    metric: str,
    num_resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> BootstrapResult:
    """Compares two systems by a corpus score, which is no mean over sources.

    Each resample adds up sacreBLEU's sentence statistics (n-gram matches, lengths) and computes the score from the
    sums, as sacreBLEU's own significance test does.

    Args:
      hypotheses_a, hypotheses_b, references: aligned, detokenised.
      metric: 'bleu', 'chrf' or 'ter'.
      num_resamples, seed, confidence: see `paired_bootstrap`.

    Raises:
      ValueError: the three differ in length, or are empty.
    """
    statistics = []
    for hypotheses in (hypotheses_a, hypotheses_b):
        check_pairs(hypotheses, references)
        # [sources, statistics]. sacreBLEU has no public name for these; tests compare the sums with its corpus score.
        rows = make_metric(metric)._extract_corpus_statistics(list(hypotheses), [list(references)])
        statistics.append(np.asarray(rows, np.float64))
    scorer = make_metric(metric)

    def score(sums: npt.NDArray[np.float64]) -> float:
        # Counts are whole numbers, and sacreBLEU's code for BLEU wants them as such.
        whole = [int(value) if value.is_integer() else float(value) for value in sums.tolist()]
        return float(scorer._compute_score_from_stats(whole).score)

    resampled = []
    for drawn in _resamples(len(references), num_resamples=num_resamples, seed=seed):
        for row in drawn:
            resampled.append(score(statistics[0][row].sum(axis=0)) - score(statistics[1][row].sum(axis=0)))
    difference = score(statistics[0].sum(axis=0)) - score(statistics[1].sum(axis=0))
    return _result(difference, np.asarray(resampled), confidence=confidence)


def _resamples(sources: int, *, num_resamples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yields `[resamples, sources]` indices, some resamples at a time."""
    if num_resamples < 1:
        raise ValueError(f"num_resamples is {num_resamples}; it must be at least 1.")
    generator = np.random.default_rng(seed)
    rows = max(_CHUNK // sources, 1)
    for start in range(0, num_resamples, rows):
        yield generator.integers(sources, size=(min(rows, num_resamples - start), sources))


def _result(difference: float, resampled: npt.NDArray[np.float64], *, confidence: float) -> BootstrapResult:
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(resampled, [tail, 1.0 - tail])
    count = resampled.size
    # One is added to both, so that no number of resamples claims a probability of zero (Davison & Hinkley, 1997).
    below, above = (int((resampled <= 0).sum()) + 1) / (count + 1), (int((resampled >= 0).sum()) + 1) / (count + 1)
    return BootstrapResult(
        difference=difference,
        low=float(low),
        high=float(high),
        p_value=min(2.0 * min(below, above), 1.0),
        num_resamples=count,
    )
