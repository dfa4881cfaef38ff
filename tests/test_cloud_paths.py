"""MODEL_DIR in a bucket, against an emulator of Google Cloud Storage: what is written there is read back, whole."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax import config, paths, processes, run_files
from rest_jax.checkpoints import checkpointer, convert, formats, t5x_legacy
from rest_jax.data.parallel import ParallelData
from rest_jax.data.store import ScoredStore, StoreWriter
from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.errors import UserError
from rest_jax.partitioning import Partitioner, make_mesh, standard_logical_axis_rules
from rest_jax.profiling import ProfiledSteps
from rest_jax.reporting.metrics_writer import MetricsWriter, read_metrics
from tests.cloud_emulator import BUCKET, emulator, this_process_in
from tests.tiny_project import make_project

# aiohttp, of the parts in which gcsfs sends a large file: from a thread of its own, which may wait.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body directly:ResourceWarning")
VOCABULARY = "rest_jax://tasks/demo_data/vocab.model"


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    with emulator() as environment, this_process_in(environment):
        yield environment


@pytest.fixture
def folder(environment: dict[str, str], request: pytest.FixtureRequest) -> Path:
    """A folder of this test's own in the bucket."""
    return paths.resolve(f"gs://{BUCKET}/{re.sub(r'[^a-z0-9]+', '-', request.node.name)}")


# Which paths there are.


@pytest.mark.parametrize("text", ["s3://bucket/run", "az://bucket/run", "hdfs://host/run", "GS://bucket/run"])
def test_an_unknown_scheme_is_refused_with_what_is_legal(text):
    with pytest.raises(UserError, match=r"is unknown. Legal are .* gs://BUCKET/"):
        paths.resolve(text)
    with pytest.raises(UserError, match="is unknown"):
        MetricsWriter(text)
    with pytest.raises(UserError, match="is unknown"):
        ScoredStore.open(text)


def test_without_its_package_the_extra_is_named(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find_spec(name))
    with pytest.raises(UserError, match=re.escape("pip install 'rest_jax[gcs]'")):
        paths.resolve("gs://bucket/run")


def test_a_bucket_must_be_named():
    with pytest.raises(UserError, match="names no bucket"):
        paths.resolve("gs://")


def test_what_must_be_local_says_so(tmp_path):
    assert paths.local(tmp_path, "CACHE_DIR") == tmp_path
    data = ParallelData(
        task="none",
        lengths={"inputs": 8, "targets": 8},
        vocabulary=SentencePieceVocabulary(VOCABULARY),
        cache_dir="gs://bucket/cache",
    )
    with pytest.raises(UserError, match="CACHE_DIR 'gs://bucket/cache' must be a folder of this machine"):
        _ = data.cache
    with pytest.raises(UserError, match="--profile_steps"):
        ProfiledSteps.parse("1:2", paths.resolve("gs://bucket/run"))


def test_paths_that_libraries_take(tmp_path):
    there = paths.resolve("gs://bucket/run/bc")
    assert paths.absolute(there) == there
    assert [str(path) for path in paths.with_parents(there)] == ["gs://bucket/run/bc", "gs://bucket/run", "gs://bucket"]
    assert paths.with_parents(tmp_path)[-1] == Path("/")
    assert (paths.url(there), paths.url(tmp_path)) == ("gs://bucket/run/bc", f"file://{tmp_path}")
    assert paths.kvstore(there) == {"driver": "gcs", "bucket": "bucket", "path": "run/bc/"}
    assert paths.kvstore(tmp_path) == {"driver": "file", "path": f"{tmp_path}/"}


def test_a_bucket_that_is_not_there_is_found_out_before_anything_runs(folder):
    paths.check_bucket(folder, "MODEL_DIR")
    with pytest.raises(UserError, match="MODEL_DIR 'gs://nowhere/run': gs://nowhere cannot be reached: .* no such"):
        run_files.check_same_run(paths.resolve("gs://nowhere/run"), given="", vocabulary_sha256="")


# Files.


@pytest.mark.parametrize("place", ["local", "bucket"])
def test_what_is_written_is_read_back(folder, tmp_path, place):
    folder = tmp_path if place == "local" else folder
    content = bytes(range(256)) * 40_000 + b"\r\n"  # 10 MB: more than gcsfs sends at once
    paths.write_bytes(folder / "data", content)
    assert (folder / "data").read_bytes() == content
    for text in ("first é\n", "second\n"):  # the second replaces the first
        paths.write_text(folder / "text", text)
        assert (folder / "text").read_text(encoding="utf-8") == text
    assert sorted(path.name for path in folder.iterdir()) == ["data", "text"]
    paths.remove_tree(folder / "absent")
    paths.remove_tree(folder)
    assert not folder.exists()


def test_a_mark_is_whole_or_absent(folder):
    path = folder / "bc" / "RESULT.json"
    with pytest.raises(TypeError):
        paths.write_json(path, {"good": 1, "bad": object()})
    assert not path.exists()
    paths.write_json(path, {"good": 1})
    assert json.loads(path.read_text()) == {"good": 1}


def test_what_another_process_wrote_is_seen(folder, environment):
    """Listings are not remembered: another host, or TensorStore in this process, writes into folders listed before."""
    paths.write_text(folder / "first", "")
    assert [path.name for path in folder.iterdir()] == ["first"]
    writing = f"from rest_jax import paths; paths.write_text(paths.resolve('{folder}') / 'second', 'there')"
    subprocess.run([sys.executable, "-c", writing], check=True, env={**os.environ, **environment})
    assert (folder / "second").read_text() == "there"
    assert sorted(path.name for path in folder.iterdir()) == ["first", "second"]


def test_a_runs_files_and_its_config(folder):
    given = "SEED = 1\n"
    for _ in range(2):
        run_files.write_run_files(
            folder, given=given, operative="# all\n", argv=["run"], facts={"vocabulary_sha256": "a"}
        )
    run = json.loads((folder / run_files.RUN).read_text())
    assert run["argv"] == ["run"] and len(run["continued"]) == 1
    run_files.check_same_run(folder, given=given, vocabulary_sha256="a")
    with pytest.raises(UserError, match="another configuration"):
        run_files.check_same_run(folder, given="SEED = 2\n", vocabulary_sha256="a")
    with pytest.raises(UserError, match="another vocabulary"):
        run_files.check_same_vocabulary("CHECKPOINT", folder / "grow_1" / "improve_1", vocabulary_sha256="b")
    found = run_files.find_config(str(folder / "bc" / "checkpoint_1"))
    assert str(found) == f"{folder}/{run_files.CONFIG}"
    with pytest.raises(UserError, match="no config.gin stands beside"):
        run_files.find_config(f"gs://{BUCKET}/nothing/here")
    paths.write_text(
        folder / "a.gin", "from __gin__ import dynamic_registration\nfrom rest_jax import filters\nfilters.TopK.k = 3\n"
    )
    config.load(gin_files=[f"{folder}/a.gin"], bindings=[])
    assert "filters.TopK.k = 3" in config.given_text()
    with pytest.raises(UserError, match="b.gin' is in none of"):
        config.load(gin_files=[f"{folder}/b.gin"], bindings=[])


def test_metrics_are_in_the_bucket_after_each_flush_and_once_after_a_restart(folder):
    with MetricsWriter(folder) as writer:
        writer.write(phase="bc", step=1, scalars={"loss": 2.0})
        writer.flush()
        writer.write(phase="bc", step=2, scalars={"loss": float("nan")})
        assert [line["step"] for line in read_metrics(folder)] == [1]
        writer.write(phase="bc", step=3, scalars={"loss": 1.0})
    assert [line["loss"] for line in read_metrics(folder)] == [2.0, None, 1.0]
    with MetricsWriter(folder) as writer:
        writer.resume(phase="bc", step=1)
        writer.write(phase="bc", step=2, scalars={"loss": 1.5})
    assert [line["loss"] for line in read_metrics(folder)] == [2.0, 1.5]
    events = list((folder / "tensorboard" / "bc").iterdir())
    assert events and all(b"loss" in path.read_bytes() for path in events)


def test_all_processes_see_a_bucket(folder):
    """The probe of `check_shared`, by a second process that only looks."""

    class Two(processes.Processes):
        def gather(self, name: str, value: str, *, timeout: float | None = None) -> list[str]:
            return [value, value]

    Two(count=2).check_shared(folder, "MODEL_DIR")
    assert not folder.exists() or not list(folder.iterdir())


# The store.


def test_a_store_is_the_same_as_on_disk(folder, tmp_path):
    from tests.data.test_store import write_store

    there, here = (ScoredStore.open(write_store(place)) for place in (folder / "grow_1", tmp_path / "grow_1"))
    assert there.rows.equals(here.rows) and there.stats == here.stats
    for name in ("source_ids", "rewards", "valid", "reference_rewards"):
        np.testing.assert_array_equal(getattr(there, name), getattr(here, name), err_msg=name)
    first, second = there.select(there.stored), here.select(here.stored)
    assert [first.targets(k).tolist() for k in range(len(first))] == [
        second.targets(k).tolist() for k in range(len(second))
    ]
    assert sorted(path.name for path in there.directory.iterdir()) == sorted(
        path.name for path in here.directory.iterdir()
    )


def test_a_damaged_chunk_is_deleted_and_drawn_again(folder):
    from tests.data.test_store import SOURCES, write_store

    write_store(folder)
    damaged = folder / "part-00000-00001.arrow"
    content = damaged.read_bytes()
    paths.write_bytes(damaged, content[: len(content) // 2])
    with pytest.raises(UserError, match="part-00000-00001.arrow"):
        _ = ScoredStore.open(folder).rows
    assert StoreWriter(folder, process_index=0).committed_chunks(SOURCES) == {0}
    assert sorted(path.name for path in folder.iterdir() if "arrow" in path.name) == [
        f"{kind}-{process:05d}-00000.arrow" for kind in ("part", "sources") for process in (0, 1)
    ]
    with pytest.raises(UserError, match="not finished"):
        ScoredStore.open(folder)
    write_store(folder, chunks={(0, 1): [5, 30]})
    assert ScoredStore.open(folder).source_ids.tolist() == [1, 2, 3, 4, 5, 7, 11, 30]
    (folder / "part-00001-00000.arrow").unlink()
    with pytest.raises(UserError, match="part-00001-00000.arrow: missing"):
        ScoredStore.open(folder)


# Checkpoints.


def make_params() -> dict[str, Any]:
    generator = np.random.default_rng(0)
    return {
        "token_embedder": {"embedding": jnp.asarray(generator.normal(size=(32, 16)), jnp.float32)},
        "encoder": {"encoder_norm": {"scale": jnp.asarray(generator.normal(size=16), jnp.float32)}},
    }


def sharded() -> tuple[Partitioner, dict[str, Any]]:
    """Parameters over all eight devices."""
    partitioner = Partitioner(make_mesh(model=2), standard_logical_axis_rules(parameter_partitioning_dims=2))
    params = make_params()
    return partitioner, jax.device_put(params, partitioner.param_shardings(params))


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_sharded_parameters_come_back_where_they_belong(folder):
    partitioner, params = sharded()
    for value in (params, jax.tree.map(lambda leaf: leaf + 1, params)):  # the second replaces the first
        checkpointer.save_params(folder / "policy", value)
    loaded = checkpointer.load_params(
        str(folder / "policy"), abstract_params=jax.eval_shape(lambda: params), partitioner=partitioner
    )
    assert_same(loaded, value)
    embedding = loaded["token_embedder"]["embedding"]
    assert embedding.sharding == params["token_embedder"]["embedding"].sharding
    assert embedding.addressable_shards[0].data.shape == (16, 4)
    assert [path.name for path in folder.iterdir()] == ["policy"]


def test_single_tensors_are_read_from_a_bucket(folder):
    params = make_params()
    checkpointer.save_params(folder / "policy", params)
    checkpoint = formats.open_checkpoint(str(folder / "policy"))
    assert checkpoint.format == "orbax"
    np.testing.assert_array_equal(
        checkpoint.tensors["token_embedder/embedding"].read(), params["token_embedder"]["embedding"]
    )


def test_a_checkpoint_that_was_not_finished_is_none(folder):
    checkpointer.save_params(folder / "checkpoint_1", make_params())
    checkpointer.save_params(folder / "checkpoint_2", make_params())
    assert checkpointer.find_checkpoint(str(folder)).name == "checkpoint_2"
    (folder / "checkpoint_2" / "state" / "commit_success.txt").unlink()
    assert checkpointer.find_checkpoint(str(folder)).name == "checkpoint_1"
    with pytest.raises(UserError, match="is no checkpoint"):
        checkpointer.find_checkpoint(str(folder / "checkpoint_2"))


def test_a_phases_checkpoints_and_their_progress(folder):
    _, params = sharded()
    for attempt in range(2):
        checkpoints = checkpointer.PhaseCheckpoints(folder / "bc")
        assert checkpoints.latest_step() == (None if attempt == 0 else 3)
        for step in range(3 * attempt + 1, 3 * attempt + 4):
            tree = {"target": jax.tree.map(lambda leaf, step=step: leaf * step, params)}
            checkpoints.save(step, tree, progress={"step": step}, best_step=2)
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
        restored, progress = checkpoints.restore(step, abstract_tree=abstract)
        checkpoints.close()
        assert_same(restored, tree)
        assert progress == {"step": step}
    assert sorted(path.name for path in (folder / "bc").iterdir()) == ["checkpoint_2", "checkpoint_6"]


def test_import_and_export_of_t5xs_format(folder, tmp_path):
    from tests.checkpoints.test_t5x_legacy import CONFIG, make_params, write_as_t5x

    params, model = make_params(), convert.Model(CONFIG)
    write_as_t5x(tmp_path / "theirs", params)
    convert.import_checkpoint(str(tmp_path / "theirs"), folder / "ours", model=model)
    convert.export_checkpoint(str(folder / "ours"), folder / "again", to="t5x", model=model)
    leaves, step = t5x_legacy.open_checkpoint(folder / "again")
    assert step == 1000 and leaves.keys() == params.keys()
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf.read(), params[name], err_msg=name)
    with pytest.raises(UserError, match="exists"):
        convert.import_checkpoint(str(tmp_path / "theirs"), folder / "ours", model=model)


def test_a_vocabulary_in_a_bucket(folder):
    with pytest.raises(UserError, match=f"no such SentencePiece model: '{folder}/x.model'"):
        SentencePieceVocabulary(f"{folder}/x.model")
    paths.write_bytes(folder / "x.model", paths.resolve(VOCABULARY).read_bytes())
    assert SentencePieceVocabulary(f"{folder}/x.model").sha256 == SentencePieceVocabulary(VOCABULARY).sha256


# A run.


def start(project: Path, model_dir: str | Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """The real command."""
    environment = {
        **os.environ,
        **environment,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
        "PYTHONPATH": os.pathsep.join([str(project), os.environ.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": str(project / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "rest_jax", "run", "--gin_file=tiny.gin", f"--model_dir={model_dir}"]
    return subprocess.Popen(
        command, cwd=project, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], *, code: int) -> str:
    try:
        output, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == code, output
    return output


def timeless(model_dir: Path) -> dict[str, Any]:
    summary = json.loads((model_dir / "summary.json").read_text())
    phases = [{key: value for key, value in phase.items() if key != "seconds"} for phase in summary["phases"]]
    return {**summary, "phases": phases, "config_sha256": None}  # the configurations name different MODEL_DIRs


def stop_once(path: Path, process: subprocess.Popen[str], by: signal.Signals, *, code: int) -> None:
    """Sends the signal when there is a file whose name begins as `path` does."""
    while not any(path.parent.glob(f"{path.name}*")):
        assert process.poll() is None, finish(process, code=0)
        time.sleep(0.05)
    process.send_signal(by)
    finish(process, code=code)


@pytest.mark.slow
def test_a_run_in_a_bucket_stopped_and_continued_is_the_run_on_disk(environment, folder, tmp_path):
    sizes = {"train": 32, "validation": 8, "test": 8}
    project = make_project(tmp_path, sizes=sizes, config="BC_LONG = False\n")
    here = project / "here"
    finish(start(project, here, {}), code=0)

    # Perhaps while a checkpoint is written, which has no mark then.
    stop_once(folder / "bc" / "checkpoint_[1-9]", start(project, str(folder), environment), signal.SIGKILL, code=-9)
    stop_once(folder / "bc" / "RESULT.json", start(project, str(folder), environment), signal.SIGTERM, code=42)
    output = finish(start(project, str(folder), environment), code=0)
    assert f"Report: {folder}/report.html" in output

    assert timeless(folder) == timeless(here)
    stores = [ScoredStore.open(place / "grow_1") for place in (folder, here)]
    assert stores[0].rows.equals(stores[1].rows) and stores[0].stats == stores[1].stats
    policies = [formats.open_checkpoint(str(place / "policy")).tensors for place in (folder, here)]
    assert policies[0].keys() == policies[1].keys()
    for name, leaf in policies[0].items():
        np.testing.assert_array_equal(leaf.read(), policies[1][name].read(), err_msg=name)
    for name in ("config.gin", "operative_config.gin", "model-info.txt", "run.json", "report.html"):
        assert (folder / name).is_file(), name
    lines = [[(line["phase"], line["step"]) for line in read_metrics(place)] for place in (folder, here)]
    assert lines[0] == lines[1]
    for file in ("bc.test.jsonl", "improve_1.1.validation.samples.jsonl"):
        assert (folder / "eval" / file).read_bytes() == (here / "eval" / file).read_bytes()
    assert not (project / "gs:").exists()
