"""Commands that read what a run left: filter, rescore, report."""

import argparse
from typing import Any

from rest_jax.commands.options import AddCommand, add_gin_options, leave_accelerators_alone, load_config


def register(add: AddCommand) -> None:
    _add_filter_options(
        add(
            "filter", _filter, "Tell what a filter would keep of a Grow step's store. Needs no model and no TensorFlow."
        )
    )
    sub = add("rescore", _rescore, "Give a Grow step's store another reward, without drawing: a new store.")
    add_gin_options(sub)
    sub.add_argument("--store", required=True, help="directory of a finished Grow step, MODEL_DIR/grow_1")
    sub.add_argument("--output", required=True, help="directory to write; must not exist")
    sub.add_argument("--stored_only", action="store_true", help="of an added reward: leave out what Grow dropped")
    sub = add("report", _report, "Write report.html from what a run left in MODEL_DIR.")
    sub.add_argument("model_dir", metavar="MODEL_DIR")


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


def _filter(options: Any) -> None:
    # Rewards are compared on the host: an accelerator, and its memory, would be taken for nothing.
    leave_accelerators_alone()
    from rest_jax import filter_text, filters
    from rest_jax.data.store import ScoredStore

    chosen: list[filters.Filter] = [filter_text.parse_filter(text) for text in options.filter]
    chosen += [filters.Threshold(tau) for tau in options.threshold]
    chosen += [filters.Percentile(p) for p in options.percentile]
    chosen += [filters.Interpolation(gamma) for gamma in options.interpolation]
    chosen += [filters.TopK(k) for k in options.top_k]
    if options.cap is not None:
        chosen = [filters.Cap(keep, options.cap) for keep in chosen or [filters.Threshold(0.0)]]
    store = ScoredStore.open(options.store)
    print(filter_text.format_rows(filter_text.report_rows(store, chosen, stored_only=options.stored_only)))


def _rescore(options: Any) -> None:
    from rest_jax import config, rescore
    from rest_jax.data.store import ScoredStore
    from rest_jax.rest import ReST

    load_config(options)
    rest, store = config.build(ReST), ScoredStore.open(options.store)
    print(rescore.rescore(rest, store=store, output=options.output, stored_only=options.stored_only))


def _report(options: Any) -> None:
    from rest_jax.reporting.report import write_report

    print(write_report(options.model_dir))
