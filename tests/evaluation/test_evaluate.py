"""Evaluation of a policy: the files and the numbers say the same, and the numbers are sacreBLEU's."""

import dataclasses
import gzip
import json

import jax
import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF, TER

from rest_jax import paths
from rest_jax.data.token_dataset import TokenDataset, TokenRow, write_token_dataset
from rest_jax.data.vocabulary import EOS_ID, SentencePieceVocabulary
from rest_jax.errors import UserError
from rest_jax.evaluation.evaluate import Evaluation, Evaluator, translation_sampling
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.rewards.chrf import ChrF
from rest_jax.sampling import LogitProcessing, Sampling

LENGTH, SAMPLES = 24, 4
VALIDATION, TEST = 10, 7
VOCABULARY = SentencePieceVocabulary("rest_jax://tasks/demo_data/vocab.model")
CONFIG = t5.T5Config(
    vocab_size=None, emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=8, mlp_dim=32
)
MODEL = EncoderDecoderModel(t5.Transformer(CONFIG), VOCABULARY, VOCABULARY)
ONE_DEVICE = Partitioner(make_mesh(data=1, devices=jax.devices()[:1]))
# Four sources a chunk, so that both splits need several, the last of them not full.
SAMPLING = Sampling(num_samples=SAMPLES, sources_per_chunk=4, processing=LogitProcessing(temperature=0.8))
EVALUATION = Evaluation(sampling=SAMPLING, selection_samples=2, selection_sources=None)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    with gzip.open(paths.resolve("rest_jax://tasks/demo_data/valid.tsv.gz"), "rt", encoding="utf-8") as file:
        pairs = [line.rstrip("\n").split("\t")[:2] for line, _ in zip(file, range(VALIDATION + TEST), strict=False)]

    def tokens(text):
        return [*VOCABULARY.encode(text)[: LENGTH - 1], EOS_ID]

    for name, chosen in (("validation", pairs[:VALIDATION]), ("test", pairs[VALIDATION:])):
        write_token_dataset(root / name, [TokenRow(tokens(s), tokens(t), s, t) for s, t in chosen], info={})
    return {name: TokenDataset.open(root / name) for name in ("validation", "test")}


@pytest.fixture(scope="module")
def params():
    shapes = {"encoder_input_tokens": (1, 1), "decoder_input_tokens": (1, 1)}
    return MODEL.get_initial_variables(jax.random.key(0), shapes)["params"]


def make_evaluator(splits, evaluation=EVALUATION):
    reward = ChrF()
    return Evaluator(
        evaluation=evaluation, model=MODEL, reward=reward, reward_params=reward.init(VOCABULARY),
        partitioner=ONE_DEVICE, lengths={"inputs": LENGTH, "targets": LENGTH}, eval_set=splits["validation"],
        test_set=splits["test"], seed=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluator(splits):
    return make_evaluator(splits)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("eval") / "eval"


@pytest.fixture(scope="module")
def scores(evaluator, params, directory):
    return evaluator.evaluate(params, directory=directory, name="improve_1.2")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_the_reward_is_the_mean_of_the_files_rewards(scores, directory):
    rows = lines(directory / "improve_1.2.validation.samples.jsonl")
    rewards = np.asarray([row["rewards"] for row in rows])
    assert rewards.shape == (VALIDATION, SAMPLES)
    # The file has six decimals.
    np.testing.assert_allclose(scores["reward"], rewards.mean(), atol=5e-7, rtol=0)
    assert scores["samples"] == rewards.size
    assert np.ptp(rewards) > 0, "a policy whose samples are all alike tests nothing"


def test_the_files_hold_the_splits_text_in_order(scores, directory, splits):
    samples, translations = (lines(directory / f"improve_1.2.{name}.jsonl") for name in ("validation.samples", "test"))
    for rows, split in ((samples, splits["validation"]), (translations, splits["test"])):
        assert [row["source_id"] for row in rows] == split.source_ids.tolist()
        assert [row["source"] for row in rows] == [split.inputs_text(i) for i in range(len(split))]
        assert [row["reference"] for row in rows] == [split.targets_text(i) for i in range(len(split))]
    assert sorted(path.name for path in directory.iterdir()) == [
        "improve_1.2.test.jsonl",
        "improve_1.2.validation.samples.jsonl",
    ]


def test_corpus_scores_are_sacrebleus_on_the_file(scores, directory):
    rows = lines(directory / "improve_1.2.test.jsonl")
    hypotheses, references = [row["hypothesis"] for row in rows], [[row["reference"] for row in rows]]
    for name, metric in (("bleu", BLEU(force=True)), ("chrf", CHRF()), ("ter", TER())):
        np.testing.assert_allclose(scores[name], metric.corpus_score(hypotheses, references).score, rtol=1e-12)
        assert scores["signatures"][name] == str(metric.get_signature())
    assert len({row["hypothesis"] for row in rows}) > 1


def test_rewards_in_the_files_are_sacrebleus_sentence_chrf_of_the_text(scores, directory, splits):
    metric = CHRF()
    rows = lines(directory / "improve_1.2.test.jsonl")
    pairs = [(row["hypothesis"], row["reward"], i) for i, row in enumerate(rows)]
    for hypothesis, reward, i in pairs:
        # The reward sees the reference cut to LENGTH tokens.
        reference = VOCABULARY.decode(splits["test"].targets(i).tolist())
        # 1e-4 is the contract of the reward.
        np.testing.assert_allclose(reward, metric.sentence_score(hypothesis, [reference]).score / 100, atol=1e-4)


def test_best_of_n_begins_at_the_mean_and_ends_at_the_mean_of_the_maxima(scores, directory):
    rewards = np.asarray([row["rewards"] for row in lines(directory / "improve_1.2.validation.samples.jsonl")])
    curve = scores["best_of_n"]
    assert len(curve) == SAMPLES
    np.testing.assert_allclose(curve[0], scores["reward"], rtol=1e-6)
    np.testing.assert_allclose(curve[-1], rewards.max(axis=1).mean(), atol=1e-6)
    assert all(a <= b for a, b in zip(curve, curve[1:], strict=False))


def test_distinct_counts_samples_of_one_source_once(scores, directory):
    rows = lines(directory / "improve_1.2.validation.samples.jsonl")
    # Different tokens may spell the same text, so the text has at most as many.
    assert sum(len(set(row["samples"])) for row in rows) <= scores["distinct"] <= scores["samples"]


def test_evaluating_again_gives_the_same(scores, evaluator, params, tmp_path, directory):
    assert evaluator.evaluate(params, directory=tmp_path, name="again") == scores
    for kind in ("test", "validation.samples"):
        assert lines(tmp_path / f"again.{kind}.jsonl") == lines(directory / f"improve_1.2.{kind}.jsonl")


def test_the_measure_for_checkpoints_is_the_first_of_the_reported_samples(evaluator, params, directory, scores):
    rewards = np.asarray([row["rewards"] for row in lines(directory / "improve_1.2.validation.samples.jsonl")])
    # A sample is a function of its index, not of how many are drawn.
    np.testing.assert_allclose(evaluator.mean_reward(params), rewards[:, :2].mean(), atol=5e-7)


@pytest.mark.slow
def test_some_sources_and_some_of_the_test_split_can_be_measured(splits, params, tmp_path, directory, scores):
    small = make_evaluator(
        splits, dataclasses.replace(EVALUATION, selection_samples=SAMPLES, selection_sources=3, max_test_sources=2)
    )
    rewards = np.asarray([row["rewards"] for row in lines(directory / "improve_1.2.validation.samples.jsonl")])
    means = rewards.mean(axis=1)
    triples = [(a + b + c) / 3 for i, a in enumerate(means) for j, b in enumerate(means[:i]) for c in means[:j]]
    assert np.min(np.abs(np.asarray(triples) - small.mean_reward(params))) < 1e-6
    small.evaluate(params, directory=tmp_path, name="bc")
    assert lines(tmp_path / "bc.test.jsonl") == lines(directory / "improve_1.2.test.jsonl")[:2]


def test_greedy_and_beam_translations_come_once_per_source():
    sampling = Sampling(num_samples=5, sources_per_chunk=4, length_multiple=24)
    greedy = translation_sampling(sampling, beam_size=1, beam_alpha=0.6)
    beam = translation_sampling(sampling, beam_size=3, beam_alpha=1.0)
    assert (greedy.num_samples, greedy.beam_size, greedy.processing.temperature) == (1, 0, 0.0)
    assert (beam.num_samples, beam.beam_size, beam.beam_alpha) == (1, 3, 1.0)
    assert (greedy.sources_per_chunk, greedy.length_multiple) == (4, 24)


@pytest.mark.parametrize(
    "name", ["selection_samples", "beam_size", "bootstrap_resamples", "selection_sources", "max_test_sources"]
)
def test_impossible_settings_are_named(name):
    with pytest.raises(UserError, match=f"{name} is 0"):
        dataclasses.replace(EVALUATION, **{name: 0})
