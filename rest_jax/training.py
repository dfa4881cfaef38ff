"""The train step and the loop around it. BC, its long control and every Improve step are this loop on other data."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rest_jax.checkpoints.checkpointer import PhaseCheckpoints
from rest_jax.data.batching import BatchPlan, MixtureSpec
from rest_jax.data.vocabulary import eos_id_of
from rest_jax.errors import Preempted, UserError
from rest_jax.objectives import Objective, bc
from rest_jax.optimizers import MakeOptimizer, MakeSchedule, adamw, cosine
from rest_jax.partitioning import Partitioner, placed
from rest_jax.profiling import ProfiledSteps
from rest_jax.reporting.metrics_writer import MetricsWriter
from rest_jax.reporting.progress import ProgressLine

Params = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How one phase trains. Bound in gin once for BC and once for Improve.

    Attributes:
      steps: gradient steps at most.
      batch_size: rows of a batch over all devices. With packing a row holds several pairs.
      learning_rate: peak of the schedule.
      schedule: `(peak, total_steps) -> optax schedule`, proportional to its peak.
      optimizer: `(schedule) -> optax optimiser`.
      objective: what is minimised.
      microbatches: a batch's gradient is accumulated over this many equal parts.
      pack: several pairs in a row.
      eval_period: steps between two measurements of the mean reward on D_eval; each writes a checkpoint.
      patience: stop after this many measurements in a row without a new best; None to run all steps.
      checkpoint_period: steps between two checkpoints that only serve to resume.
      log_period: steps between two log lines.
    """

    steps: int
    batch_size: int
    learning_rate: float
    schedule: MakeSchedule = cosine
    optimizer: MakeOptimizer = adamw
    objective: Objective = bc
    microbatches: int = 1
    pack: bool = True
    eval_period: int = 500
    patience: int | None = None
    checkpoint_period: int = 500
    log_period: int = 50

    def __post_init__(self) -> None:
        for name in ("batch_size", "microbatches", "eval_period", "checkpoint_period", "log_period"):
            if getattr(self, name) < 1:
                raise UserError(f"Training.{name} is {getattr(self, name)}; it must be at least 1.")
        if not self.learning_rate > 0:
            raise UserError(f"Training.learning_rate is {self.learning_rate}; it must be above 0.")
        if not callable(self.optimizer):
            raise UserError(
                f"OPTIMIZER is an instance of {type(self.optimizer).__module__}.{type(self.optimizer).__qualname__}; "
                "training needs a function (learning rate) -> optax optimiser. T5X's model files bind an optimiser of "
                "T5X's: include rest.gin after them, or set OPTIMIZER = @optimizers.adafactor (from rest_jax import "
                "optimizers)."
            )
        if self.patience is not None and self.patience < 1:
            raise UserError(f"Training.patience is {self.patience}; it must be at least 1, or None to run all steps.")
        if self.steps < 0:
            raise UserError(f"Training.steps is {self.steps}; it must be 0 (keep the initial policy) or more.")
        if self.batch_size % self.microbatches:
            raise UserError(
                f"Training.batch_size {self.batch_size} is not a multiple of Training.microbatches {self.microbatches}."
            )


@flax.struct.dataclass
class TrainState:
    step: jax.Array
    params: Params
    opt_state: optax.OptState

    def as_t5x(self) -> dict[str, Any]:
        """The tree under which checkpoints store it: T5X's names."""
        return {"target": self.params, "state": {"step": self.step, "param_states": self.opt_state}}

    @staticmethod
    def from_t5x(tree: Mapping[str, Any]) -> "TrainState":
        return TrainState(step=tree["state"]["step"], params=tree["target"], opt_state=tree["state"]["param_states"])


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    dropout_key: jax.Array,
    *,
    model: Any,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One gradient step: the mean of `objective` over the batch's target tokens.

    Args:
      state: step, parameters and optimiser state.
      batch: features `[batch, length]`.
      dropout_key: the phase's key; folded with the step, so that a resumed run draws the same masks.
      model, objective, optimizer: what is trained and how.
      microbatches: the gradient is summed over this many slices of the batch before the update.

    Returns:
      The next state, and the batch's metrics: the objective's sums and the gradient's global norm.
    """
    step_key = jax.random.fold_in(dropout_key, state.step)

    def summed_gradient(part: Mapping[str, jax.Array], key: jax.Array) -> tuple[Params, dict[str, jax.Array]]:
        loss_fn = lambda params: objective(model, params, part, key)  # noqa: E731
        (_, metrics), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        return gradient, metrics

    if microbatches == 1:
        gradient, metrics = summed_gradient(batch, step_key)
    else:
        # [batch, ...] -> [microbatches, batch / microbatches, ...], strided, so that each slice spans all devices.
        parts = {k: v.reshape(-1, microbatches, *v.shape[1:]).swapaxes(0, 1) for k, v in batch.items()}
        keys = jax.random.split(step_key, microbatches)
        shapes = jax.eval_shape(summed_gradient, {k: v[0] for k, v in parts.items()}, keys[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def accumulate(total: Any, part_and_key: tuple[dict[str, jax.Array], jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, summed_gradient(*part_and_key)), None

        (gradient, metrics), _ = jax.lax.scan(accumulate, zeros, (parts, keys))

    gradient = jax.tree.map(lambda g: g / jnp.maximum(metrics["weight_sum"], 1.0), gradient)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {**metrics, "grad_norm": optax.tree.norm(gradient)}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics


def compile_train_step(
    *, state: TrainState, training: Training, model: Any, partitioner: Partitioner
) -> Callable[[TrainState, Mapping[str, jax.Array], jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """`train_step` under jit with the mesh's formats; the old state's memory is reused.

    Phases that differ in their learning rate or in when they measure, as Improve steps do, share one compiled program.

    Args:
      state: as `initial_state` makes it, or its shapes.
      training, model, partitioner: what is trained, how and where.
    """
    formats = _Formats.of(state, partitioner)
    program = _step_program(_what_is_compiled(training), model, partitioner, formats)
    return functools.partial(program, learning_rate=np.float32(training.learning_rate))


def initial_state(*, training: Training, params: Params, partitioner: Partitioner) -> TrainState:
    """A state at step 0 around `params`, on the mesh."""
    training = _what_is_compiled(training)
    shapes = jax.eval_shape(functools.partial(_fresh_state, training), params)
    state: TrainState = _state_program(training, _Formats.of(shapes, partitioner))(params)
    return state


def abstract_state(*, training: Training, abstract_params: Params, partitioner: Partitioner) -> TrainState:
    """Shapes of `initial_state`'s result and how it lies on the mesh: what a checkpoint restores to."""
    shapes = jax.eval_shape(functools.partial(_fresh_state, _what_is_compiled(training)), abstract_params)
    state: TrainState = placed(shapes, partitioner.param_formats(shapes))
    return state


@dataclasses.dataclass(frozen=True)
class _Formats:
    """How the leaves of a state lie on a mesh, as a key to find a program by."""

    leaves: tuple[Any, ...]
    structure: Any

    @staticmethod
    def of(state: TrainState, partitioner: Partitioner) -> "_Formats":
        leaves, structure = jax.tree.flatten(partitioner.param_formats(state))
        return _Formats(tuple(leaves), structure)

    def tree(self) -> TrainState:
        state: TrainState = jax.tree.unflatten(self.structure, self.leaves)
        return state


@functools.cache
def _step_program(training: Training, model: Any, partitioner: Partitioner, formats: _Formats) -> Any:
    """`train_step` with the peak of the schedule as an argument; see `compile_train_step`.

    The partitioner is a key alone: the step is traced under its rules, of which JAX's own cache does not know.
    """

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(formats.tree(), None))
    def step(
        state: TrainState, batch: Mapping[str, jax.Array], dropout_key: jax.Array, *, learning_rate: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        return train_step(
            state,
            batch,
            dropout_key,
            model=model,
            objective=training.objective,
            optimizer=_optimizer(training, learning_rate),
            microbatches=training.microbatches,
        )

    return step


@functools.cache
def _state_program(training: Training, formats: _Formats) -> Any:
    return jax.jit(functools.partial(_fresh_state, training), out_shardings=formats.tree())


def _fresh_state(training: Training, params: Params) -> TrainState:
    opt_state = _optimizer(training, training.learning_rate).init(params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)


def _what_is_compiled(training: Training) -> Training:
    """The settings without those that no compiled program depends on, as a key to find one by."""
    return dataclasses.replace(
        training, learning_rate=1.0, eval_period=1, checkpoint_period=1, log_period=1, patience=None
    )


def _optimizer(training: Training, learning_rate: jax.typing.ArrayLike) -> optax.GradientTransformation:
    shape = training.schedule(1.0, training.steps)
    return training.optimizer(lambda step: learning_rate * shape(step))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """What a training phase left behind; written into its commit mark."""

    best_step: int
    best_reward: float
    steps: int
    target_tokens: int
    history: tuple[tuple[int, float], ...]  # (step, mean reward on D_eval)


def training_flops(params: Params, *, source_tokens: float, target_tokens: float) -> float:
    """Of forward and backward passes: 6 for each parameter that a token is multiplied with.

    The usual count for model-flops utilisation (arXiv 2204.02311, appendix B), here without attention's products of
    activations: less than is computed. A table that is looked up costs nothing; one that also makes the logits counts.

    Args:
      params: T5X's tree, or its shapes; of an encoder alone too.
      source_tokens, target_tokens: without padding.
    """
    encoder, decoder = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params.get(side))) for side in ("encoder", "decoder")
    )
    if "decoder" in params and "logits_dense" not in params["decoder"]:
        decoder += math.prod(params["token_embedder"]["embedding"].shape)
    return 6.0 * (encoder * source_tokens + decoder * target_tokens)


def best_of(history: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """The (step, reward) of highest reward, of equal ones the earliest."""
    return max(history, key=lambda item: (item[1], -item[0]))


def fit(
    *,
    directory: Path,
    training: Training,
    model: Any,
    partitioner: Partitioner,
    initial_params: Callable[[], Params],
    abstract_params: Params,
    mixture: MixtureSpec,
    lengths: Mapping[str, int],
    mean_reward: Callable[[Params], float],
    initial_reward: float | None,
    seed: int,
    progress: ProgressLine,
    metrics_writer: MetricsWriter,
    phase: str,
    stop_requested: Callable[[], bool],
    profiled: ProfiledSteps | None = None,
    measured: tuple[str, str] = ("reward", "mean reward on D_eval"),
) -> FitResult:
    """Trains from `initial_params` and keeps the checkpoint with the best mean reward on D_eval.

    Started again on the same directory it continues from the newest checkpoint, and ends with the same bytes.

    Args:
      directory: where checkpoints go.
      training: steps, batch, schedule, objective.
      model: a model with T5X's methods.
      partitioner: the mesh and its rules.
      initial_params: gives the parameters to start from; called only when there is no checkpoint.
      abstract_params: their shapes.
      mixture: the pairs to train on.
      lengths: `{'inputs': S, 'targets': T}`, the rows' lengths in tokens.
      mean_reward: params -> mean reward of samples on D_eval.
      initial_reward: what `mean_reward` gave for the initial parameters, when the phase that made them was measured: a
        phase that only hurts then keeps what it was given. None: the initial parameters are no candidate.
      seed: of data order and dropout.
      progress, metrics_writer, phase: where to report, under which name.
      stop_requested: True after SIGTERM.
      profiled: steps to trace, see `profiling`.
      measured: name in the metrics, and in words, of what `mean_reward` gives; the reward model's is another.

    Raises:
      Preempted: after saving, when `stop_requested`.
      FloatingPointError: the loss is not finite; names the step and the ids of the batch's sources.
    """
    checkpoints = PhaseCheckpoints(directory)
    abstract = abstract_state(training=training, abstract_params=abstract_params, partitioner=partitioner)
    latest = checkpoints.latest_step()
    if latest is None:
        state = initial_state(training=training, params=initial_params(), partitioner=partitioner)
        step, tokens, history = 0, 0, []
    else:
        tree, saved = checkpoints.restore(latest, abstract_tree=abstract.as_t5x())
        state = TrainState.from_t5x(tree)
        step, tokens, history = latest, saved["tokens"], [(int(s), float(r)) for s, r in saved["history"]]

    step_fn = compile_train_step(state=abstract, training=training, model=model, partitioner=partitioner)
    rows = partitioner.local_rows(training.batch_size)
    plan = BatchPlan(
        mixture,
        batch_size=training.batch_size,
        source_length=lengths["inputs"],
        target_length=lengths["targets"],
        pack=training.pack,
        seed=seed,
        eos_id=eos_id_of(model.output_vocabulary),
        rows=rows,
    )
    batches = plan.iterator(start_step=step)
    dropout_key = jax.random.key(seed)
    progress.start(total=training.steps, done=step)
    # Lines of a phase that left no checkpoint are all written again, those of step 0 too.
    metrics_writer.resume(phase=phase, step=-1 if latest is None else step)
    source_tokens = 0.0  # Since the last log line, of all processes, if their rows are like this one's.
    pending: list[dict[str, jax.Array]] = []  # Metrics of the steps since the last log line, still on the device.

    def save() -> None:
        best = best_of(history)[0] if history else None
        metrics_writer.flush()
        checkpoints.save(step, state.as_t5x(), progress={"history": history, "tokens": tokens}, best_step=best)

    def measure(known: float | None = None) -> None:
        with progress.paused():
            try:
                reward = mean_reward(state.params) if known is None else known
            except Preempted:
                # Measured by the process that goes on from here. A saved step is deleted before it is written again.
                if checkpoints.latest_step() != step:
                    save()
                raise
            history.append((step, reward))
            # Before the checkpoint: a run killed between the two writes this line again, rather than never.
            metrics_writer.write(phase=phase, step=step, scalars={f"eval/{measured[0]}": reward})
            save()
        progress.log_event(f"step {step} | {measured[1]} {reward:.4f}")

    def flush() -> None:
        nonlocal tokens, source_tokens
        fetched = jax.device_get(pending)
        first = step - len(fetched)
        for offset, values in enumerate(fetched):
            if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
                ids = plan.batch_example_ids(first + offset)
                raise FloatingPointError(
                    f"{phase}: the loss is {values['loss']} and the gradient's norm {values['grad_norm']} at step "
                    f"{first + offset}; the batch's source ids are {np.array2string(ids, threshold=64)}. "
                    "Nothing was saved since the last checkpoint. Lower the learning rate, or look at these pairs."
                )
        pending.clear()
        if not fetched:
            return
        total = {key: float(sum(values[key] for values in fetched)) for key in fetched[0]}
        weight = max(total["weight_sum"], 1.0)
        # Of an objective that reads no target token, the encoder's.
        new_tokens = int(total.get("tokens", total["weight_sum"]))
        tokens += new_tokens
        names = {"loss": "loss", "cross_entropy": "cross_entropy", "correct": "accuracy"}  # what an objective has
        scalars = {name: total[key] / weight for key, name in names.items() if key in total}
        scalars["grad_norm"] = total["grad_norm"] / len(fetched)
        flops = training_flops(abstract_params, source_tokens=source_tokens, target_tokens=new_tokens)
        progress.update(step, tokens=new_tokens, flops=flops, loss=scalars["loss"])
        source_tokens = 0.0
        metrics_writer.write(phase=phase, step=step, scalars=scalars)

    def is_measured(step: int) -> bool:
        return step > 0 and (step % training.eval_period == 0 or step == training.steps)

    def out_of_patience() -> bool:
        if training.patience is None or not history:
            return False
        return len(history) - 1 - history.index(best_of(history)) >= training.patience

    try:
        if step == 0 and initial_reward is not None and not history:
            measure(known=initial_reward)
        if is_measured(step) and (not history or history[-1][0] != step):
            measure()
        while step < training.steps and not out_of_patience():
            if profiled is not None:
                profiled.before(step, waits_for=state.step)
            local = next(batches)[1]
            source_tokens += np.count_nonzero(local["encoder_input_tokens"]) * training.batch_size / len(rows)
            batch = partitioner.put_batch(local)
            with partitioner.activation_rules():
                state, metrics = step_fn(state, batch, dropout_key)
            pending.append(metrics)
            step += 1
            stopping = stop_requested()  # Asked once a step: a signal that comes later must find a saved step first.
            if step % training.log_period == 0:
                flush()
            if is_measured(step):
                flush()
                measure()
            elif step % training.checkpoint_period == 0 or stopping:
                flush()
                save()
            if stopping:
                raise Preempted(f"{phase}: stopped at step {step}; everything is saved.")
        if not history:
            measure()
        if profiled is not None:
            profiled.stop(waits_for=state.step)
    finally:
        checkpoints.close()
    best_step, best_reward = best_of(history)
    return FitResult(
        best_step=best_step, best_reward=best_reward, steps=step, target_tokens=tokens, history=tuple(history)
    )
