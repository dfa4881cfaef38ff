"""gin as users meet it: shipped files parse, names are checked, a configuration is told apart from another."""

import logging
from pathlib import Path

import gin
import pytest

from rest_jax import config
from rest_jax.errors import UserError
from rest_jax.filters import ThresholdGrid
from rest_jax.rest import ReST

ROOT = Path(__file__).parent.parent
RUNS = sorted(path.name for path in (ROOT / "gin" / "runs").glob("*.gin"))
PLACE = "MODEL_DIR='/nowhere'"
# What runs/own_text.gin leaves to its user, and what is harmless for the others to be given again.
ANY = [PLACE, "MIXTURE_OR_TASK_NAME='demo_de_en'", "TASK_MODULES=('rest_jax.tasks.demo',)"]
VOCABULARY = "rest_jax://tasks/demo_data/vocab.model"


@pytest.mark.parametrize("name", RUNS)
def test_shipped_runs_build(name: str) -> None:
    macros = {"VOCABULARY_FILE": f"'{VOCABULARY}'", "REWARD_DIR": "'/nowhere/reward'"}
    text = (ROOT / "gin" / "runs" / name).read_text()
    extra = [f"{macro}={value}" for macro, value in macros.items() if macro in text]
    config.load(gin_files=[f"runs/{name}"], bindings=[*ANY, *extra])
    assert isinstance(config.build(ReST), ReST)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "gin" / "models").glob("*.gin")))
def test_shipped_models_fit_into_a_run(name: str) -> None:
    required = ["VOCABULARY=None", "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}", "TRAIN_STEPS=1", "BATCH_SIZE=1"]
    config.load(gin_files=[f"models/{name}", "rewards/chrf.gin", "rest.gin"], bindings=[*ANY[:2], *required])


def test_given_text_reads_back_to_itself(tmp_path: Path) -> None:
    config.load(gin_files=["runs/smoke.gin"], bindings=[PLACE])
    text = config.given_text()
    (tmp_path / "config.gin").write_text(text)
    config.load(gin_files=[str(tmp_path / "config.gin")], bindings=[])
    assert config.given_text() == text


def test_binding_may_name_what_no_file_mentions() -> None:
    bindings = [PLACE, "SCHEDULE=@filters.ThresholdGrid()", "filters.ThresholdGrid.taus=(0.5, 0.6)"]
    config.load(gin_files=["runs/smoke.gin"], bindings=bindings)
    assert config.build(ReST).improving.schedule == ThresholdGrid((0.5, 0.6))


def test_later_bindings_win_and_search_paths_come_before_the_package(tmp_path: Path) -> None:
    (tmp_path / "mine.gin").write_text("include 'runs/smoke.gin'\nNUM_SAMPLES = 3\n")
    config.load(
        gin_files=["mine.gin"], bindings=[PLACE, "NUM_SAMPLES=4", "NUM_SAMPLES=5"], search_paths=[str(tmp_path)]
    )
    assert config.build(ReST).growing.sampling.num_samples == 5
    with pytest.raises(UserError, match="'mine.gin' is in none of"):
        config.load(gin_files=["mine.gin"], bindings=[])


def test_fallbacks_serve_only_what_is_not_set() -> None:
    fallbacks = {"MODEL_DIR": "'a'", "NUM_SAMPLES": "1"}
    config.load(gin_files=["runs/smoke.gin"], bindings=[], fallbacks=fallbacks)
    rest = config.build(ReST)
    assert rest.model_dir == "a" and rest.growing.sampling.num_samples == 8


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("GROW_STEP = 3", ["set but nothing uses", "GROW_STEP", "Did you mean GROW_STEPS"]),
        ("MODEL_DIR = /tmp/run", ["line 5", "string without its quotes"]),
        ("rest.ReST.grow_step = 3", ["Did you mean grow_steps", "line 5"]),
        ("filtres.TopK.k = 3", ["'filtres' was not provided", "Did you mean filters?"]),
        ("SCHEDULE = @filters.TopKSchedul()", ["no attribute TopKSchedul", "line 5", "Did you mean TopKSchedule"]),
        ("include 'runs/smokes.gin'", ["Unable to open file", "Did you mean runs/smoke.gin"]),
        ("NUM_SAMPLES = %SAMPELS", ["required", "SAMPELS"]),
    ],
)
def test_faults_in_a_file(tmp_path: Path, text: str, messages: list[str]) -> None:
    file = tmp_path / "mine.gin"
    head = "from __gin__ import dynamic_registration\nfrom rest_jax import filters\nfrom rest_jax import rest\n"
    file.write_text(f"{head}include 'runs/smoke.gin'\n{text}\n")
    with pytest.raises(UserError) as caught:
        config.load(gin_files=[str(file)], bindings=[PLACE])
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("NUM_SAMPLES", "write --gin.NAME=value"),
        ("NUM_SAMPLE=3", "Did you mean NUM_SAMPLES"),
        ("num_samples=3", "Did you mean NUM_SAMPLES"),
        ("CACHE_DIR=~/cache", "--gin.CACHE_DIR=\"'~/cache'\""),
        ("GROW_STEPS=two", "--gin.GROW_STEPS=\"'two'\""),
        ("filters.TopK.kk=3", "Did you mean k?"),
        ("filters.TopK.limit=3", "It has k."),
    ],
)
def test_faults_in_a_binding(binding: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load(gin_files=["runs/smoke.gin"], bindings=[PLACE, binding])
    assert message in str(caught.value)
    assert "bindings string" not in str(caught.value)


def test_values_that_do_not_fit_name_the_call() -> None:
    config.load(gin_files=["runs/smoke.gin"], bindings=[PLACE, "GROW_STEPS='2'"])
    with pytest.raises(UserError, match=r"does not fit together(.|\n)*ReST"):
        config.build(ReST)
    config.load(gin_files=["runs/smoke.gin"], bindings=[PLACE, "TEMPERATURE=-1.0"])
    with pytest.raises(UserError, match=r"LogitProcessing.temperature is -1.0") as caught:
        config.build(ReST)
    assert "In call to configurable" not in str(caught.value)


def test_different_lines_leave_out_places_and_comments() -> None:
    config.load(gin_files=["runs/smoke.gin"], bindings=[PLACE])
    before = config.given_text()
    config.load(gin_files=["runs/smoke.gin"], bindings=["MODEL_DIR='x'", "MODEL_PARALLEL=2", "CACHE_DIR='y'"])
    assert config.given_text() != before
    assert not config.different_lines(before, config.given_text())
    config.load(gin_files=["runs/smoke.gin"], bindings=[PLACE, "RANDOM_SEED=1"])
    assert config.different_lines(before, config.given_text()) == ["- RANDOM_SEED = 0", "+ RANDOM_SEED = 1"]


def test_search_for_files_is_silent_and_leaves_logging_alone(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), list(root.filters), list(gin.config._LOCATION_PREFIXES))
    config.load(gin_files=["runs/smoke.gin"], bindings=[PLACE])
    assert not capfd.readouterr().err and "Path not found" not in caplog.text
    assert (list(root.handlers), list(root.filters), list(gin.config._LOCATION_PREFIXES)) == before
