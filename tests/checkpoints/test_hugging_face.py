"""Hugging Face folders: networks compute what transformers computes, and weights pass through bit for bit.

tests/fixtures/make_hugging_face_fixtures.py made the folders and their golden.npz with transformers.
"""

import functools
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from rest_jax import sampling
from rest_jax.checkpoints import convert, formats, hugging_face, safetensors_files, tensors
from rest_jax.checkpoints.checkpointer import load_params
from rest_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary
from rest_jax.errors import UserError
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.partitioning import Partitioner, make_mesh

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hugging_face"
FAMILIES = sorted(path.name for path in FIXTURES.iterdir())
ONE_FILE = [name for name in FAMILIES if name != "mt5_sharded"]
VOCABULARY = "rest_jax://tasks/demo_data/vocab.model"
EOS_OF = {"madlad": 2}


def load(path):
    """The parameters as the network takes them, and its configuration."""
    config = formats.open_checkpoint(str(path)).config
    abstract = jax.eval_shape(
        lambda: t5.Transformer(config).init(jax.random.key(0), *[jnp.ones((1, 1), jnp.int32)] * 3, enable_dropout=False)
    )["params"]
    partitioner = Partitioner(make_mesh(data=1, devices=jax.devices()[:1]))
    return load_params(str(path), abstract_params=abstract, partitioner=partitioner), config


def golden(name):
    with np.load(FIXTURES / name / "golden.npz") as arrays:
        return {key: arrays[key] if key == "logits" else arrays[key].astype(np.int32) for key in arrays}


def same_tensors(first, second):
    first, second = (
        {name: (tensor.dtype, tensor.read().tobytes()) for name, tensor in of.items()} for of in (first, second)
    )
    return first == second


def files_tensors(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors_files.open_tensors(file).items()
    }


@pytest.fixture
def editable(tmp_path):
    """Copies a fixture to where it may be damaged."""

    def copy(name):
        return Path(shutil.copytree(FIXTURES / name, tmp_path / name))

    return copy


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name):
    params, config = load(FIXTURES / name)
    expected = golden(name)
    source, target = expected["source"], expected["target"]
    assert (source == 0).any()
    assert source.shape[1] > 128
    assert expected["positions"].max() > 128
    decoder_input = np.pad(target, ((0, 0), (1, 0)))[:, :-1]
    logits = t5.Transformer(config).apply({"params": params}, source, decoder_input, target, enable_dropout=False)
    real = (target > 0)[:, expected["positions"]]
    difference = np.abs(np.asarray(logits)[:, expected["positions"]] - expected["logits"])[real]
    assert difference.max() < 1e-4
    assert np.std(expected["logits"][real]) > 0.5  # the bound is tight for logits of this size


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_outputs_are_those_of_transformers(name):
    params, config = load(FIXTURES / name)
    expected = golden(name)
    vocabulary = SimpleNamespace(vocab_size=config.vocab_size, eos_id=EOS_OF.get(name, 1))
    decode = functools.partial(
        sampling.decode,
        EncoderDecoderModel(t5.Transformer(config), None, vocabulary),
        source_ids=jnp.arange(len(expected["source"])),
        num_samples=1,
        max_length=expected["greedy"].shape[1],
        processing=sampling.LogitProcessing(temperature=0.0),
    )
    samples = jax.jit(decode)(params, encoder_input_tokens=jnp.asarray(expected["source"]))
    np.testing.assert_array_equal(np.asarray(samples.tokens)[:, 0], expected["greedy"])


def test_golden_outputs_vary_and_reach_past_128():
    greedy = [row for name in FAMILIES for row in golden(name)["greedy"]]
    lengths = [int((row > 0).sum()) for row in greedy]
    assert max(lengths) > 128
    assert min(lengths) < 128
    assert max(len(set(row)) for row in greedy) > 20


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_come_back_bit_for_bit(name, tmp_path):
    imported = convert.import_checkpoint(str(FIXTURES / name), tmp_path / "ours")
    assert imported.format == "hugging_face"
    convert.export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", to="hugging_face")
    assert same_tensors(files_tensors(FIXTURES / name), files_tensors(tmp_path / "theirs"))
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (FIXTURES / name, tmp_path / "theirs")
    )
    assert {key: after[key] for key in before} == before
    again = formats.open_checkpoint(str(tmp_path / "theirs"))
    assert again.config == imported.config
    assert (tmp_path / "theirs" / "generation_config.json").is_file()


@pytest.mark.parametrize("name", ONE_FILE)
def test_a_file_comes_back_byte_for_byte(name, tmp_path):
    convert.export_checkpoint(str(FIXTURES / name), tmp_path / "theirs", to="hugging_face")
    assert (tmp_path / "theirs" / "model.safetensors").read_bytes() == (
        FIXTURES / name / "model.safetensors"
    ).read_bytes()


def test_a_model_that_transformers_did_not_make_is_exported_by_its_shapes(tmp_path):
    """A policy of ours has no config.json: all but the activation is read off the tree."""
    convert.import_checkpoint(str(FIXTURES / "byt5"), tmp_path / "ours")
    (tmp_path / "ours" / "config.json").unlink()
    convert.export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", to="hugging_face")
    original, exported = (formats.open_checkpoint(str(path)) for path in (FIXTURES / "byt5", tmp_path / "theirs"))
    assert exported.config == original.config
    assert same_tensors(exported.tensors, original.tensors)


def test_large_models_are_written_in_several_files_with_an_index(tmp_path):
    convert.export_checkpoint(str(FIXTURES / "t5_1_1"), tmp_path / "many", to="hugging_face", max_shard_bytes=8000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    stored = files_tensors(FIXTURES / "t5_1_1")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored.values())
    assert same_tensors(
        formats.open_checkpoint(str(tmp_path / "many")).tensors,
        formats.open_checkpoint(str(FIXTURES / "t5_1_1")).tensors,
    )


def test_layers_are_stacked_for_a_model_that_scans_them(tmp_path):
    apart = formats.open_checkpoint(str(FIXTURES / "umt5"))
    scanned = tensors.stacked(apart.tensors)
    assert scanned["encoder/encoder/mlp/wo/kernel"].shape == (14, 2, 12)
    np.testing.assert_array_equal(
        scanned["encoder/encoder/mlp/wo/kernel"][slice(3, 9), slice(1, 2), slice(None)],
        apart.tensors["encoder/layers_1/mlp/wo/kernel"].read()[3:9, None],
    )
    assert same_tensors(tensors.unstacked(scanned), apart.tensors)


# Variants of the layout that exist in public folders ------------------------------------------------------------------


def rewrite(folder, change):
    stored = dict(safetensors_files.open_tensors(folder / "model.safetensors"))
    # Read now: the file is about to be replaced.
    changed = change({name: tensors.of_array(tensor.read()) for name, tensor in stored.items()})
    safetensors_files.write_tensors(folder / "model.safetensors", changed)


def test_the_embedding_may_be_stored_under_its_other_names(editable):
    expected = formats.open_checkpoint(str(FIXTURES / "t5_1_1")).tensors
    folder = editable("t5_1_1")
    rewrite(folder, lambda stored: stored | {"encoder.embed_tokens.weight": stored["shared.weight"]})
    assert same_tensors(formats.open_checkpoint(str(folder)).tensors, expected)
    rewrite(folder, lambda stored: {name: tensor for name, tensor in stored.items() if name != "shared.weight"})
    assert same_tensors(formats.open_checkpoint(str(folder)).tensors, expected)


def test_two_embeddings_are_refused(editable):
    folder = editable("t5_1_1")
    rewrite(folder, lambda stored: stored | {"decoder.embed_tokens.weight": stored["lm_head.weight"]})
    with pytest.raises(UserError, match="shared.weight and decoder.embed_tokens.weight differ"):
        formats.open_checkpoint(str(folder))


def test_tied_logits_may_be_stored_twice_and_an_unused_table_may_be_there(editable):
    folder = editable("t5_1_0")
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    rewrite(
        folder, lambda stored: stored | {"lm_head.weight": stored["shared.weight"], unused: stored["shared.weight"]}
    )
    opened = formats.open_checkpoint(str(folder))
    assert opened.config.logits_via_embedding
    assert same_tensors(opened.tensors, formats.open_checkpoint(str(FIXTURES / "t5_1_0")).tensors)


def test_config_json_of_transformers_5_does_not_tie_what_the_file_holds_apart(editable):
    folder = editable("t5_1_1")
    edit_json(folder / "config.json", tie_word_embeddings=True, scale_decoder_outputs=False)
    opened, expected = (formats.open_checkpoint(str(path)) for path in (folder, FIXTURES / "t5_1_1"))
    assert opened.config == expected.config
    assert same_tensors(opened.tensors, expected.tensors)


def test_logits_tied_without_a_scale_get_a_matrix_of_their_own(editable):
    folder = editable("t5_1_0")
    edit_json(folder / "config.json", tie_word_embeddings=True, scale_decoder_outputs=False)
    opened = formats.open_checkpoint(str(folder))
    assert not opened.config.logits_via_embedding
    np.testing.assert_array_equal(
        opened.tensors["decoder/logits_dense/kernel"].read(), opened.tensors["token_embedder/embedding"].read().T
    )


# Vocabularies ---------------------------------------------------------------------------------------------------------


def test_the_tokenizers_file_comes_along_and_is_named_in_the_gin_file(editable, tmp_path):
    folder = editable("t5_1_1")
    vocabulary = SentencePieceVocabulary(VOCABULARY)
    shutil.copyfile(vocabulary.path, folder / "spiece.model")

    def with_a_row_for_each_piece(stored):
        longer = {
            name: tensors.of_array(np.resize(stored[name].read(), (vocabulary.vocab_size, stored[name].shape[1])))
            for name in ("shared.weight", "lm_head.weight")
        }
        return stored | longer

    rewrite(folder, with_a_row_for_each_piece)
    edit_json(folder / "config.json", vocab_size=vocabulary.vocab_size)
    assert convert.import_checkpoint(str(folder), tmp_path / "ours").has_vocabulary
    assert (tmp_path / "ours" / "spiece.model").read_bytes() == vocabulary.path.read_bytes()
    text = (tmp_path / "ours" / "config.gin").read_text()
    assert f"sentencepiece_model_file = {str(tmp_path / 'ours' / 'spiece.model')!r}" in text
    assert "SentencePieceVocabulary.extra_ids = 0" in text  # the embedding has no room for them
    assert json.loads((tmp_path / "ours" / "run.json").read_text())["vocabulary_sha256"] == vocabulary.sha256
    convert.export_checkpoint(str(tmp_path / "ours"), tmp_path / "theirs", to="hugging_face")
    assert (tmp_path / "theirs" / "spiece.model").read_bytes() == vocabulary.path.read_bytes()


@pytest.mark.parametrize(
    ("room", "settings", "extra_ids"), [(128, {}, 100), (384, {}, 300), (99, {}, 0), (128, {"extra_ids": 7}, 7)]
)
def test_extra_ids_are_what_the_tokenizer_says_or_what_the_embedding_has_room_for(tmp_path, room, settings, extra_ids):
    vocabulary = SentencePieceVocabulary(VOCABULARY)
    shutil.copyfile(vocabulary.path, tmp_path / "spiece.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = hugging_face.open_vocabulary(tmp_path, vocab_size=vocabulary.vocab_size + room)
    assert found.vocab_size == vocabulary.vocab_size + extra_ids


def test_byt5_has_the_vocabulary_of_bytes(editable, tmp_path):
    folder = editable("byt5")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    convert.import_checkpoint(str(folder), tmp_path / "ours")
    assert (
        "VOCABULARY = @vocabulary.ByteVocabulary()\nvocabulary.ByteVocabulary.extra_ids = 125\n"
        in (tmp_path / "ours" / "config.gin").read_text()
    )
    assert hugging_face.open_vocabulary(tmp_path / "ours", vocab_size=384).vocab_size == 384


@pytest.mark.parametrize("vocabulary", [ByteVocabulary(extra_ids=125), SentencePieceVocabulary(VOCABULARY)])
def test_an_exported_policy_has_its_tokenizers_files(tmp_path, vocabulary):
    config = formats.open_checkpoint(str(FIXTURES / "byt5")).config
    model = convert.Model(config, vocabulary)
    convert.export_checkpoint(str(FIXTURES / "byt5"), tmp_path / "theirs", to="hugging_face", model=model)
    again = hugging_face.open_vocabulary(tmp_path / "theirs", vocab_size=384)
    assert again.sha256 == vocabulary.sha256


def test_a_vocabulary_without_padding_pads_with_its_id_0(tmp_path):
    text = io.StringIO("a b c ab bc abc\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=text,
        model_prefix=str(tmp_path / "madlad"),
        vocab_size=12,
        hard_vocab_limit=False,
        pad_id=-1,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    (tmp_path / "theirs").mkdir()
    hugging_face.write_vocabulary(tmp_path / "theirs", SentencePieceVocabulary(str(tmp_path / "madlad.model")))
    settings = json.loads((tmp_path / "theirs" / "tokenizer_config.json").read_text())
    assert (settings["pad_token"], settings["eos_token"], settings["unk_token"]) == ("<unk>", "</s>", "<unk>")


# What is refused ------------------------------------------------------------------------------------------------------


def drop(*names):
    return lambda stored: {name: tensor for name, tensor in stored.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (drop("encoder.final_layer_norm.weight"), "missing encoder.final_layer_norm.weight (12,)"),
        (lambda stored: stored | {"adapter.weight": stored["shared.weight"]}, "unexpected adapter.weight (64, 12)"),
        (
            lambda stored: stored | {"decoder.final_layer_norm.weight": tensors.of_array(np.ones(5, np.float32))},
            "decoder.final_layer_norm.weight is (5,), the model's is (12,)",
        ),
        (
            lambda stored: stored | {"decoder.final_layer_norm.weight": tensors.of_array(np.ones(12, np.int8))},
            "decoder.final_layer_norm.weight is int8",
        ),
        (drop("shared.weight", "lm_head.weight"), "missing shared.weight"),
    ],
    ids=["missing", "unexpected", "shape", "dtype", "no embedding"],
)
def test_weights_that_are_not_the_models_are_refused_by_name(editable, tmp_path, change, named):
    folder = editable("t5_1_1")
    rewrite(folder, change)
    with pytest.raises(UserError) as error:
        convert.import_checkpoint(str(folder), tmp_path / "ours")
    assert named in str(error.value)
    assert str(error.value).startswith("SOURCE: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t5_1_1"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "bart"}, "model_type='bart'"),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj='gelu'"),
        ({"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon=1e-05"),
        ({"d_model": "12"}, "d_model='12'"),
        ({"decoder_start_token_id": 2}, "start with token 2"),
        ({"num_layers": 3}, "missing encoder.block.2"),
    ],
)
def test_a_config_json_that_is_no_t5s_is_refused(editable, changes, named):
    folder = editable("t5_1_1")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError) as error:
        formats.open_checkpoint(str(folder))
    assert named in str(error.value)


@pytest.mark.parametrize("keep", [4, 100, 5000, -1])
def test_a_file_that_is_cut_off_is_refused(editable, tmp_path, keep):
    folder = editable("t5_1_1")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(UserError, match="model.safetensors.*(cut off|no valid header)"):
        convert.import_checkpoint(str(folder), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_missing_shard_is_named(editable):
    folder = editable("mt5_sharded")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model-00002-of-00003.safetensors"):
        formats.open_checkpoint(str(folder))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "tf_model.h5"])
def test_pickled_weights_are_not_read(editable, file):
    folder = editable("t5_1_1")
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(UserError, match=f"{file}.*Convert them to safetensors"):
        formats.open_checkpoint(str(folder))


def test_an_existing_dest_is_left_alone(tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="DEST.*exists"):
        convert.import_checkpoint(str(FIXTURES / "t5_1_1"), tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["mine.txt"]


def test_an_import_that_fails_midway_leaves_nothing(tmp_path, monkeypatch):
    read = tensors.LazyTensor.read
    seen = []

    def fail_at_the_tenth(tensor):
        seen.append(tensor)
        if len(seen) == 10:
            raise OSError("disk is gone")
        return read(tensor)

    monkeypatch.setattr(tensors.LazyTensor, "read", fail_at_the_tenth)
    with pytest.raises(UserError, match="disk is gone"):
        convert.import_checkpoint(str(FIXTURES / "t5_1_1"), tmp_path / "deep" / "ours")
    assert not list(tmp_path.glob("*/ours*"))


def test_only_one_tensor_is_read_before_it_is_written(tmp_path, monkeypatch):
    """Orbax's own handler would take all of them first."""
    import tensorstore

    events = []
    read, open_store = tensors.LazyTensor.read, tensorstore.open
    monkeypatch.setattr(tensors.LazyTensor, "read", lambda tensor: (events.append("read"), read(tensor))[1])
    monkeypatch.setattr(
        tensorstore, "open", lambda *given, **options: (events.append("open"), open_store(*given, **options))[1]
    )
    convert.import_checkpoint(str(FIXTURES / "t5_1_1"), tmp_path / "ours")
    assert events.count("read") > 20
    assert all(second != "read" for first, second in zip(events, events[1:], strict=False) if first == "read")


def test_large_tensors_are_stored_in_chunks_that_devices_read_alone(tmp_path, monkeypatch):
    import tensorstore

    from rest_jax.checkpoints import orbax_files

    monkeypatch.setattr(orbax_files, "CHUNK_BYTES", 1024)
    convert.import_checkpoint(str(FIXTURES / "byt5"), tmp_path / "ours")
    database = {"driver": "ocdbt", "base": f"file://{tmp_path}/ours/state/", "path": "target.token_embedder.embedding/"}
    stored = tensorstore.open({"driver": "zarr", "kvstore": database}, read=True).result()
    assert stored.shape == (384, 8)
    assert stored.chunk_layout.write_chunk.shape == (32, 8)
