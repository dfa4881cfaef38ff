"""Schedules against their formulas, and optimisers against the mathematics of their first steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rest_jax import optimizers
from rest_jax.models import t5
from rest_jax.models.layer_stacking import stack_layers, unstack_layers
from rest_jax.partitioning import Partitioner, make_mesh, standard_logical_axis_rules

PEAK, STEPS, WARMUP = 2e-3, 100, 10
SCHEDULES = {
    "constant": optimizers.constant,
    "rsqrt": optimizers.rsqrt,
    "cosine": optimizers.cosine,
    "linear": optimizers.linear,
}
# Values at PEAK = 1 by the formulas in the docstrings.
EXPECTED = {
    "constant": lambda step: min(step / WARMUP, 1.0),
    "rsqrt": lambda step: min((step + 1) / WARMUP, (WARMUP / (step + 1)) ** 0.5),
    "cosine": lambda step: (
        step / WARMUP
        if step < WARMUP
        else 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * min((step - WARMUP) / (STEPS - WARMUP), 1.0)))
    ),
    "linear": lambda step: (
        step / WARMUP if step < WARMUP else 1.0 - min((step - WARMUP) / (STEPS - WARMUP), 1.0)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_follow_their_formulas(name):
    schedule = SCHEDULES[name](PEAK, STEPS, warmup_steps=WARMUP)
    for step in (0, 1, 5, 9, 10, 11, 50, 99, 100, 1000):
        np.testing.assert_allclose(schedule(step), PEAK * EXPECTED[name](step), rtol=1e-5, atol=1e-9, err_msg=step)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total_steps", [0, 1, 5])
@pytest.mark.parametrize("warmup_steps", [0, 10])
def test_a_phase_shorter_than_its_warmup_never_exceeds_the_peak(name, total_steps, warmup_steps):
    schedule = SCHEDULES[name](PEAK, total_steps, warmup_steps=warmup_steps)
    rates = np.asarray([schedule(step) for step in range(max(total_steps, 1))])
    assert np.isfinite(rates).all()
    assert (rates >= 0).all() and (rates <= PEAK * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_proportional_to_their_peak(name):
    """What lets phases of different learning rates share one compiled program."""
    one, other = (SCHEDULES[name](peak, STEPS, warmup_steps=WARMUP) for peak in (1.0, PEAK))
    for step in (0, 3, 10, 60, 100):
        np.testing.assert_allclose(other(step), PEAK * one(step), rtol=1e-6)


def test_without_warmup_the_first_step_runs_at_the_peak():
    for name in ("constant", "cosine", "linear"):
        np.testing.assert_allclose(SCHEDULES[name](PEAK, STEPS, warmup_steps=0)(0), PEAK, rtol=1e-6)


def make_params():
    # One matrix that Adafactor factors (both sides at least 128), one that it does not, and a vector.
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "large": jax.random.normal(keys[0], (128, 256)),
        "small": jax.random.normal(keys[1], (4, 8)),
        "scale": 1.0 + jax.random.normal(keys[2], (16,)),
    }


def first_update(make_optimizer, params, gradient, learning_rate=0.01):
    optimizer = make_optimizer(learning_rate)
    return optimizer.update(gradient, optimizer.init(params), params)[0]


def test_adamw_moves_each_weight_by_the_learning_rate_against_its_gradient_at_first():
    params = make_params()
    gradient = jax.tree.map(lambda p: 1e-4 * jnp.where(p > 0, 3.0, -5.0), params)
    update = first_update(functools.partial(optimizers.adamw, weight_decay=0.0), params, gradient)
    for name in params:
        # Bias correction makes the first step g / (|g| + eps), eps = 1e-9 beside |g| >= 3e-4.
        np.testing.assert_allclose(update[name], -0.01 * np.sign(params[name]), rtol=1e-4)


def test_adamw_decays_weights_apart_from_the_gradient():
    params = make_params()
    zero = jax.tree.map(jnp.zeros_like, params)
    update = first_update(functools.partial(optimizers.adamw, weight_decay=0.1), params, zero)
    np.testing.assert_allclose(update["small"], -0.01 * 0.1 * params["small"], rtol=1e-5)


def test_adamw_clips_by_the_global_norm():
    params = make_params()
    gradient = jax.tree.map(lambda p: 1e3 * p, params)
    optimizer = optimizers.adamw(0.01, clip_norm=2.0)
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    first_moment = optax.tree.get(state, "mu")
    # After one step the first moment is (1 - b1) times the clipped gradient.
    np.testing.assert_allclose(optax.tree.norm(first_moment) / (1 - 0.9), 2.0, rtol=1e-4)


def test_adafactor_moves_in_proportion_to_the_parameters_scale():
    params = make_params()
    gradient = jax.tree.map(lambda p: jnp.ones_like(p), params)
    update = first_update(optimizers.adafactor, params, gradient)
    for name, value in params.items():
        # A constant gradient divided by its own root mean square is 1; the rest is the parameter's own.
        rms = np.sqrt(np.mean(np.square(value)))
        np.testing.assert_allclose(update[name], np.full(value.shape, -0.01 * rms), rtol=1e-4, err_msg=name)


def test_adafactor_keeps_rows_and_columns_of_large_matrices_alone():
    params = make_params()
    state = optimizers.adafactor(0.01).init(params)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
    assert max(sizes) == 256  # no second moment of the whole 128 x 256 matrix
    assert sum(sizes) < 600


@pytest.mark.parametrize("optimizer", [optimizers.adamw, optimizers.adafactor])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_optimizer_with_every_schedule_finds_a_minimum(optimizer, name):
    target = make_params()
    schedule = SCHEDULES[name](0.05, STEPS, warmup_steps=WARMUP)
    chain = optimizer(schedule)

    def loss(params):
        return sum(jnp.mean(jnp.square(params[key] - target[key])) for key in target)

    @jax.jit
    def step(params, state):
        updates, state = chain.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    start = jax.tree.map(lambda leaf: leaf + 0.3, target)
    params, state = start, chain.init(start)
    for _ in range(STEPS):
        params, state = step(params, state)
    assert loss(params) < 0.1 * loss(start)


@pytest.mark.slow
def test_adafactor_takes_scanned_layers_one_by_one():
    # Wide enough that kernels are factored; scales of layers far apart, so that a statistic of all layers shows.
    config = t5.T5Config(256, 128, 2, 3, 2, 64, 128)
    module = t5.Transformer(config)
    tokens = jnp.ones((1, 1), jnp.int32)
    params = module.init(jax.random.key(0), tokens, tokens, tokens, enable_dropout=False)["params"]
    for index in range(3):
        layer, factor = f"layers_{index}", 10.0**index
        params["encoder"][layer] = jax.tree.map(functools.partial(jnp.multiply, factor), params["encoder"][layer])
    optimizer = optimizers.adafactor(1e-2)

    def train(params, stacked):
        state = optimizer.init(params)
        for _ in range(3):
            plain = unstack_layers(params, config) if stacked else params
            gradients = jax.tree.map(lambda leaf: jnp.sin(leaf * 37) * leaf, plain)
            updates, state = optimizer.update(stack_layers(gradients, config) if stacked else gradients, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    expected, _ = train(params, False)
    found, state = jax.jit(lambda p: train(p, True))(stack_layers(params, config))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), unstack_layers(found, config), expected
    )
    # Each of 3 layers has its rows and columns of second moments, and they can be laid on a mesh.
    sizes = {leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(state) if "encoder_norm" not in str(path)}
    assert (128, 3) in sizes and (128, 2) in sizes
    partitioner = Partitioner(make_mesh(data=4, model=2), standard_logical_axis_rules(parameter_partitioning_dims=2))
    jax.device_put(state, partitioner.param_shardings(state))
