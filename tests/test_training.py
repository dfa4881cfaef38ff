"""The train step against plain formulas, on meshes, and the loop's stops, choices and restarts."""

import contextlib
import dataclasses
import functools
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rest_jax import optimizers, partitioning
from rest_jax.checkpoints import checkpointer
from rest_jax.data.batching import BatchPlan, MixtureSpec
from rest_jax.errors import Preempted, UserError
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.objectives import bc
from rest_jax.partitioning import Partitioner, make_mesh, standard_logical_axis_rules
from rest_jax.reporting.metrics_writer import MetricsWriter, read_metrics
from rest_jax.reporting.progress import ProgressLine
from rest_jax.training import (
    FitResult,
    Training,
    TrainState,
    abstract_state,
    compile_train_step,
    fit,
    initial_state,
    train_step,
    training_flops,
)

VOCAB, LENGTH, ROWS = 64, 12, 16
CONFIG = t5.T5Config(
    vocab_size=VOCAB, emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=8, mlp_dim=32
)
ONE_DEVICE = Partitioner(make_mesh(data=1, devices=jax.devices()[:1]))
TRAINING = Training(
    steps=12, batch_size=ROWS, learning_rate=3e-3, eval_period=4, checkpoint_period=2, log_period=4,
    schedule=optimizers.constant,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Random pairs with odd source ids; the target repeats the source, so there is something to learn."""

    size: int = 80

    @property
    def source_ids(self) -> np.ndarray:
        return 2 * np.arange(self.size, dtype=np.int64) + 1

    @property
    def source_lengths(self) -> np.ndarray:
        return np.asarray([len(self.inputs(i)) for i in range(self.size)], np.int32)

    target_lengths = source_lengths

    def inputs(self, index: int, /) -> np.ndarray:
        generator = np.random.default_rng(index)
        return np.append(generator.integers(3, VOCAB, generator.integers(2, LENGTH)), 1).astype(np.int32)

    targets = inputs


MIXTURE = MixtureSpec.single(Pairs())


def make_model(**changes: Any) -> EncoderDecoderModel:
    return EncoderDecoderModel(t5.Transformer(dataclasses.replace(CONFIG, **changes)), None, None)


MODEL = make_model()
DROPOUT_MODEL = make_model(dropout_rate=0.2)


def make_params(seed: int = 0) -> Any:
    shapes = {"encoder_input_tokens": (1, 1), "decoder_input_tokens": (1, 1)}
    return MODEL.get_initial_variables(jax.random.key(seed), shapes)["params"]


def make_batch(step: int = 0) -> dict[str, np.ndarray]:
    plan = BatchPlan(MIXTURE, batch_size=ROWS, source_length=LENGTH, target_length=LENGTH, pack=True, seed=0)
    return plan.batch(step)


def one_step(
    *, training: Training = TRAINING, model: Any = MODEL, partitioner: Partitioner = ONE_DEVICE, steps: int = 1
):
    """Parameters and metrics after some steps of the compiled program."""
    state = initial_state(training=training, params=make_params(), partitioner=partitioner)
    program = compile_train_step(state=state, training=training, model=model, partitioner=partitioner)
    for step in range(steps):
        state, metrics = program(state, partitioner.put_batch(make_batch(step)), jax.random.key(0))
    return jax.device_get(state), jax.device_get(metrics)


# The step ------------------------------------------------------------------------------------------------------------


def sgd(learning_rate: Any) -> optax.GradientTransformation:
    return optax.sgd(learning_rate)


def test_a_step_descends_the_mean_gradient_over_target_tokens():
    params, batch = make_params(), make_batch()
    state = TrainState(step=jnp.int32(0), params=params, opt_state=sgd(0.1).init(params))
    step = functools.partial(train_step, model=MODEL, objective=bc, optimizer=sgd(0.1))
    state, metrics = jax.jit(step)(state, batch, jax.random.key(0))
    tokens = batch["decoder_loss_weights"].sum()
    gradient = jax.jit(jax.grad(lambda p: MODEL.loss_fn(p, batch, None)[0] / tokens))(params)
    assert int(state.step) == 1
    assert metrics["weight_sum"] == tokens
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradient), rtol=1e-5)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - 0.1 * g, rtol=1e-5, atol=1e-6),
        state.params, params, gradient,
    )  # fmt: skip


def summed_gradient(microbatches: int) -> tuple[Any, dict[str, jax.Array]]:
    """The gradient that a step applies, times the number of target tokens, and the step's metrics."""
    params = make_params()
    state = TrainState(step=jnp.int32(0), params=params, opt_state=sgd(1.0).init(params))
    record = optax.GradientTransformation(lambda p: (), lambda g, s, p: (jax.tree.map(jnp.zeros_like, g), g))
    state, metrics = jax.jit(
        lambda state, batch: train_step(
            state, batch, jax.random.key(0), model=MODEL, objective=bc, optimizer=record, microbatches=microbatches
        )
    )(dataclasses.replace(state, opt_state=()), make_batch())
    return jax.tree.map(lambda g: g * metrics["weight_sum"], state.opt_state), metrics


@pytest.mark.parametrize("microbatches", [2, 8])
def test_accumulated_gradients_are_the_whole_batchs(microbatches):
    whole, metrics = summed_gradient(1)
    parts, part_metrics = summed_gradient(microbatches)
    for name in metrics:
        np.testing.assert_allclose(part_metrics[name], metrics[name], rtol=1e-5, err_msg=name)
    # A float32 sum of n terms errs by at most n * eps * sum |term| (Higham, 4.2); the terms of a weight's gradient are
    # one per token, and their absolute sum is at most sqrt(n) times the norm that random signs give. Of the bound's
    # n = ROWS * LENGTH terms, errors cancel as a random walk does: sqrt(n) * eps per unit of the largest entry.
    terms = ROWS * LENGTH
    tolerance = terms * np.finfo(np.float32).eps
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(a).max())


def test_the_count_of_a_steps_arithmetic_is_xlas_for_the_products_with_weights():
    # XLA also counts attention, normalisation and the loss, which weigh much in so small a model.
    params, batch = make_params(), make_batch()
    tokens = {side: float(batch[f"{side}_input_tokens"].size) for side in ("encoder", "decoder")}
    counted = training_flops(params, source_tokens=tokens["encoder"], target_tokens=tokens["decoder"])
    gradient = jax.jit(jax.grad(lambda p: MODEL.loss_fn(p, batch, None)[0])).lower(params).compile()
    assert 0.5 < counted / gradient.cost_analysis()["flops"] < 1.0


def test_accumulation_masks_each_slice_by_its_own_key():
    model = make_model(dropout_rate=0.5)
    training = dataclasses.replace(TRAINING, optimizer=sgd, microbatches=2)
    first, second = (one_step(training=training, model=model)[1]["loss"] for _ in range(2))
    assert first == second  # a function of the phase's key and the step
    assert first != one_step(training=dataclasses.replace(training, microbatches=1), model=model)[1]["loss"]


def test_dropout_differs_from_step_to_step():
    model = make_model(dropout_rate=0.5)
    params, batch, key = make_params(), make_batch(), jax.random.key(0)
    frozen = optax.set_to_zero()
    program = jax.jit(functools.partial(train_step, model=model, objective=bc, optimizer=frozen))
    losses = []
    for step in (0, 0, 1):
        state = TrainState(step=jnp.int32(step), params=params, opt_state=frozen.init(params))
        _, metrics = program(state, batch, key)
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("optimizer", "schedule", "learning_rate"),
    [(optimizers.adamw, optimizers.cosine, 1e-2), (optimizers.adafactor, optimizers.linear, 1e-2)]
    # The warm-up of 4000 steps needs a rate that is high at once.
    + [(optimizers.adafactor, optimizers.rsqrt, 1.0)],
)
def test_optimizers_learn(optimizer, schedule, learning_rate):
    training = dataclasses.replace(
        TRAINING, optimizer=optimizer, schedule=schedule, learning_rate=learning_rate, steps=30
    )
    state = initial_state(training=training, params=make_params(), partitioner=ONE_DEVICE)
    program = compile_train_step(state=state, training=training, model=MODEL, partitioner=ONE_DEVICE)
    batch, losses = ONE_DEVICE.put_batch(make_batch()), []
    for _ in range(training.steps):
        state, metrics = program(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"] / metrics["weight_sum"]))
    assert losses[-1] < 0.9 * losses[0]


def test_phases_that_differ_in_their_learning_rate_alone_share_a_program():
    traced = []

    def objective(model, params, batch, key):
        traced.append(None)
        return bc(model, params, batch, key)

    training = dataclasses.replace(TRAINING, objective=objective, optimizer=sgd)
    high, _ = one_step(training=training)
    count = len(traced)
    low, _ = one_step(training=dataclasses.replace(training, learning_rate=training.learning_rate / 2))
    assert len(traced) == count
    start = make_params()
    for old, a, b in zip(*(jax.tree.leaves(tree) for tree in (start, high.params, low.params)), strict=True):
        # Half the step; what cancellation leaves of a difference of numbers of this size.
        error = 4 * np.finfo(np.float32).eps * np.abs(old).max()
        np.testing.assert_allclose(a - old, 2 * (b - old), atol=error)


def test_partitioners_that_differ_in_their_rules_alone_have_programs_of_their_own():
    mesh, split = make_mesh(model=2), standard_logical_axis_rules(activation_partitioning_dims=2)
    state = initial_state(training=TRAINING, params=make_params(), partitioner=ONE_DEVICE)
    first, again, other = (
        compile_train_step(state=state, training=TRAINING, model=MODEL, partitioner=partitioner).func
        for partitioner in (Partitioner(mesh), Partitioner(mesh), Partitioner(mesh, split))
    )
    assert first is again is not other


def test_bfloat16_activations_train_float32_parameters():
    exact, exact_metrics = one_step(training=dataclasses.replace(TRAINING, optimizer=sgd))
    state, metrics = one_step(training=dataclasses.replace(TRAINING, optimizer=sgd), model=make_model(dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim} <= {np.dtype(np.float32)}
    assert metrics["loss"] != exact_metrics["loss"]
    # bfloat16 has 8 bits of mantissa, a unit roundoff of 2^-9; the loss passes through some ten roundings.
    np.testing.assert_allclose(metrics["loss"], exact_metrics["loss"], rtol=10 * 2**-9)
    np.testing.assert_allclose(metrics["grad_norm"], exact_metrics["grad_norm"], rtol=20 * 2**-9)


# Mesh, and in how many dimensions parameters are split.
MESHES = {
    "data 8": (dict(), 1),
    "data 4 x model 2": (dict(model=2), 1),
    "parameters over data": (dict(), 2),
    "parameters over data 4, model 2": (dict(model=2), 2),
}


@functools.cache
def steps_on_one_device(training: Training) -> Any:
    return one_step(training=training, steps=2)


def mild_adamw(learning_rate: Any) -> optax.GradientTransformation:
    # An epsilon far above the rounding of a gradient: Adam's first step is g / (|g| + eps), a mere sign without it.
    return optimizers.adamw(learning_rate, eps=1e-3)


@pytest.mark.parametrize(
    ("layout", "optimizer", "microbatches"),
    [(layout, mild_adamw, 1) for layout in MESHES]
    + [(layout, optimizers.adafactor, 2) for layout in ("data 4 x model 2", "parameters over data 4, model 2")],
)
def test_a_mesh_of_eight_devices_trains_as_one_device_does(layout, optimizer, microbatches):
    mesh, dims = MESHES[layout]
    partitioner = Partitioner(make_mesh(**mesh), standard_logical_axis_rules(parameter_partitioning_dims=dims))
    training = dataclasses.replace(TRAINING, optimizer=optimizer, microbatches=microbatches)
    expected, expected_metrics = steps_on_one_device(training)
    found, metrics = one_step(training=training, partitioner=partitioner, steps=2)
    for name in expected_metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5, err_msg=name)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected.params), jax.tree.leaves(found.params), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5, err_msg=jax.tree_util.keystr(path))


def test_parameters_and_moments_lie_split_over_the_data_axis():
    partitioner = Partitioner(make_mesh(), standard_logical_axis_rules(parameter_partitioning_dims=2))
    state = initial_state(training=TRAINING, params=make_params(), partitioner=partitioner)
    program = compile_train_step(state=state, training=TRAINING, model=MODEL, partitioner=partitioner)
    before = jax.tree.map(lambda leaf: leaf.sharding, state)
    state, _ = program(state, partitioner.put_batch(make_batch()), jax.random.key(0))
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    embedding = state.params["token_embedder"]["embedding"]
    assert embedding.addressable_shards[0].data.shape == (VOCAB, CONFIG.emb_dim // 8)
    moment = optax.tree.get(state.opt_state, "mu")["token_embedder"]["embedding"]
    assert moment.addressable_shards[0].data.shape == (VOCAB, CONFIG.emb_dim // 8)


# The loop ------------------------------------------------------------------------------------------------------------


class Died(Exception):
    """Stands for a crash."""


def run_fit(
    directory: Path, *, rewards: Any = None, stop: Callable[[], bool] = lambda: False, **changes: Any
) -> FitResult:
    """`fit` in `directory / "phase"`; `rewards` gives the n-th measurement, or is a function of the parameters.

    The first is that of the initial parameters, which `start_measured=False` leaves out.
    """
    start_measured = changes.pop("start_measured", True)
    options = {"model": MODEL, "initial_params": make_params, "mixture": MIXTURE}
    options |= {"abstract_params": jax.eval_shape(make_params), "partitioner": ONE_DEVICE}
    options |= {key: changes.pop(key) for key in (*options, "training") if key in changes}
    training = dataclasses.replace(options.pop("training", TRAINING), **changes)
    if rewards is None:
        rewards = lambda params: float(jax.tree.leaves(params)[0].sum())  # noqa: E731
    mean_reward = rewards if callable(rewards) else functools.partial(lambda left, params: next(left), iter(rewards))
    initial_reward = mean_reward(make_params()) if start_measured else None
    with MetricsWriter(directory) as writer:
        return fit(
            directory=directory / "phase",
            training=training,
            lengths={"inputs": LENGTH, "targets": LENGTH},
            mean_reward=mean_reward,
            initial_reward=initial_reward,
            seed=7,
            progress=ProgressLine("phase", stream=io.StringIO()),
            metrics_writer=writer,
            phase="phase",
            stop_requested=stop,
            **options,
        )


def kept_steps(directory: Path) -> set[int]:
    return {int(path.name.removeprefix("checkpoint_")) for path in (directory / "phase").glob("checkpoint_*")}


def load(directory: Path, step: int) -> Any:
    path = checkpointer.step_directory(directory / "phase", step)
    return checkpointer.load_params(str(path), abstract_params=jax.eval_shape(make_params), partitioner=ONE_DEVICE)


def assert_same(first: Any, second: Any) -> None:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def after_steps(steps: int) -> Any:
    """The parameters that `TRAINING` has after so many steps, without the loop."""
    plan = BatchPlan(MIXTURE, batch_size=ROWS, source_length=LENGTH, target_length=LENGTH, pack=True, seed=7)
    state = initial_state(training=TRAINING, params=make_params(), partitioner=ONE_DEVICE)
    program = compile_train_step(state=state, training=TRAINING, model=MODEL, partitioner=ONE_DEVICE)
    for step in range(steps):
        state, _ = program(state, ONE_DEVICE.put_batch(plan.batch(step)), jax.random.key(7))
    return state.params


@pytest.mark.parametrize(
    ("rewards", "best"),
    [((0.1, 0.2, 0.4, 0.3), 8), ((0.5, 0.2, 0.4, 0.3), 0), ((0.1, 0.2, 0.3, 0.4), 12), ((0.2, 0.4, 0.4, 0.4), 4)]
    + [((0.3, 0.3, 0.3, 0.3), 0)],
    ids=["in the middle", "the initial policy", "the last", "the first of equals", "nothing changed"],
)
def test_the_best_checkpoint_is_kept_and_can_be_restored(tmp_path, rewards, best):
    result = run_fit(tmp_path, rewards=rewards)
    assert (result.best_step, result.best_reward, result.steps) == (best, rewards[best // 4], 12)
    assert result.history == tuple(zip((0, 4, 8, 12), rewards, strict=True))
    assert kept_steps(tmp_path) == {best, 12}
    assert_same(load(tmp_path, best), after_steps(best))


def test_target_tokens_are_those_of_the_batches(tmp_path):
    result = run_fit(tmp_path, start_measured=False)
    plan = BatchPlan(MIXTURE, batch_size=ROWS, source_length=LENGTH, target_length=LENGTH, pack=True, seed=7)
    assert result.target_tokens == sum(int(plan.batch(step)["decoder_loss_weights"].sum()) for step in range(12))
    assert [step for step, _ in result.history] == [4, 8, 12]


@pytest.mark.parametrize(
    ("patience", "rewards", "stopped_at"),
    [
        (1, (0.1, 0.2, 0.2), 8),
        (2, (0.1, 0.2, 0.15, 0.18), 12),
        (2, (0.3, 0.2, 0.1), 8),
        (None, (0.9, 0.2, 0.1, 0.0), 12),
    ],
)
def test_training_stops_when_the_reward_no_longer_rises(tmp_path, patience, rewards, stopped_at):
    result = run_fit(tmp_path, rewards=rewards, patience=patience)
    assert result.steps == stopped_at
    assert len(result.history) == len(rewards)
    # Started again it does not go on.
    again = run_fit(tmp_path, rewards=(), start_measured=False, patience=patience)
    assert again == result


def test_no_steps_measure_and_keep_the_initial_policy(tmp_path):
    result = run_fit(tmp_path, rewards=(0.25,), steps=0, start_measured=False)
    assert (result.best_step, result.steps, result.history) == (0, 0, ((0, 0.25),))
    assert_same(load(tmp_path, 0), make_params())


def poisoned(model, params, batch, key):
    """BC whose loss is NaN where the batch holds the token 63."""
    loss, metrics = bc(model, params, batch, key)
    bad = jnp.where(jnp.any(batch["decoder_target_tokens"] == 63), jnp.nan, 0.0)
    return loss + bad, {**metrics, "loss": metrics["loss"] + bad}


@dataclasses.dataclass(frozen=True)
class Poisoned(Pairs):
    """One pair in eighty holds the token 63."""

    def targets(self, index: int, /) -> np.ndarray:
        clean = np.where(self.inputs(index) == 63, 3, self.inputs(index))
        return np.where(np.arange(len(clean)) == 0, 63, clean) if index == 41 else clean


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_and_pairs(tmp_path):
    mixture = MixtureSpec.single(Poisoned())
    plan = BatchPlan(mixture, batch_size=4, source_length=LENGTH, target_length=LENGTH, pack=True, seed=7)
    bad = next(step for step in range(100) if 83 in plan.batch_example_ids(step))
    assert bad >= 3, "the poison should not stand in the first batches"
    changes = dict(mixture=mixture, objective=poisoned, batch_size=4, steps=100, eval_period=100, checkpoint_period=2)
    with pytest.raises(FloatingPointError) as error:
        run_fit(tmp_path, log_period=50, start_measured=False, rewards=(), **changes)
    message = str(error.value)
    assert f"step {bad};" in message and "phase:" in message
    named = {int(number) for number in message.split("[")[1].split("]")[0].split()}
    assert named == set(plan.batch_example_ids(bad).tolist())
    # What was saved is from before: the newest multiple of the period that the bad batch has not touched.
    assert kept_steps(tmp_path) == {bad // 2 * 2}
    for leaf in jax.tree.leaves(load(tmp_path, bad // 2 * 2)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
    ("optimizer", "stop_at"), [(optimizers.adamw, 1), (optimizers.adamw, 4), (optimizers.adafactor, 7)]
)
def test_a_stopped_run_continues_to_the_same_bytes(tmp_path, optimizer, stop_at):
    changes = dict(optimizer=optimizer, schedule=optimizers.cosine, model=DROPOUT_MODEL, microbatches=2)
    whole = run_fit(tmp_path / "whole", **changes)
    asked = iter(range(1, 100))
    with pytest.raises(Preempted, match=f"step {stop_at};"):
        run_fit(tmp_path / "stopped", stop=lambda: next(asked) >= stop_at, **changes)
    assert stop_at in kept_steps(tmp_path / "stopped")
    assert run_fit(tmp_path / "stopped", initial_params=None, **changes) == whole
    for step in kept_steps(tmp_path / "whole"):
        assert_same(load(tmp_path / "whole", step), load(tmp_path / "stopped", step))


@pytest.mark.parametrize("optimizer", [optimizers.adamw, optimizers.adafactor])
def test_layers_that_lie_in_one_piece_train_and_continue_as_others_do(tmp_path, monkeypatch, optimizer):
    """As on TPUs: an order in memory, which no value and no checkpoint depends on."""
    model = make_model(scan_layers=True, num_encoder_layers=2, num_decoder_layers=3)
    shapes = {"encoder_input_tokens": (1, 1), "decoder_input_tokens": (1, 1)}
    params = jax.device_get(model.get_initial_variables(jax.random.key(0), shapes)["params"])
    layouts = []

    def reward(params: Any) -> float:
        kernel = params["decoder"]["decoder"]["mlp"]["wo"]["kernel"]
        layouts.append(kernel.format.layout.major_to_minor)
        return float(kernel.sum())

    changes = dict(model=model, abstract_params=params, optimizer=optimizer, start_measured=False, rewards=reward)
    changes["partitioner"] = Partitioner(make_mesh(), standard_logical_axis_rules(parameter_partitioning_dims=2))
    whole = run_fit(tmp_path / "in the order of the axes", initial_params=lambda: params, **changes)
    assert set(layouts) == {(0, 1, 2)}
    layouts.clear()
    monkeypatch.setattr(partitioning, "_keeps_layers_in_one_piece", lambda mesh: True)
    monkeypatch.setattr(partitioning, "_TPU_TILE", (1, 1))
    asked = iter(range(1, 100))
    with pytest.raises(Preempted):
        run_fit(tmp_path / "pieces", initial_params=lambda: params, stop=lambda: next(asked) >= 6, **changes)
    # Measured before any step, as restored: the layout of the first is no program's work.
    with contextlib.closing(checkpointer.PhaseCheckpoints(tmp_path / "pieces" / "phase")) as checkpoints:
        training = dataclasses.replace(TRAINING, optimizer=optimizer)
        state = abstract_state(training=training, abstract_params=params, partitioner=changes["partitioner"])
        restored, _ = checkpoints.restore(6, abstract_tree=state.as_t5x())
        reward(restored["target"])
    resumed = run_fit(tmp_path / "pieces", initial_params=None, **changes)
    assert set(layouts) == {(1, 0, 2)}
    assert resumed == whole
    for step in kept_steps(tmp_path / "pieces"):
        trees = [
            checkpointer.load_params(
                str(checkpointer.step_directory(directory / "phase", step)),
                abstract_params=params,
                partitioner=ONE_DEVICE,
            )
            for directory in (tmp_path / "in the order of the axes", tmp_path / "pieces")
        ]
        assert_same(*trees)


@pytest.mark.parametrize("measurement", [1, 2, 4])
def test_a_run_that_dies_continues_to_the_same_bytes_and_metrics(tmp_path, measurement):
    whole = run_fit(tmp_path / "whole")
    count = iter(range(1, 100))

    def reward(params: Any) -> float:
        if next(count) == measurement:
            raise Died
        return float(jax.tree.leaves(params)[0].sum())

    with pytest.raises(Died):
        run_fit(tmp_path / "died", rewards=reward)
    assert run_fit(tmp_path / "died") == whole
    assert_same(load(tmp_path / "whole", 12), load(tmp_path / "died", 12))

    def scalars(directory: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(directory)]

    assert scalars(tmp_path / "whole") == scalars(tmp_path / "died")


@pytest.mark.parametrize("measurement", [2, 4])
def test_a_run_stopped_while_it_measures_loses_no_step(tmp_path, measurement):
    whole = run_fit(tmp_path / "whole")
    count = iter(range(1, 100))

    def reward(params: Any) -> float:
        if next(count) == measurement:
            raise Preempted("stopped while a policy was measured")
        return float(jax.tree.leaves(params)[0].sum())

    with pytest.raises(Preempted):
        run_fit(tmp_path / "stopped", rewards=reward)
    reached = max(kept_steps(tmp_path / "stopped"))
    assert reached == TRAINING.eval_period * (measurement - 1)
    assert run_fit(tmp_path / "stopped", initial_params=None) == whole
    assert_same(load(tmp_path / "whole", 12), load(tmp_path / "stopped", 12))
    lines = [
        [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(tmp_path / run)]
        for run in ("whole", "stopped")
    ]
    assert lines[0] == lines[1]


def test_a_measurement_stopped_twice_leaves_the_checkpoint_alone(tmp_path):
    """To write it again it would have to be deleted, which a kill may follow."""

    def stopped(params: Any) -> float:
        raise Preempted("stopped while a policy was measured")

    inodes = []
    for _ in range(2):
        with pytest.raises(Preempted):
            run_fit(tmp_path, rewards=stopped, start_measured=False)
        inodes.append((tmp_path / "phase" / f"checkpoint_{TRAINING.eval_period}").stat().st_ino)
    assert inodes[0] == inodes[1]


def test_what_a_crash_left_of_a_checkpoint_does_no_harm(tmp_path):
    whole = run_fit(tmp_path / "whole")
    asked = iter(range(1, 100))
    with pytest.raises(Preempted):
        run_fit(tmp_path / "died", stop=lambda: next(asked) >= 6)
    phase = tmp_path / "died" / "phase"
    # Half of a save, and half of a deletion.
    (phase / "checkpoint_8.orbax-checkpoint-tmp-0" / "state").mkdir(parents=True)
    (phase / "checkpoint_3" / "metrics").mkdir(parents=True)
    assert run_fit(tmp_path / "died") == whole
    assert_same(load(tmp_path / "whole", 12), load(tmp_path / "died", 12))
    assert kept_steps(tmp_path / "died") == kept_steps(tmp_path / "whole")


def test_metrics_are_means_over_target_tokens(tmp_path):
    run_fit(tmp_path, log_period=1, steps=4, optimizer=lambda rate: optax.set_to_zero())
    lines = [line for line in read_metrics(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    plan = BatchPlan(MIXTURE, batch_size=ROWS, source_length=LENGTH, target_length=LENGTH, pack=True, seed=7)
    for step, line in enumerate(lines):
        _, metrics = MODEL.loss_fn(make_params(), plan.batch(step), None)
        weight = float(metrics["weight_sum"])
        assert math.isclose(line["cross_entropy"], float(metrics["cross_entropy"]) / weight, rel_tol=1e-5)
        assert math.isclose(line["accuracy"], float(metrics["correct"]) / weight, rel_tol=1e-5)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 4


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"microbatches": 0}, "microbatches is 0"),
        ({"microbatches": 3}, "16 is not a multiple of Training.microbatches 3"),
        ({"steps": -1}, "steps is -1"),
        ({"eval_period": 0}, "eval_period is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"optimizer": object()}, "OPTIMIZER is an instance of builtins.object"),
    ],
)
def test_impossible_settings_are_named(changes, match):
    with pytest.raises(UserError, match=match):
        dataclasses.replace(TRAINING, **changes)
