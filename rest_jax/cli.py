"""The commands.

Exit codes: 0 done; 2 the configuration or the data is at fault; 42 preempted after saving, run it again; 1 otherwise.
"""

import argparse
import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rest_jax.errors import Preempted, UserError
from rest_jax.preemption import stop_on_sigterm

EXIT_OTHER, EXIT_USER, EXIT_PREEMPTED = 1, 2, 42
GIN_PREFIX = "--gin."
EPILOG = """\
Configuration is gin, searched in the working directory, --gin_search_paths and the package:
  rest_jax run --gin_file=runs/smoke.gin --gin.MODEL_DIR="'/tmp/smoke'"
Strings need quotes inside quotes. 'rest_jax COMMAND --help' lists the options of a command.

Exit codes: 0 done; 2 the configuration or the data is at fault; 42 preempted after saving (run it again); 1 otherwise.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # --gin.NAME=value is no fixed option, so it is taken out before argparse sees it.
    # T5X's two ways to write one.
    arguments = [re.sub(r"^--gin_bindings=", GIN_PREFIX, argument) for argument in arguments]
    bindings = [argument.removeprefix(GIN_PREFIX) for argument in arguments if argument.startswith(GIN_PREFIX)]
    rest = [argument for argument in arguments if not argument.startswith(GIN_PREFIX)]
    try:
        options = _parser().parse_args(rest)
    except SystemExit as stop:  # argparse has printed the help, or what it did not understand.
        return int(stop.code or 0)
    options.bindings, options.argv = bindings, ["rest_jax", *arguments]
    try:
        if bindings and not hasattr(options, "gin_file"):
            raise UserError(f"{GIN_PREFIX}{bindings[0]}: this command is not configured by gin; see its --help.")
        options.command(options)
    except UserError as error:
        print(f"rest_jax: {error}", file=sys.stderr)
        return EXIT_USER
    except Preempted as error:
        print(f"rest_jax: preempted: {error} Run the same command to continue.", file=sys.stderr)
        return EXIT_PREEMPTED
    except BrokenPipeError:
        # The reader of our output has gone (`| head`). Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OTHER
    except Exception:
        traceback.print_exc()
        return EXIT_OTHER
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rest_jax",
        description="Reinforced Self-Training (ReST) for encoder-decoder translation models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[Any], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=command)
        return sub

    for name, command, text in (
        ("run", _run, "Algorithm 1: BC, then Grow and Improve, each followed by its evaluation."),
        ("train", _train, "BC alone: train a policy on D, and evaluate it."),
        ("grow", _grow, "One Grow step: sample from a policy, score, and store what passes."),
        ("improve", _improve, "One Improve step: train on a Grow step's survivors, and evaluate the policy."),
        ("evaluate", _evaluate, "Mean reward, BLEU, chrF and TER of finished policies, or of any checkpoint."),
    ):
        sub = add(name, command, text)
        _add_gin_options(sub)
        sub.add_argument("--dry_run", action="store_true", help="check everything, print the plan, write nothing")
        if name in ("grow", "improve"):
            example = "1" if name == "grow" else "1.2"
            sub.add_argument("--step", help=f"which, e.g. {example}; without it the first that is not finished")
        if name == "evaluate":
            which = sub.add_mutually_exclusive_group()
            which.add_argument("--policy", help="a phase's, e.g. bc or improve_1.2; without it all finished ones")
            which.add_argument("--checkpoint", help="parameters of this configuration's model, from anywhere")
    _add_translate_options(
        add("translate", _translate, "Translate lines of text: one line in, one line out, in order.")
    )
    _add_infer_options(
        add("infer", _infer, "A task's split through a checkpoint, into the JSON lines that T5X's infer writes.")
    )
    _add_filter_options(
        add(
            "filter", _filter, "Tell what a filter would keep of a Grow step's store. Needs no model and no TensorFlow."
        )
    )
    sub = add("rescore", _rescore, "Give a Grow step's store another reward, without drawing: a new store.")
    _add_gin_options(sub)
    sub.add_argument("--store", required=True, help="directory of a finished Grow step, MODEL_DIR/grow_1")
    sub.add_argument("--output", required=True, help="directory to write; must not exist")
    sub.add_argument("--stored_only", action="store_true", help="of an added reward: leave out what Grow dropped")
    for name, command, text in (
        ("import", _import, "Import a checkpoint of T5X or Hugging Face. Its format is detected."),
        ("export", _export, "Export a checkpoint, such as MODEL_DIR/policy, to T5X or Hugging Face."),
    ):
        sub = add(name, command, text)
        sub.add_argument("source", metavar="SOURCE", help="a checkpoint of any format")
        sub.add_argument("dest", metavar="DEST", help="directory to write; must not exist")
        sub.add_argument("--gin_file", action="append", default=[], help="of the model; without it, it is found out")
        if name == "export":
            sub.add_argument("--format", required=True, choices=("t5x", "hugging_face"), dest="to")
    sub = add("vocab", _vocab, "Train a SentencePiece vocabulary on both sides of a seqio task's text.")
    sub.add_argument("--task", required=True, help="seqio task whose text is read")
    sub.add_argument("--task_module", action="append", default=[], help="module that registers the task; repeatable")
    sub.add_argument("--size", type=int, default=8000, help="pieces, incl. 3 special ones and 256 bytes (default 8000)")
    sub.add_argument("--output", required=True, help="the model file to write, *.model")
    sub.add_argument("--split", default="train", help="default train")
    sub.add_argument(
        "--character_coverage",
        type=float,
        default=0.9995,
        help="share of characters with pieces of their own; the rest is spelled in bytes (default 0.9995)",
    )
    sub = add("report", _report, "Write report.html from what a run left in MODEL_DIR.")
    sub.add_argument("model_dir", metavar="MODEL_DIR")
    return parser


def _add_gin_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--gin_file",
        action="append",
        default=[],
        help="repeatable; without any, the config.gin of --model_dir; then --gin.NAME=value over them",
    )
    sub.add_argument(
        "--gin_search_paths", action="append", default=[], help="further folders for gin files, with commas between"
    )
    sub.add_argument("--model_dir", help="short for --gin.MODEL_DIR, without quotes inside quotes")
    sub.add_argument("--tfds_data_dir", help="where TFDS keeps its data sets; without it, $TFDS_DATA_DIR")


def _add_translate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("input", nargs="?", help="UTF-8 text, one sentence a line; without it, standard input")
    _add_gin_options(sub)
    sub.add_argument("--checkpoint", help="a checkpoint; without it, the policy of --model_dir")
    sub.add_argument("--policy", help="phase of --model_dir, e.g. improve_1.2; without it, the last policy of the run")
    sub.add_argument("--output", help="written whole or not at all; without it, standard output")
    sub.add_argument("--beam_size", type=int, default=1, help="default 1: greedy")
    sub.add_argument("--beam_alpha", type=float, default=0.6, help="length penalty of the beam (default 0.6)")
    sub.add_argument(
        "--num_samples",
        type=int,
        help="JSON lines with source, samples and log_probs: samples, or with --beam_size the beam's best",
    )
    sub.add_argument("--temperature", type=float, default=0.8, help="of --num_samples (default 0.8)")
    sub.add_argument("--top_p", type=float, default=1.0, help="of --num_samples (default 1: all)")
    sub.add_argument("--seed", type=int, default=0, help="of --num_samples")
    sub.add_argument("--prefix", default="", help="put before each line, if the policy's task does so")
    sub.add_argument("--sources_per_chunk", type=int, default=64, help="lines translated together (default 64)")


def _add_infer_options(sub: argparse.ArgumentParser) -> None:
    _add_gin_options(sub)
    modes = ("predict", "predict_with_aux", "score")
    sub.add_argument("--mode", choices=modes, default="predict_with_aux", help="default predict_with_aux")
    sub.add_argument("--split", default="test", help="of the task (default test)")
    sub.add_argument("--shard_id", type=int, default=0, help="which of --num_shards parts this call does (default 0)")
    sub.add_argument("--num_shards", type=int, default=1, help="default 1")


def _add_filter_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--store", required=True, help="directory of a finished Grow step, MODEL_DIR/grow_1")
    sub.add_argument("--filter", action="append", default=[], help="e.g. 'cap(threshold(0.5), k=3)'; repeatable")
    sub.add_argument("--threshold", type=float, nargs="+", default=[], help="reward > tau")
    sub.add_argument("--percentile", type=float, nargs="+", default=[], help="above this percentile of its source's")
    sub.add_argument(
        "--interpolation",
        type=float,
        nargs="+",
        default=[],
        help="reward > gamma * max + (1 - gamma) * mean of a source",
    )
    sub.add_argument("--top_k", type=int, nargs="+", default=[], help="the k best of each source")
    sub.add_argument("--cap", type=int, help="of all these, at most so many of each source")
    sub.add_argument(
        "--stored_only",
        action="store_true",
        help="leave out what Grow's own filter dropped, where that is stricter, instead of refusing",
    )


# Commands that run phases ---------------------------------------------------------------------------------------------


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

    from rest_jax import config, paths, plan, run_files
    from rest_jax.data.parallel import UnreadData
    from rest_jax.rest import ReST, Runner

    _load_config(options)
    rest = config.build(ReST)
    sha256 = rest.data.vocabulary.sha256
    with stop_on_sigterm() as stop_requested:
        # Cheap checks first: the text is read only once the rest is known to be in order.
        unread = {field.name: getattr(rest.data, field.name) for field in dataclasses.fields(rest.data)}
        draft = Runner(dataclasses.replace(rest, data=UnreadData(**unread)))
        run_files.check_same_run(draft.model_dir, given=config.given_text(), vocabulary_sha256=sha256)
        if rest.initial_checkpoint_path is not None:
            start = paths.resolve(rest.initial_checkpoint_path)
            run_files.check_same_vocabulary("INITIAL_CHECKPOINT_PATH", start, vocabulary_sha256=sha256)
        rest.data.check()
        text = plan.describe(draft)
        if options.dry_run:
            print(text)
            yield None
        else:
            yield Runner(rest, stop_requested=stop_requested)


def _run_phases(options: Any, runner: Any, phases: Sequence[Any]) -> None:
    """Runs phases, brings MODEL_DIR/policy up to date and prints the table of the run."""
    if not phases:
        print("Every step of this configuration is finished.")
        return
    _check_ready(runner, phases[0])
    _start(options, runner)
    runner.run(phases)
    if any(phase.kind == "evaluate" for phase in phases):
        print(runner.finish())


def _check_ready(runner: Any, phase: Any) -> None:
    """Raises UserError, before anything is written, when a phase's policy is not there yet."""
    if phase.policy is not None and runner.result(phase.policy) is None and runner.result(phase.name) is None:
        raise UserError(
            f"{phase.name} starts from the policy of {phase.policy}, which is not finished in MODEL_DIR "
            f"{str(runner.model_dir)!r}. Run that first: rest_jax run, train or improve, with the same configuration."
        )


def _start(options: Any, runner: Any) -> None:
    """Writes config.gin, operative_config.gin, model-info.txt and run.json, and says what is about to be done."""
    import jax

    from rest_jax import config, model_info, plan, run_files

    text = plan.describe(runner)
    if jax.process_index() == 0:
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
    from rest_jax import run_files
    from rest_jax.checkpoints import checkpointer
    from rest_jax.rest import write_json

    found = checkpointer.find_checkpoint(options.checkpoint)
    run_files.check_same_vocabulary("--checkpoint", found, vocabulary_sha256=runner.config.data.vocabulary.sha256)
    params = checkpointer.load_params(
        str(found), abstract_params=runner.abstract_params, partitioner=runner.config.partitioner
    )
    _start(options, runner)
    directory, name = runner.model_dir / "eval" / "checkpoints", "-".join(found.absolute().parts[-2:])
    scores = runner.evaluator.evaluate(params, directory=directory, name=name)
    write_json(directory / f"{name}.json", {"checkpoint": str(found.absolute()), **scores})
    shown = " | ".join(f"{key} {scores[key]:.4f}" for key in ("reward", "bleu", "chrf", "ter"))
    print(f"{found}: {shown}\nFiles: {directory}/{name}.*")


def _load_config(options: Any, *, fallbacks: dict[str, str] | None = None, also: Sequence[str] = ()) -> None:
    """Parses what `--gin_file` and `--model_dir` give, the files `also` of a command, and `--gin.NAME=value`."""
    from pathlib import Path

    from rest_jax import config, run_files

    if options.tfds_data_dir is not None:
        os.environ["TFDS_DATA_DIR"] = options.tfds_data_dir  # read by TFDS when it is imported
    files = list(options.gin_file)
    if not files and options.model_dir is not None:
        given = Path(options.model_dir) / run_files.CONFIG
        if not given.is_file():
            raise UserError(
                f"--gin_file is missing, and --model_dir {options.model_dir!r} has no {run_files.CONFIG} yet."
            )
        files = [str(given)]
    bindings = [] if options.model_dir is None else [f"MODEL_DIR={options.model_dir!r}"]
    folders = [folder for text in options.gin_search_paths for folder in text.split(",") if folder]
    for note in config.load(
        gin_files=[*files, *also], bindings=bindings + options.bindings, search_paths=folders, fallbacks=fallbacks
    ):
        print(f"rest_jax: {note}", file=sys.stderr)


# The others -----------------------------------------------------------------------------------------------------------


def _translate(options: Any) -> None:
    from rest_jax import config, run_files, translate
    from rest_jax.rest import ReST

    if options.checkpoint is not None and options.policy is not None:
        raise UserError("--checkpoint and --policy exclude each other: --policy names a phase of --model_dir.")
    if options.checkpoint is None and options.model_dir is None:
        raise UserError("translate needs --checkpoint PATH, or --model_dir DIR of a run.")
    if options.model_dir is None:
        own = options.gin_file or [str(run_files.find_config(options.checkpoint))]
        options.gin_file = [run_files.TRANSLATE, *own]
    _load_config(options, fallbacks={"MODEL_DIR": "''"})
    sampling = translate.make_sampling(
        num_samples=options.num_samples,
        beam_size=options.beam_size,
        beam_alpha=options.beam_alpha,
        temperature=options.temperature,
        top_p=options.top_p,
        sources_per_chunk=options.sources_per_chunk,
    )
    translator = translate.open_translator(
        config.build(ReST),
        checkpoint=options.checkpoint,
        policy=options.policy,
        sampling=sampling,
        prefix=options.prefix,
        seed=options.seed,
    )
    cut: list[int] = []
    with translate.open_input(options.input) as lines, translate.open_output(options.output) as output:
        for translation in translator.translate(lines, on_cut=cut.append):
            text = translation.texts[0] if options.num_samples is None else translation.as_json()
            output.write(text + "\n")
    if cut:
        shown = ", ".join(map(str, cut[:5])) + (", ..." if len(cut) > 5 else "")
        print(
            f"rest_jax: {len(cut)} line(s) have more than {translator.source_length} tokens and were cut: {shown}",
            file=sys.stderr,
        )


def _infer(options: Any) -> None:
    from rest_jax import config, infer

    fallbacks = dict(infer.FALLBACKS)
    if options.model_dir is not None:
        fallbacks["CHECKPOINT_PATH"] = repr(os.path.join(options.model_dir, "policy"))
    _load_config(options, fallbacks=fallbacks, also=[infer.GIN])
    print(
        infer.run(
            config.build(infer.Inference),
            mode=options.mode,
            split=options.split,
            shard_id=options.shard_id,
            num_shards=options.num_shards,
        )
    )


def _filter(options: Any) -> None:
    # Rewards are compared on the host: an accelerator, and its memory, would be taken for nothing.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rest_jax import filter_text
    from rest_jax.data.store import ScoredStore

    chosen = filter_text.chosen_filters(
        options.filter,
        threshold=options.threshold,
        percentile=options.percentile,
        interpolation=options.interpolation,
        top_k=options.top_k,
        cap=options.cap,
    )
    store = ScoredStore.open(options.store)
    print(filter_text.format_rows(filter_text.report_rows(store, chosen, stored_only=options.stored_only)))


def _rescore(options: Any) -> None:
    from rest_jax import config, rescore
    from rest_jax.data.store import ScoredStore
    from rest_jax.rest import ReST

    _load_config(options)
    rest, store = config.build(ReST), ScoredStore.open(options.store)
    print(rescore.rescore(rest, store=store, output=options.output, stored_only=options.stored_only))


def _import(options: Any) -> None:
    # Tensors pass through the host alone, like the next command's.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rest_jax.checkpoints.commands import import_command

    print(import_command(options.source, options.dest, gin_files=options.gin_file, bindings=options.bindings))


def _export(options: Any) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rest_jax.checkpoints.commands import export_command

    print(
        export_command(
            options.source, options.dest, to=options.to, gin_files=options.gin_file, bindings=options.bindings
        )
    )


def _vocab(options: Any) -> None:
    from rest_jax.data import seqio_tasks
    from rest_jax.data.vocabulary import SentencePieceVocabulary

    path = seqio_tasks.train_vocabulary(
        options.task,
        output=options.output,
        size=options.size,
        split=options.split,
        character_coverage=options.character_coverage,
        module_imports=options.task_module,
    )
    vocabulary = SentencePieceVocabulary(str(path))
    print(f"{path}: {vocabulary.vocab_size} pieces, sha256 {vocabulary.sha256}")


def _report(options: Any) -> None:
    from rest_jax.reporting.report import write_report

    print(write_report(options.model_dir))
