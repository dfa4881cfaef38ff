"""The report's figures: data in, matplotlib figure out, in a light and a dark theme."""

import base64
import dataclasses
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from rest_jax.evaluation.best_of_n import best_of_n_curve
from rest_jax.evaluation.significance import paired_bootstrap
from rest_jax.reporting.progress import format_duration
from rest_jax.reporting.run_files import CONTROL, is_grow, phase_label

# Inches: small, so that text is readable where the page shows a plot at half its width.
_WIDTH = 5.4
_DPI = 180


@dataclasses.dataclass(frozen=True, kw_only=True)
class Theme:
    """Colours of one appearance.

    Attributes:
      background: of the card that a plot stands on.
      ink, muted, grid: text, secondary text, lines.
      base: BC. control: BC long. ramp: from the first Improve step to the last. grows: Grow steps, in turn.
    """

    background: str
    ink: str
    muted: str
    grid: str
    base: str
    control: str
    ramp: tuple[str, str]
    grows: tuple[str, ...]


LIGHT = Theme(
    background="#ffffff",
    ink="#1f2328",
    muted="#656d76",
    grid="#e4e7eb",
    base="#6e7781",
    control="#c2560c",
    ramp=("#8fbcf0", "#0b4fa8"),
    grows=("#1a7f6b", "#7a4bc4", "#b58900", "#b3366b"),
)
DARK = Theme(
    background="#161b22",
    ink="#e6edf3",
    muted="#9198a1",
    grid="#2d333b",
    base="#a0a8b2",
    control="#f0883e",
    ramp=("#2f5f9e", "#8cc4ff"),
    grows=("#3fc1a6", "#b392f0", "#e3b341", "#f778ba"),
)

Draw = Callable[[Theme], Figure]


def data_uri(figure: Figure) -> str:
    """The figure as a PNG inside a `data:` address."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    # The software's name would be the only thing in the file that differs between two reports of one run.
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def phase_colors(names: Sequence[str], theme: Theme) -> dict[str, str | tuple[float, ...]]:
    """A colour per policy: grey for BC, orange for the control, a ramp over the Improve steps in order."""
    improves = [name for name in names if name.startswith("improve_")]
    ramp = LinearSegmentedColormap.from_list("improve", theme.ramp)
    colors: dict[str, str | tuple[float, ...]] = dict.fromkeys(names, theme.base)
    if CONTROL in colors:
        colors[CONTROL] = theme.control
    for i, name in enumerate(improves):
        colors[name] = ramp(i / (len(improves) - 1) if len(improves) > 1 else 1.0)
    return colors


def reward_by_phase(
    policies: Sequence[Mapping[str, Any]], sample_rewards: Mapping[str, npt.NDArray[np.float64]]
) -> Draw:
    """Mean reward on D_eval of each policy, with the 95 % interval over sources where its samples are at hand."""
    shown = [phase for phase in policies if phase.get("reward") is not None]
    names = [phase["name"] for phase in shown]
    means = [float(phase["reward"]) for phase in shown]
    intervals = {
        name: interval for name in names if name in sample_rewards and (interval := _interval(sample_rewards[name]))
    }

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = _figure(theme, size=(_WIDTH, 3.6))
        colors = phase_colors(names, theme)
        if CONTROL in names:
            # The bar to clear: a gain below it may only be longer training.
            axes.axhline(means[names.index(CONTROL)], color=theme.control, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        path = [i for i, name in enumerate(names) if name != CONTROL]
        axes.plot(path, [means[i] for i in path], color=theme.muted, alpha=0.45, linewidth=1.6, zorder=1)
        for i, (name, mean) in enumerate(zip(names, means, strict=True)):
            low, high = intervals.get(name, (mean, mean))
            axes.errorbar(
                i,
                mean,
                yerr=[[max(mean - low, 0)], [max(high - mean, 0)]],
                fmt="D" if name == CONTROL else "o",
                markersize=7,
                color=colors[name],
                elinewidth=1.6,
                capsize=4,
                zorder=3,
            )
            axes.annotate(
                f"{mean:.4f}",
                (i, high),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                color=theme.ink,
                fontsize=8.5,
            )
        axes.set_xticks(range(len(names)), [phase_label(name) for name in names])
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.margins(y=0.18)
        axes.set_ylabel("mean reward on D_eval")
        return figure

    return draw


def reward_histograms(grows: Mapping[int, Mapping[str, Any]]) -> Draw:
    """Rewards of all samples of each Grow step, with the thresholds of its Improve steps."""

    def draw(theme: Theme) -> Figure:
        columns = min(len(grows), 2)
        rows = math.ceil(len(grows) / columns)
        figure, all_axes = _figure(theme, size=(_WIDTH, 2.6 * rows + 0.3), rows=rows, columns=columns, share=True)
        for (step, stats), axes, color in zip(sorted(grows.items()), all_axes, _cycle(theme.grows), strict=False):
            counts = np.asarray(stats["histogram"], np.float64)
            edges = np.linspace(0.0, 1.0, counts.size + 1)
            share = 100.0 * counts / max(counts.sum(), 1.0)
            axes.stairs(share, edges, fill=True, color=color, alpha=0.35)
            axes.stairs(share, edges, color=color, linewidth=1.2)
            top = max(float(share.max()), 1e-9)
            axes.axvline(stats["mean"], color=theme.ink, linewidth=1.2, label=f"mean {stats['mean']:.3f}")
            for x, text, style in _threshold_lines(stats):
                axes.axvline(x, color=theme.control, linewidth=1.2, linestyle=style, label=text)
            axes.set_ylim(0, 1.6 * top)  # Head room, so that the legend stands above the bars.
            axes.legend(loc="upper left", frameon=False, fontsize=8, labelcolor=theme.ink, handlelength=1.6)
            # The tails of a reward are long and empty; nothing is cut that holds more than one sample in a thousand.
            occupied = np.flatnonzero(share >= 0.1)
            last = edges[occupied[-1] + 1] if occupied.size else 1.0
            axes.set_xlim(0, min(1.0, max([last, *(x for x, _, _ in _threshold_lines(stats))]) + 0.06))
            axes.set_title(f"Grow {step}", color=theme.ink, fontsize=10, loc="left")
            axes.set_xlabel("reward")
        all_axes[0].set_ylabel("% of samples per bin of 0.01")
        for axes in all_axes[len(grows) :]:
            axes.set_visible(False)
        return figure

    return draw


def kept_share(grows: Mapping[int, Mapping[str, Any]]) -> Draw:
    """Which share of a Grow step's samples lies above each threshold, and the thresholds that were used."""

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = _figure(theme, size=(_WIDTH, 3.4))
        for (step, stats), color in zip(sorted(grows.items()), _cycle(theme.grows), strict=False):
            share = 100.0 * np.asarray(stats["kept_by_threshold"], np.float64) / max(stats["count"], 1)
            taus = np.linspace(0.0, 1.0, share.size)
            axes.plot(taus, share, color=color, linewidth=1.8)
            used = [(t, float(np.interp(t["tau"], taus, share))) for t in _with_tau(stats)]
            axes.plot([t["tau"] for t, _ in used], [value for _, value in used], "o", color=color, markersize=6)
            labels = [f"τ{t['improve_step']} {value:.1f} %" for t, value in used]
            labels += [
                f"I{t['improve_step']} {100 * t['pairs'] / stats['count']:.1f} %"
                for t in stats.get("thresholds", ())
                if t.get("tau") is None and t.get("pairs") is not None
            ]
            label = f"Grow {step}: {', '.join(labels)}" if labels else f"Grow {step}"
            axes.plot([], [], color=color, marker="o" if used else None, label=label)
        axes.set_xlabel("threshold τ")
        axes.set_ylabel("% of samples with reward > τ")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 104)
        _legend(axes, theme)
        return figure

    return draw


def metrics_against_reward(policies: Sequence[Mapping[str, Any]]) -> Draw:
    """Test BLEU and chrF against the reward that was optimised: they should rise together."""

    def draw(theme: Theme) -> Figure:
        figure, panels = _figure(theme, size=(_WIDTH, 3.2), columns=2)
        names = [phase["name"] for phase in policies]
        colors = phase_colors(names, theme)
        for axes, (key, label) in zip(panels, (("bleu", "BLEU"), ("chrf", "chrF")), strict=True):
            points = {
                phase["name"]: (phase["reward"], phase[key])
                for phase in policies
                if phase.get("reward") is not None and phase.get(key) is not None
            }
            path = [point for name, point in points.items() if name != CONTROL]
            axes.plot(*zip(*path, strict=True), color=theme.muted, alpha=0.45, linewidth=1.6, zorder=1)
            for name, (x, y) in points.items():
                axes.plot(x, y, "D" if name == CONTROL else "o", color=colors[name], markersize=7, zorder=3)
            _label_points(axes, points, theme)
            axes.margins(x=0.24, y=0.18)
            axes.set_xlabel("mean reward on D_eval")
            axes.set_title(f"test {label}", color=theme.ink, fontsize=10, loc="left")
            axes.locator_params(axis="x", nbins=4)
        return figure

    return draw


def best_of_n(sample_rewards: Mapping[str, npt.NDArray[np.float64]]) -> Draw:
    """The expected reward of the best of n samples, for each policy."""
    curves = {name: best_of_n_curve(rewards) for name, rewards in sample_rewards.items()}

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = _figure(theme, size=(_WIDTH, 3.6))
        colors = phase_colors(list(curves), theme)
        for name, curve in curves.items():
            n = np.arange(1, curve.size + 1)
            axes.plot(
                n,
                curve,
                color=colors[name],
                linewidth=1.8,
                linestyle=(0, (4, 2)) if name == CONTROL else "-",
                marker="o" if curve.size <= 32 else None,
                markersize=3,
                label=phase_label(name),
            )
        longest = max(curve.size for curve in curves.values())
        axes.set_xscale("log", base=2)
        ticks = [2**k for k in range(int(math.log2(longest)) + 1)]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("samples drawn per source, n")
        axes.set_ylabel("expected best reward of n")
        _legend(axes, theme)
        return figure

    return draw


def training_curves(metrics: Sequence[Mapping[str, Any]]) -> Draw | None:
    """Training loss, and mean reward on D_eval while training; None when no phase logged a loss."""
    losses = _series(metrics, "loss")
    rewards = _series(metrics, "eval/reward")
    if not losses:
        return None

    def draw(theme: Theme) -> Figure:
        panels = [(losses, "loss per target token")]
        panels += [(rewards, "reward on D_eval")] if rewards else []
        figure, all_axes = _figure(theme, size=(_WIDTH, 3.2), columns=len(panels))
        # One colour per phase in both panels, also where a phase has logged only one of the two.
        colors = phase_colors(list(dict.fromkeys(line["phase"] for line in metrics)), theme)
        for axes, (series, title) in zip(all_axes, panels, strict=True):
            for name, (steps, values) in series.items():
                style = (0, (4, 2)) if name == CONTROL else "-"
                marker = "o" if len(steps) <= 12 else None
                axes.plot(
                    steps,
                    values,
                    color=colors[name],
                    linewidth=1.5,
                    linestyle=style,
                    marker=marker,
                    markersize=3.5,
                    label=phase_label(name),
                )
            axes.set_title(title, color=theme.ink, fontsize=10, loc="left")
            axes.set_xlabel("step of the phase")
        _legend(all_axes[0], theme)
        return figure

    return draw


def time_by_phase(phases: Sequence[Mapping[str, Any]]) -> Draw:
    """Seconds of each phase, training and sampling apart."""
    timed = [phase for phase in phases if phase.get("seconds")]

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = _figure(theme, size=(_WIDTH, 0.34 * len(timed) + 0.9))
        colors = phase_colors([phase["name"] for phase in timed], theme)
        for row, phase in enumerate(timed):
            color = theme.grows[0] if is_grow(phase["name"]) else colors[phase["name"]]
            axes.barh(row, phase["seconds"], color=color, height=0.62)
            axes.annotate(
                format_duration(phase["seconds"]),
                (phase["seconds"], row),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                color=theme.ink,
                fontsize=8.5,
            )
        axes.set_yticks(range(len(timed)), [phase_label(phase["name"]) for phase in timed])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.14 * max(phase["seconds"] for phase in timed))
        axes.set_xlabel("seconds, with its evaluation")
        return figure

    return draw


def _figure(
    theme: Theme, *, size: tuple[float, float], rows: int = 1, columns: int = 1, share: bool = False
) -> tuple[Figure, list[Axes]]:
    """An empty figure of `size` inches in the theme's colours, and its axes row by row."""
    figure = Figure(figsize=size, layout="constrained", facecolor=theme.background)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    for axes in grid.flat:
        axes.set_facecolor(theme.background)
        axes.grid(visible=True, color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=theme.muted, labelsize=8.5, length=0)
        axes.xaxis.label.set(color=theme.muted, fontsize=9)
        axes.yaxis.label.set(color=theme.muted, fontsize=9)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(theme.grid)
    return figure, list(grid.flat)


def _legend(axes: Axes, theme: Theme) -> None:
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=8.5)


def _label_points(axes: Axes, points: Mapping[str, tuple[float, float]], theme: Theme) -> None:
    """Names beside points. BC and its control lie close: one to the left, one to the right; the others take turns."""
    sides = {"left": ((-8, 0), "right", "center"), "right": ((8, 0), "left", "center")}
    sides |= {"above": ((-5, 5), "right", "bottom"), "below": ((5, -5), "left", "top")}
    turns = 0
    for name, point in sorted(points.items(), key=lambda item: item[1][0]):
        side = {"bc": "left", CONTROL: "right"}.get(name)
        if side is None:
            side = ("above", "below")[turns % 2]
            turns += 1
        offset, horizontal, vertical = sides[side]
        axes.annotate(
            phase_label(name),
            point,
            xytext=offset,
            textcoords="offset points",
            ha=horizontal,
            va=vertical,
            color=theme.ink,
            fontsize=8,
        )


def _threshold_lines(stats: Mapping[str, Any]) -> list[tuple[float, str, Any]]:
    """(reward, label, line style) of each Improve step: its τ dashed, else the mean of what it keeps, dotted.

    Gaps grow with the step, so that the legend tells steps apart.
    """
    lines: list[tuple[float, str, Any]] = []
    for number, threshold in enumerate(stats.get("thresholds", ())):
        step = threshold["improve_step"]
        if threshold.get("tau") is not None:
            lines.append((threshold["tau"], f"τ{step} = {threshold['tau']:.3f}", (0, (4, 1 + number))))
        elif threshold.get("mean_reward") is not None:
            lines.append(
                (threshold["mean_reward"], f"I{step} keeps {threshold['mean_reward']:.3f}", (0, (1, 1 + number)))
            )
    return lines


def _with_tau(stats: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The Improve steps whose filter is one global threshold; the per-source filters have none to draw."""
    return [threshold for threshold in stats.get("thresholds", ()) if threshold.get("tau") is not None]


def _cycle(colors: Sequence[str]) -> list[str]:
    return list(colors) * 25


def _interval(rewards: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % bootstrap interval over sources of the mean reward."""
    per_source = rewards.mean(axis=1)
    result = paired_bootstrap(per_source, np.zeros_like(per_source))
    return result.low, result.high


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> dict[str, tuple[list[int], list[float]]]:
    series: dict[str, tuple[list[int], list[float]]] = {}
    for line in metrics:
        if line.get(key) is not None:
            steps, values = series.setdefault(line["phase"], ([], []))
            steps.append(int(line["step"]))
            values.append(float(line[key]))
    return series
