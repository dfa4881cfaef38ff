"""Commands that read text: translate, infer, vocab."""

import argparse
import os
import sys
from typing import Any

from rest_jax.commands.options import AddCommand, add_gin_options, load_config
from rest_jax.errors import UserError


def register(add: AddCommand) -> None:
    _add_translate_options(
        add("translate", _translate, "Translate lines of text: one line in, one line out, in order.")
    )
    _add_infer_options(
        add("infer", _infer, "A task's split through a checkpoint, into the JSON lines that T5X's infer writes.")
    )
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


def _add_translate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("input", nargs="?", help="UTF-8 text, one sentence a line; without it, standard input")
    add_gin_options(sub)
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
    sub.add_argument("--target_prefix", default="", help="that translations start with, e.g. a language's tag")
    sub.add_argument("--sources_per_chunk", type=int, default=64, help="lines translated together (default 64)")


def _add_infer_options(sub: argparse.ArgumentParser) -> None:
    add_gin_options(sub)
    modes = ("predict", "predict_with_aux", "score")
    sub.add_argument("--mode", choices=modes, default="predict_with_aux", help="default predict_with_aux")
    sub.add_argument("--split", default="test", help="of the task (default test)")
    sub.add_argument("--shard_id", type=int, default=0, help="which of --num_shards parts this call does (default 0)")
    sub.add_argument("--num_shards", type=int, default=1, help="default 1")


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
    load_config(options, fallbacks={"MODEL_DIR": "''"})
    sampling = translate.make_sampling(
        num_samples=options.num_samples,
        beam_size=options.beam_size,
        beam_alpha=options.beam_alpha,
        temperature=options.temperature,
        top_p=options.top_p,
        sources_per_chunk=options.sources_per_chunk,
        target_prefix=options.target_prefix,
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
    load_config(options, fallbacks=fallbacks, also=[infer.GIN])
    print(
        infer.run(
            config.build(infer.Inference),
            mode=options.mode,
            split=options.split,
            shard_id=options.shard_id,
            num_shards=options.num_shards,
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
