"""Reads what a run wrote to MODEL_DIR. The report is built from these files alone, so any run can be reported again."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rest_jax import paths
from rest_jax.errors import UserError
from rest_jax.reporting.metrics_writer import read_metrics

SUMMARY = "summary.json"
AUDIT = "audit.json"
CONTROL = "bc_long"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translation:
    """One line of `eval/<phase>.test.jsonl`: the decoded translation of a test source and its reward."""

    source_id: int
    source: str
    reference: str
    hypothesis: str
    reward: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A MODEL_DIR in memory.

    Attributes:
      directory: the MODEL_DIR.
      summary: `summary.json`.
      grows: Grow step -> its `stats.json`.
      translations: policy -> test translations, by source id.
      sample_rewards: policy -> rewards of its samples on D_eval, `[sources, samples]`.
      metrics: the lines of `metrics.jsonl`.
      config: `operative_config.gin`, else `config.gin`, else nothing.
      run: `run.json`, or nothing.
      audit: `audit.json`, of a run with a learned reward, or nothing.
    """

    directory: Path
    summary: Mapping[str, Any]
    grows: Mapping[int, Mapping[str, Any]]
    translations: Mapping[str, Mapping[int, Translation]]
    sample_rewards: Mapping[str, npt.NDArray[np.float64]]
    metrics: Sequence[Mapping[str, Any]]
    config: str
    run: Mapping[str, Any]
    audit: Mapping[str, Any]

    @property
    def phases(self) -> Sequence[Mapping[str, Any]]:
        """The summary's phases, in order."""
        return self.summary["phases"]

    @property
    def policies(self) -> Sequence[Mapping[str, Any]]:
        """The phases that ended in a policy."""
        return [phase for phase in self.phases if not is_grow(phase["name"])]


def is_grow(name: str) -> bool:
    """Whether a phase's name is a Grow step's, `grow_<g>`."""
    return name.startswith("grow_")


def final_policy(phases: Sequence[Mapping[str, Any]]) -> str | None:
    """The last Improve phase, what ReST ends with; None when none was run."""
    names = [phase["name"] for phase in phases if phase["name"].startswith("improve_")]
    return names[-1] if names else None


def phase_label(name: str) -> str:
    """What a plot or a table calls a phase: `BC`, `BC long`, `Grow 1`, `G1 I2`."""
    if is_grow(name):
        return f"Grow {name.removeprefix('grow_')}"
    if name.startswith("improve_"):
        grow, _, improve = name.removeprefix("improve_").partition(".")
        return f"G{grow} I{improve}"
    return {"bc": "BC", CONTROL: "BC long"}.get(name, name)


def read_run(model_dir: str | Path) -> Run:
    """Reads a MODEL_DIR, finished or not; what is not there yet is empty.

    Raises:
      UserError: there is no summary yet, or a file is damaged; names the file.
    """
    directory = paths.resolve(model_dir)
    path = directory / SUMMARY
    if not path.is_file():
        raise UserError(
            f"{path} does not exist. A report needs the MODEL_DIR of a run that has finished its first evaluation: "
            "give that directory, or let `rest_jax run` go on until then."
        )
    summary = read_json(path)
    phases = summary.get("phases")
    if not isinstance(phases, list) or not all(isinstance(phase, dict) and "name" in phase for phase in phases):
        raise UserError(f'{path}: "phases" must be a list of objects that each have a "name".')
    policies = [phase["name"] for phase in phases if not is_grow(phase["name"])]
    grows = {}
    for phase in phases:
        stats = directory / phase["name"] / "stats.json"
        if is_grow(phase["name"]) and stats.is_file():
            grows[int(phase["name"].removeprefix("grow_"))] = read_json(stats)
    config = next((f for f in (directory / "operative_config.gin", directory / "config.gin") if f.is_file()), None)
    run_file, audit_file = directory / "run.json", directory / AUDIT
    return Run(
        directory=directory,
        summary=summary,
        grows=grows,
        translations={name: t for name in policies if (t := _translations(directory / "eval" / f"{name}.test.jsonl"))},
        sample_rewards={
            name: rewards
            for name in policies
            if (rewards := _sample_rewards(directory / "eval" / f"{name}.validation.samples.jsonl")).size
        },
        metrics=read_metrics(directory),
        config="" if config is None else config.read_text(encoding="utf-8"),
        run=read_json(run_file) if run_file.is_file() else {},
        audit=read_json(audit_file) if audit_file.is_file() else {},
    )


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object. Raises UserError that names the file when it holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {error}. Run the command that wrote it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold one JSON object, it holds a {type(value).__name__}.")
    return value


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a JSONL file; nothing when it does not exist."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number} is damaged: {error}. Evaluate this policy again.") from error


def _translations(path: Path) -> dict[int, Translation]:
    fields = [field.name for field in dataclasses.fields(Translation)]
    result = {}
    for number, line in _lines(path):
        missing = [field for field in fields if field not in line]
        if missing:
            raise UserError(f"{path}:{number} lacks {', '.join(missing)}; each line needs {', '.join(fields)}.")
        result[int(line["source_id"])] = Translation(**{field: line[field] for field in fields})
    return result


def _sample_rewards(path: Path) -> npt.NDArray[np.float64]:
    """`[sources, samples]` in the order of source ids, so that two policies' rows belong together."""
    rows = []
    for number, line in _lines(path):
        if "source_id" not in line or not isinstance(line.get("rewards"), list):
            raise UserError(f"{path}:{number} lacks source_id or rewards.")
        rows.append((int(line["source_id"]), line["rewards"]))
        if len(line["rewards"]) != len(rows[0][1]):
            raise UserError(f"{path}:{number} has {len(line['rewards'])} rewards, the first line {len(rows[0][1])}.")
    return np.asarray([rewards for _, rewards in sorted(rows, key=lambda row: row[0])], np.float64)
