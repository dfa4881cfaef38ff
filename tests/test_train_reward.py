"""Training a reward whole, on ratings that a tiny network can learn."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from rest_jax import cli
from rest_jax import train_reward as lib
from rest_jax.data.parallel import ParallelData
from rest_jax.data.ratings import Store, Table
from rest_jax.data.store import ScoredStore
from rest_jax.data.token_dataset import TokenDataset, TokenRow, write_token_dataset
from rest_jax.data.vocabulary import ByteVocabulary
from rest_jax.errors import Preempted, UserError
from rest_jax.evaluation.evaluate import Evaluation
from rest_jax.filters import Constant, Threshold
from rest_jax.grow import Growing
from rest_jax.improve import Improving
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.models.regressor import regress
from rest_jax.models.t5 import T5Config, Transformer
from rest_jax.optimizers import adamw, constant
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.rest import ReST, Runner
from rest_jax.rewards import regressor
from rest_jax.rewards.chrf import ChrF
from rest_jax.sampling.scored import Sampling
from rest_jax.training import Training

BYTES = ByteVocabulary()
CONFIG = T5Config(
    vocab_size=None, emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=8, mlp_dim=16
)


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Table:
    """The more of the letters are x, the better."""
    rng = np.random.default_rng(0)
    lines = ["src\tmt\tscore"]
    for source in range(60):
        for _ in range(4):
            letters = rng.choice(["x", "q"], 8, p=(share := rng.uniform(), 1 - share))
            lines.append(f"source {source}\t{''.join(letters)}\t{np.mean(letters == 'x')}")
    path = tmp_path_factory.mktemp("ratings") / "ratings.tsv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Table(path=str(path), scale=(0, 1))


def config(table: Table, directory, **fields) -> lib.RewardTraining:
    training = Training(
        steps=80,
        batch_size=8,
        learning_rate=1e-2,
        schedule=constant,
        optimizer=adamw,
        eval_period=40,
        checkpoint_period=20,
        log_period=20,
    )
    values = {
        "reward_dir": str(directory),
        "model": EncoderDecoderModel(Transformer(CONFIG), BYTES, BYTES),
        "vocabulary": BYTES,
        "training": training,
        "partitioner": Partitioner(make_mesh()),
        "length": 120,
        "ratings": table,
        "template": "{source}:{sample}",
        "held_out": 0.3,
    }
    return lib.RewardTraining(**{**values, **fields})


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward")
    return directory, lib.train_reward(config(table, directory))


def test_it_learns_what_the_ratings_say_and_writes_a_reward(trained):
    directory, report = trained
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["agreement"]["kendall"] > 0.5
    assert summary["agreement"]["pairwise_accuracy"] > 0.75
    assert summary["agreement"]["pairs"] > 20
    assert max(tau for _, tau in summary["history"]) == pytest.approx(summary["agreement"]["kendall"], abs=1e-6)
    assert f"{summary['agreement']['kendall']:.4f}" in report
    assert summary["failures_below_original"]["empty"] > 0.5
    reward = regressor.Regressor(str(directory))
    params = reward.init(BYTES)

    def tokens(*texts: str) -> np.ndarray:
        rows = np.zeros((len(texts), 12), np.int32)
        for row, text in zip(rows, texts, strict=True):
            row[: len(text) + 1] = [*BYTES.encode(text), 1]
        return rows

    batch = {"samples": tokens("xxxxxxxx", "qqqqqqqq")[None], "sources": tokens("source 99"), "references": tokens("x")}
    good, bad = reward.combine(reward.score(params, batch))[0]
    assert good > bad + 0.3


def test_a_stopped_training_ends_with_the_same_reward(trained, table, tmp_path):
    directory, report = trained
    asked = iter(range(1000))
    with pytest.raises(Preempted):
        lib.train_reward(config(table, tmp_path), stop_requested=lambda: next(asked) >= 50)
    assert not (tmp_path / regressor.REWARD_FILE).exists()
    assert lib.train_reward(config(table, tmp_path)) == report
    # Once there it is not made again.
    assert lib.train_reward(config(table, tmp_path)) == report
    for name in ("reward.json",):
        assert digest(tmp_path / name) == digest(directory / name)


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_source_is_on_one_side_and_stays_there(table):
    ratings = table.read(BYTES)
    train, held = lib._split(ratings, share=0.3, most=4000)
    keys = ratings.source_keys()
    assert set(keys[train]).isdisjoint(keys[held]) and len(train) + len(held) == len(ratings)
    fewer = ratings.take(np.arange(0, len(ratings), 2))
    _, still = lib._split(fewer, share=0.3, most=4000)
    assert set(fewer.source_keys()[still]) <= set(keys[held])
    _, capped = lib._split(ratings, share=0.3, most=30)
    assert 0 < len(capped) < len(held)


def test_synthetic_failures_and_their_labels(table):
    ratings = table.read(BYTES)
    made = lib.synthetic_failures(
        ratings, kinds=("gibberish", "copied_source", "truncated", "repeated"), number=80, vocabulary=BYTES, seed=0
    )
    assert all(10 <= len(part) <= 20 for part in made.values())
    assert not made["gibberish"].scores.any() and not made["copied_source"].scores.any()
    for source, hypothesis in zip(made["copied_source"].sources, made["copied_source"].hypotheses, strict=True):
        np.testing.assert_array_equal(source, hypothesis)
    lengths = np.asarray([len(tokens) for tokens in made["truncated"].hypotheses])
    assert lengths.max() < 8
    # 8 letters of score s, n kept: s * n / 8
    ratios = made["truncated"].scores * 8 / lengths
    np.testing.assert_allclose(ratios * 8, np.round(ratios * 8), atol=1e-4)
    assert min(len(tokens) for tokens in made["repeated"].hypotheses) > 8


def test_with_references_failures_are_made_of_them(table):
    ratings = table.read(BYTES)
    references = [np.asarray(BYTES.encode("a good reference"), np.int32)] * len(ratings)
    with_references = dataclasses.replace(ratings, references=references)
    made = lib.synthetic_failures(with_references, kinds=("truncated",), number=20, vocabulary=BYTES, seed=0)
    assert all("a good reference".startswith(BYTES.decode(tokens)) for tokens in made["truncated"].hypotheses)
    np.testing.assert_allclose(
        made["truncated"].scores, [len(BYTES.decode(t).split()) / 3 for t in made["truncated"].hypotheses], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratings": None}, "set ratings"),
        ({"held_out": 0.0}, "held_out"),
        ({"synthetic_kinds": ("permuted",)}, "synthetic"),
        ({"template": "{source}"}, "TEMPLATE"),
        ({"length": 2}, "length is 2"),
        ({"initial_checkpoint_path": "/nowhere"}, "nowhere"),
        ({"held_out": 1e-9}, "too few to hold out"),
        ({"template": "{sample} {reference}"}, "the ratings have none"),
    ],
)
def test_what_can_not_be_trained_is_refused_before_training(table, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        lib.train_reward(config(table, tmp_path / "reward", **fields))
    assert not (tmp_path / "reward").exists()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenisedData(ParallelData):
    directory: Path

    def open(self, split: str) -> TokenDataset:
        return TokenDataset.open(self.directory)


def test_a_reward_learns_from_labelled_samples_of_a_policy_and_scores_its_next_ones(tmp_path):
    rows = [
        TokenRow([*BYTES.encode(text), 1], [*BYTES.encode(text), 1], text, text) for text in map(str, range(900, 940))
    ]
    write_token_dataset(tmp_path / "data", rows, info={})
    partitioner = Partitioner(make_mesh(devices=jax.devices()[:1]))
    sampling = Sampling(num_samples=2, sources_per_chunk=40)
    training = Training(steps=1, batch_size=4, learning_rate=1e-3, optimizer=adamw)
    run = ReST(
        model_dir=str(tmp_path / "run"),
        model=EncoderDecoderModel(Transformer(CONFIG), BYTES, BYTES),
        data=TokenisedData(
            task="t", vocabulary=BYTES, lengths={"inputs": 8, "targets": 8}, directory=tmp_path / "data"
        ),
        reward=regressor.Regressor(str(tmp_path / "reward")),
        partitioner=partitioner,
        bc=training,
        growing=Growing(sampling=sampling, filter=Threshold(-1.0)),
        improving=Improving(training=training, schedule=Constant(Threshold(-1.0))),
        evaluation=Evaluation(sampling=sampling),
        improve_steps=0,
        bc_long=False,
    )
    trained = config(
        None, tmp_path / "reward", samples=run, label=ChrF(), training=training, partitioner=partitioner, held_out=0.4
    )
    assert "held-out" in lib.train_reward(trained)
    labelled = ScoredStore.open(tmp_path / "reward" / "samples" / "grow_1")
    assert labelled.stats["reward"] == "chrf"

    runner = Runner(run)
    runner.run([phase for phase in runner.phases if phase.kind != "evaluate"])
    store = ScoredStore.open(tmp_path / "run" / "grow_1")
    assert store.stats["reward"] == "regressor"
    again = Store(directory=str(store.directory)).read(BYTES)
    files = regressor.read(str(tmp_path / "reward"))
    params = run.reward.init(BYTES)["params"]
    inputs = np.zeros((len(again), 40), np.int32)
    for row, source, sample in zip(inputs, again.sources, again.hypotheses, strict=True):
        tokens = files.joined.join({"source": source, "sample": sample})
        row[: len(tokens)] = tokens
    expected = jax.jit(lambda inputs: regress(files.module, params, inputs)[:, 0])(inputs)
    np.testing.assert_allclose(again.scores, np.clip(expected, 0, 1), rtol=1e-4, atol=1e-5)
    assert np.ptp(again.scores) > 0


def test_the_command(table, tmp_path, capsys, monkeypatch):
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    gin = f"""
from __gin__ import dynamic_registration
from rest_jax.data import ratings
from rest_jax.data import vocabulary
from rest_jax.models import t5
VOCABULARY = @vocabulary.ByteVocabulary()
t5.T5Config:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 16
  num_encoder_layers = 1
  num_decoder_layers = 1
REWARD_DIR = '{tmp_path / "reward"}'
REWARD_STEPS = 2
REWARD_BATCH_SIZE = 8
REWARD_LENGTH = 64
REWARD_RATINGS = @ratings.Table()
ratings.Table.path = '{table.path}'
"""
    (tmp_path / "my_reward.gin").write_text(gin)
    files = ["models/nano.gin", "train_reward.gin", str(tmp_path / "my_reward.gin")]
    command = ["train_reward", *(f"--gin_file={file}" for file in files)]
    assert cli.main(command) == 0
    assert "pairwise accuracy" in capsys.readouterr().out
    for name in ("config.gin", "operative_config.gin", "run.json", "summary.json", "metrics.jsonl", "reward.json"):
        assert (tmp_path / "reward" / name).is_file()
    assert cli.main([*command, "--gin.REWARD_STEPS=3"]) == 2
    assert "another configuration" in capsys.readouterr().err
