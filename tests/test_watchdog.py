"""A run that stands still ends by itself and leaves every thread's stack."""

import subprocess
import sys
import time

SCRIPT = """
import sys, threading, time
from rest_jax.watchdog import watchdog

def waits_for_ever():
    threading.Event().wait()

threading.Thread(target=waits_for_ever, daemon=True).start()
with watchdog(0.4) as beat:
    for _ in range(8):  # twice as long as the limit, in steps that are shorter
        time.sleep(0.1)
        beat()
    print("alive", flush=True)
    if sys.argv[1] == "hang":
        time.sleep(60)
time.sleep(0.6)  # past the limit: the watchdog has gone
print("done")
"""


def run(mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, timeout=60)


def test_a_run_that_hangs_leaves_its_stacks_and_exits_with_1():
    started = time.monotonic()
    result = run("hang")
    assert result.returncode == 1 and result.stdout == "alive\n"
    assert time.monotonic() - started < 50
    assert "Timeout" in result.stderr and "waits_for_ever" in result.stderr and result.stderr.count("Thread 0x") == 2


def test_a_run_that_moves_is_left_alone():
    result = run("end")
    assert result.returncode == 0 and result.stdout == "alive\ndone\n" and result.stderr == ""
