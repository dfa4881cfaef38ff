import pytest
import sacrebleu

from rest_jax.evaluation.metrics import corpus_scores

HYPOTHESES = ["The cat sat on the mat.", "It was raining .", "Hello"]
REFERENCES = ["The cat is sitting on the mat.", "It rained.", "Hello world"]


def test_equals_sacrebleu_and_carries_its_signatures():
    scores = corpus_scores(HYPOTHESES, REFERENCES)
    assert scores["bleu"] == sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score
    assert scores["chrf"] == sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score
    assert scores["ter"] == sacrebleu.corpus_ter(HYPOTHESES, [REFERENCES]).score
    assert set(scores["signatures"]) == {"bleu", "chrf", "ter"}
    assert all(f"version:{sacrebleu.__version__}" in signature for signature in scores["signatures"].values())
    assert "nc:6|nw:0" in scores["signatures"]["chrf"]


def test_references_score_full_marks():
    scores = corpus_scores(REFERENCES, REFERENCES)
    assert scores["bleu"] == pytest.approx(100)
    assert scores["chrf"] == pytest.approx(100)
    assert scores["ter"] == 0


def test_empty_hypotheses_are_scored_not_refused():
    assert corpus_scores(["", "", ""], REFERENCES)["chrf"] == 0


@pytest.mark.parametrize(("hypotheses", "references"), [(["a"], []), ([], [])])
def test_refuses_unaligned_or_empty(hypotheses, references):
    with pytest.raises(ValueError, match="hypothes"):
        corpus_scores(hypotheses, references)
