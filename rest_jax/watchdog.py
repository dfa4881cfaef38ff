"""Ends a run that stands still: a collective that waits for a host that is no more would wait for ever."""

import contextlib
import faulthandler
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def watchdog(seconds: float | None) -> Iterator[Callable[[], None]]:
    """A function to call at each sign of progress.

    When it has not been called for `seconds`, the stacks of all threads go to standard error and the process exits with
    1. The clock is faulthandler's: a thread outside Python, so it also runs while the interpreter is held up.

    Args:
      seconds: must be more than compiling the largest program takes, or scoring a test split; None for no watchdog.
    """
    if seconds is None:
        yield lambda: None
        return

    def beat() -> None:
        faulthandler.dump_traceback_later(seconds, exit=True)

    beat()
    try:
        yield beat
    finally:
        faulthandler.cancel_dump_traceback_later()
