import io

import pytest

from rest_jax.reporting.progress import Chrono, ProgressLine, format_duration, format_line, format_value


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0s"), (0.4, "0s"), (59.6, "1m00s"), (723, "12m03s"), (11_220, "3h07m"), (187_200, "2d04h")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(3, "3"), (2.1361, "2.136"), (0.0, "0.000"), (0.00012, "1.20e-04")])
def test_values(value, text):
    assert format_value(value) == text
    assert format_value(float("nan")) == "nan"


def test_the_line():
    line = format_line(
        "grow 1/2 | improve 2/3",
        step=400,
        total_steps=2000,
        values={"loss": 2.136},
        tokens_per_second=7138.2,
        remaining_seconds=723,
    )
    assert line == "grow 1/2 | improve 2/3 | step 400/2000 (20.0%) | loss 2.136 | 7138 tok/s | ETA 12m03s"


def test_the_line_says_what_of_the_devices_is_used(clock):
    stream = io.StringIO()
    line = ProgressLine("bc", 100, stream=stream, devices=8, peak_flops=8e12, clock=clock)
    clock.now += 2
    line.update(10, tokens=8000, flops=4e12)
    assert stream.getvalue() == "bc | step 10/100 (10.0%) | 4000 tok/s | 500 tok/s/device | MFU 25.0% | ETA -\n"
    unknown = ProgressLine("bc", 100, stream=stream, clock=clock)
    unknown.update(10, tokens=8000, flops=4e12)
    assert "MFU" not in stream.getvalue().splitlines()[1]


def test_a_chrono_leaves_out_nested_pauses(clock):
    chrono = Chrono(clock=clock)
    clock.now += 2
    with chrono.paused():
        clock.now += 5
        with chrono.paused():
            clock.now += 5
        assert chrono.seconds() == 2
    clock.now += 1
    assert chrono.seconds() == 3


def test_eta_and_rate_leave_out_the_first_report_and_pauses(clock):
    stream = io.StringIO()
    progress = ProgressLine("bc", 100, stream=stream, clock=clock)
    clock.now += 60  # Compilation.
    progress.update(10, tokens=1000, loss=3.0)
    clock.now += 10
    with progress.paused():
        clock.now += 500
    progress.update(20, tokens=1000, loss=2.5)
    clock.now += 10
    progress.update(30, tokens=2000, loss=2.0)
    clock.now += 70
    progress.update(100, tokens=7000, loss=1.0)
    assert stream.getvalue().splitlines() == [
        "bc | step 10/100 (10.0%) | loss 3.000 | 17 tok/s | ETA -",
        "bc | step 20/100 (20.0%) | loss 2.500 | 100 tok/s | ETA 1m20s",
        "bc | step 30/100 (30.0%) | loss 2.000 | 200 tok/s | ETA 1m10s",
        "bc | step 100/100 (100.0%) | loss 1.000 | 100 tok/s | ETA 0s",
    ]


def test_reports_of_the_same_moment_share_their_period(clock):
    stream = io.StringIO()
    progress = ProgressLine("grow 1/1", 3, stream=stream, clock=clock)
    for seconds, tokens in ((30, 300), (4, 400), (0.0001, 100)):
        clock.now += seconds
        progress.advance(1, tokens=tokens)
    assert [line.split(" | ")[2] for line in stream.getvalue().splitlines()] == ["10 tok/s", "100 tok/s", "125 tok/s"]


def test_a_resumed_phase_counts_only_its_own_steps(clock):
    stream = io.StringIO()
    progress = ProgressLine("grow 1/1", stream=stream, clock=clock)
    progress.start(total=10, done=6)
    clock.now += 30
    progress.advance(1, tokens=300, kept=0.25)
    clock.now += 4
    progress.advance(1, tokens=400, kept=0.5)
    progress.log_event("saved")
    assert stream.getvalue().splitlines() == [
        "grow 1/1 | step 7/10 (70.0%) | kept 0.250 | 10 tok/s | ETA -",
        "grow 1/1 | step 8/10 (80.0%) | kept 0.500 | 100 tok/s | ETA 8s",
        "grow 1/1 | saved",
    ]


def test_a_bar_on_a_terminal_only_and_never_in_the_way(clock):
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        progress = ProgressLine("bc", 4, stream=stream, clock=clock)
        progress.update(1)
        progress.update(4)
        progress.close()
    assert "\r" not in file.getvalue() and "█" not in file.getvalue()
    first, bar, last = terminal.getvalue().replace("\r\x1b[K", "\n").splitlines()
    assert first.startswith("bc | step 1/4") and last.startswith("bc | step 4/4")
    assert bar.count("█") == 10 and bar.endswith("25.0%")


def test_other_processes_print_nothing(clock):
    stream = Terminal()
    progress = ProgressLine("bc", 4, stream=stream, enabled=False, clock=clock)
    progress.update(1, loss=1.0)
    progress.log_event("saved")
    progress.close()
    assert stream.getvalue() == ""
