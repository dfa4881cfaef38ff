"""Commands that examine a reward and make its guards: audit_reward, train_language_id."""

from typing import Any

from rest_jax import paths
from rest_jax.commands.options import AddCommand, add_gin_options, leave_accelerators_alone, load_config
from rest_jax.errors import UserError


def register(add: AddCommand) -> None:
    sub = add("audit_reward", _audit_reward, "Tell how often a reward prefers translations made bad on purpose.")
    add_gin_options(sub)
    sub.add_argument("--sources", help="UTF-8 text, a sentence a line; without it, D_eval of the configuration")
    sub.add_argument("--references", help="of --sources, line by line")
    sub.add_argument("--hypotheses", help="other translations of --sources, for a reward that reads the reference")
    sub.add_argument("--source_prefix", default="", help="that the policy's task puts before sources")
    sub.add_argument("--wrong_language", help="text in a third language; without it, other sources are the wrong one")
    sub.add_argument("--num_pairs", type=int, default=1000, help="at most so many, at random (default 1000)")
    sub.add_argument("--seed", type=int, default=0, help="of their choice and of the variants")
    sub.add_argument("--output", help="JSON file to write too")

    sub = add("train_language_id", _train_language_id, "Train the identifier of guards against the wrong language.")
    text_help = "a language's name, as in LANGUAGES, and its text: UTF-8, a sentence a line, *.gz too; at least two"
    sub.add_argument("--text", action="append", default=[], metavar="LANGUAGE=FILE", help=text_help)
    sub.add_argument("--output", required=True, help="the file to write, *.npz")
    sub.add_argument("--held_out", type=float, default=0.1, help="share of each text to measure on (default 0.1)")


def _audit_reward(options: Any) -> None:

    from rest_jax import audit, config
    from rest_jax.checkpoints import checkpointer
    from rest_jax.data.lines import read_lines
    from rest_jax.reporting.audit_table import format_audit
    from rest_jax.rest import ReST
    from rest_jax.rewards.base import check_reward
    from rest_jax.rewards.corruptions import in_language_of, other_source

    load_config(options, fallbacks={"MODEL_DIR": "''"})
    if (options.sources is None) != (options.references is None) or (options.hypotheses and options.sources is None):
        raise UserError("--sources and --references belong together, and --hypotheses to both.")
    if options.num_pairs < 1:
        raise UserError(f"--num_pairs is {options.num_pairs}; it must be at least 1.")
    rest = config.build(ReST)
    check_reward(rest.reward, has_references=True, languages=rest.languages)
    if options.sources is not None:
        pairs = audit.read_pairs(
            options.sources,
            options.references,
            options.hypotheses,
            source_prefix=options.source_prefix,
            num_pairs=options.num_pairs,
            seed=options.seed,
        )
    else:
        pairs = audit.pairs_of_run(
            rest.reward,
            eval_set=rest.data.open(rest.data.eval_split),
            model_dir=paths.resolve(rest.model_dir),
            num_pairs=options.num_pairs,
            seed=options.seed,
        )
    others = other_source if options.wrong_language is None else in_language_of(read_lines(options.wrong_language))
    result = audit.audit(
        rest.reward,
        pairs,
        params=checkpointer.put_params(rest.reward.init(rest.data.vocabulary), rest.partitioner),
        data=rest.data,
        sampling=rest.evaluation.sampling,
        partitioner=rest.partitioner,
        source_prefix=options.source_prefix,
        wrong_language=others,
        seed=options.seed,
    )
    print(format_audit(result))
    if options.output is not None:
        paths.write_json(paths.resolve(options.output), result)


def _train_language_id(options: Any) -> None:
    # Counting is done by the processor; an accelerator would be taken for nothing.
    leave_accelerators_alone()

    from rest_jax.data.lines import read_lines
    from rest_jax.rewards import language

    named = [text.partition("=") for text in options.text]
    names = [name for name, _, _ in named]
    if len(named) < 2 or len(set(names)) < len(names) or not all(name and file for name, _, file in named):
        raise UserError(f"--text is {options.text}; give it for two languages or more, like --text de=german.txt.")
    if not 0 < options.held_out < 1:
        raise UserError(f"--held_out is {options.held_out}; it must be a share between 0 and 1.")
    texts = {name: read_lines(file) for name, _, file in named}
    output = paths.resolve(options.output)
    trained, held_out = language.split(texts, held_out=options.held_out)
    identifier = language.train(trained)
    language.write(output, identifier)
    print(f"{'language':10}{'characters':>12}{'held out':>10}{'accuracy':>10}{'refused':>10}")
    for name, lengths in language.accuracy_by_length(identifier, held_out).items():
        for length, found in lengths.items():
            cells = f"{found['accuracy']:>10.2%}{found['refused']:>10.2%}"
            print(f"{name:10}{length:>12}{found['sentences']:>10}{cells}")
    print(f"Identifier: {output}")
