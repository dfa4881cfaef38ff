"""The table of an audit (`rest_jax.audit`), for a terminal and for the report."""

from collections.abc import Mapping
from typing import Any


def format_audit(result: Mapping[str, Any]) -> str:
    """The table that is printed."""
    headings, rows = audit_rows(result)
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in (headings, *rows)
    ]
    return "\n".join([describe_audit(result), "", *lines])


def describe_audit(result: Mapping[str, Any]) -> str:
    """What the table is of, in words."""
    guards = ", ".join(result["guards"])
    own = "its own" if result["guards_in_reward"] else "which it does not have"
    return (
        f"Audit of {result['reward']}: {result['pairs']} pairs; how often it gives a higher reward to a variant that "
        f"was made bad on purpose than to the {result['base']} that the variant was made of, with 95 % intervals. "
        f"Equal: the same reward. Guards ({own}): {guards}; they refuse {100 * result['base_refused']:.1f} % of the "
        f"{result['base']}s themselves."
    )


def audit_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings, and a row for each kind of variant, as text."""
    rows = []
    for kind, variant in result["variants"].items():
        cells = [kind.replace("_", " "), str(variant["pairs"])]
        for name in ("without_guards", "with_guards"):
            found = variant[name]
            cells += (
                ["-", "-"]
                if found is None
                else [
                    f"{100 * found['preferred']:.1f} % [{100 * found['low']:.1f}, {100 * found['high']:.1f}]",
                    f"{100 * found['equal']:.1f} %",
                ]
            )
        rows.append(cells)
    return ["variant", "pairs", "preferred", "equal", "with guards", "equal"], rows
