"""Meshes and shardings on eight fake devices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from rest_jax.errors import UserError
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.partitioning import Partitioner, make_mesh, param_logical_axes, standard_logical_axis_rules

CONFIG = t5.T5Config(
    vocab_size=64, emb_dim=16, num_heads=8, num_encoder_layers=1, num_decoder_layers=1, head_dim=4, mlp_dim=32,
    dropout_rate=0.1,
)  # fmt: skip
MODEL = EncoderDecoderModel(t5.Transformer(CONFIG), None, None, label_smoothing=0.1)
OPTIMIZER = optax.sgd(1e-2, momentum=0.9)
ONE_DEVICE = dict(data=1, devices=jax.devices()[:1])
# Mesh, number of dimensions over which parameters are split, whether activations are pinned.
LAYOUTS = {
    "data": (dict(replica=2), 1, False),
    "tensor": (dict(model=8), 1, False),
    "fully sharded": (dict(), 2, False),
    "fully sharded and tensor": (dict(replica=2, model=2), 2, True),
}


def initial_params(seed=0, *, model=MODEL):
    shapes = {"encoder_input_tokens": (1, 1), "decoder_input_tokens": (1, 1)}
    return model.get_initial_variables(jax.random.key(seed), shapes)["params"]


def numpy_batch(rows=8, length=6):
    rng = np.random.default_rng(0)
    target = rng.integers(2, 64, (rows, length)).astype(np.int32)
    return {
        "encoder_input_tokens": rng.integers(2, 64, (rows, length)).astype(np.int32),
        "decoder_input_tokens": np.pad(target[:, :-1], ((0, 0), (1, 0))),
        "decoder_target_tokens": target,
        "decoder_loss_weights": np.ones((rows, length), np.float32),
    }


def train_step(partitioner, *, model=MODEL, activation_rules=False):
    """Loss before and parameters after one step, laid out by the partitioner."""
    params = initial_params(model=model)
    state = {"target": params, "state": OPTIMIZER.init(params)}
    shardings = partitioner.param_shardings(state)

    def step(state, batch):
        (loss, _), gradient = jax.value_and_grad(model.loss_fn, has_aux=True)(state["target"], batch, jax.random.key(1))
        updates, opt_state = OPTIMIZER.update(gradient, state["state"], state["target"])
        return {"target": optax.apply_updates(state["target"], updates), "state": opt_state}, loss

    jitted = jax.jit(
        step,
        in_shardings=(shardings, partitioner.batch_sharding()),
        out_shardings=(shardings, partitioner.replicated()),
    )
    arguments = (jax.device_put(state, shardings), partitioner.put_batch(numpy_batch()))
    if activation_rules:
        with partitioner.activation_rules():
            state, loss = jitted(*arguments)
    else:
        state, loss = jitted(*arguments)
    return float(loss), jax.device_get(state["target"])


@pytest.fixture(scope="module")
def single_device():
    return train_step(Partitioner(make_mesh(**ONE_DEVICE)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_as_one_device_does(layout, single_device):
    mesh, dims, activation_rules = LAYOUTS[layout]
    partitioner = Partitioner(make_mesh(**mesh), standard_logical_axis_rules(parameter_partitioning_dims=dims))
    loss, params = train_step(partitioner, activation_rules=activation_rules)
    expected_loss, expected = single_device
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, expected)


@pytest.mark.slow
def test_scanned_layers_train_on_a_mesh_as_on_one_device():
    config = dataclasses.replace(
        CONFIG, num_encoder_layers=2, scan_layers=True, remat_policy="minimal", relative_bias_per_layer=True
    )
    model = EncoderDecoderModel(t5.Transformer(config), None, None)
    mesh, dims, activation_rules = LAYOUTS["fully sharded and tensor"]
    partitioner = Partitioner(make_mesh(**mesh), standard_logical_axis_rules(parameter_partitioning_dims=dims))
    kernel = specs(partitioner, initial_params(model=model))["encoder/encoder/attention/query/kernel"]
    assert kernel == PartitionSpec(("data",), None, ("model",))
    loss, params = train_step(partitioner, model=model, activation_rules=activation_rules)
    expected_loss, expected = train_step(Partitioner(make_mesh(**ONE_DEVICE)), model=model)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, expected)


def specs(partitioner, tree):
    flat = jax.tree_util.tree_flatten_with_path(partitioner.param_shardings(tree))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec for path, sharding in flat}


def test_parameters_lie_as_t5x_lays_them():
    params = jax.eval_shape(initial_params)
    by_rules = {
        dims: specs(
            Partitioner(make_mesh(data=4, model=2), standard_logical_axis_rules(parameter_partitioning_dims=dims)),
            params,
        )
        for dims in (1, 2)
    }
    assert by_rules[1]["token_embedder/embedding"] == PartitionSpec(("model",), None)
    assert by_rules[1]["encoder/layers_0/attention/query/kernel"] == PartitionSpec(None, ("model",))
    assert by_rules[1]["encoder/layers_0/attention/out/kernel"] == PartitionSpec(("model",), None)
    assert by_rules[1]["decoder/layers_0/mlp/wo/kernel"] == PartitionSpec(("model",), None)
    assert by_rules[1]["encoder/relpos_bias/rel_embedding"] == PartitionSpec(("model",), None)
    assert by_rules[1]["decoder/decoder_norm/scale"] == PartitionSpec(None)
    assert by_rules[2]["token_embedder/embedding"] == PartitionSpec(("model",), ("data",))
    assert by_rules[2]["decoder/logits_dense/kernel"] == PartitionSpec(("data",), ("model",))
    assert by_rules[2]["decoder/decoder_norm/scale"] == PartitionSpec(("data",))


def test_every_parameter_has_logical_axes_of_its_rank():
    for path, leaf in jax.tree_util.tree_flatten_with_path(jax.eval_shape(initial_params))[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = param_logical_axes(name)
        assert axes is not None and len(axes) == leaf.ndim, name
    assert param_logical_axes("encoder/encoder/attention/query/kernel") == ("embed", "layers", "joined_kv")
    assert param_logical_axes("0/mu/decoder/decoder/pre_mlp_layer_norm/scale") == ("embed", "layers")
    assert param_logical_axes("decoder/decoder/relpos_bias/rel_embedding") == ("heads", "layers", "relpos_buckets")
    # T5X's scalable_t5, where heads have a dimension of their own and layers still lie on axis 1.
    scanned = "encoder/encoder/attention"
    assert param_logical_axes(f"{scanned}/query/kernel", rank=4) == ("embed", "layers", "heads", "kv")
    assert param_logical_axes(f"{scanned}/out/kernel", rank=4) == ("heads", "layers", "kv", "embed")
    assert param_logical_axes("encoder/layers_0/attention/out/kernel", rank=3) == ("heads", "kv", "embed")
    assert param_logical_axes("count") is None
    assert param_logical_axes("decoder/my_logits_dense_2/kernel") is None


def test_optimizer_state_lies_as_its_parameters():
    partitioner = Partitioner(make_mesh(data=4, model=2), standard_logical_axis_rules(parameter_partitioning_dims=2))
    params = jax.eval_shape(initial_params)
    adam = specs(partitioner, jax.eval_shape(optax.adamw(1e-3).init, params))
    assert adam["0/mu/token_embedder/embedding"] == PartitionSpec(("model",), ("data",))
    assert adam["0/count"] == PartitionSpec()
    factored = optax.adafactor(1e-3, min_dim_size_to_factor=8)
    adafactor = specs(partitioner, jax.eval_shape(factored.init, params))
    rows = [spec for name, spec in adafactor.items() if "v_row" in name or "v_col" in name]
    assert rows and all(spec in (PartitionSpec(), PartitionSpec(None)) for spec in rows)


def test_shapes_with_shardings_restore_where_they_belong():
    partitioner = Partitioner(make_mesh(model=2))
    abstract = partitioner.with_shardings(jax.eval_shape(initial_params))
    leaf = abstract["decoder"]["logits_dense"]["kernel"]
    assert leaf.shape == (16, 64) and leaf.sharding.spec == PartitionSpec(None, ("model",))


def test_put_batch_splits_rows_over_replica_and_data():
    partitioner = Partitioner(make_mesh(replica=2, model=2))
    batch = numpy_batch()
    arrays = partitioner.put_batch(batch)
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, batch[name])
        assert {shard.data.shape for shard in array.addressable_shards} == {(2, 6)}
    assert partitioner.num_batch_shards == 4


def test_indivisible_sizes_say_which():
    partitioner = Partitioner(make_mesh(model=2))
    with pytest.raises(UserError, match=r"BATCH_SIZE=6 .* 4 devices .* multiple of 4"):
        partitioner.check_batch_divisible(6, "BATCH_SIZE")
    with pytest.raises(UserError, match="BATCH_SIZE=0"):
        partitioner.check_batch_divisible(0, "BATCH_SIZE")
    partitioner.check_batch_divisible(8, "BATCH_SIZE")
    tree = {"decoder": {"logits_dense": {"kernel": jax.ShapeDtypeStruct((16, 63), jnp.float32)}}}
    with pytest.raises(UserError, match=r"decoder/logits_dense/kernel: dimension 1 \('vocab'\) has size 63.*'model'"):
        partitioner.param_shardings(tree)


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        (dict(model=3), "8 devices cannot be divided"),
        (dict(data=3), "= 3 devices, but there are 8"),
        (dict(model=0), "at least 1"),
        (dict(data=0), "at least 1"),
    ],
)
def test_impossible_meshes_say_so(sizes, match):
    with pytest.raises(UserError, match=match):
        make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class SliceDevice:
    """As much of a TPU device as a mesh is laid out by."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int = 0
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"
    core_on_chip: int = 0


@pytest.mark.parametrize("model", [1, 2, 4, 8])
def test_slices_are_replicas_whatever_the_width(model):
    places = np.ndindex(2, 16, 16)
    devices = [SliceDevice(number, (x, y, 0), index) for number, (index, x, y) in enumerate(places)]
    mesh = make_mesh(replica=2, model=model, devices=devices)
    assert dict(mesh.shape) == {"replica": 2, "data": 256 // model, "model": model}
    assert [{device.slice_index for device in replica.ravel()} for replica in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match="multiple of 2"):
        make_mesh(model=model, devices=devices)


def test_rules_are_checked():
    with pytest.raises(UserError, match="parameter_partitioning_dims"):
        standard_logical_axis_rules(parameter_partitioning_dims=3)
    with pytest.raises(UserError, match="'pipeline'"):
        Partitioner(make_mesh(), (("embed", "pipeline"),))
    rules = standard_logical_axis_rules(additional_rules=[("vocab", None)])
    tree = {"token_embedder": {"embedding": jax.ShapeDtypeStruct((63, 16), jnp.float32)}}
    assert specs(Partitioner(make_mesh(model=2), rules), tree)["token_embedder/embedding"] == PartitionSpec(None, None)


def test_activations_are_pinned_only_under_the_rules():
    partitioner = Partitioner(make_mesh(model=2))
    params, batch = jax.eval_shape(initial_params), numpy_batch()

    def trace():
        # A new function each time: JAX remembers the trace of the same one.
        return str(jax.make_jaxpr(lambda p: MODEL.loss_fn(p, batch, None))(params))

    assert "sharding_constraint" not in trace()
    with partitioner.activation_rules():
        assert "sharding_constraint" in trace()
