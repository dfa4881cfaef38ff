"""scalable_t5's kernels: every part of them reads as the same part of the whole, and whole checkpoints come and go."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rest_jax.checkpoints import convert, formats, model_config, tensors
from rest_jax.checkpoints.attention_heads import joined_heads, split_heads, with_heads_of
from rest_jax.checkpoints.checkpointer import load_params
from rest_jax.partitioning import Partitioner, make_mesh
from tests.checkpoints.test_t5x_legacy import CONFIG, assert_same, make_params, write_as_t5x

HEADS, HEAD_DIM, EMB, LAYERS = 3, 4, 5, 2
UMT5 = dataclasses.replace(CONFIG, relative_bias_per_layer=True, num_encoder_layers=2, num_decoder_layers=3)
# Name -> its shapes here and in scalable_t5, by hand.
KERNELS = {
    "encoder/layers_0/attention/query/kernel": ((EMB, 12), (EMB, HEADS, HEAD_DIM)),
    "decoder/layers_0/encoder_decoder_attention/out/kernel": ((12, EMB), (HEADS, HEAD_DIM, EMB)),
}
SCANNED_KERNELS = {
    "decoder/decoder/self_attention/value/kernel": ((EMB, LAYERS, 12), (EMB, LAYERS, HEADS, HEAD_DIM)),
    "encoder/encoder/attention/out/kernel": ((12, LAYERS, EMB), (HEADS, LAYERS, HEAD_DIM, EMB)),
}
ALL = KERNELS | SCANNED_KERNELS


def join(values, name):
    """[..., H, K] -> [..., H * K], and for out [H, L, K, ...] -> [H * K, L, ...], a head at a time."""
    if not name.endswith("out/kernel"):
        return np.concatenate([values[..., head, :] for head in range(HEADS)], axis=-1)
    if values.ndim == 4:
        return np.concatenate([values[head].swapaxes(0, 1) for head in range(HEADS)], axis=0)
    return np.concatenate([values[head] for head in range(HEADS)], axis=0)


def part_of(data, shape):
    """A slice for each dimension, never empty."""
    ends = [sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in shape]
    return tuple(slice(start, max(stop, start + 1)) for start, stop in ends)


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_any_part_of_a_kernel_is_that_part_of_the_whole(name, data):
    ours, theirs = ALL[name]
    values = np.arange(np.prod(theirs)).reshape(theirs)
    joined = joined_heads({name: tensors.of_array(values)})[name]
    assert joined.shape == ours
    part = part_of(data, ours)
    np.testing.assert_array_equal(joined[part], join(values, name)[part])
    back = split_heads({name: joined}, num_heads=HEADS)[name]
    assert back.shape == theirs
    part = part_of(data, theirs)
    np.testing.assert_array_equal(back[part], values[part])


def test_what_has_the_wanted_heads_and_what_is_no_attention_stays():
    leaves = {name: tensors.of_array(np.zeros(shapes[0])) for name, shapes in KERNELS.items()}
    leaves["encoder/layers_0/mlp/wi_0/kernel"] = tensors.of_array(np.zeros((EMB, 7)))
    shapes = tensors.flat_shapes(tensors.unflatten(leaves))
    assert tensors.flat_shapes(tensors.unflatten(with_heads_of(leaves, shapes))) == shapes
    split = {name: shapes[1] for name, shapes in KERNELS.items()}
    theirs = with_heads_of(leaves, split)
    assert {name: theirs[name].shape for name in split} == split
    assert theirs["encoder/layers_0/mlp/wi_0/kernel"].shape == (EMB, 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scanned", [False, True])
def test_checkpoints_of_scalable_t5_come_and_go_bit_for_bit(tmp_path, scanned, dtype):
    config = dataclasses.replace(UMT5, scan_layers=scanned)
    ours = make_params(dtype, config)
    lazy = {name: tensors.of_array(value) for name, value in ours.items()}
    theirs = {name: tensor.read() for name, tensor in split_heads(lazy, num_heads=2).items()}
    write_as_t5x(tmp_path / "theirs", theirs)
    imported = convert.import_checkpoint(str(tmp_path / "theirs"), tmp_path / "ours")
    assert imported.config == config
    assert_same(formats.open_checkpoint(str(tmp_path / "ours")).tensors, ours)
    convert.export_checkpoint(str(tmp_path / "ours"), tmp_path / "again", to="t5x")
    assert_same(formats.open_checkpoint(str(tmp_path / "again")).tensors, theirs)


@pytest.mark.parametrize("scanned", [False, True])
def test_a_run_starts_from_one_whatever_its_own_layout(tmp_path, scanned):
    config = dataclasses.replace(UMT5, scan_layers=True)
    lazy = {name: tensors.of_array(value) for name, value in make_params(config=config).items()}
    write_as_t5x(tmp_path / "theirs", {name: tensor.read() for name, tensor in split_heads(lazy, num_heads=2).items()})
    expected = lazy if scanned else tensors.unstacked(lazy)
    shapes = model_config.expected_shapes(dataclasses.replace(UMT5, scan_layers=scanned))
    abstract = tensors.unflatten({name: jnp.zeros(shape) for name, shape in shapes.items()})
    loaded = load_params(str(tmp_path / "theirs"), abstract_params=abstract, partitioner=Partitioner(make_mesh()))
    for name, leaf in tensors.flatten(loaded).items():
        np.testing.assert_array_equal(leaf, expected[name].read())
