"""Corpus scores by sacreBLEU, with the signatures that make them comparable."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from sacrebleu.metrics import BLEU, CHRF, TER

METRICS: Mapping[str, type] = {"bleu": BLEU, "chrf": CHRF, "ter": TER}
LABELS: Mapping[str, str] = {"bleu": "BLEU", "chrf": "chrF", "ter": "TER"}


class CorpusScores(TypedDict):
    """BLEU and chrF (higher is better) and TER (lower is better), all times 100 as sacreBLEU prints them."""

    bleu: float
    chrf: float
    ter: float
    signatures: dict[str, str]


def make_metric(name: str) -> Any:
    """sacreBLEU's metric with its defaults, as in `METRICS`."""
    # `force` silences the warning about tokenised text: it is written for people who score files by hand.
    return BLEU(force=True) if name == "bleu" else METRICS[name]()


def check_pairs(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Raises ValueError when the two differ in length or are empty."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses against {len(references)} references: they must be aligned.")
    if not hypotheses:
        raise ValueError("There is no hypothesis to score: the split is empty.")


def corpus_scores(hypotheses: Sequence[str], references: Sequence[str]) -> CorpusScores:
    """Scores a test set against one reference each.

    Args:
      hypotheses: detokenised translations.
      references: detokenised references, aligned with them.

    Returns:
      The three scores and `signatures` {metric: sacreBLEU's signature}.

    Raises:
      ValueError: the two differ in length, or are empty.
    """
    check_pairs(hypotheses, references)
    scores: dict[str, float] = {}
    signatures: dict[str, str] = {}
    for name in METRICS:
        metric = make_metric(name)
        scores[name] = float(metric.corpus_score(list(hypotheses), [list(references)]).score)
        signatures[name] = str(metric.get_signature())
    return {"bleu": scores["bleu"], "chrf": scores["chrf"], "ter": scores["ter"], "signatures": signatures}
