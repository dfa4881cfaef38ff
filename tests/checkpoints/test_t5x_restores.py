"""T5X itself restores what is exported, and what it saves is imported.

Skipped where t5x is absent; docs/t5x.md says what it needs.
"""

import dataclasses
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.checkpoints import convert, formats, model_config, tensors
from tests.checkpoints.test_t5x_legacy import CONFIG, assert_same, make_params

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what T5X imports
    checkpoints = pytest.importorskip("t5x.checkpoints")
    from t5x import models, optimizers, partitioning, train_state
    from t5x.examples.scalable_t5 import network as scalable_network
    from t5x.examples.t5 import network

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # T5X leaves the event loop that it writes with open.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
# T5X splits heads and hidden units over all devices of a CPU, of which the tests have eight.
T5 = dataclasses.replace(CONFIG, num_heads=8, emb_dim=16)
SCALABLE = dataclasses.replace(T5, relative_bias_per_layer=True, num_decoder_layers=3)
CONFIGS = {"t5": T5, "scalable_t5": SCALABLE, "scalable_t5, scanned": dataclasses.replace(SCALABLE, scan_layers=True)}


def t5x_state(config):
    """T5X's train state of the same network, with its own optimizer."""
    module = scalable_network if config.relative_bias_per_layer else network
    fields = {field.name for field in dataclasses.fields(module.T5Config)}
    sizes = {name: value for name, value in vars(config).items() if name in fields}
    vocabulary = SimpleNamespace(vocab_size=config.vocab_size, eos_id=1)
    model = models.EncoderDecoderModel(
        module.Transformer(module.T5Config(**sizes)), vocabulary, vocabulary, optimizers.sgd(0.1)
    )
    shapes = {"encoder_input_tokens": (1, 4), "decoder_input_tokens": (1, 4)}
    variables = model.get_initial_variables(jax.random.key(3), shapes)
    # Arrays, as of a program: T5X asks even the step for its shape.
    return jax.tree.map(jnp.asarray, train_state.FlaxOptimTrainState.create(model.optimizer_def, variables))


def checkpointer(state, directory):
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    return checkpoints.Checkpointer(state, partitioner, str(directory))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_t5x_restores_an_export(tmp_path, config):
    params = make_params(config=config)
    leaves = {name: tensors.of_array(value) for name, value in params.items()}
    convert.orbax_files.write_tensors(tmp_path / "ours" / "state", leaves, step=7)
    convert.export_checkpoint(str(tmp_path / "ours"), tmp_path / "run" / "checkpoint_7", to="t5x")
    state = t5x_state(config)
    restored = checkpointer(state, tmp_path / "run").restore(step=7, fallback_state=state.state_dict())
    assert int(restored.step) == 7
    wanted = formats.in_layout_of(leaves, tensors.flat_shapes(restored.params))
    for name, leaf in tensors.flatten(restored.params).items():
        np.testing.assert_array_equal(leaf, wanted[name].read())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("step", [0, 5])
def test_what_t5x_saves_is_imported(tmp_path, config, step):
    state = t5x_state(config)
    state = state.replace_step(jnp.asarray(step))
    checkpointer(state, tmp_path / "run").save(state)
    imported = convert.import_checkpoint(str(tmp_path / "run"), tmp_path / "ours")
    assert imported.config == dataclasses.replace(config, mlp_activations=imported.config.mlp_activations)
    ours = formats.open_checkpoint(str(tmp_path / "ours"))
    assert ours.step == step
    saved = {name: tensors.of_array(value) for name, value in tensors.flatten(state.params).items()}
    wanted = formats.in_layout_of(saved, model_config.expected_shapes(config))
    assert_same(ours.tensors, {name: tensor.read() for name, tensor in wanted.items()})
