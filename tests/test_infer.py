"""`rest_jax infer`: T5X's files of JSON lines, from a model's gin file or from a run."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seqio

from rest_jax import cli, config, infer
from rest_jax.checkpoints import checkpointer
from rest_jax.models.initial_params import initial_params
from rest_jax.tasks import parallel_text

VOCABULARY = "rest_jax://tasks/demo_data/vocab.model"
PAIRS = [
    ("Im Anfang schuf Gott Himmel und Erde.", "In the beginning God created the heaven and the earth."),
    ("Und es ward Licht.", "And there was light."),
    ("Gott sah, dass das Licht gut war.", "God saw the light, that it was good."),
    ("Und Gott sprach: Es werde Licht!", "And God said, Let there be light."),
    ("Da schied Gott das Licht von der Finsternis", "God divided the light from the darkness."),
]
GIN = """
from __gin__ import dynamic_registration
from rest_jax.data import vocabulary
from rest_jax.models import t5
include 'models/nano.gin'
MIXTURE_OR_TASK_NAME = 'infer_demo'
TASK_FEATURE_LENGTHS = {'inputs': 24, 'targets': 8}
VOCABULARY = @vocabulary.SentencePieceVocabulary()
vocabulary.SentencePieceVocabulary.sentencepiece_model_file = 'rest_jax://tasks/demo_data/vocab.model'
CACHE_DIR = '%s'
SOURCES_PER_CHUNK = 8
t5.T5Config:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 16
  num_encoder_layers = 1
  num_decoder_layers = 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A task, a model's gin file, and random parameters of it in `checkpoint/`."""
    root = tmp_path_factory.mktemp("infer")
    (root / "text.tsv").write_text("".join(f"{source}\t{target}\n" for source, target in PAIRS), encoding="utf-8")
    parallel_text.register_parallel_text(
        "infer_demo", splits={"test": root / "text.tsv", "validation": root / "text.tsv"}, vocabulary=VOCABULARY
    )
    (root / "model.gin").write_text(GIN % (root / "cache"))
    config.load(
        gin_files=[str(root / "model.gin"), infer.GIN],
        bindings=["CHECKPOINT_PATH=''", "INFER_OUTPUT_DIR=''"],
        fallbacks=infer.FALLBACKS,
    )
    model = config.build(infer.Inference).model
    params = jax.jit(lambda: initial_params(model, jax.random.key(0)))()
    checkpointer.save_params(root / "checkpoint", params)
    yield root
    seqio.TaskRegistry.remove("infer_demo")


@pytest.fixture
def run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the command; returns the objects of the file that it names."""

    def _run(*arguments: str) -> list[dict]:
        options = [
            f"--gin_file={folder / 'model.gin'}",
            f"--gin.CHECKPOINT_PATH='{folder / 'checkpoint'}'",
            f"--gin.INFER_OUTPUT_DIR='{tmp_path / 'out'}'",
        ]
        capsys.readouterr()
        assert cli.main(["infer", *options, *arguments]) == 0
        path = Path(capsys.readouterr().out.strip())
        assert path.parent == tmp_path / "out"
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    return _run


def test_lines_have_t5xs_fields_and_the_translations_of_translate(
    run, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["infer_demo-predict_with_aux.jsonl-00000-of-00001"]
    assert [row.keys() for row in rows] == [{"inputs", "prediction", "aux"}] * len(PAIRS)
    texts = [(row["inputs"]["inputs_pretokenized"], row["inputs"]["targets_pretokenized"]) for row in rows]
    assert texts == PAIRS
    assert all(row["aux"]["scores"] < 0 for row in rows)

    config.load(
        gin_files=[str(folder / "model.gin"), infer.GIN],
        bindings=[f"CHECKPOINT_PATH='{folder / 'checkpoint'}'", "INFER_OUTPUT_DIR=''"],
        fallbacks=infer.FALLBACKS,
    )
    model = config.build(infer.Inference).model
    params = initial_params(model, jax.random.key(0))
    ids = [[*model.input_vocabulary.encode(source), 1] for source, _ in PAIRS]
    batch = {
        "encoder_input_tokens": jnp.asarray([row + [0] * (24 - len(row)) for row in ids]),
        "decoder_input_tokens": jnp.zeros((len(PAIRS), 8), jnp.int32),
    }
    best, aux = model.predict_batch_with_aux(params, batch)
    assert [row["prediction"] for row in rows] == model.output_vocabulary.decode_batch(best.tolist())
    np.testing.assert_allclose([row["aux"]["scores"] for row in rows], aux["scores"], rtol=1e-4)


@pytest.mark.slow
def test_shards_together_are_the_whole_and_modes_leave_out(run, tmp_path: Path) -> None:
    whole = run("--mode=predict", "--split=validation")
    assert whole[0].keys() == {"inputs", "prediction"}
    parts = [run("--mode=predict", "--split=validation", f"--shard_id={i}", "--num_shards=2") for i in (0, 1)]
    assert parts[0] == whole[::2] and parts[1] == whole[1::2]
    assert (tmp_path / "out" / "infer_demo-predict.jsonl-00001-of-00002").is_file()


def test_scores_are_those_of_the_tasks_own_targets(run, folder: Path) -> None:
    rows = run("--mode=score")
    assert rows[0].keys() == {"inputs", "score"}
    beam = run("--gin.infer/scored.Sampling.beam_size=4", "--gin.infer/scored.Sampling.num_samples=2")
    assert all(len(row["prediction"]) == len(row["aux"]["scores"]) == 2 for row in beam)
    # Random parameters spread their mass over 2,048 pieces: each of the 8 tokens costs about log 2048.
    assert all(-150 < row["score"] < max(other["aux"]["scores"]) for row, other in zip(rows, beam, strict=True))


def test_a_runs_policy_needs_no_checkpoint_path(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    text = (folder / "model.gin").read_text() + "include 'rewards/chrf.gin'\ninclude 'rest.gin'\n"
    text += f"MODEL_DIR = '{tmp_path / 'run'}'\nTRAIN_STEPS = 1\nBATCH_SIZE = 8\nMIXTURE_OR_TASK_NAME = 'infer_demo'\n"
    text += f"TASK_FEATURE_LENGTHS = {{'inputs': 24, 'targets': 8}}\nCACHE_DIR = '{folder / 'cache'}'\n"
    (tmp_path / "run" / "config.gin").write_text(text)
    arguments = ["infer", f"--model_dir={tmp_path / 'run'}", f"--gin.INFER_OUTPUT_DIR='{tmp_path / 'out'}'"]
    assert cli.main(arguments) == 2
    assert "CHECKPOINT_PATH" in capsys.readouterr().err
    (tmp_path / "run" / "policy").symlink_to(folder / "checkpoint", target_is_directory=True)
    assert cli.main([*arguments, "--mode=predict"]) == 0
    assert len(Path(capsys.readouterr().out.strip()).read_text().splitlines()) == len(PAIRS)


def test_refusals_write_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = [f"--gin.INFER_OUTPUT_DIR='{tmp_path / 'out'}'"]
    checkpoint = [f"--gin.CHECKPOINT_PATH='{folder / 'checkpoint'}'"]
    for arguments, messages in (
        ([], ["CHECKPOINT_PATH", "INFER_OUTPUT_DIR"]),
        ([*place, "--gin.CHECKPOINT_PATH='/nowhere'"], ["CHECKPOINT_PATH", "/nowhere"]),
        ([*place, *checkpoint, "--shard_id=2", "--num_shards=2"], ["--shard_id is 2"]),
        ([*place, *checkpoint, "--split=train"], ["train"]),
        ([*place, *checkpoint, "--gin.SOURCES_PER_CHUNK=12"], ["SOURCES_PER_CHUNK=12", "multiple of 8"]),
        ([*place, *checkpoint, "--mode=guess"], ["predict_with_aux"]),
    ):
        assert cli.main(["infer", f"--gin_file={folder / 'model.gin'}", *arguments]) == 2
        error = capsys.readouterr().err
        assert all(message in error for message in messages) and "Traceback" not in error
    assert not (tmp_path / "out").exists()
