"""T5X's own format: files laid out as T5X lays them out are read, and what is written is read back bit for bit."""

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest
import tensorstore
from flax import serialization

from rest_jax.checkpoints import convert, formats, model_config, orbax_files, t5x_legacy, tensors
from rest_jax.errors import UserError
from rest_jax.models import t5

CONFIG = t5.T5Config(
    vocab_size=48,
    emb_dim=12,
    num_heads=2,
    num_encoder_layers=2,
    num_decoder_layers=1,
    head_dim=4,
    mlp_dim=16,
    dropout_rate=0.1,
)
INLINED = "encoder/encoder_norm/scale"


def make_params(dtype="float32", config=CONFIG):
    generator = np.random.default_rng(0)
    shapes = model_config.expected_shapes(config)
    return {name: generator.normal(size=shape).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}


def write_as_t5x(folder, params, *, step=1000, version=3, spec=lambda spec: spec):
    """What T5X's Checkpointer writes, by TensorStore and flax: one leaf in the file, the others in chunks of half."""
    folder.mkdir(parents=True)
    leaves = {}
    for name, value in params.items():
        if name == INLINED:
            leaves[name] = value
            continue
        path = f"target/{name}".replace("/", ".")
        metadata = {
            "compressor": {"id": "gzip"},
            "shape": list(value.shape),
            "chunks": [max(1, size // 2) for size in value.shape],
        }
        there = {"driver": "file", "path": str(folder / path)}
        stored = {"driver": "zarr", "dtype": str(value.dtype), "metadata": metadata}
        tensorstore.open(stored | {"kvstore": there}, create=True).result().write(value).result()
        relative = tensorstore.Spec(stored | {"kvstore": {"driver": "file", "path": path}}).to_json()
        leaves[name] = spec(relative)
    states = {"encoder": {"encoder_norm": {"scale": {"v": np.ones(3, np.float32), "m": None}}}}
    state = {"step": np.asarray(step, np.int32), "param_states": states}
    content = {"version": version, "optimizer": {"target": tensors.unflatten(leaves), "state": state}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(content))


def assert_same(leaves, params):
    assert leaves.keys() == params.keys()
    for name, value in params.items():
        assert (leaves[name].shape, leaves[name].dtype) == (value.shape, value.dtype)
        assert leaves[name].read().tobytes() == value.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("step", [0, 1_100_000])
def test_weights_and_step_come_back_bit_for_bit(tmp_path, dtype, step):
    params = make_params(dtype)
    write_as_t5x(tmp_path / "theirs", params, step=step)
    imported = convert.import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    assert (imported.format, imported.config) == ("t5x", CONFIG)
    ours = formats.open_checkpoint(str(tmp_path / "ours"))
    assert (ours.format, ours.step) == ("orbax", step)
    assert_same(ours.tensors, params)
    convert.export_checkpoint(str(tmp_path / "ours"), tmp_path / "again", to="t5x")
    again = formats.open_checkpoint(str(tmp_path / "again"))
    assert (again.format, again.step) == ("t5x", step)
    assert_same(again.tensors, params)


def test_what_is_written_is_what_t5x_reads(tmp_path):
    """Its keys and specifications, read without our reader."""
    params = make_params()
    leaves = {name: tensors.of_array(value) for name, value in params.items()}
    (tmp_path / "checkpoint_7").mkdir()
    t5x_legacy.write_checkpoint(tmp_path / "checkpoint_7", leaves, step=7)
    content = serialization.msgpack_restore((tmp_path / "checkpoint_7" / "checkpoint").read_bytes())
    assert content["version"] == 3
    assert content["optimizer"]["state"]["step"] == 7
    assert content["optimizer"]["state"]["step"].dtype == np.int32
    spec = content["optimizer"]["target"]["decoder"]["logits_dense"]["kernel"]
    assert spec["kvstore"]["path"].rstrip("/") == "target.decoder.logits_dense.kernel"
    assert spec["metadata"]["compressor"]["id"] == "gzip"
    # T5X drops these two, puts the folder before the path, and opens the rest.
    del spec["metadata"]["chunks"], spec["metadata"]["compressor"]
    spec["kvstore"]["path"] = f"{tmp_path}/checkpoint_7/{spec['kvstore']['path']}"
    read = tensorstore.open(spec, open=True).result().read().result()
    np.testing.assert_array_equal(read, params["decoder/logits_dense/kernel"])


def test_large_arrays_are_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(t5x_legacy, "CHUNK_BYTES", 600)
    params = make_params()
    t5x_legacy.write_checkpoint(tmp_path, {name: tensors.of_array(value) for name, value in params.items()}, step=0)
    assert len(list((tmp_path / "target.token_embedder.embedding").glob("[0-9]*"))) == 4  # 12 of 48 rows each
    assert_same(t5x_legacy.open_checkpoint(tmp_path)[0], params)


def test_scanned_layers_stay_together_or_come_apart_as_the_model_wants(tmp_path):
    scanned = t5.T5Config(**{**vars(CONFIG), "scan_layers": True})
    params = make_params()
    write_as_t5x(tmp_path / "apart", params)
    convert.import_checkpoint(str(tmp_path / "apart"), tmp_path / "scanned", model=convert.Model(scanned))
    together = formats.open_checkpoint(str(tmp_path / "scanned")).tensors
    assert together["encoder/encoder/mlp/wo/kernel"].shape == (16, 2, 12)
    assert "SCAN_LAYERS = True" in (tmp_path / "scanned" / "config.gin").read_text()
    # T5X has no network of such layers together.
    convert.export_checkpoint(str(tmp_path / "scanned"), tmp_path / "back", to="t5x")
    assert_same(formats.open_checkpoint(str(tmp_path / "back")).tensors, params)


@pytest.mark.parametrize(
    "spec",
    [
        lambda spec: spec | {"kvstore": {"driver": "gfile", "path": spec["kvstore"]["path"]}},
        lambda spec: (
            spec | {"kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket", "path": spec["kvstore"]["path"]}}
        ),
        # TensorStore before 0.1.14.
        lambda spec: (
            spec | {"kvstore": {"driver": "gcs", "bucket": "t5x-dummy-bucket"}, "path": spec["kvstore"]["path"]}
        ),
    ],
    ids=["gfile", "gcs", "path beside the kvstore"],
)
def test_checkpoints_written_to_other_file_systems_are_read_where_they_lie(tmp_path, spec):
    params = make_params()
    write_as_t5x(tmp_path / "theirs", params, spec=spec)
    assert_same(formats.open_checkpoint(str(tmp_path / "theirs")).tensors, params)


def test_version_2_stored_bfloat16_as_integers(tmp_path):
    params = make_params("bfloat16")
    write_as_t5x(tmp_path / "theirs", {name: value.view(np.uint16) for name, value in params.items()}, version=2)
    assert_same(formats.open_checkpoint(str(tmp_path / "theirs")).tensors, params)


def test_a_part_is_read_without_the_rest(tmp_path):
    params = make_params()
    write_as_t5x(tmp_path / "theirs", params)
    kernel = formats.open_checkpoint(str(tmp_path / "theirs")).tensors["decoder/logits_dense/kernel"]
    part = kernel[slice(2, 5), slice(None)]
    np.testing.assert_array_equal(part, params["decoder/logits_dense/kernel"][2:5])


@pytest.mark.parametrize("keep", [0, 1, 300, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path, keep):
    write_as_t5x(tmp_path / "theirs", make_params())
    file = tmp_path / "theirs" / "checkpoint"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match="SOURCE: .*is no T5X checkpoint, or is cut off"):
        convert.import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "1.0").write_bytes(b"short"), "a chunk of .* is missing or cut off"),
        (lambda folder: (folder / "1.0").unlink(), "a chunk of .* is missing or cut off"),
        (lambda folder: (folder / ".zarray").unlink(), ".* is missing or damaged"),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), ".* is missing or damaged"),
    ],
    ids=["chunk cut off", "chunk missing", "no .zarray", "no array"],
)
def test_an_array_that_is_damaged_is_named_and_nothing_is_left(tmp_path, damage, named):
    write_as_t5x(tmp_path / "theirs", make_params())
    damage(tmp_path / "theirs" / "target.decoder.logits_dense.kernel")
    with pytest.raises(UserError, match=f"decoder/logits_dense/kernel cannot be read: {named}"):
        convert.import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_an_array_of_another_folder_is_refused(tmp_path):
    write_as_t5x(
        tmp_path / "theirs",
        make_params(),
        spec=lambda spec: spec | {"kvstore": {"driver": "file", "path": "../../secret"}},
    )
    with pytest.raises(UserError, match="names no zarr array of its own folder"):
        formats.open_checkpoint(str(tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'model_checkpoint_path: "model.ckpt-1000"\n', "TensorFlow checkpoint"),
        (msgpack.packb({"version": 9, "optimizer": {"target": {}}}), "version 9"),
        (msgpack.packb({"version": 3, "optimizer": {}}), "no T5X checkpoint"),
        (msgpack.packb([1, 2]), "no T5X checkpoint"),
    ],
)
def test_files_of_other_programs_are_refused(tmp_path, content, named):
    (tmp_path / "checkpoint").write_bytes(content)
    with pytest.raises(UserError, match=named):
        formats.open_checkpoint(str(tmp_path))


def test_weights_that_are_not_the_models_are_refused_by_name(tmp_path):
    params = make_params()
    del params["decoder/decoder_norm/scale"]
    params["encoder/adapter/scale"] = np.ones(3, np.float32)
    params["encoder/layers_1/mlp/wo/kernel"] = np.ones((3, 3), np.float32)
    write_as_t5x(tmp_path / "theirs", params)
    with pytest.raises(UserError) as error:
        convert.import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    for text in (
        "missing decoder/decoder_norm/scale (12,)",
        "unexpected encoder/adapter/scale (3,)",
        "encoder/layers_1/mlp/wo/kernel is (3, 3), the model's is (16, 12)",
    ):
        assert text in str(error.value)


def test_a_tree_that_is_no_t5s_is_refused(tmp_path):
    write_as_t5x(tmp_path / "theirs", {"params/dense/kernel": np.ones((2, 2), np.float32)})
    with pytest.raises(UserError, match="no encoder-decoder T5.*params/dense/kernel"):
        convert.import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")


@pytest.mark.parametrize(("use_ocdbt", "use_zarr3"), [(True, False), (False, False), (True, True)])
def test_t5x_orbax_checkpoints_with_their_optimizer_are_imported(tmp_path, use_ocdbt, use_zarr3):
    import orbax.checkpoint as ocp

    params = make_params("bfloat16")
    tree = {
        "target": tensors.unflatten({name: jnp.asarray(value) for name, value in params.items()}),
        "state": {"step": jnp.int32(5), "param_states": {"0": {"v": jnp.ones(3)}}},
    }
    with ocp.PyTreeCheckpointer(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3) as checkpointer:
        checkpointer.save(tmp_path / "run" / "checkpoint_5" / "state", tree)
    imported = convert.import_checkpoint(str(tmp_path / "run"), tmp_path / "ours")
    assert (imported.format, imported.config) == ("orbax", CONFIG)
    ours = formats.open_checkpoint(str(tmp_path / "ours"))
    assert ours.step == 5
    assert_same(ours.tensors, params)
    part = ours.tensors["decoder/logits_dense/kernel"][slice(2, 5), slice(7, None)]
    np.testing.assert_array_equal(part, params["decoder/logits_dense/kernel"][2:5, 7:])


def test_an_orbax_database_that_is_cut_off_is_refused(tmp_path):
    # One array: where several fail at once, Orbax leaves the later failures to TensorStore's threads, which complain.
    orbax_files.write_tensors(tmp_path / "ours" / "state", {"a": tensors.of_array(np.arange(1000.0))})
    for file in (tmp_path / "ours" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="SOURCE: .*(cannot be read|is damaged)"):
        convert.export_checkpoint(str(tmp_path / "ours"), tmp_path / "again", to="t5x")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_t5xs_first_orbax_wrote_a_file_of_placeholders(tmp_path):
    params = make_params()
    state = tmp_path / "checkpoint_5" / "state"
    write_as_t5x(state, params, spec=lambda spec: f"PLACEHOLDER://{spec['kvstore']['path'].rstrip('/')}")
    content = serialization.msgpack_restore((state / "checkpoint").read_bytes())
    (state / "checkpoint").write_bytes(serialization.msgpack_serialize(content["optimizer"]))
    opened = formats.open_checkpoint(str(tmp_path))
    assert (opened.format, opened.step) == ("t5x", 1000)
    assert_same(opened.tensors, params)


def test_the_newest_step_is_found_and_step_0_counts(tmp_path):
    for step in (0, 20, 100):
        write_as_t5x(tmp_path / f"checkpoint_{step}", {}, step=step)
    assert formats.find_checkpoint(str(tmp_path)) == tmp_path / "checkpoint_100"
    assert formats.find_checkpoint(str(tmp_path / "checkpoint_20" / "checkpoint")) == tmp_path / "checkpoint_20"
    for step in (20, 100):
        (tmp_path / f"checkpoint_{step}" / "checkpoint").unlink()
    assert formats.find_checkpoint(str(tmp_path)) == tmp_path / "checkpoint_0"


def test_jax_arrays_lie_where_the_mesh_wants_them(tmp_path):
    from rest_jax.checkpoints.checkpointer import check_fits, load_params
    from rest_jax.partitioning import Partitioner, make_mesh, standard_logical_axis_rules

    params = make_params("bfloat16")
    write_as_t5x(tmp_path / "theirs", params)
    partitioner = Partitioner(make_mesh(model=2), standard_logical_axis_rules(parameter_partitioning_dims=2))
    for config in (CONFIG, t5.T5Config(**{**vars(CONFIG), "scan_layers": True})):
        abstract = tensors.unflatten(
            {
                name: jax.ShapeDtypeStruct(shape, jnp.float32)
                for name, shape in model_config.expected_shapes(config).items()
            }
        )
        check_fits(str(tmp_path / "theirs"), abstract_params=abstract)
        loaded = load_params(str(tmp_path / "theirs"), abstract_params=abstract, partitioner=partitioner)
        assert jax.tree.structure(loaded) == jax.tree.structure(abstract)
        shardings = partitioner.param_shardings(abstract)
        assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, loaded, shardings))
        leaves = {name: tensors.of_array(value.astype(np.float32)) for name, value in params.items()}
        expected = tensors.stacked(leaves) if config.scan_layers else leaves
        for name, leaf in tensors.flatten(loaded).items():
            np.testing.assert_array_equal(leaf, expected[name].read())
