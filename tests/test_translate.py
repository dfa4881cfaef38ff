"""Translating lines: one in, one out, in order, whatever the lines are; and the same by beam and by sampling."""

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import sentencepiece

from rest_jax import cli, config, run_files, translate
from rest_jax.checkpoints import checkpointer
from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.errors import UserError
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.rest import ReST
from rest_jax.sampling import LogitProcessing, Sampling

GIN = """
include 'runs/demo_bc.gin'
t5.T5Config:
  emb_dim = 16
  num_heads = 2
  head_dim = 8
  mlp_dim = 16
  num_encoder_layers = 1
  num_decoder_layers = 1
TASK_FEATURE_LENGTHS = {'inputs': 24, 'targets': 8}
MODEL_DIR = '%s'
"""
LINES = [
    "Im Anfang schuf Gott",
    "",
    "Licht",
    "  ",
    "Und die Erde war wüst und leer, " * 4,
    "東京 \u2028 \x85 Licht",
    "Licht",
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of random parameters beside its configuration, as a run leaves it."""
    root = tmp_path_factory.mktemp("translate") / "run"
    (root.parent / "run.gin").write_text(
        "from __gin__ import dynamic_registration\nfrom rest_jax.models import t5\n" + GIN % root
    )
    config.load(gin_files=[str(root.parent / "run.gin")], bindings=[])
    rest = config.build(ReST)
    shapes = {"encoder_input_tokens": (1, 1), "decoder_input_tokens": (1, 1)}
    params = jax.jit(lambda: rest.model.get_initial_variables(jax.random.key(0), shapes)["params"])()
    sha256 = rest.data.vocabulary.sha256
    run_files.write_run_files(
        root,
        given=config.given_text(),
        operative=config.operative_text(),
        argv=["rest_jax"],
        facts={"vocabulary_sha256": sha256},
    )
    checkpointer.save_params(root / "policy", params)
    return root


@pytest.fixture
def run(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Translates lines by the command; returns what it printed."""

    def _run(lines: Sequence[str], *arguments: str, code: int = 0) -> SimpleNamespace:
        (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        options = [f"--model_dir={model_dir}", "--sources_per_chunk=8", *arguments]
        capsys.readouterr()
        assert cli.main(["translate", str(tmp_path / "in.txt"), *options]) == code
        captured = capsys.readouterr()
        return SimpleNamespace(lines=captured.out.split("\n")[:-1], error=captured.err)

    return _run


def test_one_line_in_one_line_out_in_order(run) -> None:
    done = run(LINES)
    assert len(done.lines) == len(LINES)
    assert [bool(line) for line in done.lines] == [bool(line.strip()) for line in LINES]
    assert done.lines[2] == done.lines[6]
    # A line's translation does not depend on its neighbours.
    assert [run([line]).lines[0] for line in LINES] == done.lines
    assert "1 line(s) have more than 24 tokens and were cut: 5" in done.error


def test_blocks_change_nothing(run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"Licht {number}" for number in range(20)]
    whole = run(lines, "--num_samples=2").lines
    monkeypatch.setattr(translate, "BLOCK_CHUNKS", 1)
    assert run(lines, "--num_samples=2").lines == whole


def test_samples_are_json_lines(run) -> None:
    rows = [json.loads(line) for line in run(LINES, "--num_samples=3").lines]
    assert [row["source"] for row in rows] == LINES
    for row in rows:
        assert len(row["samples"]) == len(row["log_probs"]) == 3
        assert all(p < 0 for p in row["log_probs"]) if row["source"].strip() else row["log_probs"] == [0, 0, 0]
    assert len(set(rows[0]["samples"])) > 1
    again = [json.loads(line) for line in run(LINES, "--num_samples=3").lines]
    other = [json.loads(line) for line in run(LINES, "--num_samples=3", "--seed=1").lines]
    assert again == rows and other != rows


def test_beam_gives_its_best_first(run) -> None:
    rows = [json.loads(line) for line in run(LINES[:1], "--num_samples=4", "--beam_size=4", "--beam_alpha=0").lines]
    assert rows[0]["log_probs"] == sorted(rows[0]["log_probs"], reverse=True)
    assert run(LINES[:1], "--beam_size=4", "--beam_alpha=0").lines == rows[0]["samples"][:1]


def test_a_target_prefix_is_forced_and_left_out(run, monkeypatch: pytest.MonkeyPatch) -> None:
    free, forced = run(LINES).lines, run(LINES, "--target_prefix=das ").lines
    assert forced != free and not any(line.startswith("das") for line in forced)
    monkeypatch.setattr(translate, "without_prefix", lambda text, sampling: text)
    whole = run(LINES, "--target_prefix=das ").lines
    assert all(line.startswith("das") for line in whole if line)
    assert [line.removeprefix("das").lstrip() for line in whole] == forced


def test_standard_input_and_a_checkpoint_without_a_gin_file(
    run, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = run(LINES).lines
    text = io.BytesIO("\r\n".join(LINES).encode())  # Windows' line ends, and none at the end
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=text))
    assert cli.main(["translate", f"--checkpoint={model_dir / 'policy'}", "--sources_per_chunk=8"]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == expected


def test_output_file_is_whole_or_absent(
    run, tmp_path: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.txt"
    expected = run(LINES).lines
    assert not run(LINES, f"--output={output}").lines
    assert output.read_text(encoding="utf-8") == "".join(f"{line}\n" for line in expected)
    before = output.read_bytes()
    (tmp_path / "bad.txt").write_bytes(b"Licht\nStra\xdfe\n")
    options = [f"--model_dir={model_dir}", f"--output={output}"]
    assert cli.main(["translate", str(tmp_path / "bad.txt"), *options]) == 2
    assert "bad.txt:2: text that is not UTF-8" in capsys.readouterr().err
    assert output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "in.txt", "out.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policy=improve_1.1"], "'improve_1.1'"),
        (["--policy=bc", "--checkpoint=x"], "exclude each other"),
        (["--num_samples=0"], "at least 1"),
        (["--beam_size=0"], "1 (greedy"),
        (["--beam_size=2", "--num_samples=3"], "beam_size is 2"),
        (["--num_samples=2", "--top_p=0"], "top_p"),
        (["--sources_per_chunk=12"], "multiple of 8"),
        (["--target_prefix=" + 40 * "Licht "], "fewer tokens than a translation may have"),
        (["--output=/nonexistent/x"], "folder that exists"),
    ],
)
def test_refusals(run, arguments: list[str], message: str) -> None:
    assert message in run(["Licht"], *arguments, code=2).error


def test_missing_input_checkpoint_or_configuration(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (["nowhere.txt", f"--model_dir={model_dir}"], "'nowhere.txt' cannot be read"),
        ([], "needs --checkpoint PATH, or --model_dir"),
        ([f"--checkpoint={tmp_path}"], "no config.gin stands beside"),
        ([f"--model_dir={tmp_path}"], "has no config.gin yet"),
        ([f"--model_dir={model_dir}", f"--checkpoint={tmp_path}"], "is no checkpoint"),
    ):
        assert cli.main(["translate", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_line_ends_in_a_translation_are_blanks() -> None:
    assert translate._one_line("a\nb\r\nc") == "a b  c"


def test_lines_end_at_line_feeds_alone() -> None:
    file = io.BytesIO("a\u2028b\x85c\n\nd".encode())
    assert list(translate.read_lines(file, name="x")) == ["a\u2028b\x85c", "", "d"]
    with pytest.raises(UserError, match="x:1"):
        list(translate.read_lines(io.BytesIO(b"\xff"), name="x"))


@pytest.mark.slow
def test_a_target_tag_stands_before_each_line_and_the_vocabularys_own_eos_behind(tmp_path: Path) -> None:
    # As in MADLAD-400: unk 0, EOS 2, and a piece for each target language.
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20),
        model_prefix=str(tmp_path / "tags"),
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=["<2en>", "<2de>"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    vocabulary = SentencePieceVocabulary(str(tmp_path / "tags.model"))
    network = t5.T5Config(
        vocab_size=None, emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=8, mlp_dim=16
    )
    model = EncoderDecoderModel(t5.Transformer(network), vocabulary, vocabulary)
    shapes = {"encoder_input_tokens": (1, 1), "decoder_input_tokens": (1, 1)}
    params = model.get_initial_variables(jax.random.key(0), shapes)["params"]

    def translation(tag: str) -> translate.Translation:
        translator = translate.Translator(
            model=model,
            params=params,
            partitioner=Partitioner(make_mesh()),
            sampling=Sampling(num_samples=1, sources_per_chunk=8, processing=LogitProcessing(temperature=0.0)),
            source_length=32,
            target_length=6,
            prefix=f"{tag} ",
        )
        return next(translator.translate(["Im Anfang"]))

    tokens = [*vocabulary.encode("<2de> Im Anfang"), 2]
    assert [vocabulary.id_to_piece(token) for token in tokens].count("<2de>") == 1
    sources = np.zeros((1, 32), np.int32)
    sources[0, : len(tokens)] = tokens
    batch = {"encoder_input_tokens": sources, "decoder_input_tokens": np.zeros((1, 6), np.int32)}
    best, aux = model.predict_batch_with_aux(params, batch)
    found = translation("<2de>")
    assert found.texts == (vocabulary.decode(best[0].tolist()),)
    np.testing.assert_allclose(found.log_probs[0], aux["scores"][0], rtol=1e-5)
    assert translation("<2en>").log_probs != found.log_probs
