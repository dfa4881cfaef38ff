"""Filters as text, for the `filter` command: what `filters.describe` writes, read back; and a table of what passes."""

import ast
import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rest_jax import filters
from rest_jax.data.store import ScoredStore, filter_report
from rest_jax.errors import UserError

FILTERS = (
    filters.Threshold,
    filters.Percentile,
    filters.Interpolation,
    filters.TopK,
    filters.Cap,
    filters.AllOf,
)


def _snake(kind: type) -> str:
    """`TopK` -> `top_k`, as `filters.describe` writes it."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()


_BY_NAME: Mapping[str, Any] = {name: kind for kind in FILTERS for name in (kind.__name__, _snake(kind))}
COLUMNS = ("filter", "pairs", "sources", "tokens", "mean reward", "kept")


def parse_filter(text: str) -> filters.Filter:
    """`cap(threshold(0.5), k=3)`, `Cap(Threshold(tau=0.5), 3)` or `all_of(top_k(4), threshold(0.2))` -> the filter.

    Raises:
      UserError: it is no such expression; names the part.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise UserError(f"--filter {text!r}: not an expression ({error.msg}). Write e.g. {_EXAMPLE}.") from error
    result = _evaluate(tree, text)
    if not callable(result):
        raise UserError(f"--filter {text!r}: a number is no filter. Write e.g. {_EXAMPLE}.")
    return result


_EXAMPLE = "'threshold(0.5)' or 'cap(percentile(75), k=3)'"


def _evaluate(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        kind = _BY_NAME.get(node.func.id)
        if kind is None:
            names = sorted(_snake(kind) for kind in FILTERS)
            close = difflib.get_close_matches(node.func.id.lower(), names, n=1)
            also = f" Did you mean {close[0]}?" if close else ""
            raise UserError(f"--filter {text!r}: no filter {node.func.id!r};{also} there are {', '.join(names)}.")
        values = [_evaluate(argument, text) for argument in node.args]
        named = {keyword.arg: _evaluate(keyword.value, text) for keyword in node.keywords if keyword.arg}
        if kind is filters.AllOf and not named:
            values = [tuple(values)]
        try:
            return kind(*values, **named)
        except TypeError as error:
            fields = ", ".join(field.name for field in dataclasses.fields(kind))
            raise UserError(f"--filter {text!r}: {node.func.id} takes ({fields}): {error}.") from error
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise UserError(
            f"--filter {text!r}: {ast.unparse(node)!r} is neither a number nor a filter. Write e.g. {_EXAMPLE}."
        ) from error


def report_rows(
    store: ScoredStore, chosen: Sequence[filters.Filter], *, stored_only: bool = False
) -> list[dict[str, Any]]:
    """`filter_report` of each filter, with its description.

    Args:
      store: the Grow step's.
      chosen: filters; without any, one row for all that is stored.
      stored_only: leave out samples whose tokens Grow did not store, instead of refusing the filter.
    """
    if not chosen:
        return [{"filter": "all stored", **filter_report(store, store.stored)}]
    rows = []
    for keep_filter in chosen:
        keep = np.asarray(keep_filter(store.rewards, store.valid))
        report = filter_report(store, keep & store.stored if stored_only else keep)
        rows.append({"filter": filters.describe(keep_filter), **report})
    return rows


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with one line a filter."""
    cells = [COLUMNS] + [
        (
            str(row["filter"]),
            f"{row['pairs']:,}",
            f"{row['sources']:,}",
            f"{row['tokens']:,}",
            f"{row['mean_reward']:.4f}" if row["pairs"] else "-",
            f"{row['kept_share']:.2%}",
        )
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in cells
    )
