"""The table that a run prints last: the numbers of summary.json, unrounded beyond what is shown."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rest_jax.reporting.progress import format_duration

Cell = Callable[[Any], str]


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the phase table: the key in a phase, the heading, how a value is shown."""

    key: str
    heading: str
    show: Cell


def _fixed(digits: int) -> Cell:
    return lambda value: f"{float(value):.{digits}f}"


def _count(value: Any) -> str:
    # Zero is what a phase that samples nothing carries: a dash says so better.
    return f"{int(value):,}" if value else ""


COLUMNS = (
    Column("reward", "reward", _fixed(4)),
    Column("bleu", "BLEU", _fixed(2)),
    Column("chrf", "chrF", _fixed(2)),
    Column("ter", "TER", _fixed(2)),
    Column("steps", "steps", _count),
    Column("samples", "samples", _count),
    Column("distinct", "distinct", _count),
    Column("kept", "kept", _count),
    Column("seconds", "time", lambda value: format_duration(float(value))),
)


def phase_rows(phases: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The phase table as text.

    Args:
      phases: `summary.json`'s.

    Returns:
      Headings, and one row per phase; columns in which no phase has a value are left out, a missing value is `-`.
    """
    cells = [
        ["" if phase.get(column.key) is None else column.show(phase[column.key]) for phase in phases]
        for column in COLUMNS
    ]
    shown = [i for i, column in enumerate(cells) if any(column)]
    headings = ["phase", *(COLUMNS[i].heading for i in shown)]
    return headings, [[phase["name"], *(cells[i][row] or "-" for i in shown)] for row, phase in enumerate(phases)]


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """`improve_2.2 - bc_long  reward +0.0123 [+0.0101, +0.0145]`, and whether zero lies outside."""
    low, high = comparison["low"], comparison["high"]
    verdict = "significant" if low > 0 or high < 0 else "not significant"
    return (
        f"{comparison['a']} - {comparison['b']}: {comparison['metric']} {show_difference(comparison)} "
        f"[{show_signed(low, comparison['metric'])}, {show_signed(high, comparison['metric'])}] ({verdict})"
    )


def show_difference(comparison: Mapping[str, Any]) -> str:
    """A comparison's difference with its sign."""
    return show_signed(comparison["difference"], comparison["metric"])


def show_signed(value: float, metric: str) -> str:
    """A difference with its sign and the decimals of its metric's column."""
    return f"{value:+.4f}" if metric == "reward" else f"{value:+.2f}"


def format_table(summary: Mapping[str, Any]) -> str:
    """The summary for a terminal: a row per phase, alarms, comparisons with their 95 % intervals, signatures."""
    headings, rows = phase_rows(summary["phases"])
    widths = [max(len(row[i]) for row in [headings, *rows]) for i in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        # Names to the left, numbers to the right.
        return "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])

    lines = [line(headings), "  ".join("-" * width for width in widths), *map(line, rows)]
    for alarm in summary.get("alarms") or []:
        lines += ["", alarm["text"]]
    comparisons = summary.get("comparisons") or []
    if comparisons:
        lines += ["", "95 % interval, paired bootstrap by source:", *(f"  {comparison_text(c)}" for c in comparisons)]
    signatures = summary.get("signatures") or {}
    if signatures:
        lines += ["", *(f"{name}: {signature}" for name, signature in signatures.items())]
    return "\n".join(lines)
