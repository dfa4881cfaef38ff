"""A whole run with T5X's own model class, network and gin file, through the commands.

Skipped where t5x is absent; docs/t5x.md says what it needs.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import seqio

from rest_jax import cli, config
from rest_jax.data import batching
from rest_jax.models.initial_params import initial_params
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.rest import ReST
from rest_jax.tasks import parallel_text
from rest_jax.training import Training, compile_train_step, initial_state

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what T5X imports
    pytest.importorskip("t5x.models")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
VOCABULARY = Path(__file__).parent.parent / "tasks" / "demo_data" / "vocab.model"
WORDS = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four", "fünf": "five", "sechs": "six"}
# T5X's own file, as it is, then what a user of T5X sets: sizes, the vocabulary's file, DROPOUT_RATE.
GIN = """
from __gin__ import dynamic_registration
import seqio
from rest_jax import filters
from t5x.examples.t5 import network
include 't5x/examples/t5/t5_1_1/base.gin'
include 'rewards/chrf.gin'
include 'rest.gin'
MIXTURE_OR_TASK_NAME = 't5x_demo'
TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 12}
seqio.SentencePieceVocabulary.sentencepiece_model_file = '{vocabulary}'
CACHE_DIR = '{cache}'
DROPOUT_RATE = 0.1
USE_CACHED_TASKS = False
EVAL_STEPS = 20
network.T5Config:
  vocab_size = 2048
  dtype = 'float32'
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 16
  num_encoder_layers = 1
  num_decoder_layers = 1
TRAIN_STEPS = 6
BATCH_SIZE = 8
WARMUP_STEPS = 2
EVAL_PERIOD = 3
GROW_STEPS = 1
IMPROVE_STEPS = 2
NUM_SAMPLES = 4
SOURCES_PER_CHUNK = 16
IMPROVE_TRAIN_STEPS = 2
IMPROVE_EVAL_PERIOD = 2
SCHEDULE = @filters.TopKSchedule()
filters.TopKSchedule.ks = (2, 1)
EVAL_SAMPLES = 2
SELECTION_SAMPLES = 2
BC_LONG = False
"""
# The same network, ours: it takes T5X's parameters.
OURS = """
from __gin__ import dynamic_registration
from rest_jax.data import vocabulary
from rest_jax.models import t5
include 'models/nano.gin'
include 'rewards/chrf.gin'
include 'rest.gin'
MIXTURE_OR_TASK_NAME = 't5x_demo'
TASK_FEATURE_LENGTHS = {'inputs': 16, 'targets': 12}
VOCABULARY = @vocabulary.SentencePieceVocabulary()
vocabulary.SentencePieceVocabulary.sentencepiece_model_file = '{vocabulary}'
MODEL_DIR = ''
TRAIN_STEPS = 1
BATCH_SIZE = 8
t5.T5Config:
  vocab_size = 2048
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 16
  num_encoder_layers = 1
  num_decoder_layers = 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("t5x")
    words = list(WORDS.items())
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("validation", 8), ("test", 8)):
        rows = [[words[i] for i in rng.integers(0, len(words), 3)] for _ in range(count)]
        lines = ["\t".join(" ".join(pair[side] for pair in row) for side in (0, 1)) for row in rows]
        (root / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    splits = {split: root / f"{split}.tsv" for split in ("train", "validation", "test")}
    parallel_text.register_parallel_text("t5x_demo", splits=splits, vocabulary=VOCABULARY)
    for name, text in (("run.gin", GIN), ("ours.gin", OURS)):
        (root / name).write_text(text.replace("{vocabulary}", str(VOCABULARY)).replace("{cache}", str(root / "cache")))
    yield root
    seqio.TaskRegistry.remove("t5x_demo")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """MODEL_DIR of BC, one Grow and two Improve steps."""
    model_dir, devices = folder / "run", jax.devices()[:1]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(jax, "devices", lambda: devices)
        assert cli.main(["run", f"--gin_file={folder / 'run.gin'}", f"--gin.MODEL_DIR='{model_dir}'"]) == 0
    return model_dir


def test_bc_grow_improve_and_evaluation_run(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    phases = {phase["name"]: phase for phase in summary["phases"]}
    assert list(phases) == ["bc", "grow_1", "improve_1.1", "improve_1.2"]
    assert phases["grow_1"]["samples"] == 32 * 4 and phases["grow_1"]["distinct"] > 32
    assert phases["improve_1.1"]["kept"] > phases["improve_1.2"]["kept"] > 0
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses and all(0 < loss < 10 for loss in losses)  # a token of 2,048 costs log 2048 = 7.6 at first
    assert "from t5x import models" in (finished / "operative_config.gin").read_text()
    assert "decoder/logits_dense/kernel" in (finished / "model-info.txt").read_text()


def test_the_same_command_again_changes_nothing(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in finished.glob("grow_1/**/*.arrow")}
    assert cli.main(["run", f"--model_dir={finished}", "--dry_run"]) == 0
    captured = capsys.readouterr()
    assert "7, of which 7 are finished" in captured.out
    assert "USE_CACHED_TASKS is T5X's" in captured.err and "EVAL_STEPS is T5X's" in captured.err
    assert before and before == {path: path.read_bytes() for path in finished.glob("grow_1/**/*.arrow")}


def test_its_policy_translates_the_same_in_our_own_model(
    finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "lines.txt").write_text("eins zwei drei\nsechs\n\nvier fünf eins\n", encoding="utf-8")
    options = [str(folder / "lines.txt"), f"--checkpoint={finished / 'policy'}", "--sources_per_chunk=8"]
    translations = []
    for name in ("run.gin", "ours.gin"):
        capsys.readouterr()
        assert cli.main(["translate", *options, f"--gin_file={folder / name}"]) == 0
        translations.append(capsys.readouterr().out.splitlines())
    assert translations[0] == translations[1] and len(translations[0]) == 4 and any(translations[0])


def test_infer_reads_the_runs_configuration(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["infer", f"--model_dir={finished}", f"--gin.INFER_OUTPUT_DIR='{tmp_path}'"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.name == "t5x_demo-predict_with_aux.jsonl-00000-of-00001"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tested = [json.loads(line) for line in (finished / "eval" / "improve_1.2.test.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == [row["hypothesis"] for row in tested]
    assert all(row["aux"]["scores"] < 0 for row in rows)


def test_the_mesh_changes_no_gradient_step(finished: Path, folder: Path) -> None:
    config.load(gin_files=[str(folder / "run.gin")], bindings=["MODEL_DIR=''", "DROPOUT_RATE=0.0"])
    rest = config.build(ReST)
    dataset = rest.data.open("train")
    plan = batching.BatchPlan(
        batching.MixtureSpec.single(dataset), batch_size=8, source_length=16, target_length=12, pack=True, seed=0
    )
    # Adam would make much of the rounding of the smallest gradients.
    training = Training(steps=10, batch_size=8, learning_rate=0.1, optimizer=optax.sgd)
    results = []
    for mesh in (make_mesh(devices=jax.devices()[:1]), make_mesh(model=2)):
        partitioner = Partitioner(mesh)
        params = jax.jit(lambda: initial_params(rest.model, jax.random.key(0)))()
        state = initial_state(training=training, params=params, partitioner=partitioner)
        step = compile_train_step(state=state, training=training, model=rest.model, partitioner=partitioner)
        with partitioner.activation_rules():
            state, metrics = step(state, partitioner.put_batch(plan.batch(0)), jax.random.key(1))
        results.append(jax.device_get((state.params, metrics)))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_t5xs_own_optimiser_is_answered_with_the_line_to_write(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f"--gin_file={folder / 'run.gin'}", "--gin_file=t5x/examples/t5/t5_1_1/base.gin"]
    bindings = [
        "--gin.DROPOUT_RATE=0.0",
        f"--gin.seqio.SentencePieceVocabulary.sentencepiece_model_file='{VOCABULARY}'",
    ]
    assert cli.main(["run", *files, f"--model_dir={tmp_path / 'run'}", *bindings]) == 2
    error = capsys.readouterr().err
    assert "OPTIMIZER is an instance of t5x.adafactor.Adafactor" in error and "@optimizers.adafactor" in error
    assert not (tmp_path / "run").exists()


def test_t5xs_vocabulary_on_another_machine_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """T5X's files name one in Google's cloud."""
    binding = "--gin.seqio.SentencePieceVocabulary.sentencepiece_model_file='/nowhere/cc_all.model'"
    assert cli.main(["run", f"--gin_file={folder / 'run.gin'}", f"--model_dir={tmp_path / 'run'}", binding]) == 2
    assert "/nowhere/cc_all.model" in capsys.readouterr().err
