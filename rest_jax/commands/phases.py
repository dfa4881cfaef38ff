"""Commands that run phases of Algorithm 1: run, train, grow, improve, evaluate."""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from rest_jax.commands.options import AddCommand, add_gin_options, add_process_options, load_config
from rest_jax.errors import UserError


def register(add: AddCommand) -> None:
    for name, command, text in (
        ("run", _run, "Algorithm 1: BC, then Grow and Improve, each followed by its evaluation."),
        ("train", _train, "BC alone: train a policy on D, and evaluate it."),
        ("grow", _grow, "One Grow step: sample from a policy, score, and store what passes."),
        ("improve", _improve, "One Improve step: train on a Grow step's survivors, and evaluate the policy."),
        ("evaluate", _evaluate, "Mean reward, BLEU, chrF and TER of finished policies, or of any checkpoint."),
    ):
        sub = add(name, command, text)
        add_gin_options(sub)
        add_process_options(sub)
        sub.add_argument("--dry_run", action="store_true", help="check everything, print the plan, write nothing")
        if name in ("grow", "improve"):
            example = "1" if name == "grow" else "1.2"
            sub.add_argument("--step", help=f"which, e.g. {example}; without it the first that is not finished")
        if name == "evaluate":
            which = sub.add_mutually_exclusive_group()
            which.add_argument("--policy", help="a phase's, e.g. bc or improve_1.2; without it all finished ones")
            which.add_argument("--checkpoint", help="parameters of this configuration's model, from anywhere")


def _run(options: Any) -> None:
    with _runner(options) as runner:
        if runner is not None:
            _run_phases(options, runner, runner.phases)


def _train(options: Any) -> None:
    with _runner(options) as runner:
        if runner is not None:
            _run_phases(options, runner, [phase for phase in runner.phases if "bc" in (phase.name, phase.policy)][:2])


def _grow(options: Any) -> None:
    with _runner(options) as runner:
        if runner is not None:
            _run_phases(options, runner, _steps(runner, "grow", options.step))


def _improve(options: Any) -> None:
    with _runner(options) as runner:
        if runner is not None:
            chosen = _steps(runner, "improve", options.step)
            evaluations = {phase.policy: phase for phase in runner.phases if phase.kind == "evaluate"}
            _run_phases(options, runner, [step for phase in chosen for step in (phase, evaluations[phase.name])])


def _evaluate(options: Any) -> None:
    with _runner(options) as runner:
        if runner is None:
            return
        if options.checkpoint is not None:
            _evaluate_checkpoint(options, runner)
            return
        evaluations = {phase.policy: phase for phase in runner.phases if phase.kind == "evaluate"}
        if options.policy is not None and options.policy not in evaluations:
            raise UserError(
                f"--policy {options.policy!r}: no such phase; legal are {', '.join(map(str, evaluations))}."
            )
        chosen = [
            phase
            for name, phase in evaluations.items()
            if name == options.policy or (options.policy is None and runner.result(str(name)) is not None)
        ]
        if not chosen:
            raise UserError(
                f"MODEL_DIR {str(runner.model_dir)!r} has no finished policy to evaluate; train one first, or give "
                "--checkpoint."
            )
        _run_phases(options, runner, chosen)


def _steps(runner: Any, kind: str, step: str | None) -> list[Any]:
    """The phase of `--step`; without it the first that is not finished, or none."""
    phases = {phase.name.removeprefix(f"{kind}_"): phase for phase in runner.phases if phase.kind == kind}
    if step is not None and step not in phases:
        raise UserError(f"--step {step!r}: this configuration's {kind} steps are {', '.join(phases) or 'none'}.")
    if step is not None:
        return [phases[step]]
    return [phase for phase in phases.values() if runner.result(phase.name) is None][:1]


@contextlib.contextmanager
def _runner(options: Any) -> Iterator[Any]:
    """The checked run; None after a dry run, which has then said what there is to say. Nothing is written yet."""
    import dataclasses

    import jax

    from rest_jax import config, paths, plan, processes, run_files
    from rest_jax.data.parallel import UnreadData
    from rest_jax.preemption import stop_of_any, stop_on_sigterm
    from rest_jax.profiling import ProfiledSteps
    from rest_jax.rest import ReST, Runner
    from rest_jax.watchdog import watchdog

    if options.compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", options.compilation_cache_dir)
    with contextlib.ExitStack() as stack:
        together = stack.enter_context(
            processes.joined(
                coordinator_address=options.coordinator_address,
                num_processes=options.num_processes,
                process_id=options.process_id,
                timeout=options.barrier_seconds,
            )
        )
        stop_requested = stop_of_any() if together.count > 1 else stack.enter_context(stop_on_sigterm())
        load_config(options)
        rest = config.build(ReST)
        sha256 = rest.data.vocabulary.sha256
        together.check_same("the configuration", hashlib.sha256(config.given_text().encode()).hexdigest())
        together.check_same("the sha256 of VOCABULARY", sha256)
        # Cheap checks first: the text is read only once the rest is known to be in order.
        unread = {field.name: getattr(rest.data, field.name) for field in dataclasses.fields(rest.data)}
        draft = Runner(dataclasses.replace(rest, data=UnreadData(**unread)))
        run_files.check_same_run(draft.model_dir, given=config.given_text(), vocabulary_sha256=sha256)
        if rest.initial_checkpoint_path is not None:
            start = paths.resolve(rest.initial_checkpoint_path)
            run_files.check_same_vocabulary("INITIAL_CHECKPOINT_PATH", start, vocabulary_sha256=sha256)
        # One process tokenises; the others find it in CACHE_DIR if they share that, and do the same if not.
        with together.lead_first("data"):
            rest.data.check()
            if together.count > 1 and not options.dry_run:
                sizes = {split: len(rest.data.open(split)) for split in rest.data.splits}
        # Where CACHE_DIR is not shared the others tokenise after process 0, which may take longer than a barrier waits.
        together.wait("data read", timeout=processes.DAY)
        text = plan.describe(draft)
        if options.dry_run:
            if together.lead:
                print(text)
            yield None
            return
        if together.count > 1:
            together.check_same("the number of pairs in each split", str(sizes))
            together.check_shared(draft.model_dir, "MODEL_DIR")
            together.check_same("what --dry_run prints (devices, memory, finished phases)", text)
        profiled = None
        if options.profile_steps is not None:
            profiled = ProfiledSteps.parse(options.profile_steps, draft.model_dir)
        beat = stack.enter_context(watchdog(options.watchdog_seconds))
        yield Runner(rest, stop_requested=stop_requested, processes=together, beat=beat, profiled=profiled)


def _run_phases(options: Any, runner: Any, phases: Sequence[Any]) -> None:
    """Runs phases, brings MODEL_DIR/policy up to date and prints the table of the run."""
    if not phases:
        print("Every step of this configuration is finished.")
        return
    _check_ready(runner, phases[0])
    _start(options, runner)
    runner.run(phases)
    if any(phase.kind == "evaluate" for phase in phases):
        table = runner.finish()
        if runner.processes.lead:
            print(table)


def _check_ready(runner: Any, phase: Any) -> None:
    """Raises UserError, before anything is written, when a phase's policy is not there yet."""
    if phase.policy is not None and runner.result(phase.policy) is None and runner.result(phase.name) is None:
        raise UserError(
            f"{phase.name} starts from the policy of {phase.policy}, which is not finished in MODEL_DIR "
            f"{str(runner.model_dir)!r}. Run that first: rest_jax run, train or improve, with the same configuration."
        )


def _start(options: Any, runner: Any) -> None:
    """Writes config.gin, operative_config.gin, model-info.txt and run.json, and says what is about to be done."""
    from rest_jax import config, model_info, plan, run_files

    text = plan.describe(runner)
    if runner.processes.lead:
        print(text, flush=True)
        run_files.write_run_files(
            runner.model_dir,
            given=config.given_text(),
            operative=config.operative_text(),
            argv=options.argv,
            facts={"vocabulary_sha256": runner.config.data.vocabulary.sha256},
            model_info=model_info.describe(runner.abstract_params, runner.config.partitioner),
        )


def _evaluate_checkpoint(options: Any, runner: Any) -> None:
    """Into MODEL_DIR/eval/checkpoints, where the run's own evaluations are not."""
    from rest_jax import paths, run_files
    from rest_jax.checkpoints import checkpointer

    found = checkpointer.find_checkpoint(options.checkpoint)
    run_files.check_same_vocabulary("--checkpoint", found, vocabulary_sha256=runner.config.data.vocabulary.sha256)
    params = checkpointer.load_params(
        str(found), abstract_params=runner.abstract_params, partitioner=runner.config.partitioner
    )
    _start(options, runner)
    directory, name = runner.model_dir / "eval" / "checkpoints", "-".join(paths.absolute(found).parts[-2:])
    scores = runner.evaluator.evaluate(params, directory=directory, name=name)
    if not runner.processes.lead:
        return
    paths.write_json(directory / f"{name}.json", {"checkpoint": str(paths.absolute(found)), **scores})
    shown = " | ".join(f"{key} {scores[key]:.4f}" for key in ("reward", "bleu", "chrf", "ter"))
    print(f"{found}: {shown}\nFiles: {directory}/{name}.*")
