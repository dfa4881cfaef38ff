"""Every compiled program of a run, with the shapes that it is called with: no weights and no data are made."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rest_jax.checkpoints import checkpointer
from rest_jax.data.batching import feature_shapes
from rest_jax.errors import UserError
from rest_jax.evaluation.evaluate import samplings_of
from rest_jax.grow import compile_grow
from rest_jax.models.initial_params import initial_params
from rest_jax.partitioning import Partitioner, placed
from rest_jax.rest import ReST
from rest_jax.sampling import Sampling, sampling_shapes
from rest_jax.sampling.scored import compile_sample_and_score
from rest_jax.training import Training, abstract_state, compile_train_step

PHASES = ("bc", "grow", "improve", "evaluate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One program of a run.

    Attributes:
      phase: which part of Algorithm 1 runs it, one of PHASES.
      name: the phase's, or of several of one phase each its own.
      jitted: the function.
      arguments: of each call, shapes with their shardings.
      keywords: the static ones.
      partitioner: the mesh that it runs on.
      sampling: how it samples; None for a train step.
      reward_bytes: of each device's memory, what the reward's parameters take; 0 for a train step.
      training: how it trains; None for one that samples.
    """

    phase: str
    name: str
    jitted: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    partitioner: Partitioner
    sampling: Sampling | None = None
    reward_bytes: int = 0
    training: Training | None = None

    def trace(self) -> Any:
        """`jax.stages.Traced`, under the rules that the run traces with."""
        if self.training is None:
            return self.jitted.trace(*self.arguments, **self.keywords)
        with self.partitioner.activation_rules():
            return self.jitted.trace(*self.arguments, **self.keywords)


def abstract_params(config: ReST) -> Any:
    """Shapes of the policy's parameters."""
    return jax.eval_shape(lambda: initial_params(config.model, jax.random.key(config.seed)))


def has(config: ReST, phase: str) -> bool:
    """Whether a run has a phase at all."""
    needed = {
        "bc": (config.bc.steps,),
        "grow": (config.grow_steps,),
        "improve": (config.grow_steps, config.improve_steps),
    }
    return all(needed.get(phase, ()))


def programs(config: ReST, *, phases: tuple[str, ...] = PHASES) -> list[Program]:
    """What a run compiles in `phases`.

    Sources are as long as they may be, the longest of the few lengths that a run compiles for.

    Raises:
      UserError: what does not divide over the mesh.
    """
    params = abstract_params(config)
    config.partitioner.param_shardings(params)
    made: list[Program] = []
    reward_bytes = 0
    if {"grow", "evaluate"} & set(phases):
        reward_bytes = checkpointer.bytes_on_device(config.reward.init(config.data.vocabulary), config.partitioner)
    if "bc" in phases and has(config, "bc"):
        made.append(_train(config, "bc", config.bc, params))
    if "grow" in phases and has(config, "grow"):
        jitted = compile_grow(
            growing=config.growing,
            model=config.model,
            reward=config.reward,
            partitioner=config.partitioner,
            max_length=config.data.lengths["targets"],
            reward_bytes=reward_bytes,
        )
        shapes = sampling_shapes(config.model, params)
        shapes = config.partitioner.with_shardings(shapes)
        made.append(_sample(config, "grow", "grow", config.growing.sampling, jitted, shapes, reward_bytes))
    if "improve" in phases and has(config, "improve"):
        made.append(_train(config, "improve", config.improving.training, params))
    if "evaluate" in phases:
        for name, sampling in samplings_of(config.evaluation).items():
            jitted = compile_sample_and_score(
                model=config.model,
                reward=config.reward,
                sampling=sampling,
                partitioner=config.partitioner,
                max_length=config.data.lengths["targets"],
                reward_bytes=reward_bytes,
            )
            # The choice of a checkpoint draws from a train state, as it lies in memory.
            formats = config.partitioner.param_formats if name == "select" else config.partitioner.param_shardings
            placed_params = placed(params, formats(params))
            made.append(_sample(config, "evaluate", name, sampling, jitted, placed_params, reward_bytes))
    if not made:
        raise UserError(f"--phase: this configuration has nothing to compile in {', '.join(phases)}.")
    return made


def _train(config: ReST, phase: str, training: Training, params: Any) -> Program:
    partitioner = config.partitioner
    partitioner.check_batch_divisible(training.batch_size, "BATCH_SIZE", microbatches=training.microbatches)
    state = abstract_state(training=training, abstract_params=params, partitioner=partitioner)
    shapes = feature_shapes(
        batch_size=training.batch_size,
        source_length=config.data.lengths["inputs"],
        target_length=config.data.lengths["targets"],
        pack=training.pack,
    )
    batch = placed(shapes, partitioner.batch_sharding())
    step: Any = compile_train_step(state=state, training=training, model=config.model, partitioner=partitioner)
    return Program(
        phase=phase,
        name=phase,
        jitted=step.func,
        arguments=(state, batch, jax.eval_shape(lambda: jax.random.key(0))),
        keywords=step.keywords,
        partitioner=partitioner,
        training=training,
    )


def _sample(
    config: ReST,
    phase: str,
    name: str,
    sampling: Sampling,
    jitted: Callable[..., Any],
    params: Any,
    reward_bytes: int,
) -> Program:
    partitioner = config.partitioner
    partitioner.check_batch_divisible(sampling.sources_per_chunk, "SOURCES_PER_CHUNK")
    rows = sampling.sources_per_chunk
    batch = {
        "encoder_input_tokens": jax.ShapeDtypeStruct((rows, config.data.lengths["inputs"]), jnp.int32),
        "references": jax.ShapeDtypeStruct((rows, config.data.lengths["targets"]), jnp.int32),
        "source_ids": jax.ShapeDtypeStruct((rows,), jnp.uint32),
    }
    number = jax.ShapeDtypeStruct((), jnp.uint32)
    return Program(
        phase=phase,
        name=name,
        jitted=jitted,
        arguments=(
            params,
            checkpointer.abstract_params(config.reward.init(config.data.vocabulary), partitioner),
            placed(batch, partitioner.batch_sharding()),
            number,
            number,
        ),
        keywords={},
        partitioner=partitioner,
        sampling=sampling,
        reward_bytes=reward_bytes,
    )
