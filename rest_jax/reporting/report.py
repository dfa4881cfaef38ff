"""report.html: one file without outside links that shows what a run gained, built from the files of MODEL_DIR alone."""

import difflib
import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rest_jax import paths
from rest_jax.evaluation.metrics import LABELS
from rest_jax.reporting import plots
from rest_jax.reporting.audit_table import audit_rows, describe_audit
from rest_jax.reporting.progress import format_duration
from rest_jax.reporting.report_style import CSS
from rest_jax.reporting.run_files import CONTROL, Run, Translation, final_policy, is_grow, phase_label, read_run
from rest_jax.reporting.table import phase_rows, show_signed

FILE_NAME = "report.html"
_NUM_EXAMPLES = 12


def write_report(model_dir: str | Path) -> Path:
    """Writes MODEL_DIR/report.html, also of a run that is not finished: what is not there yet is left out.

    Returns:
      Its path.

    Raises:
      UserError: there is no summary yet, or a file is damaged; names the file.
    """
    run = read_run(model_dir)
    path = run.directory / FILE_NAME
    paths.write_text(path, render(run))
    return path


def render(run: Run) -> str:
    """The page."""
    title = f"ReST · {run.directory.resolve().name}"
    sections = [
        _header(run, title),
        _tiles(run),
        _alarms(run),
        _warnings(run),
        _phase_table(run),
        _plots(run),
        _grow_table(run),
        _threshold_table(run),
        _examples(run),
        _comparisons(run),
        _audit(run),
        _setup(run),
        _configuration(run),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


def choose_examples(base: Mapping[int, Translation], final: Mapping[int, Translation], *, count: int) -> list[int]:
    """Source ids whose outputs differ, at even steps from the largest gain in reward to the largest loss.

    Even steps rather than the best ones: a reader should see what a typical change is, and what the worst one is.
    """
    changed = [i for i in base if i in final and base[i].hypothesis != final[i].hypothesis]
    ranked = sorted(changed, key=lambda i: (base[i].reward - final[i].reward, i))
    if len(ranked) <= count:
        return ranked
    return [ranked[round(k * (len(ranked) - 1) / (count - 1))] for k in range(count)]


def mark_changes(before: str, after: str) -> str:
    """`after` as HTML, with the words that are not in `before` at that place marked."""
    old, new = (re.findall(r"\w+|\s+|[^\w\s]", text) for text in (before, after))
    pieces = []
    for kind, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        text = _text("".join(new[start:end]))
        pieces.append(f"<mark>{text}</mark>" if kind in ("replace", "insert") and text.strip() else text)
    return "".join(pieces)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _element(tag: str, body: str, *, css: str = "") -> str:
    return f'<{tag} class="{css}">{body}</{tag}>' if css else f"<{tag}>{body}</{tag}>"


def _card(title: str, body: str, *, note: str = "") -> str:
    remark = f'<p class="note">{_text(note)}</p>' if note else ""
    return f'<section class="card"><h2>{_text(title)}</h2>{remark}{body}</section>'


def _table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    row_classes: Sequence[str] = (),
) -> str:
    """A table of cells that are HTML already; the first `left` columns are words, the others numbers."""

    def line(row: Sequence[str], *, tag: str, row_class: str) -> str:
        cells = (_element(tag, cell, css="" if i < left else "number") for i, cell in enumerate(row))
        return _element("tr", "".join(cells), css=row_class)

    head = line([_text(heading) for heading in headings], tag="th", row_class="")
    classes = row_classes or [""] * len(rows)
    body = "".join(line(row, tag="td", row_class=c) for row, c in zip(rows, classes, strict=True))
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _header(run: Run, title: str) -> str:
    facts = [run.summary["task"]] if run.summary.get("task") else []
    grows = sum(is_grow(phase["name"]) for phase in run.phases)
    improves = sum(phase["name"].startswith("improve_") for phase in run.phases)
    facts.append(f"{grows} Grow and {improves} Improve steps")
    if run.summary.get("parameters"):
        facts.append(f"{run.summary['parameters'] / 1e6:.1f} M parameters")
    facts.append(f"{format_duration(sum(phase.get('seconds') or 0 for phase in run.phases))} in all")
    if run.run.get("start"):
        facts.append(f"started {run.run['start']}")
    if run.run.get("hostname"):
        facts.append(f"on {run.run['hostname']}")
    return f'<header><h1>{_text(title)}</h1><p class="muted">{_text(" · ".join(facts))}</p></header>'


def _find(phases: Sequence[Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    return next((phase for phase in phases if phase["name"] == name), {})


def _comparison(run: Run, a: str, b: str, metric: str) -> Mapping[str, Any] | None:
    return next(
        (c for c in run.summary.get("comparisons") or () if (c["a"], c["b"], c["metric"]) == (a, b, metric)), None
    )


def _kind(comparison: Mapping[str, Any] | None) -> str:
    """The colour of a difference: none where its interval holds zero, or there is none."""
    if comparison is None:
        return ""
    return "good" if comparison["low"] > 0 else "bad" if comparison["high"] < 0 else ""


def _tiles(run: Run) -> str:
    """What the last Improve step has over BC, and over the control, per measure."""
    final = final_policy(run.phases)
    if final is None:
        return ""
    base, last, control = (_find(run.phases, name) for name in ("bc", final, CONTROL))
    tiles = []
    for key, label, digits in (
        ("reward", "mean reward on D_eval", 4),
        ("bleu", "test BLEU", 2),
        ("chrf", "test chrF", 2),
    ):
        if base.get(key) is None or last.get(key) is None:
            continue
        details = []
        for name, other in (("bc", base), (CONTROL, control)):
            if other.get(key) is None:
                continue
            difference = last[key] - other[key]
            comparison = _comparison(run, final, name, key)
            interval = (
                f" [{show_signed(comparison['low'], key)}, {show_signed(comparison['high'], key)}]"
                if comparison
                else ""
            )
            details.append(
                f'<div class="tile-detail"><span class="{_kind(comparison)}">{show_signed(difference, key)}</span>'
                f"{interval} over {_text(phase_label(name))}</div>"
            )
        before, after = f"{base[key]:.{digits}f}", f"{last[key]:.{digits}f}"
        tiles.append(
            f'<div class="card"><div class="tile-name">{_text(label)}</div>'
            f'<div class="tile-value"><span class="tile-from">{before} → </span>{after}</div>{"".join(details)}</div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def warnings(run: Run) -> list[str]:
    """What a reader must know before believing the gain: a reward that rose alone, or that longer training explains."""
    final = final_policy(run.phases)
    if final is None:
        return []
    base, last, control = (_find(run.phases, name) for name in ("bc", final, CONTROL))
    found = []
    if base.get("reward") is not None and last.get("reward") is not None and last["reward"] > base["reward"]:
        fallen = [
            f"{label} fell from {base[key]:.2f} to {last[key]:.2f}"
            for key, label in (("bleu", "BLEU"), ("chrf", "chrF"))
            # By more than chance: the interval of the difference leaves out zero.
            if (comparison := _comparison(run, final, "bc", key)) is not None and comparison["high"] < 0
        ]
        if fallen:
            found.append(
                f"The reward rose while test {' and '.join(fallen)}: look for outputs that please the reward "
                "without being better translations."
            )
    if control.get("reward") is None:
        found.append(
            "There is no result of bc_long: without that control a gain may only be what longer training gives."
        )
    elif last.get("reward") is not None:
        comparison = _comparison(run, final, CONTROL, "reward")
        if last["reward"] <= control["reward"]:
            found.append(
                f"The final policy's reward {last['reward']:.4f} is not above that of bc_long, "
                f"{control['reward']:.4f}: longer training on D does as well."
            )
        elif comparison is not None and comparison["low"] <= 0:
            found.append("The interval of the reward's gain over bc_long holds zero: the gain may be chance.")
    return found


def _alarms(run: Run) -> str:
    alarms = run.summary.get("alarms") or ()
    return "".join(f'<section class="card alarm" role="alert">{_text(alarm["text"])}</section>' for alarm in alarms)


def _warnings(run: Run) -> str:
    return "".join(f'<section class="card warning">{_text(text)}</section>' for text in warnings(run))


def _listed(names: Sequence[str]) -> str:
    """`BLEU is`, or `BLEU and TER are`."""
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _phase_table(run: Run) -> str:
    headings, rows = phase_rows(run.phases)
    final = final_policy(run.phases)
    classes = ["final" if row[0] == final else "grow" if is_grow(row[0]) else "" for row in rows]
    note = (
        "Reward: mean over sampled translations of the sources of D_eval. BLEU, chrF and TER: sacreBLEU on the test "
        "split. bc_long: BC continued for as many gradient steps as all Improve steps together."
    )
    held_out = run.summary.get("held_out_metrics")
    if held_out:
        note += (
            f" {_listed([LABELS[name] for name in held_out])} no part of the reward: an alarm is raised when the "
            "reward rises over an Improve step and one of them gets worse beyond its 95 % interval."
        )
    return _card(
        "Phases", _table(headings, [[_text(cell) for cell in row] for row in rows], row_classes=classes), note=note
    )


def _plot(title: str, note: str, draw: plots.Draw) -> str:
    light, dark = (plots.data_uri(draw(theme)) for theme in (plots.LIGHT, plots.DARK))
    picture = (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{_text(title)}: {_text(note)}"></picture>'
    )
    return _card(title, picture, note=note)


def _plots(run: Run) -> str:
    drawn = []
    if any(policy.get("reward") is not None for policy in run.policies):
        drawn.append(
            _plot(
                "Reward by phase",
                "Mean reward of samples on D_eval; bars are 95 % intervals over sources, the dashed line is BC long.",
                plots.reward_by_phase(run.policies, run.sample_rewards),
            )
        )
    if sum(p.get("reward") is not None and (p.get("bleu") or p.get("chrf")) is not None for p in run.policies) > 1:
        drawn.append(
            _plot(
                "BLEU and chrF against reward",
                "Test scores should rise with the reward; a reward that rises alone is being hacked.",
                plots.metrics_against_reward(run.policies),
            )
        )
    histograms = {step: stats for step, stats in run.grows.items() if stats.get("histogram") and "mean" in stats}
    if histograms:
        drawn.append(
            _plot(
                "Rewards of the samples of each Grow step",
                "All samples, kept or not. Dashed: τ of each Improve step; dotted: where its filter looks at "
                "each source by itself and so has no τ, the mean reward of what it keeps.",
                plots.reward_histograms(histograms),
            )
        )
    shares = {step: stats for step, stats in run.grows.items() if stats.get("kept_by_threshold") and stats.get("count")}
    if shares:
        drawn.append(
            _plot(
                "Share kept by threshold",
                "Samples with a reward above τ, of all. Points and legend: what each Improve step's filter keeps.",
                plots.kept_share(shares),
            )
        )
    if run.sample_rewards:
        drawn.append(
            _plot(
                "Best of n",
                "Expected reward of the best of n samples on D_eval (all subsets, unbiased).",
                plots.best_of_n(run.sample_rewards),
            )
        )
    curves = plots.training_curves(run.metrics)
    if curves is not None:
        drawn.append(_plot("Training", "Loss of each training phase, and its measurements on D_eval.", curves))
    if any(phase.get("seconds") for phase in run.phases):
        drawn.append(_plot("Time by phase", "Wall-clock time, with compilation.", plots.time_by_phase(run.phases)))
    return f'<div class="plots">{"".join(drawn)}</div>' if drawn else ""


def _share(part: Any, whole: Any) -> str:
    return f"{100 * part / whole:.1f} %" if part is not None and whole else "-"


def _number(value: Any, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _grow_table(run: Run) -> str:
    if not run.grows:
        return ""
    headings = ["Grow", "sources", "samples", "distinct", "kept", "mean reward", "std. deviation", "mean of references"]
    headings += ["tokens per sample", "reached EOS", "sources without variance"]
    rows = []
    for step, stats in sorted(run.grows.items()):
        count, variance = stats.get("count"), stats.get("variance")
        zero = stats.get("zero_variance_sources")
        rows.append(
            [
                str(step),
                _number(stats.get("sources"), 0),
                _number(count, 0),
                _share(stats.get("distinct"), count),
                _share(stats.get("kept"), count),
                _number(stats.get("mean"), 4),
                "-" if variance is None else f"{variance**0.5:.4f}",
                _number(stats.get("reference_mean"), 4),
                _number(stats.get("mean_length"), 1),
                _share(stats.get("hit_eos"), 1),
                _share(zero, 1),
            ]
        )
    note = "Distinct and kept in percent of all samples. Sources without variance: all their samples score the same."
    return _card("Grow steps", _table(headings, rows), note=note)


def _threshold_table(run: Run) -> str:
    rows = []
    for step, stats in sorted(run.grows.items()):
        for threshold in stats.get("thresholds") or ():
            tau = threshold.get("tau")
            rows.append(
                [
                    f"{step}.{threshold['improve_step']}",
                    f"<code>{_text(threshold.get('description', ''))}</code>",
                    "-" if tau is None else f"{tau:.4f}",
                    _number(threshold.get("pairs"), 0),
                    _share(threshold.get("pairs"), stats.get("count")),
                    _number(threshold.get("sources"), 0),
                    _number(threshold.get("mean_reward"), 4),
                    _number(threshold.get("references"), 0),
                    "-" if threshold.get("learning_rate") is None else f"{threshold['learning_rate']:.2g}",
                ]
            )
    if not rows:
        return ""
    headings = ["Improve", "filter", "τ", "samples kept", "of all", "their sources", "their mean reward"]
    headings += ["references mixed in", "learning rate"]
    note = "Samples of the Grow step that pass the Improve step's filter, and the pairs of D that are mixed with them."
    return _card("What each Improve step trained on", _table(headings, rows, left=2), note=note)


def _examples(run: Run) -> str:
    final = final_policy(run.phases)
    if final is None or not run.translations.get("bc") or not run.translations.get(final):
        return ""
    base, last = run.translations["bc"], run.translations[final]
    chosen = choose_examples(base, last, count=_NUM_EXAMPLES)
    changed = sum(base[i].hypothesis != last[i].hypothesis for i in base if i in last)
    rows = []
    for i in chosen:
        before, after = base[i], last[i]
        kind = "good" if after.reward > before.reward else "bad" if after.reward < before.reward else ""
        rows.append(
            [
                f'<span dir="auto">{_text(before.source)}</span>',
                f'<span dir="auto">{_text(before.reference)}</span>',
                f'<span dir="auto">{_text(before.hypothesis)}</span><span class="score">{before.reward:.3f}</span>',
                f'<span dir="auto">{mark_changes(before.hypothesis, after.hypothesis)}</span>'
                f'<span class="score">{after.reward:.3f} '
                f'<span class="{kind}">({after.reward - before.reward:+.3f})</span></span>',
            ]
        )
    note = (
        f"{changed} of {len(base)} test translations differ between BC and {phase_label(final)}. Shown: {len(chosen)} "
        "of them, at even steps from the largest gain in reward to the largest loss, so not the best ones. "
        "Marked: what changed. Under each output its reward."
    )
    headings = ["source", "reference", "BC", phase_label(final)]
    return _card("Translations", f'<div class="examples">{_table(headings, rows, left=4)}</div>', note=note)


def _comparisons(run: Run) -> str:
    comparisons = run.summary.get("comparisons") or []
    if not comparisons:
        return ""
    rows = []
    for c in comparisons:
        metric = c["metric"]
        rows.append(
            [
                _text(f"{c['a']} − {c['b']}"),
                _text(metric),
                f'<span class="{_kind(c)}">{show_signed(c["difference"], metric)}</span>',
                f"[{show_signed(c['low'], metric)}, {show_signed(c['high'], metric)}]",
                "yes" if c["low"] > 0 or c["high"] < 0 else "no",
            ]
        )
    headings = ["policies", "measure", "difference", "95 % interval", "leaves out zero"]
    note = "Paired bootstrap by source: all samples of a source are drawn together."
    return _card("Comparisons", _table(headings, rows, left=2), note=note)


def _audit(run: Run) -> str:
    if not run.audit:
        return ""
    headings, rows = audit_rows(run.audit)
    return _card(
        "Audit of the reward",
        _table(headings, [[_text(cell) for cell in row] for row in rows]),
        note=describe_audit(run.audit),
    )


def _setup(run: Run) -> str:
    def flat(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{key} {flat(item)}" for key, item in value.items())
        if isinstance(value, (list, tuple)):
            return " ".join(flat(item) for item in value)
        return str(value)

    facts: dict[str, Any] = {"command": run.run.get("argv")}
    for key in ("start", "hostname", "devices"):
        facts[key] = run.run.get(key)
    parameters = run.summary.get("parameters")
    facts["parameters"] = f"{parameters:,}" if parameters else None
    facts["mesh"] = run.summary.get("mesh")
    facts["configuration"] = f"sha256 {run.summary['config_sha256']}" if run.summary.get("config_sha256") else None
    for name, signature in (run.summary.get("signatures") or {}).items():
        facts[name] = signature
    for name, version in (run.summary.get("versions") or run.run.get("versions") or {}).items():
        facts[f"{name} version"] = version
    items = "".join(
        f"<dt>{_text(name)}</dt><dd><code>{_text(flat(value))}</code></dd>" for name, value in facts.items() if value
    )
    return _card("How it was made", f"<dl>{items}</dl>") if items else ""


def _configuration(run: Run) -> str:
    if not run.config:
        return ""
    return (
        '<section class="card"><details><summary>Configuration as it was used</summary>'
        f"<pre>{_text(run.config)}</pre></details></section>"
    )
