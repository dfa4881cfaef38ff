"""Training a reward whole, on ratings that a tiny network can learn."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax import cli
from rest_jax import train_reward as lib
from rest_jax.checkpoints import checkpointer
from rest_jax.data.batching import BatchPlan, LengthGroup, MixtureSpec
from rest_jax.data.parallel import ParallelData
from rest_jax.data.ratings import Table
from rest_jax.data.store import ScoredStore
from rest_jax.data.token_dataset import TokenDataset, TokenRow, write_token_dataset
from rest_jax.data.vocabulary import ByteVocabulary
from rest_jax.errors import Preempted, UserError
from rest_jax.evaluation.evaluate import Evaluation
from rest_jax.filters import Constant, Threshold
from rest_jax.grow import Growing, compile_grow
from rest_jax.improve import Improving
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.models.initial_params import initial_params
from rest_jax.models.regressor import regress
from rest_jax.models.t5 import T5Config, Transformer
from rest_jax.objectives import squared_error
from rest_jax.optimizers import adamw, constant
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.rest import ReST
from rest_jax.rewards import regressor
from rest_jax.rewards.base import Reward
from rest_jax.rewards.joined_input import JoinedInput
from rest_jax.sampling.scored import Sampling, chunk_batch
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


def config(table: Table | None, directory, **fields) -> lib.RewardTraining:
    """What GIN says."""
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
        "partitioner": Partitioner(make_mesh(devices=jax.devices()[:1])),
        "length": 120,
        "ratings": table,
        "template": "{source}:{sample}",
        "held_out": 0.3,
    }
    return lib.RewardTraining(**{**values, **fields})


GIN = """
from __gin__ import dynamic_registration
from rest_jax import optimizers
from rest_jax import train_reward
from rest_jax import training
from rest_jax.data import ratings
from rest_jax.data import vocabulary
from rest_jax.models import t5
VOCABULARY = @vocabulary.ByteVocabulary()
DROPOUT_RATE = 0.0
t5.T5Config:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 16
  num_encoder_layers = 1
  num_decoder_layers = 1
REWARD_STEPS = 80
REWARD_BATCH_SIZE = 8
REWARD_LENGTH = 120
REWARD_LEARNING_RATE = 1e-2
REWARD_OPTIMIZER = @optimizers.adamw
REWARD_EVAL_PERIOD = 40
REWARD_PATIENCE = None
REWARD_RATINGS = @ratings.Table()
ratings.Table.scale = (0, 1)
reward/training.Training:
  schedule = @optimizers.constant
  checkpoint_period = 20
  log_period = 20
REWARD_TEMPLATE = '{source}:{sample}'
train_reward.RewardTraining.held_out = 0.3
"""


@pytest.fixture(scope="module")
def trained(table, tmp_path_factory):
    """By the command: the directory, its arguments, and what it printed."""
    directory = tmp_path_factory.mktemp("reward")
    (directory / "my_reward.gin").write_text(f"{GIN}ratings.Table.path = '{table.path}'\n")
    files = ["models/nano.gin", "train_reward.gin", str(directory / "my_reward.gin")]
    command = ["train_reward", *(f"--gin_file={file}" for file in files), f"--gin.REWARD_DIR='{directory / 'reward'}'"]
    devices, printed = jax.devices()[:1], io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(jax, "devices", lambda: devices)
        assert cli.main(command) == 0
    return directory / "reward", command, printed.getvalue()


def test_the_command_writes_its_files_and_refuses_another_configuration(trained, capsys):
    directory, command, _ = trained
    for name in ("config.gin", "operative_config.gin", "run.json", "summary.json", "metrics.jsonl", "reward.json"):
        assert (directory / name).is_file()
    assert cli.main([*command, "--gin.REWARD_STEPS=3"]) == 2
    assert "another configuration" in capsys.readouterr().err


def on_device(params):
    return checkpointer.put_params(params, Partitioner(make_mesh(devices=jax.devices()[:1])))


def test_it_learns_what_the_ratings_say_and_writes_a_reward(trained):
    directory, _, printed = trained
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["agreement"]["kendall"] > 0.5
    assert summary["agreement"]["pairwise_accuracy"] > 0.75
    assert summary["agreement"]["pairs"] > 20
    assert max(tau for _, tau in summary["history"]) == pytest.approx(summary["agreement"]["kendall"], abs=1e-6)
    assert lib.format_summary(summary) in printed
    assert summary["failures_below_original"]["empty"] > 0.5
    reward = regressor.Regressor(str(directory))
    params = on_device(reward.init(BYTES))

    def tokens(*texts: str) -> np.ndarray:
        rows = np.zeros((len(texts), 12), np.int32)
        for row, text in zip(rows, texts, strict=True):
            row[: len(text) + 1] = [*BYTES.encode(text), 1]
        return rows

    batch = {"samples": tokens("xxxxxxxx", "qqqqqqqq")[None], "sources": tokens("source 99"), "references": tokens("x")}
    good, bad = reward.combine(reward.score(params, batch))[0]
    assert good > bad + 0.3


@pytest.mark.slow
def test_a_stopped_training_ends_with_the_same_reward(trained, table, tmp_path):
    directory, _, printed = trained
    asked = iter(range(1000))
    with pytest.raises(Preempted):
        lib.train_reward(config(table, tmp_path), stop_requested=lambda: next(asked) >= 50)
    assert not (tmp_path / regressor.REWARD_FILE).exists()
    report = lib.train_reward(config(table, tmp_path))
    assert report in printed
    assert lib.train_reward(config(table, tmp_path)) == report  # once there it is not made again
    params = [on_device(regressor.Regressor(str(path)).init(BYTES))["params"] for path in (directory, tmp_path)]
    jax.tree.map(np.testing.assert_array_equal, *params)


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


@pytest.mark.parametrize("template", ["{source}:{sample}", "{source}"])
def test_the_loss_is_that_of_the_scores_that_the_reward_gives(table, template):
    """Packed rows in training, single ones in scoring; the sample in the encoder, or in the decoder."""
    ratings = table.read(BYTES).take(np.arange(12))
    joined, model = JoinedInput.from_template(template, BYTES), EncoderDecoderModel(Transformer(CONFIG), BYTES, BYTES)
    params = jax.jit(lambda key: regressor.initial_regressor(model.module, key))(jax.random.key(0))
    examples = lib._examples(ratings, joined=joined, eos_id=1)
    plan = BatchPlan(MixtureSpec.single(examples), batch_size=8, source_length=64, target_length=30, pack=True, seed=0)
    assert plan.steps_in_epoch(0) == 1
    batch = plan.batch(0)
    loss, sums = jax.jit(lambda params, batch: squared_error(model, params, batch, None))(params, batch)
    rows = np.zeros((12, 64), np.int32)
    for row, encoder, sample in zip(rows, examples.joined, ratings.hypotheses, strict=True):
        whole = [*encoder, 1, *sample] if joined.sample_in_decoder else encoder
        row[: len(whole)] = whole
    scores = jax.jit(
        lambda rows: regressor.score_inputs(model.module, params, rows, joined=joined, eos_id=1, rows_per_step=12)
    )(rows)
    assert sums["weight_sum"] == 12
    np.testing.assert_allclose(loss, np.sum((np.asarray(scores) - ratings.scores) ** 2), rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ratings": None}, "set ratings"),
        ({"relative_labels": 0.3}, "relative_labels"),
        ({"held_out": 0.0}, "held_out"),
        ({"synthetic_kinds": ("permuted",)}, "synthetic"),
        ({"template": "{nothing}"}, "TEMPLATE"),
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


@dataclasses.dataclass(frozen=True)
class Shortness(Reward):
    """Compiles faster than chrF."""

    @property
    def name(self) -> str:
        return "shortness"

    def score(self, params, batch):
        return {self.name: jnp.mean(batch["samples"] == 0, axis=-1, dtype=jnp.float32)}


@pytest.mark.slow
def test_a_reward_learns_from_labelled_samples_of_a_policy_and_scores_in_grow(tmp_path):
    rows = [
        TokenRow([*BYTES.encode(text), 1], [*BYTES.encode(text), 1], text, text) for text in map(str, range(900, 940))
    ]
    write_token_dataset(tmp_path / "data", rows, info={})
    partitioner = Partitioner(make_mesh(devices=jax.devices()[:1]))
    sampling = Sampling(num_samples=2, sources_per_chunk=40)
    training = Training(steps=1, batch_size=4, learning_rate=1e-3, optimizer=adamw)
    model = EncoderDecoderModel(Transformer(CONFIG), BYTES, BYTES)
    policy = jax.jit(lambda key: initial_params(model, key))(jax.random.key(0))
    checkpointer.save_params(tmp_path / "policy", policy)
    run = ReST(
        model_dir=str(tmp_path / "run"),
        model=model,
        initial_checkpoint_path=str(tmp_path / "policy"),
        data=TokenisedData(
            task="t", vocabulary=BYTES, lengths={"inputs": 8, "targets": 8}, directory=tmp_path / "data"
        ),
        reward=regressor.Regressor(str(tmp_path / "reward")),
        partitioner=partitioner,
        bc=dataclasses.replace(training, steps=0),
        growing=Growing(sampling=sampling, filter=Threshold(0.9)),
        improving=Improving(training=training, schedule=Constant(Threshold(0.0))),
        evaluation=Evaluation(sampling=sampling),
    )
    to_train = config(
        None, tmp_path / "reward", samples=run, label=Shortness(), relative_labels=0.3, training=training, held_out=0.4
    )
    with pytest.raises(UserError, match="1 steps of BC.*TRAIN_STEPS = 0"):
        dataclasses.replace(to_train, samples=dataclasses.replace(run, bc=training))
    assert "held-out" in lib.train_reward(to_train)
    labelled = ScoredStore.open(tmp_path / "reward" / "samples" / "grow_1")
    assert labelled.stats["reward"] == "shortness"
    np.testing.assert_array_equal(labelled.stored, labelled.valid)  # whatever the run's own filter

    growing = Growing(sampling=dataclasses.replace(sampling, sources_per_chunk=8), filter=Threshold(-1.0))
    program = compile_grow(growing=growing, model=run.model, reward=run.reward, partitioner=partitioner, max_length=8)
    dataset = run.data.open("train")
    batch = chunk_batch(dataset, LengthGroup(indices=np.arange(8), padded_length=8), rows=np.arange(8), target_length=8)
    reward_params = on_device(run.reward.init(BYTES))
    grown = program(policy, reward_params, partitioner.put_batch(batch), np.uint32(0), np.uint32(1))
    survivors, files = jax.device_get(grown["survivors"]), regressor.read(str(tmp_path / "reward"))
    kept, inputs = int(grown["kept"][0]), np.zeros((16, 40), np.int32)
    assert kept > 8
    for row in range(kept):
        sample = survivors["targets"][0, row]
        ended = np.flatnonzero(sample == 1)
        sample = sample[: ended[0] if len(ended) else None]
        source = np.asarray(BYTES.encode(str(900 + survivors["row"][0, row])), np.int32)
        tokens = files.joined.join({"source": source, "sample": sample[sample > 0]})
        inputs[row, : len(tokens)] = tokens
    expected = jax.jit(lambda inputs: regress(files.module, reward_params["params"], inputs)[:, 0])(inputs)
    np.testing.assert_allclose(survivors["reward"][0, :kept], np.clip(expected, 0, 1)[:kept], rtol=1e-4, atol=1e-5)
