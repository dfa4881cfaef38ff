"""`rest_jax import` and `export` as a user types them, and what a run then does with the result."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from rest_jax import cli, config
from rest_jax.checkpoints import checkpointer, formats, hugging_face, model_config, tensors
from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.partitioning import Partitioner, make_mesh

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hugging_face"
VOCABULARY = "rest_jax://tasks/demo_data/vocab.model"
ONE_DEVICE = Partitioner(make_mesh(data=1, devices=jax.devices()[:1]))


def run(*argv):
    return cli.main([str(argument) for argument in argv])


def weights(path):
    return {
        name: (tensor.dtype, tensor.read().tobytes())
        for name, tensor in formats.open_checkpoint(str(path)).tensors.items()
    }


def test_hugging_face_to_ours_to_t5x_to_ours_to_hugging_face(tmp_path, capsys):
    source = FIXTURES / "t5_1_1_bfloat16"
    assert run("import", source, tmp_path / "a") == 0
    out = capsys.readouterr().out
    assert "3,908 parameters, imported from the format hugging_face" in out
    assert "It has no vocabulary: set VOCABULARY" in out
    assert f"--gin_file={tmp_path / 'a'}/config.gin" in out
    assert run("export", tmp_path / "a", tmp_path / "b", "--format", "t5x") == 0
    assert run("import", tmp_path / "b", tmp_path / "c") == 0
    assert run("export", tmp_path / "c", tmp_path / "d", "--format", "hugging_face") == 0
    assert (tmp_path / "d" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert formats.open_checkpoint(str(tmp_path / "d")).config == formats.open_checkpoint(str(source)).config


def test_the_written_gin_file_makes_the_model_and_its_vocabulary(tmp_path):
    """A model of which gin knows nothing but the written file, with a vocabulary that the embedding has room for."""
    vocabulary = SentencePieceVocabulary(VOCABULARY)
    made = t5.T5Config(
        vocab_size=vocabulary.vocab_size + 100,
        emb_dim=12,
        num_heads=2,
        num_encoder_layers=1,
        num_decoder_layers=1,
        head_dim=4,
        mlp_dim=8,
        dropout_rate=0.1,
        relative_bias_per_layer=True,
    )
    generator = np.random.default_rng(0)
    shapes = model_config.expected_shapes(made)
    params = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    checkpointer.save_params(tmp_path / "run" / "policy", tensors.unflatten(params))
    gin_text = model_config.gin_text(
        made, comment="A run.", vocabulary=model_config.vocabulary_text(vocabulary, model_file=vocabulary.path)
    )
    (tmp_path / "run" / "config.gin").write_text(gin_text)
    # The run's own config.gin is found, and gives the vocabulary.
    assert run("export", tmp_path / "run" / "policy", tmp_path / "theirs", "--format", "hugging_face") == 0
    assert (tmp_path / "theirs" / "spiece.model").read_bytes() == vocabulary.path.read_bytes()
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["model_type"] == "umt5"
    assert run("import", tmp_path / "theirs", tmp_path / "ours") == 0
    # After the gin file of a run, which brings another model and vocabulary.
    config.load(gin_files=["runs/smoke.gin", str(tmp_path / "ours" / "config.gin")], bindings=["MODEL_DIR='/nowhere'"])
    model = config.build(EncoderDecoderModel)
    assert model.module.config == made
    assert model.output_vocabulary.path == tmp_path / "ours" / "spiece.model"
    token = np.ones((1, 1), np.int32)
    abstract = jax.eval_shape(
        lambda: model.get_initial_variables(
            jax.random.key(0), {"encoder_input_tokens": token.shape, "decoder_input_tokens": token.shape}
        )
    )["params"]
    loaded = checkpointer.load_params(str(tmp_path / "ours"), abstract_params=abstract, partitioner=ONE_DEVICE)
    for name, leaf in tensors.flatten(loaded).items():
        np.testing.assert_array_equal(leaf, params[name])


def test_an_imported_translation_model_translates_at_once(tmp_path, capsys):
    vocabulary = SentencePieceVocabulary(VOCABULARY)
    sizes = {"emb_dim": 12, "num_heads": 2, "head_dim": 4, "mlp_dim": 8}
    network = t5.T5Config(vocab_size=vocabulary.vocab_size, num_encoder_layers=1, num_decoder_layers=1, **sizes)
    generator = np.random.default_rng(0)
    shapes = model_config.expected_shapes(network)
    leaves = {name: tensors.of_array(generator.normal(size=shape, scale=0.5)) for name, shape in shapes.items()}
    (tmp_path / "theirs").mkdir()
    hugging_face.write_weights(tmp_path / "theirs", leaves, config=network)
    hugging_face.write_config(tmp_path / "theirs", config=network, dtype="float64", eos_id=None)
    hugging_face.write_vocabulary(tmp_path / "theirs", vocabulary)
    assert run("import", tmp_path / "theirs", tmp_path / "ours") == 0
    (tmp_path / "lines.txt").write_text("Guten Morgen.\nWie geht es?\n")
    capsys.readouterr()
    lengths = "--gin.TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 16}"
    assert (
        run("translate", tmp_path / "lines.txt", "--checkpoint", tmp_path / "ours", "--sources_per_chunk=8", lengths)
        == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 2
    # T5X's format names no vocabulary: a gin file does.
    (tmp_path / "vocabulary.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom rest_jax.data import vocabulary\n"
        "VOCABULARY = @vocabulary.SentencePieceVocabulary()\n"
        f"vocabulary.SentencePieceVocabulary.sentencepiece_model_file = '{vocabulary.path}'\n"
    )
    assert run("export", tmp_path / "ours", tmp_path / "t5x", "--format", "t5x") == 0
    assert run("import", tmp_path / "t5x", tmp_path / "back") == 0
    files = [f"--gin_file={tmp_path}/{name}" for name in ("back/config.gin", "vocabulary.gin")]
    options = [f"--checkpoint={tmp_path / 'back'}", "--sources_per_chunk=8", lengths, *files]
    capsys.readouterr()
    assert run("translate", tmp_path / "lines.txt", *options) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_folder_with_two_formats_is_refused(tmp_path, capsys):
    assert run("import", FIXTURES / "t5_1_1", tmp_path / "a") == 0
    assert run("export", tmp_path / "a", tmp_path / "both", "--format", "t5x") == 0
    shutil.copytree(FIXTURES / "t5_1_1", tmp_path / "both", dirs_exist_ok=True)
    assert run("import", tmp_path / "both", tmp_path / "b") == cli.EXIT_USER
    assert "both' holds two checkpoints, one of the format t5x and one of hugging_face" in capsys.readouterr().err


def test_a_given_vocabulary_takes_the_place_of_the_sources(tmp_path):
    sizes = {"emb_dim": 12, "num_heads": 2, "head_dim": 4, "mlp_dim": 8}
    network = t5.T5Config(vocab_size=384, num_encoder_layers=1, num_decoder_layers=1, **sizes)
    leaves = {name: tensors.of_array(np.ones(shape)) for name, shape in model_config.expected_shapes(network).items()}
    (tmp_path / "theirs").mkdir()
    hugging_face.write_weights(tmp_path / "theirs", leaves, config=network)
    hugging_face.write_config(tmp_path / "theirs", config=network, dtype="float64", eos_id=None)
    own = {"tokenizer_class": "ByT5Tokenizer", "extra_ids": 125, "model_max_length": 77}
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(own))
    assert run("import", tmp_path / "theirs", tmp_path / "a") == 0
    assert json.loads((tmp_path / "a" / "tokenizer_config.json").read_text()) == own
    text = (tmp_path / "a" / "config.gin").read_text()
    (tmp_path / "model.gin").write_text(text.replace("extra_ids = 125", "extra_ids = 7"))
    assert run("import", tmp_path / "theirs", tmp_path / "b", f"--gin_file={tmp_path / 'model.gin'}") == 0
    assert json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())["extra_ids"] == 7


def test_what_lies_where_an_import_writes_is_not_removed(tmp_path, capsys):
    (tmp_path / "dest.tmp").mkdir()
    assert run("import", FIXTURES / "t5_1_1", tmp_path / "dest") == cli.EXIT_USER
    assert "dest.tmp' cannot be made" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dest.tmp"]


def test_gin_files_give_the_model_that_tensors_cannot_show(tmp_path):
    """silu has gelu's shapes; layers are stored as the configured model has them."""
    assert run("import", FIXTURES / "t5_1_1", tmp_path / "a") == 0
    text = (tmp_path / "a" / "config.gin").read_text()
    (tmp_path / "model.gin").write_text(text.replace("('gelu', 'linear')", "('silu', 'linear')"))
    assert (
        run(
            "import",
            tmp_path / "a",
            tmp_path / "b",
            f"--gin_file={tmp_path / 'model.gin'}",
            "--gin.SCAN_LAYERS=True",
        )
        == 0
    )
    assert tensors.is_scanned(formats.open_checkpoint(str(tmp_path / "b")).tensors)
    assert run("export", tmp_path / "b", tmp_path / "c", "--format=hugging_face") == 0
    assert formats.open_checkpoint(str(tmp_path / "c")).config.mlp_activations == ("silu", "linear")
    assert weights(tmp_path / "c") == weights(FIXTURES / "t5_1_1")


def test_a_configured_model_of_another_size_is_refused_by_name(tmp_path, capsys):
    assert run("import", FIXTURES / "t5_1_1", tmp_path / "a", "--gin_file=models/t5_1_1_small.gin") == 2
    error = capsys.readouterr().err
    assert "SOURCE: " in error
    assert "missing decoder/layers_2" in error
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: None, "is no checkpoint"),
        (lambda path: (path.mkdir(), (path / "pytorch_model.bin").write_bytes(b"x")), "Convert them to safetensors"),
        (lambda path: shutil.copytree(FIXTURES / "t5_1_1", path) and (path / "config.json").write_text("{"), "no JSON"),
    ],
    ids=["nothing", "pickle", "damaged"],
)
def test_a_source_that_cannot_be_read_is_the_users_to_correct(tmp_path, capsys, make, named):
    make(tmp_path / "source")
    before = sorted(tmp_path.rglob("*"))
    for command in (("import",), ("export", "--format=t5x")):
        assert run(*command, tmp_path / "source", tmp_path / "dest") == 2
        assert named in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_bindings_without_a_gin_file_are_refused(tmp_path, capsys):
    assert run("import", FIXTURES / "t5_1_1", tmp_path / "a", "--gin.DROPOUT_RATE=0.2") == 2
    assert "give --gin_file of the model too" in capsys.readouterr().err


def test_a_vocabulary_with_more_ids_than_rows_is_refused_with_both_sizes(tmp_path, capsys):
    source = shutil.copytree(FIXTURES / "t5_1_1", tmp_path / "source")
    shutil.copy(SentencePieceVocabulary(VOCABULARY).path, source / "spiece.model")
    assert run("import", source, tmp_path / "out") == cli.EXIT_USER
    message = capsys.readouterr().err
    assert "64 rows" in message and f"{SentencePieceVocabulary(VOCABULARY).vocab_size} ids" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("extra_ids", ["many", -1, True])
def test_a_tokenizer_with_impossible_extra_ids_is_refused(tmp_path, capsys, extra_ids):
    source = shutil.copytree(FIXTURES / "byt5", tmp_path / "source")
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "ByT5Tokenizer", "extra_ids": extra_ids})
    )
    assert run("import", source, tmp_path / "out") == cli.EXIT_USER
    assert f"extra_ids={extra_ids!r}" in capsys.readouterr().err


def test_an_imported_config_replaces_the_vocabulary_of_own_text(tmp_path):
    vocabulary = SentencePieceVocabulary(VOCABULARY)
    shapes = t5.T5Config(
        vocab_size=8064, emb_dim=8, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=4, mlp_dim=8
    )
    name = model_config.vocabulary_text(vocabulary, model_file=vocabulary.path)
    (tmp_path / "config.gin").write_text(model_config.gin_text(shapes, comment="", vocabulary=name))
    config.load(
        gin_files=["runs/own_text.gin", str(tmp_path / "config.gin")],
        bindings=["MODEL_DIR=''", "MIXTURE_OR_TASK_NAME='x'", "TASK_MODULES=()"],
    )
