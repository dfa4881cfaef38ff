# ruff: noqa: E501 (lines of XLA's own)
"""Costs read from XLA's text: loops of known and of unknown length, collectives, slices of large arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rest_jax.aot import flops, hlo

# As XLA:TPU writes it: a loop over 6 layers that reads a slice of a stack, inside a loop of unknown length.
TPU_TEXT = """
HloModule jit_f, is_scheduled=true

%body (p.1: (s32[], f32[6,128,256], f32[128,256])) -> (s32[], f32[6,128,256], f32[128,256]) {
  %p.1 = (s32[]{:T(128)}, f32[6,128,256]{2,1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %stack = f32[6,128,256]{2,1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %own = f32[128,256]{1,0:T(8,128)} get-tuple-element(%p.1), index=2
  %slice = f32[1,128,256]{2,1,0:T(8,128)S(1)} fusion(%stack, %i), kind=kLoop, calls=%sliced, backend_config={"window_config":{"estimated_cycles":"100"}}
  %sum = f32[128,256]{1,0:T(8,128)} all-reduce(%own), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %next = (s32[]{:T(128)}, f32[6,128,256]{2,1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)}) tuple(%i, %stack, %sum)
}

%sliced (q.0: f32[6,128,256], q.1: s32[]) -> f32[1,128,256] {
  %q.0 = f32[6,128,256]{2,1,0:T(8,128)} parameter(0)
  %q.1 = s32[]{:T(128)} parameter(1)
  ROOT %ds = f32[1,128,256]{2,1,0:T(8,128)S(1)} dynamic-slice(%q.0, %q.1, %q.1, %q.1), dynamic_slice_sizes={1,128,256}
}

%condition (p.2: (s32[], f32[6,128,256], f32[128,256])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, f32[6,128,256]{2,1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)}) parameter(0)
  %six = s32[]{:T(128)} constant(6)
  %at = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt = pred[]{:T(512)} compare(%at, %six), direction=LT
}

%outer (p.3: (s32[], f32[6,128,256], f32[128,256])) -> (s32[], f32[6,128,256], f32[128,256]) {
  %p.3 = (s32[]{:T(128)}, f32[6,128,256]{2,1,0:T(8,128)}, /*index=2*/f32[128,256]{1,0:T(8,128)}) parameter(0)
  ROOT %layers = (s32[]{:T(128)}, f32[6,128,256]{2,1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)}) while(%p.3), condition=%condition, body=%body
}

%unfinished (p.4: (s32[], f32[6,128,256], f32[128,256])) -> pred[] {
  %p.4 = (s32[]{:T(128)}, f32[6,128,256]{2,1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)}) parameter(0)
  ROOT %any = pred[]{:T(512)} custom-call(%p.4), custom_call_target="any"
}

ENTRY %main (a: f32[6,128,256], b: f32[128,256]) -> f32[128,256] {
  %a = f32[6,128,256]{2,1,0:T(8,128)} parameter(0)
  %b = f32[128,256]{1,0:T(8,128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %near = ((f32[6,128,256]{2,1,0:T(8,128)}), f32[1,128,256]{2,1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:1], [0:128], [0:256]}
  %far = (f32[128,256]{1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%b)
  %start = (s32[]{:T(128)}, f32[6,128,256]{2,1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)}) tuple(%zero, %a, %b)
  %gather = f32[128,2048]{1,0:T(8,128)} all-gather(%b), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}, dimensions={1}
  %decode = (s32[]{:T(128)}, f32[6,128,256]{2,1,0:T(8,128)}, f32[128,256]{1,0:T(8,128)}) while(%start), condition=%unfinished, body=%outer, metadata={op_name="jit(f)/shard_map/while"}
  ROOT %out = f32[128,256]{1,0:T(8,128)} get-tuple-element(%decode), index=2
}
"""
LAYER = 128 * 256 * 4


def test_loops_and_collectives_of_a_tpu_program():
    analysis = hlo.analyse(TPU_TEXT, devices_per_slice=4)
    (loop,) = analysis.loops
    assert loop.name == "jit(f)/shard_map/while"
    # Six layers an iteration: 100 cycles and one slice of the stack each, never the whole stack.
    assert loop.costs.cycles == 600
    assert 6 * LAYER <= loop.costs.hbm_bytes < 6 * (LAYER + 128) + 7 * LAYER  # and what the condition reads
    (reduction,) = loop.costs.collectives
    assert reduction == hlo.Collective(kind="all-reduce", size=LAYER, group=4, across_slices=False, count=6)
    # A slice comes into the core's own memory, and a copy goes out of it.
    assert analysis.once.hbm_bytes == 2 * LAYER
    (gather,) = analysis.once.collectives
    assert gather == hlo.Collective(kind="all-gather", size=8 * LAYER, group=8, across_slices=True)


ASYNCHRONOUS = """
HloModule jit_g, is_scheduled=true

%begin (b.0: bf16[2,64]) -> (bf16[2,64], bf16[16,64], u32[]) {
  %b.0 = bf16[2,64]{1,0:T(2,128)(2,1)} parameter(0)
  %gather.1 = bf16[16,64]{1,0:T(2,128)(2,1)} all-gather(%b.0), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %begun = (bf16[2,64]{1,0:T(2,128)(2,1)}, bf16[16,64]{1,0:T(2,128)(2,1)}, u32[]{:S(2)}) custom-call(%gather.1), custom_call_target="AsyncCollectiveStart"
}

%meanwhile (m.0: bf16[2,64], m.1: f32[8,8], m.2: u32[]) -> (f32[8,8], bf16[2,64], bf16[16,64], u32[]) {
  %m.0 = bf16[2,64]{1,0:T(2,128)(2,1)} parameter(0)
  %m.1 = f32[8,8]{1,0:T(8,128)} parameter(1)
  %m.2 = u32[]{:S(2)} parameter(2)
  %work = f32[8,8]{1,0:T(8,128)} add(%m.1, %m.1)
  %gather.2 = bf16[16,64]{1,0:T(2,128)(2,1)} all-gather(%m.0), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %both = (f32[8,8]{1,0:T(8,128)}, bf16[2,64]{1,0:T(2,128)(2,1)}, bf16[16,64]{1,0:T(2,128)(2,1)}, u32[]{:S(2)}) tuple(%work, %m.0, %gather.2, %m.2)
}

ENTRY %main (a: bf16[2,64], b: f32[8,8]) -> f32[8,8] {
  %a = bf16[2,64]{1,0:T(2,128)(2,1)} parameter(0)
  %b = f32[8,8]{1,0:T(8,128)} parameter(1)
  %f.0 = (bf16[2,64]{1,0:T(2,128)(2,1)}, bf16[16,64]{1,0:T(2,128)(2,1)}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%begin
  %flag = u32[]{:S(2)} get-tuple-element(%f.0), index=2
  %f.1 = (f32[8,8]{1,0:T(8,128)}, bf16[2,64]{1,0:T(2,128)(2,1)}, bf16[16,64]{1,0:T(2,128)(2,1)}, u32[]{:S(2)}) fusion(%a, %b, %flag), kind=kCustom, calls=%meanwhile
  ROOT %out = f32[8,8]{1,0:T(8,128)} get-tuple-element(%f.1), index=0
}
"""


def test_a_collective_that_goes_on_beside_other_work_counts_once():
    once = hlo.analyse(ASYNCHRONOUS, devices_per_slice=8).once
    assert once.hbm_bytes == 2 * 8 * 8 * 4  # what the other work reads and writes
    (gather,) = once.collectives
    assert gather == hlo.Collective(kind="all-gather", size=16 * 64 * 2, group=8, across_slices=False)


# Two slices, as XLA:TPU writes what the hosts carry between them.
BETWEEN_SLICES = """
HloModule jit_h, is_scheduled=true

ENTRY %main (a: bf16[96,8,128], b: s32[8,8,16,1]) -> bf16[96,8,128] {
  %a = bf16[96,8,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = s32[8,8,16,1]{2,0,3,1:T(8,128)} parameter(1)
  %after.1 = token[] after-all()
  %send.35 = (bf16[96,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%a, %after.1), channel_id=10, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.376_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2,3}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent.35 = token[] send-done(%send.35), channel_id=10, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %recv.35 = (bf16[96,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after.1), channel_id=9, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.376_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2,3}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %received.35 = (bf16[96,8,128]{2,1,0:T(8,128)(2,1)}, token[]) recv-done(%recv.35), channel_id=9, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %send.19 = (s32[8,8,16,1]{2,0,3,1:T(8,128)}, u32[], token[]) send(%b, %after.1), channel_id=40, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-to-all_0",_xla_megascale_target={{100000,100002,200000,200002},{100001,100003,200001,200003}},_xla_megascale_transfer_type="ALL_TO_ALL"}
  ROOT %out = bf16[96,8,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%received.35), index=0
}
"""


def test_what_hosts_carry_between_slices_counts_as_collectives():
    once = hlo.analyse(BETWEEN_SLICES, devices_per_slice=8).once
    assert once.collectives == (
        hlo.Collective(kind="all-reduce", size=96 * 8 * 128 * 2, group=3, across_slices=True),
        hlo.Collective(kind="all-to-all", size=8 * 8 * 16 * 4, group=2, across_slices=True),
    )
    with pytest.raises(ValueError, match="not known here.*another_handler"):
        hlo.analyse(BETWEEN_SLICES.replace("xla_megascale_", "another_handler_"), devices_per_slice=8)


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [0, 4]),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_0','axis_1'}", [0, 1]),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", [0, 1]),
        ("source_target_pairs={{3,5},{5,3}}", [3, 5]),
    ],
)
def test_groups_of_devices(text, members):
    assert hlo._group(text) == members


def test_a_compiled_program_of_eight_devices():
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))

    def loss(kernel, rows):
        return jnp.sum(jnp.square(rows @ kernel))

    shapes = (
        jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=whole),
        jax.ShapeDtypeStruct((128, 64), jnp.float32, sharding=split),
    )
    compiled = jax.jit(jax.grad(loss), out_shardings=whole).lower(*shapes).compile()
    analysis = hlo.analyse(compiled.as_text(), devices_per_slice=8)
    (reduction,) = analysis.once.collectives
    assert (reduction.kind, reduction.size, reduction.group) == ("all-reduce", 64 * 32 * 4, 8)


def test_flops_of_layers_branches_and_loops():
    def f(kernels, x):
        def layer(x, kernel):
            return jax.lax.cond(x[0, 0] > 0, lambda: x @ kernel, lambda: x), None

        x, _ = jax.lax.scan(layer, x, kernels)
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ kernels[0], x)

    traced = jax.jit(f).trace(jnp.zeros((6, 32, 32)), jnp.zeros((16, 32)))
    one = 2 * 16 * 32 * 32
    assert flops.count(traced.jaxpr.jaxpr) == flops.Flops(6 * one, (one,))


def test_flops_inside_shard_map_are_those_of_all_shards():
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    spec = PartitionSpec("data")
    f = jax.jit(jax.shard_map(lambda x, y: x @ y, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec))
    traced = f.trace(jnp.zeros((64, 32)), jnp.zeros((32, 16)))
    assert flops.count(traced.jaxpr.jaxpr).once == 2 * 64 * 32 * 16
