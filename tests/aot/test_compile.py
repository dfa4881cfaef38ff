"""What does not fit, what stands in for what is not here, and the command's errors."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from rest_jax import chips, cli
from rest_jax.aot import measure, stand_in, topology, values
from rest_jax.errors import UserError
from rest_jax.partitioning import devices_of_trace, make_mesh, trace_mesh
from rest_jax.rewards.chrf import ChrF

OUT_OF_MEMORY = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.

Largest program allocations in hbm:

  1. Size: 8.00G
     Operator: op_name="jit(f)/dot"
     Shape: f32[32768,65536]{1,0:T(8,128)}
     Unpadded size: 8.00G
     XLA label: fusion.1
     Allocation type: HLO temp
     ==========================

  2. Size: 512.0M
     Shape: bf16[4096,65536]{1,0:T(8,128)(2,1)}
     Unpadded size: 512.0M
     Allocation type: parameter: 0
     ==========================
"""


def test_what_the_compiler_says_when_it_runs_out_of_memory():
    needed, buffers = measure.read_out_of_memory(OUT_OF_MEMORY)
    assert needed == int(20.5 * 2**30)
    assert [size for _, size in buffers] == [8 * 2**30, 512 * 2**20]
    assert buffers[0][0].startswith("f32[32768,65536]")
    short = "the total memory required for HLO temporaries (20.00G) exceeds available HBM (15.75G)."
    assert measure.read_out_of_memory(short) == (20 * 2**30, ())


def test_the_largest_values_stand_for_a_list_that_the_compiler_did_not_give():
    @jax.jit
    def f(kernels, x):
        return jax.value_and_grad(lambda k: jnp.sum(jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, k)[0]))(
            kernels
        )

    traced = f.trace(jnp.zeros((6, 32, 32)), jnp.zeros((4096, 32)))
    found = values.largest(traced.jaxpr.jaxpr, shards=4, count=3)
    # What the loop keeps of each of its 6 steps for the backward pass; then one step's activations.
    assert found[0] == ("float32[6,4096,32] of scan, over 4 data shards", 6 * 4096 * 32 * 4 // 4)
    assert found[1][0].startswith("float32[4096,32] of ") and found[1][1] == 4096 * 32
    assert [size for _, size in found] == sorted((size for _, size in found), reverse=True)


def test_chips_are_told_apart_by_their_kind():
    class Device:
        def __init__(self, device_kind, num_cores):
            self.device_kind, self.num_cores = device_kind, num_cores

    found = [chips.of_device(Device(kind, cores)) for kind, cores in (("TPU v5 lite", 1), ("TPU v5", 2), ("cpu", 1))]
    assert [chip and chip.name for chip in found] == ["v5e", "v5p", None]
    half, whole = (chips.of_device(Device("TPU v4", cores)) for cores in (1, 2))
    assert half.flops * 2 == whole.flops and half.hbm_bytes * 2 == whole.hbm_bytes


def test_without_libtpu_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    topology.devices.cache_clear()
    with pytest.raises(UserError, match=r"rest_jax\[tpu-compile\]"):
        topology.devices(name="v5e:2x2")


def test_choices_follow_the_mesh_not_this_machine():
    mesh = make_mesh(devices=jax.devices()[:4])
    seen = []

    @jax.jit
    def f(x):
        with trace_mesh(mesh):
            seen.append(devices_of_trace())
        seen.append(devices_of_trace())
        return x

    f(1.0)
    assert seen == [("cpu", 4), ("cpu", 8)]


def test_a_stand_in_vocabulary_serves_a_reward():
    vocabulary = stand_in.StandInVocabulary(500)
    table = ChrF().init(vocabulary)
    assert table.codes.shape[0] == 501
    assert vocabulary.decode([4, 5, 1]) == vocabulary.decode_batch([[4, 5]])[0]
    pieces = {vocabulary.id_to_piece(token) for token in range(500)}
    assert len(pieces) == 500


def test_unknown_effort_is_refused(capsys):
    arguments = ["compile", "--gin_file=models/nano.gin", "--topology=v5e:2x2", "--effort=3"]
    assert cli.main(arguments) == cli.EXIT_USER
    assert "--effort is 3.0" in capsys.readouterr().err
