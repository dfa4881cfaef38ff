"""Commands that examine a reward and make its guards: audit_reward, train_language_id."""

from typing import Any

from rest_jax.commands.options import AddCommand, add_gin_options, load_config
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


def _audit_reward(options: Any) -> None:
    from pathlib import Path

    from rest_jax import audit, config
    from rest_jax.checkpoints import checkpointer
    from rest_jax.data.lines import read_lines
    from rest_jax.reporting.audit_table import format_audit
    from rest_jax.rest import ReST, write_json
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
            model_dir=Path(rest.model_dir),
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
        write_json(Path(options.output).expanduser(), result)
