"""The commands, through `main`: what users see, what is written, exit codes, and one tiny run from text to report."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
import seqio

from rest_jax import cli, rest
from rest_jax.data import seqio_tasks
from rest_jax.rest import Runner
from rest_jax.tasks import demo, parallel_text

ROOT = Path(__file__).parent.parent
GIN = """
from __gin__ import dynamic_registration
from rest_jax import filters
from rest_jax.data import vocabulary
from rest_jax.models import t5
include 'models/nano.gin'
include 'rewards/chrf.gin'
include 'rest.gin'
MIXTURE_OR_TASK_NAME = 'cli_demo'
TASK_FEATURE_LENGTHS = {'inputs': 32, 'targets': 16}
VOCABULARY = @vocabulary.SentencePieceVocabulary()
vocabulary.SentencePieceVocabulary.sentencepiece_model_file = '{vocabulary}'
CACHE_DIR = '{cache}'
t5.T5Config:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 16
  num_encoder_layers = 1
  num_decoder_layers = 1
TRAIN_STEPS = 4
BATCH_SIZE = 8
WARMUP_STEPS = 2
EVAL_PERIOD = 4
GROW_STEPS = 1
IMPROVE_STEPS = 2
NUM_SAMPLES = 4
SOURCES_PER_CHUNK = 64
IMPROVE_TRAIN_STEPS = 4
IMPROVE_EVAL_PERIOD = 4
SCHEDULE = @filters.TopKSchedule()
filters.TopKSchedule.ks = (2, 1)
EVAL_SAMPLES = 2
SELECTION_SAMPLES = 2
"""


def pairs(count: int) -> list[str]:
    with gzip.open(demo.DATA_DIR / "test.tsv.gz", "rt", encoding="utf-8") as file:
        return ["\t".join(next(file).rstrip("\n").split("\t")[:2]) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """64 demo lines as the task `cli_demo`, a vocabulary made by the command, and run.gin."""
    root = tmp_path_factory.mktemp("cli")
    lines = pairs(64)
    for split, part in (("train", lines[:48]), ("validation", lines[48:56]), ("test", lines[56:])):
        (root / f"{split}.tsv").write_text("\n".join(part) + "\n", encoding="utf-8")
    parallel_text.register_parallel_text(
        "cli_demo",
        splits={split: root / f"{split}.tsv" for split in ("train", "validation", "test")},
        vocabulary=root / "vocab.model",
    )
    arguments = ["--task=cli_demo", "--size=400", f"--output={root / 'vocab.model'}"]
    assert cli.main(["vocab", *arguments]) == 0
    (root / "run.gin").write_text(
        GIN.replace("{vocabulary}", str(root / "vocab.model")).replace("{cache}", str(root / "cache"))
    )
    yield root
    seqio.TaskRegistry.remove("cli_demo")


def use_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight fake devices on two cores would only slow down what is about commands."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    use_one_device(monkeypatch)


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """MODEL_DIR of a whole run, G = 1 and I = 2."""
    model_dir = folder / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_one_device(monkeypatch)
        assert cli.main(["run", f"--gin_file={folder / 'run.gin'}", f"--gin.MODEL_DIR='{model_dir}'"]) == 0
    return model_dir


@pytest.fixture
def refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Runs a command that must exit with 2 and write nothing; returns its message."""

    def _refused(*arguments: str, command: str = "run", gin: str | None = "run.gin", model_dir: bool = True) -> str:
        files = [] if gin is None else [f"--gin_file={folder / gin}"]
        place = [f"--gin.MODEL_DIR='{tmp_path / 'model_dir'}'"] if model_dir else []
        capsys.readouterr()
        assert cli.main([command, *files, *place, *arguments]) == 2
        assert not (tmp_path / "model_dir").exists()
        error = capsys.readouterr().err
        assert error.startswith("rest_jax: ") and "Traceback" not in error
        return error

    return _refused


# A whole run ----------------------------------------------------------------------------------------------------------


def test_run_leaves_what_the_design_lists(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert [phase["name"] for phase in summary["phases"]] == ["bc", "grow_1", "improve_1.1", "improve_1.2", "bc_long"]
    run = json.loads((finished / "run.json").read_text())
    assert {"argv", "start", "hostname", "devices", "versions", "vocabulary_sha256"} <= run.keys()
    given, operative = ((finished / name).read_text() for name in ("config.gin", "operative_config.gin"))
    assert "TRAIN_STEPS = 4" in given
    # Defaults that no gin file names stand in what was used, of functions that training calls too.
    default = "optimizers.adafactor.clipping_threshold"
    assert default in operative and default not in given
    assert (finished / "report.html").is_file() and (finished / "policy").is_dir()
    assert "token_embedder/embedding" in (finished / "model-info.txt").read_text()


@pytest.mark.usefixtures("one_device")
def test_same_command_again_changes_nothing(finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in finished.glob("grow_1/**/*.arrow")}
    assert cli.main(["run", f"--model_dir={finished}"]) == 0
    assert before == {path: path.read_bytes() for path in finished.glob("grow_1/**/*.arrow")}
    assert "5 are finished" not in capsys.readouterr().err
    assert len(json.loads((finished / "run.json").read_text())["continued"]) >= 1


def test_other_configuration_in_the_same_model_dir_is_refused(
    finished: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "config.gin").read_bytes()
    assert cli.main(["run", f"--gin_file={folder / 'run.gin'}", f"--model_dir={finished}", "--gin.NUM_SAMPLES=8"]) == 2
    error = capsys.readouterr().err
    assert "- NUM_SAMPLES = 4" in error and "+ NUM_SAMPLES = 8" in error and "TRAIN_STEPS" not in error
    assert (finished / "config.gin").read_bytes() == before


def test_other_mesh_or_cache_is_the_same_configuration(finished: Path, folder: Path, tmp_path: Path) -> None:
    arguments = [f"--gin_file={folder / 'run.gin'}", f"--model_dir={finished}", "--dry_run"]
    assert cli.main(["run", *arguments, "--gin.MODEL_PARALLEL=2", f"--gin.CACHE_DIR='{tmp_path}'"]) == 0


def test_t5xs_other_ways_to_say_it(
    finished: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", "/elsewhere")
    arguments = [f"--gin_file={folder / 'run.gin'}", f"--model_dir={finished}", f"--tfds_data_dir={tmp_path}"]
    assert cli.main(["run", *arguments, "--dry_run", "--gin_bindings=NUM_SAMPLES=8"]) == 2
    assert "+ NUM_SAMPLES = 8" in capsys.readouterr().err
    assert os.environ["TFDS_DATA_DIR"] == str(tmp_path)


def test_dry_run_prints_the_plan_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir, cache = tmp_path / "model_dir", tmp_path / "cache"
    arguments = [f"--gin_file={folder / 'run.gin'}", f"--model_dir={model_dir}", f"--gin.CACHE_DIR='{cache}'"]
    assert cli.main(["run", *arguments, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "data=8" in out and "8 x cpu" in out
    # 512 pieces x 16 for the embedding and again for the logits, and the layers.
    parameters = int(out.split("parameters  ")[1].split()[0].replace(",", ""))
    assert 2 * 512 * 16 < parameters < 3 * 512 * 16
    assert f"parameters {parameters * 4 / 2**20:.1f} MiB" in out and "optimiser state" in out
    assert "improve_1.2 (from improve_1.1)" in out
    assert not model_dir.exists() and not cache.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_steps_one_by_one_equal_the_run(finished: Path, folder: Path, tmp_path: Path) -> None:
    options = [f"--gin_file={folder / 'run.gin'}", f"--model_dir={tmp_path}"]
    for command in (["train"], ["grow"], ["improve", "--step=1.1"], ["improve"]):
        assert cli.main([command[0], *options, *command[1:]]) == 0
    ours, theirs = (
        {path.name: path.read_bytes() for path in (model_dir / "eval").glob("*.jsonl") if "bc_long" not in path.name}
        for model_dir in (tmp_path, finished)
    )
    assert ours == theirs and len(ours) == 6
    assert cli.main(["grow", *options]) == 0  # nothing is left to do


@pytest.mark.slow
@pytest.mark.usefixtures("one_device")
def test_evaluate_policies_and_checkpoints(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = json.loads((finished / "eval" / "improve_1.1.json").read_text())
    (finished / "eval" / "improve_1.1.json").unlink()
    assert cli.main(["evaluate", f"--model_dir={finished}", "--policy=improve_1.1"]) == 0
    after = json.loads((finished / "eval" / "improve_1.1.json").read_text())
    assert {**before, "seconds": 0} == {**after, "seconds": 0}
    (checkpoint,) = (finished / "bc").glob("checkpoint_*")
    assert cli.main(["evaluate", f"--model_dir={finished}", f"--checkpoint={checkpoint}"]) == 0
    scores = json.loads((finished / "eval" / "checkpoints" / f"bc-{checkpoint.name}.json").read_text())
    bc = json.loads((finished / "eval" / "bc.json").read_text())
    assert all(scores[key] == bc[key] for key in ("reward", "bleu", "chrf", "ter"))
    capsys.readouterr()
    assert cli.main(["evaluate", f"--model_dir={finished}", "--policy=improve_2.1"]) == 2
    assert "legal are bc, improve_1.1, improve_1.2, bc_long" in capsys.readouterr().err


def test_report(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "report.html").unlink()
    assert cli.main(["report", str(finished)]) == 0
    assert capsys.readouterr().out.strip() == str(finished / "report.html")
    assert "<html" in (finished / "report.html").read_text()


@pytest.mark.usefixtures("one_device")
def test_a_step_that_fools_its_reward_raises_an_alarm(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    # As if BC had translated the test split without a fault, and its samples had no reward at all.
    scores = json.loads((run / "eval" / "bc.json").read_text()) | {"reward": 0.0, "bleu": 100.0, "ter": 0.0}
    (run / "eval" / "bc.json").write_text(json.dumps(scores))
    rows = [json.loads(line) for line in (run / "eval" / "bc.test.jsonl").read_text().splitlines()]
    perfect = [json.dumps({**row, "hypothesis": row["reference"]}) + "\n" for row in rows]
    (run / "eval" / "bc.test.jsonl").write_text("".join(perfect))
    (run / "eval" / "improve_1.1.json").unlink()
    capsys.readouterr()
    assert cli.main(["evaluate", f"--model_dir={run}", "--policy=improve_1.1"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "ALARM" in line]
    assert [line[line.index("ALARM") :].split(" got worse")[0] for line in said] == [
        f"ALARM: from bc to improve_1.1 the reward rose from 0.0000 to {_reward(run, 'improve_1.1'):.4f}, but test "
        f"{metric}, which is no part of it,"
        for metric in ("BLEU", "TER") * 2
    ]  # when it was evaluated, and under the table; chrF is the reward
    summary = json.loads((run / "summary.json").read_text())
    assert [alarm["metric"] for alarm in summary["alarms"]] == summary["held_out_metrics"] == ["bleu", "ter"]
    assert cli.main(["report", str(run)]) == 0
    assert (run / "report.html").read_text().count('role="alert">ALARM: from bc to improve_1.1') == 2


@pytest.mark.usefixtures("one_device")
def test_audit_reward_of_a_run_and_of_files(
    finished: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "audit.json"
    sources, references, hypotheses = tmp_path / "de", tmp_path / "en", tmp_path / "hypotheses"
    sources.write_text("Gott sprach.\n" * 3 + "So " * 200 + "\n", encoding="utf-8")
    references.write_text("And God said.\n" * 4, encoding="utf-8")
    hypotheses.write_text("So God.\nThe day.\nAnd he.\nGod.\n", encoding="utf-8")
    texts = [f"--sources={sources}", f"--references={references}"]
    audit_reward = ["audit_reward", f"--model_dir={finished}", *texts]
    assert cli.main([*audit_reward, f"--hypotheses={hypotheses}", f"--output={output}"]) == 0
    said, result = capsys.readouterr().out, json.loads(output.read_text())
    assert (result["base"], result["pairs"], result["too_long"]) == ("hypothesis", 3, 1)  # chrF reads references
    assert said.startswith("Audit of chrf: ") and "\nwrong language " in said
    # BC's own samples, none of which this policy has ended.
    assert cli.main(["audit_reward", f"--model_dir={finished}"]) == 2
    assert "none fits into" in capsys.readouterr().err
    for arguments, words in (
        (texts, "--hypotheses"),
        (texts[:1], "belong together"),
        ([*texts, "--num_pairs=0"], "--num_pairs"),
    ):
        assert cli.main(["audit_reward", f"--model_dir={finished}", *arguments]) == 2
        assert words in capsys.readouterr().err


def _reward(run: Path, policy: str) -> float:
    return json.loads((run / "eval" / f"{policy}.json").read_text())["reward"]


# filter ---------------------------------------------------------------------------------------------------------------


def test_filter_prints_a_row_for_each(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = f"--store={finished / 'grow_1'}"
    assert (
        cli.main(["filter", store, "--threshold", "0.0", "0.99", "--top_k", "1", "--filter", "cap(top_k(3), k=2)"]) == 0
    )
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["filter", "pairs", "sources", "tokens"]
    assert [row.split("  ")[0] for row in rows] == [
        "cap(top_k(k=3), k=2)",
        "threshold(tau=0)",
        "threshold(tau=0.99)",
        "top_k(k=1)",
    ]
    assert rows[3].split()[1] == "48"  # one pair for each of 48 sources
    assert rows[2].split()[1] == "0"


def test_filter_needs_neither_model_nor_tensorflow(finished: Path) -> None:
    program = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("tensorflow", "seqio", "flax", "orbax", "rest_jax.models", "rest_jax.rest"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
from rest_jax.cli import main
sys.exit(main(["filter", "--store={finished / "grow_1"}", "--percentile=50"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "percentile(p=50)" in done.stdout


@pytest.mark.usefixtures("one_device")
def test_rescore_writes_a_store_that_filter_reads(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [f"--gin_file={finished / 'config.gin'}", "--gin_file=rewards/bleu.gin"]
    arguments = [*files, f"--store={finished / 'grow_1'}", f"--output={tmp_path / 'bleu'}", "--stored_only"]
    assert cli.main(["rescore", *arguments]) == 0
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["component", "chrf", "bleu", "total: bleu"]
    assert json.loads((tmp_path / "bleu" / "stats.json").read_text())["reward"] == "bleu"
    assert cli.main(["filter", f"--store={tmp_path / 'bleu'}", "--top_k", "1"]) == 0
    capsys.readouterr()
    assert cli.main(["rescore", *arguments]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("treshold(0.5)", "Did you mean threshold?"),
        ("threshold(", "not an expression"),
        ("0.5", "a number is no filter"),
        ("threshold(limit=1)", "takes (tau)"),
        ("threshold(x)", "neither a number nor a filter"),
        ("percentile(100)", "below 100"),
    ],
)
def test_filter_refuses_an_expression(finished: Path, refused, text: str, message: str) -> None:
    options = {"command": "filter", "gin": None, "model_dir": False}
    assert message in refused(f"--store={finished / 'grow_1'}", f"--filter={text}", **options)


def test_filter_names_a_truncated_part(finished: Path, refused, tmp_path: Path) -> None:
    store = tmp_path / "grow_1"
    store.mkdir()
    for path in (finished / "grow_1").iterdir():
        if path.is_file():
            (store / path.name).write_bytes(path.read_bytes())
    part = next(store.glob("part-*.arrow"))
    part.write_bytes(part.read_bytes()[:-200])
    message = refused(f"--store={store}", command="filter", gin=None, model_dir=False)
    assert part.name in message and "truncated or damaged" in message


# Errors that exit with 2 and write nothing ----------------------------------------------------------------------------


def test_missing_gin_file(refused) -> None:
    assert "Did you mean runs/smoke.gin" in refused("--gin_file=runs/smok.gin", gin=None)
    assert "--gin_file is missing" in refused(gin=None)


def test_unknown_names(refused) -> None:
    assert "Did you mean GROW_STEPS" in refused("--gin.GROW_STEP=1")
    assert "Did you mean TopK?" in refused("--gin.filters.TopKk.k=1")
    assert "Did you mean grow_steps" in refused("--gin.rest.ReST.grow_step=1")


def test_unset_macros_in_one_message(refused) -> None:
    message = refused("--gin_file=rest.gin", gin=None, model_dir=False)
    for name in ("BATCH_SIZE", "MODEL", "MODEL_DIR", "REWARD", "TASK_FEATURE_LENGTHS", "TRAIN_STEPS", "VOCABULARY"):
        assert name in message
    assert message.count("rest_jax: ") == 1


def test_unquoted_string(refused) -> None:
    message = refused("--gin.MODEL_DIR=/tmp/run", model_dir=False)
    assert "--gin.MODEL_DIR=\"'/tmp/run'\"" in message


def test_value_of_a_wrong_type(refused) -> None:
    assert "GROW_STEPS" in refused("--gin.GROW_STEPS='2'") or "ReST" in refused("--gin.GROW_STEPS='2'")


def test_batch_that_the_mesh_does_not_divide(refused) -> None:
    message = refused("--gin.BATCH_SIZE=12")
    assert "BATCH_SIZE=12" in message and "multiple of 8" in message


def test_missing_checkpoint(refused, tmp_path: Path) -> None:
    message = refused(f"--gin.INITIAL_CHECKPOINT_PATH='{tmp_path / 'nowhere'}'")
    assert "INITIAL_CHECKPOINT_PATH" in message and "nowhere" in message


def test_grow_without_a_policy(refused) -> None:
    assert "starts from the policy of bc" in refused(command="grow")
    assert "improve steps are 1.1, 1.2" in refused("--step=2.1", command="improve")
    assert "no finished policy" in refused(command="evaluate")


def other_vocabulary(folder: Path) -> Path:
    """Another vocabulary of as many pieces: the shapes of all parameters are the same."""
    path = folder / "other.model"
    if not path.exists():
        seqio_tasks.train_vocabulary("cli_demo", output=path, size=400, split="test")
    return path


def test_vocabulary_that_is_not_the_tasks(refused, folder: Path) -> None:
    name = "vocabulary.SentencePieceVocabulary.sentencepiece_model_file"
    message = refused(f"--gin.{name}='{other_vocabulary(folder)}'")
    assert "VOCABULARY" in message and "other.model" in message and "cli_demo" in message


def test_vocabulary_that_is_not_the_checkpoints(refused, folder: Path, finished: Path) -> None:
    name = "vocabulary.SentencePieceVocabulary.sentencepiece_model_file"
    parallel_text.register_parallel_text(
        "cli_other",
        splits={split: folder / f"{split}.tsv" for split in ("train", "validation", "test")},
        vocabulary=other_vocabulary(folder),
    )
    try:
        message = refused(
            f"--gin.{name}='{other_vocabulary(folder)}'",
            "--gin.MIXTURE_OR_TASK_NAME='cli_other'",
            f"--gin.INITIAL_CHECKPOINT_PATH='{finished / 'policy'}'",
        )
    finally:
        seqio.TaskRegistry.remove("cli_other")
    assert "INITIAL_CHECKPOINT_PATH" in message and "another vocabulary" in message


def test_checkpoint_of_another_shape(refused, finished: Path) -> None:
    message = refused(f"--gin.INITIAL_CHECKPOINT_PATH='{finished / 'policy'}'", "--gin.t5.T5Config.mlp_dim=32")
    assert "does not fit the model" in message and "mlp/wi_0/kernel" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"eins\tone\nzwei\n", "train.tsv:2: 1 tab-separated column"),
        (b"", "the corpus is empty"),
        (b"eins\tone\nStra\xdfe\tstreet\n", "train.tsv:2: text that is not UTF-8"),
    ],
    ids=["one column", "empty", "latin1"],
)
@pytest.mark.parametrize("options", [(), ("--dry_run",)], ids=["run", "dry run"])
def test_faulty_text(refused, folder: Path, tmp_path: Path, content: bytes, message: str, options: tuple) -> None:
    (tmp_path / "train.tsv").write_bytes(content)
    parallel_text.register_parallel_text(
        "cli_faulty",
        splits={
            "train": tmp_path / "train.tsv",
            "validation": folder / "validation.tsv",
            "test": folder / "test.tsv",
        },
        vocabulary=folder / "vocab.model",
    )
    try:
        assert message in refused("--gin.MIXTURE_OR_TASK_NAME='cli_faulty'", *options)
    finally:
        seqio.TaskRegistry.remove("cli_faulty")


def test_unknown_task(refused) -> None:
    assert "did you mean 'cli_demo'" in refused("--gin.MIXTURE_OR_TASK_NAME='cli_dem'")


def test_gin_where_there_is_none(refused) -> None:
    assert "not configured by gin" in refused("--gin.X=1", "--store=x", command="filter", gin=None, model_dir=False)


# The rest -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    ["run", "train", "grow", "improve", "evaluate", "translate", "infer", "filter", "rescore", "vocab", "report"],
)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    assert "usage: rest_jax" in capsys.readouterr().out


def test_unknown_option_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--gin_fil=x"]) == 2
    assert "--gin_fil" in capsys.readouterr().err


def test_unexpected_error_exits_1_with_its_traceback(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise FloatingPointError("the loss is nan at step 3")

    monkeypatch.setattr(Runner, "run", fail)
    assert cli.main(["train", f"--gin_file={folder / 'run.gin'}", f"--model_dir={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "nan at step 3" in error


def test_sigterm_saves_and_exits_42(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    options = [f"--gin_file={folder / 'run.gin'}", f"--model_dir={tmp_path}"]
    whole = Runner.run

    def run(runner: Runner, phases: object = None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        whole(runner, phases)

    monkeypatch.setattr(rest.Runner, "run", run)
    assert cli.main(["train", *options]) == 42
    assert "Run the same command to continue" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not (tmp_path / "bc").exists()


def test_second_sigterm_ends_the_process() -> None:
    program = """
import os, signal, time
from rest_jax.preemption import stop_on_sigterm
with stop_on_sigterm() as stop_requested:
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop_requested()
    print("asked once", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "asked once\n"
    assert done.returncode == -signal.SIGTERM
