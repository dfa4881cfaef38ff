"""One greppable line per log period, and on a terminal a bar below it.

grow 1/2 | improve 2/3 | step 400/2000 (20.0%) | loss 2.136 | 7138 tok/s | ETA 12m03s
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

_BAR_WIDTH = 40
_SAME_MOMENT = 0.01  # seconds


def format_duration(seconds: float) -> str:
    """The two largest units, what is smaller is dropped: `47s`, `12m03s`, `3h07m`, `2d04h`."""
    whole = max(round(seconds), 0)
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    if minutes:
        return f"{minutes}m{s:02d}s"
    return f"{s}s"


def format_value(value: float) -> str:
    """Integers as they are; others with three decimals, or three digits where those would show nothing."""
    if isinstance(value, int) or value != value or value in (float("inf"), float("-inf")):
        return str(value)
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2e}"


def format_line(
    prefix: str,
    *,
    step: int,
    total_steps: int,
    values: Mapping[str, float],
    tokens_per_second: float | None = None,
    devices: int = 1,
    utilisation: float | None = None,
    remaining_seconds: float | None = None,
) -> str:
    """The progress line. `ETA -` stands until a rate without compilation is known.

    `utilisation` is the share of the devices' peak that went into the model's own arithmetic.
    """
    share = 100.0 * step / total_steps if total_steps else 100.0
    parts = [prefix, f"step {step}/{total_steps} ({share:.1f}%)"]
    parts += [f"{name} {format_value(value)}" for name, value in values.items()]
    if tokens_per_second is not None:
        parts.append(f"{tokens_per_second:.0f} tok/s")
        if devices > 1:
            parts.append(f"{tokens_per_second / devices:.0f} tok/s/device")
    if utilisation is not None:
        parts.append(f"MFU {100 * utilisation:.1f}%")
    parts.append("ETA -" if remaining_seconds is None else f"ETA {format_duration(remaining_seconds)}")
    return " | ".join(part for part in parts if part)


class Chrono:
    """A stopwatch that can be paused, so that a rate leaves out evaluation and saving."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started = clock()
        self._paused_total = 0.0
        self._paused_since: float | None = None

    def seconds(self) -> float:
        """Seconds since construction less the pauses."""
        now = self._clock() if self._paused_since is None else self._paused_since
        return now - self._started - self._paused_total

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count; pauses may be nested."""
        if self._paused_since is not None:
            yield
            return
        self._paused_since = self._clock()
        try:
            yield
        finally:
            self._paused_total += self._clock() - self._paused_since
            self._paused_since = None


class ProgressLine:
    """Prints a phase's progress.

    The ETA comes from the steps after the first report, because that one holds the compilation: it is the mean over
    all of them, so it does not jump. Time inside `paused()` counts neither for the ETA nor for tok/s.

    Args:
      prefix: where the run is, `grow 1/2 | improve 2/3`.
      total_steps: steps of the phase; `start` can set it later.
      stream: where to print, standard output by default. The bar is drawn only where this is a terminal.
      enabled: False on all processes but the first.
      devices: of all processes.
      peak_flops: FLOP/s of all devices together; None where it is not known.
      clock: seconds, increasing.
    """

    def __init__(
        self,
        prefix: str,
        total_steps: int = 0,
        *,
        stream: TextIO | None = None,
        enabled: bool = True,
        devices: int = 1,
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._devices, self._peak_flops = devices, peak_flops
        self._prefix = prefix
        self._total = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._enabled = enabled
        self._clock = clock
        self._bar_drawn = False
        self.start(total=total_steps)

    def start(self, *, total: int, done: int = 0) -> None:
        """Sets the number of steps, of which `done` were finished by an earlier run, and starts the clock."""
        self._total = total
        self._step = done
        self._chrono = Chrono(clock=self._clock)
        self._reported_at = 0.0
        self._period: tuple[float, int, float] | None = None  # seconds, tokens and FLOP of the last report
        self._first_report: tuple[int, float] | None = None  # (step, seconds) where the ETA's rate begins

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around evaluation, saving, or the first call of a jitted program."""
        with self._chrono.paused():
            yield

    def advance(self, steps: int, *, tokens: int | None = None, **values: float) -> None:
        """`update` for a caller that counts steps rather than numbering them."""
        self.update(self._step + steps, tokens=tokens, **values)

    def update(self, step: int, *, tokens: int | None = None, flops: float | None = None, **values: float) -> None:
        """Prints the line for `step`.

        Args:
          step: steps done.
          tokens: target tokens since the previous report.
          flops: the model's arithmetic since the previous report, of all devices.
          **values: shown by name, in this order.
        """
        seconds = self._chrono.seconds()
        since_report = max(seconds - self._reported_at, 1e-9)
        if since_report < _SAME_MOMENT and self._period is not None:
            # Fetched together with the report before: one period, whose rate is that of both.
            before, tokens_before, flops_before = self._period
            since_report += before
            tokens = None if tokens is None else tokens + tokens_before
            flops = None if flops is None else flops + flops_before
        self._period = (since_report, tokens or 0, flops or 0.0)
        remaining = None
        if step >= self._total:
            remaining = 0.0
        elif self._first_report is not None and step > self._first_report[0]:
            first_step, first_seconds = self._first_report
            remaining = (self._total - step) * (seconds - first_seconds) / (step - first_step)
        if self._first_report is None:
            self._first_report = (step, seconds)
        self._step = step
        self._reported_at = seconds
        self._print(
            format_line(
                self._prefix,
                step=step,
                total_steps=self._total,
                values=values,
                tokens_per_second=None if tokens is None else tokens / since_report,
                devices=self._devices,
                utilisation=None
                if flops is None or self._peak_flops is None
                else flops / since_report / self._peak_flops,
                remaining_seconds=remaining,
            )
        )
        self._draw_bar()

    def log_event(self, text: str) -> None:
        """Prints something that is not a log period, `grow 1/2 | improve 2/3 | <text>`."""
        self._print(f"{self._prefix} | {text}" if self._prefix else text)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar_drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._bar_drawn = False

    def _print(self, line: str) -> None:
        if not self._enabled:
            return
        self.close()
        print(line, file=self._stream, flush=True)

    def _draw_bar(self) -> None:
        # A log file wants whole lines: the bar rewrites itself, so only a terminal gets it.
        if not self._enabled or not self._stream.isatty() or not self._total or self._step >= self._total:
            return
        filled = round(_BAR_WIDTH * self._step / self._total)
        self._stream.write(f"[{'█' * filled}{'·' * (_BAR_WIDTH - filled)}] {100 * self._step / self._total:.1f}%")
        self._stream.flush()
        self._bar_drawn = True
