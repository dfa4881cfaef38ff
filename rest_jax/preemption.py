"""SIGTERM as a question that a run asks itself: the way a scheduler takes its machine back."""

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from jax.experimental import multihost_utils


def stop_of_any() -> Callable[[], bool]:
    """With several processes: whether SIGTERM has reached one of them, answered alike by all.

    All must ask equally often. JAX's preemption service takes the signal, tells the others, and makes all say yes at
    the same question; after that the answer stays yes.
    """
    asked, stopped = itertools.count(), False

    def requested() -> bool:
        nonlocal stopped
        stopped = stopped or multihost_utils.reached_preemption_sync_point(next(asked))
        return stopped

    return requested


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM has arrived: the run then saves and exits with 42. A second one ends it."""
    requested = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if requested.is_set():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        requested.set()
        # A signal handler may interrupt a print; a write to the descriptor cannot be in its way.
        os.write(2, b"rest_jax: SIGTERM: saving at the next step; a second SIGTERM ends it at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield requested.is_set  # Python gives signals to the main thread alone.
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield requested.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
