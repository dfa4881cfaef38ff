"""T5X's macros that are nothing here, or something else: a note or the line to write, never gin's own trace."""

import sys
from pathlib import Path

import pytest

from rest_jax import cli, config, paths, t5x_macros
from rest_jax.errors import UserError
from rest_jax.rest import ReST

PLACE = "MODEL_DIR='/nowhere'"


@pytest.mark.parametrize("name", sorted(t5x_macros.IGNORED))
def test_macros_without_a_meaning_are_noted_on_the_command_line_and_in_a_file(tmp_path: Path, name: str) -> None:
    plain = config.load(gin_files=["runs/smoke.gin"], bindings=[PLACE])
    assert plain == []
    bound = config.load(gin_files=["runs/smoke.gin"], bindings=[PLACE, f"{name}=1"])
    (tmp_path / "mine.gin").write_text(f"include 'runs/smoke.gin'\n{name} = 1\n")
    from_file = config.load(gin_files=[str(tmp_path / "mine.gin")], bindings=[PLACE])
    assert bound == from_file == [t5x_macros.note(name)]
    assert name in bound[0]


@pytest.mark.parametrize("name", sorted(t5x_macros.INSTEAD))
def test_macros_of_another_name_are_answered_with_ours(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as bound:
        config.load(gin_files=["runs/smoke.gin"], bindings=[PLACE, f"{name}='x'"])
    (tmp_path / "mine.gin").write_text(f"include 'runs/smoke.gin'\n{name} = 'x'\n")
    with pytest.raises(UserError) as from_file:
        config.load(gin_files=[str(tmp_path / "mine.gin")], bindings=[PLACE])
    for caught in (bound, from_file):
        assert f"{name}: {t5x_macros.INSTEAD[name]}" in str(caught.value)


def test_a_note_is_printed_and_the_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gin_file=runs/smoke.gin", f"--model_dir={tmp_path / 'run'}", "--gin.USE_CACHED_TASKS=False"]
    # The checkpoint that is missing is looked for after the configuration has been read.
    assert cli.main(["run", *arguments, "--gin.INITIAL_CHECKPOINT_PATH='/nowhere'"]) == 2
    error = capsys.readouterr().err
    assert f"rest_jax: {t5x_macros.note('USE_CACHED_TASKS')}\n" in error and "'/nowhere'" in error


def test_every_macro_of_t5xs_that_has_a_meaning_is_ours_too() -> None:
    """The list of the T5X interface, less those that are answered."""
    meant = {
        "MODEL VOCABULARY OPTIMIZER DROPOUT_RATE Z_LOSS LABEL_SMOOTHING LOSS_NORMALIZING_FACTOR MIXTURE_OR_TASK_NAME "
        "TASK_FEATURE_LENGTHS TRAIN_STEPS EVAL_PERIOD MODEL_DIR BATCH_SIZE RANDOM_SEED INITIAL_CHECKPOINT_PATH"
    }
    config.load(gin_files=["runs/smoke.gin"], bindings=[PLACE])
    assert set(" ".join(meant).split()) <= config._used_macros()


def test_t5xs_run_files_and_a_missing_t5x_are_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "finetune.gin").write_text(
        "from __gin__ import dynamic_registration\nimport __main__ as train_script\ntrain_script.train.eval_steps = 1\n"
    )
    with pytest.raises(UserError, match="Include its model file, then rest.gin"):
        config.load(gin_files=[str(tmp_path / "finetune.gin")], bindings=[])
    monkeypatch.setitem(sys.modules, "t5x", None)  # as if it were not installed
    (tmp_path / "base.gin").write_text("from __gin__ import dynamic_registration\nfrom t5x import models\n")
    with pytest.raises(UserError, match="docs/t5x.md"):
        config.load(gin_files=[str(tmp_path / "base.gin")], bindings=[])


def test_t5xs_own_gin_files_are_found_by_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "t5x", raising=False)
    (tmp_path / "t5x" / "examples").mkdir(parents=True)
    (tmp_path / "t5x" / "__init__.py").write_text("raise RuntimeError('looking for gin files imports nothing')\n")
    (tmp_path / "t5x" / "examples" / "base.gin").write_text("include 'runs/smoke.gin'\nNUM_SAMPLES = 5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert paths.t5x_search_paths() == [str(tmp_path)]
    config.load(gin_files=["t5x/examples/base.gin"], bindings=[PLACE])
    assert config.build(ReST).growing.sampling.num_samples == 5
