"""ReST, Algorithm 1 of arXiv 2308.08998, as a list of phases that can be stopped and continued anywhere.

    train π on D                                                                  Phase("bc")
    for g in 1..G:                                                                algorithm_1
      D_g = N samples per source from π, scored, ∪ D                              grow.grow
      for i in 1..I:
        choose τ_i > τ_{i-1}                                                      Improving.schedule
        while reward improves on D_eval: minimise E_{D_g}[ 1[R > τ_i] · L ]       improve.improve -> training.fit

Every phase reads its inputs from MODEL_DIR and leaves a commit mark there, so a run that is started again
skips what is finished, and a run that was never stopped takes the same path.
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rest_jax import audit as audit_lib
from rest_jax import chips, paths
from rest_jax import grow as grow_lib
from rest_jax import improve as improve_lib
from rest_jax import training as training_lib
from rest_jax.checkpoints import checkpointer
from rest_jax.data.batching import MixtureSpec
from rest_jax.data.parallel import ParallelData
from rest_jax.data.store import ScoredStore
from rest_jax.errors import Preempted, UserError
from rest_jax.evaluation.alarm import Alarm, held_out_metrics, raise_alarms
from rest_jax.evaluation.evaluate import Evaluation, Evaluator
from rest_jax.filters import check_nested, check_schedule
from rest_jax.models.initial_params import initial_params
from rest_jax.partitioning import Partitioner
from rest_jax.processes import Processes
from rest_jax.profiling import ProfiledSteps
from rest_jax.reporting.metrics_writer import MetricsWriter
from rest_jax.reporting.progress import ProgressLine
from rest_jax.reporting.report import write_report
from rest_jax.reporting.run_files import AUDIT
from rest_jax.reporting.table import format_table
from rest_jax.rewards.base import Reward, RewardParams, check_comparable, check_reward, leaves
from rest_jax.sampling import sampling_shapes
from rest_jax.summary import summarise

Params = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReST:
    """A run, as bound in gin.

    Attributes:
      model_dir: where everything is written.
      model: a model with T5X's methods.
      data: D, D_eval and the test split.
      reward: R, in the graph.
      partitioner: the mesh and its rules.
      bc: how the first policy is trained; `steps=0` takes `initial_checkpoint_path` as it is.
      growing: what a Grow step samples and keeps.
      improving: what an Improve step trains on, and how.
      evaluation: what is measured after each policy.
      grow_steps, improve_steps: G and I.
      bc_long: also train the control: BC continued for as many gradient steps as all Improve steps took together.
      initial_checkpoint_path: parameters to start from; None for random ones.
      policy_dtype: type of the parameters in MODEL_DIR/policy, the last policy alone.
      seed: of everything random.
      languages: source and target language, e.g. ('de', 'en'), for rewards that are made for some; None leaves it open.
    """

    model_dir: str
    model: Any
    data: ParallelData
    reward: Reward
    partitioner: Partitioner
    bc: training_lib.Training
    growing: grow_lib.Growing
    improving: improve_lib.Improving
    evaluation: Evaluation
    grow_steps: int = 1
    improve_steps: int = 1
    bc_long: bool = True
    initial_checkpoint_path: str | None = None
    policy_dtype: str = "float32"
    seed: int = 0
    languages: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("grow_steps", "improve_steps", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name.upper()} is {getattr(self, name)}; it must be 0 or more.")
        if self.languages is not None and (isinstance(self.languages, str) or len(self.languages) != 2):
            raise UserError(
                f"LANGUAGES is {self.languages!r}; it must be None or a source and a target, like ('de', 'en')."
            )
        if self.bc.steps == 0 and self.initial_checkpoint_path is None:
            raise UserError(
                "TRAIN_STEPS is 0 and INITIAL_CHECKPOINT_PATH is None: there is no policy. Set one of them."
            )


@dataclasses.dataclass(frozen=True)
class Phase:
    """One entry of the list: `bc`, `grow_1`, `improve_1.2`, `bc_long`, each followed by its evaluation."""

    name: str
    kind: str  # 'bc', 'grow', 'improve', 'bc_long' or 'evaluate'
    grow_step: int = 0
    improve_step: int = 0
    policy: str | None = None  # the phase whose policy this one starts from, samples, or evaluates


def algorithm_1(*, grow_steps: int, improve_steps: int, bc_long: bool, restart_from_base: bool) -> list[Phase]:
    """Algorithm 1, line by line.

    Args:
      grow_steps, improve_steps: G and I.
      bc_long: append the control run.
      restart_from_base: every Improve step starts from BC's policy (ReST-EM) rather than the previous step's.
    """
    phases = [Phase("bc", "bc")]  # train π on D with L
    policy = "bc"
    for g in range(1, grow_steps + 1):
        phases.append(Phase(f"grow_{g}", "grow", g, policy=policy))  # sample N per source, score, keep
        for i in range(1, improve_steps + 1):
            start = "bc" if restart_from_base else policy
            policy = f"improve_{g}.{i}"
            phases.append(Phase(policy, "improve", g, i, policy=start))  # minimise E[1[R > τ_i] L]
    if bc_long:
        phases.append(Phase("bc_long", "bc_long", policy="bc"))
    return [
        step
        for phase in phases
        for step in (
            [phase] if phase.kind == "grow" else [phase, Phase(f"evaluate_{phase.name}", "evaluate", policy=phase.name)]
        )
    ]


def mark_path(model_dir: Path, phase: Phase) -> Path:
    """The file whose presence says that a phase is finished; it holds the phase's result."""
    if phase.kind == "evaluate":
        return model_dir / "eval" / f"{phase.policy}.json"
    return phase_directory(model_dir, phase.name) / "RESULT.json"


def phase_directory(model_dir: Path, name: str) -> Path:
    """`bc` -> bc/, `grow_1` -> grow_1/, `improve_1.2` -> grow_1/improve_2/."""
    if name.startswith("improve_"):
        grow_step, improve_step = name.removeprefix("improve_").split(".")
        return model_dir / f"grow_{grow_step}" / f"improve_{improve_step}"
    return model_dir / name


def phase_seed(seed: int, name: str) -> int:
    """A seed of its own for each phase, so that two phases never see the same order or masks."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


class Runner:
    """Runs phases of one configuration in its MODEL_DIR.

    Args:
      config: the run.
      stop_requested: True after SIGTERM; the phase in progress saves and raises `Preempted`.
      processes: of the run, all of which make a Runner; None where there is one.
      beat: called at each sign of progress (`watchdog`).
      profiled: training steps to trace.

    Raises:
      UserError: something in the configuration or the data does not fit; nothing was written.
    """

    def __init__(
        self,
        config: ReST,
        *,
        stop_requested: Callable[[], bool] = lambda: False,
        processes: Processes | None = None,
        beat: Callable[[], None] = lambda: None,
        profiled: ProfiledSteps | None = None,
    ):
        self.config = config
        self.processes = processes or Processes()
        self.model_dir = paths.resolve(config.model_dir)
        self._beat, self._profiled = beat, profiled
        self._asked_to_stop = stop_requested
        check_reward(config.reward, has_references=True, languages=config.languages)
        check_comparable(config.reward)
        self._held_out = held_out_metrics(config.reward)
        if config.grow_steps and config.improve_steps:
            check_schedule(config.improving.schedule, improve_steps=config.improve_steps)
            check_nested(
                config.improving.schedule,
                grow_filter=config.growing.filter,
                improve_steps=config.improve_steps,
                num_samples=config.growing.sampling.num_samples,
            )
        for training in (config.bc, config.improving.training):
            config.partitioner.check_batch_divisible(
                training.batch_size, "BATCH_SIZE", microbatches=training.microbatches
            )
        for name, sampling in (
            ("SOURCES_PER_CHUNK", config.growing.sampling),
            ("evaluate/scored.Sampling.sources_per_chunk", config.evaluation.sampling),
        ):
            config.partitioner.check_batch_divisible(sampling.sources_per_chunk, name)
        self.abstract_params = jax.eval_shape(self._init_params)
        config.partitioner.param_shardings(self.abstract_params)
        if config.initial_checkpoint_path is not None:
            checkpointer.check_fits(config.initial_checkpoint_path, abstract_params=self.abstract_params)

        data = config.data
        self.train_set = data.open(data.train_split)
        self._eval_set, self._test_set = data.open(data.eval_split), data.open(data.test_split)
        self._reward_files = config.reward.init(data.vocabulary)
        self.reward_bytes = checkpointer.bytes_on_device(self._reward_files, config.partitioner)
        self.phases = algorithm_1(
            grow_steps=config.grow_steps,
            improve_steps=config.improve_steps,
            bc_long=config.bc_long,
            restart_from_base=config.improving.restart_from_base,
        )
        self._grow_program: Any = None
        self._writer = MetricsWriter(self.model_dir, enabled=self.processes.lead)

    def _stop_requested(self) -> bool:
        """Asked once a step or chunk: each is a sign of progress."""
        self._beat()
        return self._asked_to_stop()

    @functools.cached_property
    def reward_params(self) -> RewardParams:
        """The reward's, on the mesh; read when they are first asked for."""
        return checkpointer.put_params(self._reward_files, self.config.partitioner)

    @functools.cached_property
    def evaluator(self) -> Evaluator:
        config = self.config
        return Evaluator(
            evaluation=config.evaluation,
            model=config.model,
            reward=config.reward,
            reward_params=self.reward_params,
            reward_bytes=self.reward_bytes,
            partitioner=config.partitioner,
            lengths=config.data.lengths,
            eval_set=self._eval_set,
            test_set=self._test_set,
            seed=config.seed,
            stop_requested=self._stop_requested,
        )

    def run(self, phases: Iterable[Phase] | None = None) -> None:
        """Runs phases in order, all of Algorithm 1 by default; finished ones are skipped."""
        for phase in self.phases if phases is None else phases:
            mark = mark_path(self.model_dir, phase)
            if mark.exists():
                continue
            if self._stop_requested():
                raise Preempted(f"stopped before {phase.name}; everything is saved.")
            if phase.policy is not None and not self._policy_mark(phase.policy).exists():
                raise UserError(
                    f"{phase.name} starts from the policy of {phase.policy}, which is not finished in MODEL_DIR "
                    f"{str(self.model_dir)!r}. Run that first (python -m rest_jax run), or set INITIAL_CHECKPOINT_PATH "
                    "and TRAIN_STEPS = 0."
                )
            started = time.monotonic()
            if phase.kind in ("grow", "evaluate"):  # training resumes at a step of its own
                self._writer.resume(phase=phase.name, step=-1)
            result = getattr(self, f"_{phase.kind}")(phase, self._progress(phase))
            self._writer.flush()
            if self.processes.lead:
                paths.write_json(mark, {"name": phase.name, **result, "seconds": round(time.monotonic() - started, 2)})
            self.processes.wait_for_file(mark)
            if phase.kind == "evaluate" and self.processes.lead:
                self._summarise(num_resamples=0)
        self._writer.close()

    def _summarise(self, *, num_resamples: int) -> dict[str, Any]:
        """Brings summary.json up to date with what is finished; comparisons take seconds, so only with resamples."""
        results = {phase.name: result for phase in self.phases if (result := self.result(phase.name)) is not None}
        facts = {
            "task": self.config.data.task,
            "parameters": int(sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(self.abstract_params))),
            "mesh": {name: int(size) for name, size in self.config.partitioner.mesh.shape.items()},
            "held_out_metrics": list(self._held_out),
        }
        summary = summarise(
            self.model_dir,
            results,
            num_resamples=num_resamples,
            seed=self.config.seed,
            facts=facts,
        )
        paths.write_json(self.model_dir / "summary.json", summary)
        return summary

    def finish(self) -> str:
        """Writes the last policy to MODEL_DIR/policy, the comparisons and the report; returns the table of the run.

        All processes write the policy and audit the reward, the first one does the rest; to the others it returns an
        empty text.
        """
        trained = [phase.name for phase in self.phases if phase.kind in ("bc", "improve")]
        last = [name for name in trained if self.result(name) is not None][-1]
        checkpointer.save_params(
            self.model_dir / "policy", self.policy(last), dtype=self.config.policy_dtype, processes=self.processes
        )
        self._audit_reward()
        if not self.processes.lead:
            return ""
        summary = self._summarise(num_resamples=self.config.evaluation.bootstrap_resamples)
        report = write_report(self.model_dir)
        return f"{format_table(summary)}\n\nReport: {report}"

    def _audit_reward(self) -> None:
        """A learned reward's audit becomes part of the report."""
        config, path = self.config, self.model_dir / AUDIT
        if not (config.reward.learned and config.evaluation.audit_pairs) or path.exists():
            return
        pairs = audit_lib.pairs_of_run(
            config.reward,
            eval_set=self._eval_set,
            model_dir=self.model_dir,
            num_pairs=config.evaluation.audit_pairs,
            seed=config.seed,
        )
        try:
            result = audit_lib.audit(
                config.reward,
                pairs,
                params=self.reward_params,
                data=config.data,
                sampling=config.evaluation.sampling,
                partitioner=config.partitioner,
                seed=config.seed,
            )
        except UserError as error:  # no pair can be used; the run is worth its report without
            if self.processes.lead:
                print(f"The reward was not audited: {error}", flush=True)
            return
        if self.processes.lead:
            paths.write_json(path, result)

    def _policy_mark(self, name: str) -> Path:
        return mark_path(self.model_dir, next(phase for phase in self.phases if phase.name == name))

    def result(self, name: str) -> dict[str, Any] | None:
        """What a finished phase left; None for one that is not finished."""
        phase = next(phase for phase in self.phases if phase.name == name)
        mark = mark_path(self.model_dir, phase)
        return json.loads(mark.read_text()) if mark.exists() else None

    def policy(self, name: str, *, shapes: Params | None = None) -> Params:
        """The parameters that a finished training phase kept, its best checkpoint's, in the types of `shapes` (None:
        the model's own)."""
        result = json.loads(self._policy_mark(name).read_text())
        directory = checkpointer.step_directory(phase_directory(self.model_dir, name), result["best_step"])
        return checkpointer.load_params(
            str(directory),
            abstract_params=self.abstract_params if shapes is None else shapes,
            partitioner=self.config.partitioner,
        )

    # One method per kind of phase; each returns what goes into the commit mark.

    def _bc(self, phase: Phase, progress: ProgressLine) -> dict[str, Any]:
        config = self.config

        def initial() -> Params:
            if config.initial_checkpoint_path is not None:
                return checkpointer.load_params(
                    config.initial_checkpoint_path,
                    abstract_params=self.abstract_params,
                    partitioner=config.partitioner,
                )
            shardings = config.partitioner.param_shardings(self.abstract_params)
            return jax.jit(self._init_params, out_shardings=shardings)()

        return self._fit(
            phase, progress, training=config.bc, mixture=MixtureSpec.single(self.train_set), initial_params=initial
        )

    def _grow(self, phase: Phase, progress: ProgressLine) -> dict[str, Any]:
        config = self.config
        assert phase.policy is not None
        if self._grow_program is None:
            self._grow_program = grow_lib.compile_grow(
                growing=config.growing,
                model=config.model,
                reward=config.reward,
                partitioner=config.partitioner,
                max_length=config.data.lengths["targets"],
                reward_bytes=self.reward_bytes,
            )
        statistics = grow_lib.grow(
            directory=phase_directory(self.model_dir, phase.name),
            growing=config.growing,
            program=self._grow_program,
            params=self.policy(phase.policy, shapes=sampling_shapes(config.model, self.abstract_params)),
            reward_params=self.reward_params,
            policy_step=json.loads(self._policy_mark(phase.policy).read_text())["best_step"],
            dataset=self.train_set,
            lengths=config.data.lengths,
            partitioner=config.partitioner,
            processes=self.processes,
            seed=config.seed,
            grow_step=phase.grow_step,
            progress=progress,
            metrics_writer=self._writer,
            phase=phase.name,
            stop_requested=self._stop_requested,
            preview=self._preview,
            facts={
                "vocabulary_sha256": config.data.vocabulary.sha256,
                "reward": config.reward.name,
                "rewards": {name: repr(leaf) for name, leaf in leaves(config.reward).items()},
            },
        )
        for report in statistics["thresholds"]:
            progress.log_event(improve_lib.describe(report))
        return {key: statistics[key] for key in ("count", "distinct", "kept", "mean", "sources")}

    def _preview(self, store: ScoredStore) -> list[dict[str, Any]]:
        """What each Improve step would train on; raises UserError where that is nothing, or was not stored."""
        return [
            improve_lib.selection_report(improving=self.config.improving, store=store, improve_step=step)
            for step in range(1, self.config.improve_steps + 1)
        ]

    def _improve(self, phase: Phase, progress: ProgressLine) -> dict[str, Any]:
        assert phase.policy is not None
        start = phase.policy
        store = ScoredStore.open(self.model_dir / f"grow_{phase.grow_step}")
        selection = improve_lib.select(
            improving=self.config.improving,
            store=store,
            references=self.train_set,
            improve_step=phase.improve_step,
        )
        progress.log_event(improve_lib.describe(selection.report))
        result = self._fit(
            phase,
            progress,
            training=selection.training,
            mixture=selection.mixture,
            initial_params=lambda: self.policy(start),
        )
        return {**result, "selection": selection.report}

    def _bc_long(self, phase: Phase, progress: ProgressLine) -> dict[str, Any]:
        improves = [self.result(p.name) for p in self.phases if p.kind == "improve"]
        steps = sum(result["steps"] for result in improves if result is not None)
        training = dataclasses.replace(self.config.improving.training, steps=steps, patience=None)
        return self._fit(
            phase,
            progress,
            training=training,
            mixture=MixtureSpec.single(self.train_set),
            initial_params=lambda: self.policy("bc"),
        )

    def _evaluate(self, phase: Phase, progress: ProgressLine) -> dict[str, Any]:
        assert phase.policy is not None
        scores = self.evaluator.evaluate(
            self.policy(phase.policy), directory=self.model_dir / "eval", name=phase.policy
        )
        progress.log_event(
            f"{phase.policy}: mean reward {scores['reward']:.4f} | BLEU {scores['bleu']:.2f} | "
            f"chrF {scores['chrf']:.2f}"
        )
        self._writer.write(
            phase=phase.name, step=0, scalars={name: scores[name] for name in ("reward", "bleu", "chrf", "ter")}
        )
        step = next(step for step in self.phases if step.name == phase.policy)
        alarms: list[Alarm] = []
        if step.kind == "improve" and step.policy is not None:
            alarms = raise_alarms(
                self.model_dir / "eval",
                policy=step.name,
                scores=scores,
                start=step.policy,
                metrics=self._held_out,
                num_resamples=self.config.evaluation.bootstrap_resamples,
                seed=self.config.seed,
            )
        for alarm in alarms:
            progress.log_event(alarm["text"])
        return {**scores, "alarms": alarms}

    def _fit(
        self,
        phase: Phase,
        progress: ProgressLine,
        *,
        training: training_lib.Training,
        mixture: MixtureSpec,
        initial_params: Callable[[], Params],
    ) -> dict[str, Any]:
        start = None if phase.policy is None else self.result(phase.policy)
        result = training_lib.fit(
            directory=phase_directory(self.model_dir, phase.name),
            training=training,
            model=self.config.model,
            partitioner=self.config.partitioner,
            initial_params=initial_params,
            abstract_params=self.abstract_params,
            mixture=mixture,
            lengths=self.config.data.lengths,
            mean_reward=self.evaluator.mean_reward,
            # Every policy is measured with the same random numbers, so the phase before has measured this one's start.
            initial_reward=None if start is None else start["best_reward"],
            seed=phase_seed(self.config.seed, phase.name),
            progress=progress,
            metrics_writer=self._writer,
            phase=phase.name,
            stop_requested=self._stop_requested,
            profiled=self._profiled,
        )
        return dataclasses.asdict(result)

    def _init_params(self) -> Params:
        return initial_params(self.config.model, jax.random.key(self.config.seed))

    def _progress(self, phase: Phase) -> ProgressLine:
        parts = [f"grow {phase.grow_step}/{self.config.grow_steps}"] if phase.grow_step else []
        if phase.kind == "improve":
            parts.append(f"improve {phase.improve_step}/{self.config.improve_steps}")
        devices = self.config.partitioner.mesh.devices.ravel().tolist()
        chip = chips.of_device(devices[0])
        return ProgressLine(
            " | ".join(parts) or phase.name,
            enabled=self.processes.lead,
            devices=len(devices),
            peak_flops=None if chip is None else chip.flops * len(devices),
        )
