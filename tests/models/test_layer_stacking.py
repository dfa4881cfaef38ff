"""Scanned layers: T5X's tree, the same function of it, one compiled layer, and conversion both ways."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.errors import UserError
from rest_jax.models import t5
from rest_jax.models.layer_stacking import stack_layers, unstack_layers

PLAIN = t5.T5Config(
    vocab_size=50, emb_dim=16, num_heads=2, num_encoder_layers=3, num_decoder_layers=2, head_dim=4, mlp_dim=24
)


def scanned(config):
    return dataclasses.replace(config, scan_layers=True)


def init(config, seed=0):
    tokens = jnp.ones((1, 1), jnp.int32)
    module = t5.Transformer(config)
    return jax.jit(lambda key: module.init(key, tokens, tokens, tokens, enable_dropout=False))(jax.random.key(seed))[
        "params"
    ]


def paths(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def batch():
    rng = np.random.default_rng(0)
    source, target = (rng.integers(2, 50, (2, length)).astype(np.int32) for length in (7, 6))
    source[1, 4:] = target[0, 5:] = 0
    return source, np.pad(target[:, :-1], ((0, 0), (1, 0))), target


def loss(params, config, **kwargs):
    """A weighted sum of the logits, so that every parameter has a gradient."""
    logits = t5.Transformer(config).apply({"params": params}, *batch(), **{"enable_dropout": False, **kwargs})
    return jnp.sum(jnp.sin(logits))


@pytest.mark.parametrize("per_layer", [False, True], ids=["one table", "a table per layer"])
def test_scanned_tree_is_that_of_t5x_scalable_t5(per_layer):
    config = dataclasses.replace(PLAIN, relative_bias_per_layer=per_layer)
    shapes = {name: leaf.shape for name, leaf in paths(jax.eval_shape(lambda: init(scanned(config)))).items()}
    assert shapes["encoder/encoder/attention/query/kernel"] == (16, 3, 8)
    assert shapes["decoder/decoder/mlp/wi_1/kernel"] == (16, 2, 24)
    assert shapes["decoder/decoder/pre_cross_attention_layer_norm/scale"] == (16, 2)
    assert shapes["decoder/decoder_norm/scale"] == (16,)
    if per_layer:
        assert shapes["encoder/encoder/relpos_bias/rel_embedding"] == (2, 3, 32)
        assert "encoder/relpos_bias/rel_embedding" not in shapes
    else:
        assert shapes["encoder/relpos_bias/rel_embedding"] == (2, 32)
    stacked = jax.eval_shape(lambda: stack_layers(init(config), config))
    assert {name: leaf.shape for name, leaf in paths(stacked).items()} == shapes


def test_scanned_layers_start_different_and_as_large_as_separate_ones():
    config = t5.T5Config(50, 128, 4, 2, 2, 32, 256)
    kernel = init(scanned(config))["encoder"]["encoder"]["mlp"]["wo"]["kernel"]  # [256, 2, 128]
    assert not np.array_equal(kernel[:, 0], kernel[:, 1])
    assert float(np.std(kernel)) == pytest.approx(256**-0.5, rel=0.03)


@pytest.mark.parametrize(
    "variant", [{}, pytest.param({"relative_bias_per_layer": True}, marks=pytest.mark.slow)], ids=["T5", "UMT5"]
)
def test_scanned_layers_compute_what_separate_ones_do(variant):
    config = dataclasses.replace(PLAIN, **variant)
    params = init(config)
    expected, gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, config)))(params)
    stacked = stack_layers(params, config)
    found, stacked_gradient = jax.jit(jax.value_and_grad(lambda p: loss(p, scanned(config))))(stacked)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        unstack_layers(stacked_gradient, config),
        gradient,
    )


@functools.cache
def value_gradient_and_kept_bytes(policy, scan):
    layers = 2 if scan else 1
    config = dataclasses.replace(
        PLAIN,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        dropout_rate=0.2,
        scan_layers=scan,
        remat_policy=policy,
    )
    params = init(config)

    def of(params):
        return loss(params, config, enable_dropout=True, rngs={"dropout": jax.random.key(1)})

    value, gradient = jax.jit(jax.value_and_grad(of))(params)
    return value, gradient, _kept_bytes(of, params)


@pytest.mark.parametrize("scan", [pytest.param(False, marks=pytest.mark.slow), True], ids=["separate", "scanned"])
@pytest.mark.parametrize("policy", ["minimal", pytest.param("full", marks=pytest.mark.slow)])
def test_rematerialisation_changes_no_value_and_keeps_less(policy, scan):
    expected, expected_gradient, kept = value_gradient_and_kept_bytes("none", scan)
    found, gradient, kept_by_remat = value_gradient_and_kept_bytes(policy, scan)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient, expected_gradient)
    assert kept_by_remat < 0.8 * kept


def _kept_bytes(function, params):
    """Bytes of what the forward pass keeps for the backward pass."""
    _, pullback = jax.eval_shape(lambda p: jax.vjp(function, p), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))


def test_program_does_not_grow_with_depth():
    def program_size(layers, scan):
        config = dataclasses.replace(PLAIN, num_encoder_layers=layers, num_decoder_layers=layers, scan_layers=scan)
        params = jax.eval_shape(lambda: init(config))
        return len(jax.jit(lambda p: loss(p, config)).lower(params).as_text())

    assert program_size(8, True) < 1.02 * program_size(2, True)
    assert program_size(8, False) > 2 * program_size(2, False)


@pytest.mark.parametrize("to", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_conversion_there_and_back_keeps_every_bit_and_the_kind_of_array(to):
    params = jax.tree.map(to, init(PLAIN))
    stacked = stack_layers(params, PLAIN)
    back = unstack_layers(stacked, PLAIN)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for converted in (stacked, back):
        assert all(isinstance(leaf, type(to(0.0))) for leaf in jax.tree.leaves(converted))
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_trees_that_do_not_fit_are_refused_by_name():
    params = init(PLAIN)
    deeper = dataclasses.replace(PLAIN, num_encoder_layers=4)
    with pytest.raises(UserError, match=r"encoder have 3 layers.*has 4.*num_encoder_layers"):
        stack_layers(params, deeper)
    with pytest.raises(UserError, match=r"encoder stack \[3\] layers.*has 4.*num_encoder_layers"):
        unstack_layers(stack_layers(params, PLAIN), deeper)
    with pytest.raises(UserError, match="encoder/encoder"):
        unstack_layers(params, PLAIN)
    with pytest.raises(UserError, match="decoder"):
        stack_layers({"encoder": params["encoder"]}, PLAIN)
    del params["encoder"]["layers_2"]["mlp"]["wi_1"]
    with pytest.raises(UserError, match=r"layers_2 differs from layers_0 in .*mlp/wi_1/kernel.*scan_layers=False"):
        stack_layers(params, PLAIN)
