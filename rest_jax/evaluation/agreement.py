"""How a metric's scores agree with labels: the measures of WMT's metrics task."""

import numpy as np
import numpy.typing as npt
import scipy.stats

Floats = npt.NDArray[np.floating]


def kendall(scores: Floats, labels: Floats) -> float:
    """Kendall's tau-b over all rows; 0 where either is constant."""
    return _correlation(scipy.stats.kendalltau, scores, labels)


def agreement(scores: Floats, labels: Floats, *, groups: npt.ArrayLike) -> dict[str, float]:
    """Agreement of `scores` with `labels`, [rows] each.

    Args:
      scores, labels: higher is better in both.
      groups: [rows], equal for rows of one source.

    Returns:
      `pearson`, `spearman`, `kendall` (tau-b) over all rows, 0 where either is constant; `pairwise_accuracy`: the share
      of pairs of one source with different labels that the scores order as the labels do, an equal score counting half,
      NaN without such pairs; `pairs`: their number.
    """
    right, pairs = 0.0, 0
    order = np.argsort(groups, kind="stable")
    _, starts = np.unique(np.asarray(groups)[order], return_index=True)
    for rows in np.split(order, starts[1:]):
        label = np.sign(labels[rows][:, None] - labels[rows])
        score = np.sign(scores[rows][:, None] - scores[rows])
        above = label > 0  # each pair once
        pairs += int(above.sum())
        right += float(((1 + score) / 2)[above].sum())
    return {
        "pearson": _correlation(scipy.stats.pearsonr, scores, labels),
        "spearman": _correlation(scipy.stats.spearmanr, scores, labels),
        "kendall": kendall(scores, labels),
        "pairwise_accuracy": right / pairs if pairs else float("nan"),
        "pairs": pairs,
    }


def _correlation(measure: object, scores: Floats, labels: Floats) -> float:
    if np.ptp(scores) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(measure(np.asarray(scores, np.float64), np.asarray(labels, np.float64)).statistic)  # type: ignore[operator]
