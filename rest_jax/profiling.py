"""`--profile_steps 10:15`: a trace of some steps, for TensorBoard's profile tab or Perfetto."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from rest_jax import paths
from rest_jax.errors import UserError

DIRECTORY = "profile"


@dataclasses.dataclass
class ProfiledSteps:
    """Traces training steps first..last-1, counted from 0, of the first phase that reaches them.

    Attributes:
      first, last: numbers of steps.
      directory: where `jax.profiler` writes; each process its own file.
    """

    first: int
    last: int
    directory: Path
    _running: bool = False
    _done: bool = False

    @staticmethod
    def parse(text: str, model_dir: Path) -> "ProfiledSteps":
        """From `10:15`.

        Raises:
          UserError: it is not of this form, or has no step in it; or MODEL_DIR is in a bucket, to which JAX's profiler
            does not write.
        """
        first, _, last = text.partition(":")
        if not (first.isdigit() and last.isdigit() and int(first) < int(last)):
            raise UserError(f"--profile_steps is {text!r}; it must be FIRST:LAST, like 10:15 for the steps 10 to 14.")
        return ProfiledSteps(
            int(first), int(last), paths.local(model_dir, "With --profile_steps, MODEL_DIR") / DIRECTORY
        )

    def before(self, step: int, waits_for: Any) -> None:
        """Starts the trace before step `first`; ends it before step `last`.

        Args:
          step: the one that comes next.
          waits_for: arrays of the step before: what was launched is finished before the trace begins or ends.
        """
        if not self._running and not self._done and self.first <= step < self.last:
            jax.block_until_ready(waits_for)
            jax.profiler.start_trace(self.directory)
            self._running = True
        elif self._running and step >= self.last:
            self.stop(waits_for)

    def stop(self, waits_for: Any) -> None:
        """Ends a trace that is running, as a phase that ends does."""
        if self._running:
            jax.block_until_ready(waits_for)
            jax.profiler.stop_trace()
            self._running, self._done = False, True
