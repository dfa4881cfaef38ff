"""metrics.jsonl and TensorBoard: the scalars of every phase, without a line twice after a restart."""

import json
import math
import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, SupportsFloat

from rest_jax import paths

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends `{"phase", "step", "time", ...scalars}` to `metrics.jsonl` and to `tensorboard/<phase>/`.

    In a bucket `metrics.jsonl` has what was written before the last `flush`; TensorBoard's file is sent every 30 s.
    A phase that resumes calls `resume` first: what it logged beyond its checkpoint is dropped, as it is logged again.

    Args:
      model_dir: the run's directory.
      enabled: False on all processes but the first, and in a dry run: then nothing is written.
    """

    def __init__(self, model_dir: str | os.PathLike[str], *, enabled: bool = True) -> None:
        self._model_dir = paths.resolve(model_dir)
        self._enabled = enabled
        self._resumed: dict[str, int] = {}  # phase -> step it resumed at
        self._unwritten: list[str] = []  # lines that a bucket does not have yet
        self._board: Any = None
        self._board_phase: str | None = None

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def resume(self, *, phase: str, step: int) -> None:
        """Drops the lines of `phase` beyond `step`, and a last line that a crash cut off."""
        if not self._enabled:
            return
        self.flush()
        self._resumed[phase] = step
        if self._board_phase == phase:
            self.close()
        path = self._model_dir / FILE_NAME
        if not path.exists():
            return
        lines = read_metrics(self._model_dir)
        kept = [line for line in lines if line["phase"] != phase or line["step"] <= step]
        paths.write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, *, phase: str, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        """Writes one line. A number that is not finite becomes null: JSON has no word for it."""
        if not self._enabled:
            return
        values = {name: float(value) for name, value in scalars.items()}
        line = {
            "phase": phase,
            "step": int(step),
            "time": round(time.time(), 3),
            **{name: value if math.isfinite(value) else None for name, value in values.items()},
        }
        text = json.dumps(line) + "\n"
        if paths.in_bucket(self._model_dir):
            self._unwritten.append(text)
        else:
            self._model_dir.mkdir(parents=True, exist_ok=True)
            with (self._model_dir / FILE_NAME).open("a", encoding="utf-8") as file:
                file.write(text)
        board = self._tensorboard(phase)
        for name, value in values.items():
            board.add_scalar(name, value, int(step))

    def flush(self) -> None:
        """Puts what was written since the last time into a bucket; a file on disk has it already.

        Objects cannot be appended to, so the whole file is sent again: before each checkpoint and each mark, beyond
        which a run that is continued writes its lines again anyway.
        """
        if not self._unwritten:
            return
        path = self._model_dir / FILE_NAME
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        paths.write_text(path, before + "".join(self._unwritten))
        self._unwritten = []

    def close(self) -> None:
        """Flushes both files; writing again opens another of TensorBoard's."""
        self.flush()
        if self._board is not None:
            self._board.close()
        self._board, self._board_phase = None, None

    def _tensorboard(self, phase: str) -> Any:
        # One run of TensorBoard per phase: the steps of each begin at 0, so the curves lie over each other.
        if self._board_phase != phase:
            # Imported here because it takes as long as the rest of the package, and most commands log nothing.
            import tensorboardX

            self.close()
            resumed_at = self._resumed.get(phase)
            self._board = tensorboardX.SummaryWriter(
                str(self._model_dir / "tensorboard" / phase),
                purge_step=None if resumed_at is None else resumed_at + 1,
                flush_secs=30,
            )
            self._board_phase = phase
        return self._board


def read_metrics(model_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, in order. A line that a crash cut off is left out; a missing file has none."""
    path = paths.resolve(model_dir) / FILE_NAME
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().decode("utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "phase" in line and "step" in line:
            lines.append(line)
    return lines
