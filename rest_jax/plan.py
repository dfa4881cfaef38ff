"""What a run is about to do, in a few lines: mesh, devices, parameters, memory, phases."""

import math
from typing import Any

import jax

from rest_jax import training as training_lib
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.rest import Runner
from rest_jax.sampling import memory, sampling_shapes

MIB = 2**20


def describe(runner: Runner) -> str:
    """The plan of a run, from shapes alone: nothing is computed or allocated."""
    config = runner.config
    devices = config.partitioner.mesh.devices.ravel().tolist()
    mesh = ", ".join(f"{name}={size}" for name, size in config.partitioner.mesh.shape.items())
    lines = [
        f"model_dir   {config.model_dir}",
        f"devices     {len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es)",
        f"mesh        {mesh}",
        f"parameters  {sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(runner.abstract_params)):,}",
    ]
    for name, training in (("bc", config.bc), ("improve", config.improving.training)):
        state = _abstract_state(runner, training)
        params, optimizer = (_bytes(runner, tree) for tree in (state.params, state.opt_state))
        lines.append(
            f"memory      {name}: parameters {params[0] / MIB:.1f} MiB, optimiser state {optimizer[0] / MIB:.1f} MiB; "
            f"on each device {(params[1] + optimizer[1]) / MIB:.1f} MiB"
        )
    if isinstance(config.model, EncoderDecoderModel):
        for name, sampling, shapes in (
            ("grow", config.growing.sampling, sampling_shapes(config.model, runner.abstract_params)),
            ("evaluate", config.evaluation.sampling, runner.abstract_params),
        ):
            plan = memory.plan(
                config.model.module.config,
                batch=sampling.sources_per_chunk,
                num_samples=sampling.num_samples,
                source_length=config.data.lengths["inputs"],
                max_length=config.data.lengths["targets"],
                slots=sampling.slots,
                beam_size=sampling.beam_size,
                cache_dtype=sampling.cache_dtype,
                mesh=config.partitioner.mesh,
                kernel_dtype=memory.kernel_dtype(shapes),
                reward_bytes=runner.reward_bytes,
            )
            lines.append(f"sampling    {name}: {plan}")
    done = [phase for phase in runner.phases if runner.result(phase.name) is not None]
    lines.append(f"phases      {len(runner.phases)}, of which {len(done)} are finished")
    lines += [
        f"  {'done' if phase in done else '    '} {phase.name}" + (f" (from {phase.policy})" if phase.policy else "")
        for phase in runner.phases
    ]
    return "\n".join(lines)


def _abstract_state(runner: Runner, training: training_lib.Training) -> training_lib.TrainState:
    """Shapes of a train state. Calling the optimiser and its schedule also tells gin that they are in use."""
    return training_lib.abstract_state(
        training=training, abstract_params=runner.abstract_params, partitioner=runner.config.partitioner
    )


def _bytes(runner: Runner, tree: Any) -> tuple[int, int]:
    """Bytes of a tree of shapes: all of it, and what lies on one device."""
    leaves = jax.tree.leaves(runner.config.partitioner.with_shardings(tree))
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    device = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return whole, device
