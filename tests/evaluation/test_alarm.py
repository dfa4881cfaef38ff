"""A policy that pleases its reward and translates worse raises an alarm; chance and honest gains raise none."""

import json

import numpy as np
import pytest

from rest_jax.errors import UserError
from rest_jax.evaluation.alarm import held_out_metrics, raise_alarms
from rest_jax.evaluation.metrics import corpus_scores
from rest_jax.rewards.bleu import BLEU
from rest_jax.rewards.chrf import ChrF
from rest_jax.rewards.combinations import Affine, Guarded, Min, WeightedSum
from rest_jax.rewards.guards import NotEmpty
from rest_jax.rewards.regressor import Regressor

WORDS = ["cat", "sat", "mat", "saw", "two", "ships", "in", "the", "wide", "bay", "before", "noon", "today"]
BOTH = ("bleu", "ter")


def write_policy(directory, name, *, share: float, reward: float) -> dict:
    """A test split in which this share of words is wrong; returns the policy's scores."""
    generator = np.random.default_rng(0)
    references = [" ".join(generator.choice(WORDS, 12)) for _ in range(60)]
    noise = np.random.default_rng(1).random((60, 12))  # policies err at the same places, so their difference is paired
    hypotheses = [
        " ".join("x" if at < share else word for word, at in zip(text.split(), row, strict=True))
        for text, row in zip(references, noise, strict=True)
    ]
    rows = [{"hypothesis": h, "reference": r} for h, r in zip(hypotheses, references, strict=True)]
    (directory / f"{name}.test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {"reward": reward, **corpus_scores(hypotheses, references)}
    (directory / f"{name}.json").write_text(json.dumps(scores))
    return scores


def alarms_of(directory, after: dict, *, metrics=BOTH):
    return raise_alarms(
        directory,
        policy="improve_1.1",
        scores=after,
        start="bc",
        metrics=metrics,
        num_resamples=200,
        seed=0,
    )


def test_the_reward_rises_and_what_is_held_out_gets_worse(tmp_path):
    before = write_policy(tmp_path, "bc", share=0.2, reward=0.3)
    after = write_policy(tmp_path, "improve_1.1", share=0.4, reward=0.4)
    bleu, ter = alarms_of(tmp_path, after)
    assert (bleu["metric"], bleu["policy"], bleu["start"]) == ("bleu", "improve_1.1", "bc")
    assert bleu["low"] <= after["bleu"] - before["bleu"] <= bleu["high"] < 0
    assert 0 < ter["low"] <= after["ter"] - before["ter"]  # TER counts errors
    for words in (
        "from bc to improve_1.1",
        "rose from 0.3000 to 0.4000",
        f"{before['bleu']:.2f} to {after['bleu']:.2f}",
    ):
        assert words in bleu["text"]
    assert json.loads(json.dumps(bleu))["score"] == [before["bleu"], after["bleu"]]
    (alone,) = alarms_of(tmp_path, after, metrics=("ter",))
    assert alone == ter


def test_what_is_no_reason_for_alarm(tmp_path):
    before = write_policy(tmp_path, "bc", share=0.2, reward=0.3)
    worse = write_policy(tmp_path, "improve_1.1", share=0.4, reward=0.3)
    assert alarms_of(tmp_path, worse) == []  # the reward did not rise
    better = write_policy(tmp_path, "improve_1.1", share=0.1, reward=0.4)
    assert alarms_of(tmp_path, better) == []
    chance = write_policy(tmp_path, "improve_1.1", share=0.2015, reward=0.4)
    assert chance["bleu"] < before["bleu"]  # one word of 720
    assert alarms_of(tmp_path, chance) == []
    (tmp_path / "bc.json").unlink()
    assert alarms_of(tmp_path, {**before, "reward": 0.9, "bleu": 0.0}) == []  # nothing to compare with


def test_what_a_reward_measures_is_not_held_out():
    assert held_out_metrics(ChrF()) == ("bleu", "ter")
    assert held_out_metrics(ChrF(word_order=2)) == ("bleu", "ter")
    assert held_out_metrics(Guarded(Min((ChrF(), BLEU())), (NotEmpty(),))) == ("ter",)
    assert held_out_metrics(Regressor("/nowhere")) == ("bleu", "chrf", "ter")
    assert held_out_metrics(WeightedSum((Regressor("/nowhere"), BLEU()), (0.5, 0.5))) == ("chrf", "ter")
    assert [reward.learned for reward in (ChrF(), Affine(Regressor("/nowhere"), 1.0))] == [False, True]


def test_a_reward_that_is_all_there_is_leaves_nothing_to_watch():
    class Everything(ChrF):
        measures = frozenset({"bleu", "chrf", "ter"})

    with pytest.raises(UserError, match=r"REWARD: chrf measures all .*bleu, chrf, ter"):
        held_out_metrics(Everything())
