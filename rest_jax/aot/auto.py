"""Meshes and slot counts that `compile --auto` tries."""

import dataclasses
from collections.abc import Iterator

from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.partitioning import LogicalAxisRules, Partitioner, make_mesh
from rest_jax.rest import ReST

# Wider models pay with three reductions of each decoder layer at every position.
MODEL_PARALLEL = (1, 2, 4, 8, 16)
# As many as are of use or fit, by the memory plan; then fewer, where the compiler needs more than was planned.
SLOTS = (None, 512, 128)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """A run changed in how it lies on the devices, for one phase."""

    phase: str
    config: ReST
    model_parallel: int
    slots: int | None = None
    shards_parameters: bool = False

    def __str__(self) -> str:
        if self.phase in ("grow", "evaluate"):
            return f"MODEL_PARALLEL={self.model_parallel}, slots={self.slots or 'as planned'}"
        return f"MODEL_PARALLEL={self.model_parallel}, PARAMETER_PARTITIONING_DIMS={2 if self.shards_parameters else 1}"


def candidates(config: ReST, *, phases: tuple[str, ...]) -> Iterator[Choice]:
    """Every combination whose mesh the devices can make; what does not fit is found out by compiling it."""
    mesh = config.partitioner.mesh
    devices = mesh.devices.ravel().tolist()
    for phase in phases:
        for model in MODEL_PARALLEL:
            if len(devices) % (mesh.shape["replica"] * model) or not _divides(config, model):
                continue
            wide = make_mesh(replica=mesh.shape["replica"], model=model, devices=devices)
            if phase in ("grow", "evaluate"):
                for slots in SLOTS:
                    yield _choice(config, phase, Partitioner(wide, config.partitioner.rules), model, slots=slots)
                continue
            for dims in (1, 2):
                rules = _with_parameters(config.partitioner.rules, over_data=dims == 2)
                yield _choice(config, phase, Partitioner(wide, rules), model, shards_parameters=dims == 2)


def _choice(
    config: ReST,
    phase: str,
    partitioner: Partitioner,
    model: int,
    *,
    slots: int | None = None,
    shards_parameters: bool = False,
) -> Choice:
    growing, evaluation = config.growing, config.evaluation
    changed = dataclasses.replace(
        config,
        partitioner=partitioner,
        growing=dataclasses.replace(growing, sampling=dataclasses.replace(growing.sampling, slots=slots)),
        evaluation=dataclasses.replace(evaluation, sampling=dataclasses.replace(evaluation.sampling, slots=slots)),
    )
    return Choice(phase=phase, config=changed, model_parallel=model, slots=slots, shards_parameters=shards_parameters)


def _with_parameters(rules: LogicalAxisRules, *, over_data: bool) -> LogicalAxisRules:
    """The rules with parameters whole on each data shard, or split over 'data'; all others stay."""
    split = ("embed", "data")
    others = [rule for rule in rules if rule != split]
    if over_data:
        others.insert(others.index(("embed", None)) if ("embed", None) in others else len(others), split)
    return tuple(others)


def _divides(config: ReST, model: int) -> bool:
    """A mesh axis can not be wider than what lies on it."""
    if not isinstance(config.model, EncoderDecoderModel):
        return True
    shape = config.model.module.config
    return shape.num_heads % model == 0 and shape.mlp_dim % model == 0 and (shape.vocab_size or 0) % model == 0
