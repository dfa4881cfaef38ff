"""Checkpoints: what is written is read back, and what does not fit is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.checkpoints.checkpointer import (
    PhaseCheckpoints,
    check_fits,
    find_checkpoint,
    load_params,
    save_params,
    step_directory,
)
from rest_jax.errors import UserError
from rest_jax.partitioning import Partitioner, make_mesh, standard_logical_axis_rules

ONE_DEVICE = Partitioner(make_mesh(data=1, devices=jax.devices()[:1]))


def make_params(width=16):
    generator = np.random.default_rng(0)
    return {
        "token_embedder": {"embedding": jnp.asarray(generator.normal(size=(32, width)), jnp.float32)},
        "encoder": {"encoder_norm": {"scale": jnp.asarray(generator.normal(size=width), jnp.float32)}},
    }


def shapes_of(params):
    return jax.eval_shape(lambda: params)


def load(path, wanted, partitioner=ONE_DEVICE):
    return load_params(str(path), abstract_params=shapes_of(wanted), partitioner=partitioner)


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_parameters_come_back_as_float32(tmp_path, dtype):
    params = make_params()
    save_params(tmp_path / "policy", params, dtype=dtype)
    loaded = load(tmp_path / "policy", params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}
    expected = (
        params if dtype != "bfloat16" else jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)
    )
    assert_same(loaded, expected)
    check_fits(str(tmp_path / "policy"), abstract_params=shapes_of(params))


def test_bfloat16_takes_about_half_the_space(tmp_path):
    params = {"token_embedder": {"embedding": jax.random.normal(jax.random.key(0), (1024, 256))}}
    size = {}
    for dtype in ("float32", "bfloat16"):
        save_params(tmp_path / dtype, params, dtype=dtype)
        size[dtype] = sum(path.stat().st_size for path in (tmp_path / dtype).rglob("*") if path.is_file())
    assert size["bfloat16"] < 0.6 * size["float32"]


def test_parameters_are_placed_on_the_mesh_that_asks_for_them(tmp_path):
    params = make_params()
    save_params(tmp_path / "policy", params)
    partitioner = Partitioner(make_mesh(model=2), standard_logical_axis_rules(parameter_partitioning_dims=2))
    loaded = load(tmp_path / "policy", params, partitioner)
    assert_same(loaded, params)
    embedding = loaded["token_embedder"]["embedding"]
    assert embedding.sharding == partitioner.param_shardings(params)["token_embedder"]["embedding"]
    assert embedding.addressable_shards[0].data.shape == (32 // 2, 16 // 4)


def test_saving_again_replaces_what_stood_there(tmp_path):
    first, second = make_params(), jax.tree.map(lambda leaf: leaf + 1, make_params())
    for params in (first, second):
        save_params(tmp_path / "policy", params)
    assert_same(load(tmp_path / "policy", second), second)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tree: tree | {"decoder": {"scale": jnp.ones(16)}}, ["missing decoder/scale (16,)"]),
        (lambda tree: {"encoder": tree["encoder"]}, ["unexpected token_embedder/embedding (32, 16)"]),
        (lambda tree: make_params(width=24), ["token_embedder/embedding is (32, 16), the model's is (32, 24)"]),
        (
            lambda tree: {"encoder": tree["encoder"], "other": tree["token_embedder"]},
            ["missing other/embedding", "unexpected token_embedder/embedding"],
        ),
    ],
    ids=["missing", "unexpected", "wrong shape", "other name"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, change, named):
    params = make_params()
    save_params(tmp_path / "policy", params)
    for refuse in (load, lambda path, wanted: check_fits(str(path), abstract_params=shapes_of(wanted))):
        with pytest.raises(UserError) as error:
            refuse(tmp_path / "policy", change(params))
        assert "INITIAL_CHECKPOINT_PATH" in str(error.value)
        for text in named:
            assert text in str(error.value)


def test_a_checkpoint_that_lacks_everything_names_eight_and_counts_the_rest(tmp_path):
    save_params(tmp_path / "policy", {"a": jnp.ones(1)})
    wanted = {f"p{i:02}": jnp.ones(1) for i in range(20)}
    with pytest.raises(UserError, match="and 13 more"):
        load(tmp_path / "policy", wanted)


def test_find_checkpoint_takes_a_step_a_phase_or_a_policy(tmp_path):
    for name in ("checkpoint_5", "checkpoint_30", "checkpoint_100"):
        save_params(tmp_path / "bc" / name, make_params())
    # A save that was cut off, a step whose deletion was, and other names are no checkpoints.
    (tmp_path / "bc" / "checkpoint_200.orbax-checkpoint-tmp-1" / "state").mkdir(parents=True)
    (tmp_path / "bc" / "checkpoint_300" / "progress").mkdir(parents=True)
    assert find_checkpoint(str(tmp_path / "bc")) == tmp_path / "bc" / "checkpoint_100"
    assert find_checkpoint(str(tmp_path / "bc" / "checkpoint_5")) == tmp_path / "bc" / "checkpoint_5"


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("x")])
def test_where_there_is_no_checkpoint_the_message_says_what_one_looks_like(tmp_path, make):
    make(tmp_path / "nothing")
    with pytest.raises(UserError, match="is no checkpoint.*checkpoint_N"):
        find_checkpoint(str(tmp_path / "nothing"))


def tree(value):
    return {"target": {"w": jnp.full(3, float(value))}, "state": {"step": jnp.int32(value), "param_states": ()}}


def steps(directory):
    return sorted(int(path.name.split("_")[1]) for path in directory.glob("checkpoint_*"))


def test_a_phase_keeps_its_newest_and_its_best_checkpoint_over_restarts(tmp_path):
    for step, best in ((0, 0), (1, 0), (2, 0), (3, 3), (4, 3), (5, 3)):
        # A process of its own for each save: nothing may rest on what an earlier one knew.
        checkpoints = PhaseCheckpoints(tmp_path)
        checkpoints.save(step, tree(step), progress={"step": step}, best_step=best)
        assert checkpoints.latest_step() == step
        checkpoints.close()
        assert steps(tmp_path) == sorted({step, best})
    for step in (3, 5):
        checkpoints = PhaseCheckpoints(tmp_path)
        restored, progress = checkpoints.restore(step, abstract_tree=ONE_DEVICE.with_shardings(shapes_of(tree(0))))
        checkpoints.close()
        assert_same(restored, tree(step))
        assert progress == {"step": step}


def test_a_step_saved_to_resume_from_can_be_saved_again_when_it_is_measured(tmp_path):
    checkpoints = PhaseCheckpoints(tmp_path)
    checkpoints.save(1, tree(1), progress={"history": []}, best_step=None)
    checkpoints.save(1, tree(1), progress={"history": [[1, 0.5]]}, best_step=1)
    _, progress = checkpoints.restore(1, abstract_tree=ONE_DEVICE.with_shardings(shapes_of(tree(0))))
    checkpoints.close()
    assert progress == {"history": [[1, 0.5]]}


def test_a_phases_checkpoint_can_be_loaded_as_a_policy(tmp_path):
    params = make_params()
    checkpoints = PhaseCheckpoints(tmp_path / "bc")
    state = {"target": params, "state": {"step": jnp.int32(7), "param_states": ({"mu": params},)}}
    checkpoints.save(7, state, progress={}, best_step=7)
    checkpoints.close()
    assert step_directory(tmp_path / "bc", 7) == find_checkpoint(str(tmp_path / "bc"))
    assert_same(load(tmp_path / "bc", params), params)
