"""With the TPU's compiler: topologies, a program read, Grow as the command compiles it, how a train state lies."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec

from rest_jax import chips, optimizers
from rest_jax.aot import hlo, topology
from rest_jax.errors import UserError
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.partitioning import Partitioner, devices_of_trace, make_mesh, standard_logical_axis_rules, trace_mesh
from rest_jax.sampling import memory
from rest_jax.training import Training, abstract_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu is not installed: pip install 'rest_jax[tpu-compile]', as make test_slow does",
    ),
]


def test_a_topology_has_its_devices_memory_and_platform():
    devices = topology.devices(name="v5e:2x2")
    mesh = make_mesh(model=2, devices=devices)
    assert dict(mesh.shape) == {"replica": 1, "data": 2, "model": 2}
    assert 15 * 2**30 < memory.device_bytes(devices[0]) < 16 * 2**30
    with trace_mesh(mesh):
        assert devices_of_trace() == ("tpu", 4)
    two = make_mesh(replica=2, devices=topology.devices(name="v5e:2x2", slices=2))
    assert [{device.slice_index for device in replica.ravel()} for replica in two.devices] == [{0}, {1}]
    with pytest.raises(UserError, match="v5e:3x5"):
        topology.devices(name="v5e:3x5")


@pytest.fixture
def no_cache():
    """What is compiled for devices that are not here can not be read back from JAX's cache on disk."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


def test_a_program_compiled_for_a_tpu_is_read(no_cache):
    mesh = make_mesh(devices=topology.devices(name="v5e:2x2"))
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(("replica", "data")))

    def f(kernels, x):
        return jnp.sum(jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0])

    shapes = (
        jax.ShapeDtypeStruct((6, 1024, 1024), jnp.bfloat16, sharding=whole),
        jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16, sharding=rows),
    )
    compiled = jax.jit(f).lower(*shapes).compile()
    analysis = hlo.analyse(compiled.as_text(), devices_per_slice=4)
    assert not analysis.loops
    assert [each.kind for each in analysis.once.collectives] == ["all-reduce"]
    chip = chips.of_device(mesh.devices.flat[0])
    least = 6 * 2 * 1024**3 / chip.flops
    assert least < analysis.once.cycles / chip.clock < 4 * least
    # The layers' kernels are read once each, slice by slice; activations stay in the core's memory.
    assert 12 * 2**20 <= analysis.once.hbm_bytes < 16 * 2**20


PODS_GIN = Path(__file__).parents[1] / "benchmarks/pods/pods.gin"
EMB_DIM, DECODER_LAYERS = 256, 3


def compiled(folder, *, slices, model_parallel):
    """The decode loop's collectives as the command writes them, and the number of slots."""
    file = folder / "found.json"
    sizes = {"emb_dim": EMB_DIM, "num_heads": 4, "mlp_dim": 512, "num_decoder_layers": DECODER_LAYERS}
    bindings = {f"t5.T5Config.{name}": size for name, size in {**sizes, "vocab_size": 2048}.items()}
    bindings |= {"VOCABULARY_SIZE": 2048, "NUM_SAMPLES": 8, "SOURCES_PER_CHUNK": 16, "BATCH_SIZE": 16}
    bindings |= {"REPLICAS": slices, "MODEL_PARALLEL": model_parallel}
    command = [sys.executable, "-m", "rest_jax", "compile", "--gin_file=models/t5_1_1_small.gin"]
    command += [f"--gin_file={PODS_GIN}", "--topology=v5e:2x2", f"--slices={slices}", "--phase=grow", f"--json={file}"]
    command += [f"--gin.{name}={value}" for name, value in bindings.items()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (grow,) = json.loads(file.read_text())["programs"]
    assert grow["fits"] and grow["timed"] and grow["seconds"] > 0
    return grow["step"]["collectives"], grow["slots"]


@pytest.mark.parametrize("slices", [1, 2])
def test_data_shards_exchange_nothing_while_they_decode(tmp_path, slices):
    assert compiled(tmp_path, slices=slices, model_parallel=1)[0] == []


@pytest.mark.parametrize("slices", [1, 2])
def test_tensor_parallel_decoding_adds_up_three_sublayers_of_each_layer(tmp_path, slices):
    collectives, slots = compiled(tmp_path, slices=slices, model_parallel=2)
    assert all(each["group"] == 2 and not each["across_slices"] for each in collectives)
    activations = slots * EMB_DIM * 2  # bytes of bfloat16
    of_layers = [each["count"] for each in collectives if (each["kind"], each["size"]) == ("all-reduce", activations)]
    assert sum(of_layers) == 3 * DECODER_LAYERS


@pytest.mark.parametrize(("dims", "kernel"), [(1, "wo"), (2, "wi_0")])
def test_trained_layers_lie_in_one_piece_where_that_fills_tiles(dims, kernel):
    """The width is split over 4 devices where `dims` is 2: no last dimension of `wo` is a multiple of 128 then."""
    config = t5.T5Config(
        vocab_size=256, emb_dim=128, num_heads=2, num_encoder_layers=2, num_decoder_layers=3, head_dim=64, mlp_dim=256,
        scan_layers=True,
    )  # fmt: skip
    model = EncoderDecoderModel(t5.Transformer(config), None, None)
    features = {"encoder_input_tokens": (1, 1), "decoder_input_tokens": (1, 1)}
    params = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), features)["params"])
    rules = standard_logical_axis_rules(parameter_partitioning_dims=dims)
    partitioner = Partitioner(make_mesh(devices=topology.devices(name="v5e:2x2")), rules)
    training = Training(steps=1, batch_size=4, learning_rate=1e-3, optimizer=optimizers.adamw)
    state = abstract_state(training=training, abstract_params=params, partitioner=partitioner)
    layers = state.params["decoder"]["decoder"]["mlp"]
    assert layers[kernel]["kernel"].format.layout.major_to_minor == (1, 0, 2)
    assert state.params["token_embedder"]["embedding"].format.layout is None
    assert (layers["wo"]["kernel"].format.layout is None) == (dims == 2)
