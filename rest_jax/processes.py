"""The processes of one run, one for each host: joining them, waiting for each other by name, and comparing notes.

Arrays travel through JAX's collectives. What is said here is small and goes through the key-value store of JAX's
coordination service (`jax.distributed`), because a wait there ends in time and can say who did not come.
"""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src import clusters, distributed  # the public API has neither the key-value store nor "is there a cluster?"

from rest_jax.errors import Preempted, UserError

BARRIER_SECONDS = 600
# Tokenising a large corpus: a process that dies meanwhile is noticed by its heartbeat.
DAY = 24 * 3600
# Others notice a failure when their own connections to the lost process break.
_FAILURE_SECONDS = 20.0


class LostProcessError(Exception):
    """Some process of the run did not come to where the others wait for it."""


class Processes:
    """This process among those of its run. All methods must be called by all processes, in the same order.

    Args:
      index, count: which of how many; process 0 leads: it writes what there is one of.
      timeout: seconds that the others wait for one.
      client: of JAX's coordination service; None where the process is alone.
    """

    def __init__(self, *, index: int = 0, count: int = 1, timeout: float = BARRIER_SECONDS, client: Any = None) -> None:
        self.index, self.count = index, count
        self._timeout = timeout
        self._client = client
        self._meetings = 0

    @property
    def lead(self) -> bool:
        return self.index == 0

    def wait(self, name: str, *, timeout: float | None = None) -> None:
        """Returns when all processes are here.

        Raises:
          LostProcessError: some did not come in time; the message names them.
        """
        self.gather(name, "", timeout=timeout)

    def gather(self, name: str, value: str, *, timeout: float | None = None) -> list[str]:
        """What each process says, in their order. For a few hundred bytes.

        Raises:
          LostProcessError: see `wait`.
        """
        self._meetings += 1
        return self._meet(f"{self._meetings}/{name}", value, timeout=timeout or self._timeout)

    def _meet(self, name: str, value: str, *, timeout: float) -> list[str]:
        if self.count == 1:
            return [value]
        folder = f"rest_jax/{name}/"
        self._client.key_value_set(f"{folder}{self.index}", f"={value}")  # the store takes no empty value
        try:
            self._client.wait_at_barrier(f"rest_jax/{name}", int(timeout * 1000))
        except jax.errors.JaxRuntimeError as error:
            came = {int(key.rsplit("/", 1)[1]) for key, _ in self._client.key_value_dir_get(folder)}
            lost = sorted(set(range(self.count)) - came)
            raise LostProcessError(
                f"waited {timeout:.0f} s at {name.split('/', 1)[-1]!r} for {_named(lost) if lost else 'some process'} "
                f"of {self.count}, which did not come. Run the same command again on all hosts: what was finished is "
                "kept."
            ) from error
        said = dict(self._client.key_value_dir_get(folder))
        return [said[f"{folder}{index}"].removeprefix("=") for index in range(self.count)]

    def check_same(self, name: str, value: str) -> None:
        """Raises UserError, on all processes, unless all give the same value."""
        values = self.gather(name, value)
        others = [index for index, other in enumerate(values) if other != values[0]]
        if others:
            raise UserError(
                f"{name} differs between process 0 ({values[0]!r}) and {_named(others)} ({values[others[0]]!r}). All "
                "processes must be started with the same command, configuration and data."
            )

    @contextlib.contextmanager
    def lead_first(self, name: str) -> Iterator[None]:
        """Process 0 runs the body before the others do, so that they find what it made."""
        if not self.lead:
            self.gather(name, "", timeout=DAY)
        try:
            yield
        finally:
            if self.lead:
                self.gather(name, "", timeout=DAY)

    def wait_for_file(self, path: Path) -> None:
        """After process 0 has written `path`: returns when all processes see it.

        Raises:
          LostProcessError: some does not; network file systems may be some seconds late, not longer.
        """
        self.wait(path.name)
        end = time.monotonic() + self._timeout
        while not path.exists():
            if time.monotonic() > end:
                raise LostProcessError(f"process {self.index} does not see {path}, which process 0 has written.")
            time.sleep(0.1)

    def check_shared(self, directory: Path, name: str) -> None:
        """Raises UserError, on all processes, unless all see the same folder there."""
        if self.count == 1:
            return
        probe = directory / f".seen-by-all-{self.gather('probe', str(os.getpid()))[0]}"
        problem = ""
        if self.lead:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                probe.touch()
            except OSError as error:
                problem = f"{error}"
        problem = self.gather("probe written", problem)[0]
        if problem:
            raise UserError(f"{name} {str(directory)!r} can not be written: {problem}. Give a folder that can.")
        seen = self.gather("probe seen", str(_appears(probe)))
        if self.lead:
            probe.unlink()
        blind = [index for index, answer in enumerate(seen) if answer != "True"]
        if blind:
            raise UserError(
                f"{name} {str(directory)!r} is not one folder for all: {_named(blind)} of {self.count} did not see "
                "the file that process 0 wrote there. With several hosts it must lie on a shared file system, or be a "
                "gs:// path."
            )

    def who_is_lost(self, after: str = "an error") -> str:
        """After an error on this process: which others do not come to say so too, in a sentence; empty where all do."""
        try:
            self._meet(f"after {after}", "", timeout=_FAILURE_SECONDS)
        except LostProcessError as lost:
            return str(lost)
        return ""

    def end(self, *, exit_code: int) -> NoReturn:
        """Ends this process without waiting for the others, as Python's own exit would."""
        if self.lead:
            time.sleep(2.0)  # The coordination service ends with this process: the others print first.
        sys.stdout.flush()
        os._exit(exit_code)


def _appears(path: Path, *, seconds: float = 10.0) -> bool:
    """Whether a file is there within some seconds: network file systems may be late."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _named(indices: list[int]) -> str:
    return f"process{'es' if len(indices) > 1 else ''} {', '.join(map(str, indices))}"


@contextlib.contextmanager
def joined(
    *,
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    timeout: float = BARRIER_SECONDS,
) -> Iterator[Processes]:
    """Joins the run's processes (`jax.distributed.initialize`); must come before anything that uses a device.

    With no argument at all: alone, unless JAX finds a cluster that it knows: TPU VMs, GKE, Slurm.

    An error inside that is not the user's ends this process at once, after it has found out who is lost: the exit that
    Python would make waits for processes that are no more. So does a user's error that not all processes have, with
    exit code 2.

    Raises:
      UserError: some of the three arguments, but not all.
    """
    given: dict[str, Any] = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(
            f"--{', --'.join(missing)} missing: give all three of --{', --'.join(given)}, or none where JAX finds the "
            "processes by itself (TPU VMs, GKE, Slurm)."
        )
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise UserError(f"--process_id is {process_id}; it must be in 0..{num_processes - 1} (--num_processes).")
    if missing and not _in_a_cluster():
        yield Processes()
        return
    jax.distributed.initialize(
        **given, heartbeat_timeout_seconds=max(int(timeout), 10), shutdown_timeout_seconds=max(int(timeout), 10)
    )
    processes = Processes(
        index=jax.process_index(),
        count=jax.process_count(),
        timeout=timeout,
        client=distributed.global_state.client,
    )
    try:
        yield processes
    except Preempted:
        raise
    except UserError as error:
        # Nobody else is lost where all have it: they end in the usual way.
        if processes.who_is_lost("an error of the configuration or the data"):
            print(f"rest_jax: process {processes.index}: {error}", file=sys.stderr, flush=True)
            processes.end(exit_code=2)
        raise
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, LostProcessError | jax.errors.JaxRuntimeError):
            found = processes.who_is_lost() or "all processes are alive."
        else:
            found = "it failed by itself (above); the others stop when they wait for it."
        print(f"rest_jax: process {processes.index}: {found}", file=sys.stderr, flush=True)
        processes.end(exit_code=1)


def _in_a_cluster() -> bool:
    return any(kind.is_env_present() for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method)
