"""The sampling benchmark runs, and its weights do what it says of them."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.sampling import LogitProcessing, decode
from tests.benchmarks.sampling import compare, engines, growth, weights
from tests.benchmarks.sampling.setting import Setting

CONFIG = t5.T5Config(256, 64, 2, 1, 2, 16, 64)
SOURCES = np.random.default_rng(0).integers(2, 256, (4, 6)).astype(np.int32)


def drawn_lengths(params, *, num_samples, max_length, temperature):
    model = EncoderDecoderModel(t5.Transformer(CONFIG), None, None)
    samples = jax.jit(
        lambda params: decode(
            model, params, encoder_input_tokens=SOURCES, source_ids=np.arange(4), num_samples=num_samples,
            max_length=max_length, processing=LogitProcessing(temperature=temperature),
        )
    )(params)  # fmt: skip
    return np.asarray(samples.lengths - samples.hit_eos).ravel()


@pytest.mark.slow
def test_samples_end_as_the_lengths_that_were_given():
    model = EncoderDecoderModel(t5.Transformer(CONFIG), None, None)
    wanted = np.random.default_rng(1).gamma(6.0, 2.0, 4000).astype(np.int64)  # mean 11.5
    params = weights.random_params(model, seed=0, max_length=32, lengths=wanted, temperature=0.7)
    drawn = drawn_lengths(params, num_samples=500, max_length=32, temperature=0.7)
    assert abs(drawn.mean() / np.minimum(wanted, 32).mean() - 1) < 0.1
    np.testing.assert_allclose(
        np.percentile(drawn, [10, 25, 50, 75, 90]), np.percentile(wanted, [10, 25, 50, 75, 90]), atol=1.5
    )


def test_samples_do_not_end_where_no_lengths_are_given():
    model = EncoderDecoderModel(t5.Transformer(CONFIG), None, None)
    params = weights.random_params(model, seed=0, max_length=12)
    assert (drawn_lengths(params, num_samples=100, max_length=12, temperature=1.0) == 12).all()


def test_flops_are_the_formulas():
    # Two samples of 3 and 4 steps, of one source of 5: D 64, A 32, F 64, V 256; one encoder and two decoder layers.
    layer, steps, pairs = 8 * 64 * 32 + 6 * 64 * 64, 3 + 4, 6 + 10
    decoder = 2 * (steps * (layer + 4 * 64 * 32 + 4 * 32 * 5) + 4 * 32 * pairs)
    encoder = layer * 5 + 4 * 32 * 25 + 2 * 4 * 64 * 32 * 5
    flops = compare.sample_flops(CONFIG, steps=np.array([3, 4]), source_length=5, num_samples=2)
    assert flops == decoder + steps * 2 * 64 * 256 + encoder


@pytest.mark.slow
def test_memory_of_sources_is_read_off_the_loop():
    setting = Setting(model="", sources=4, target_length=6)
    measured = growth.memory(setting, EncoderDecoderModel(t5.Transformer(CONFIG), None, None))["rows"]
    once = measured[0]["keys_and_values_once"]
    assert once == 2 * 2 * 32 * 4 * 4 * measured[0]["source_length"]  # keys, values; layers; A; bytes; sources
    assert all(once <= row["source_bytes"] < 3 * once for row in measured)
    with pytest.raises(ValueError, match="no loop"):
        growth.loop_bytes("%while.1 = (s32[], f32[4,6]{1,0}) while(%tuple)", length=7)


def test_tokens_before_eos_are_counted():
    tokens = np.array([[5, 6, 1, 0], [5, 6, 7, 8], [1, 0, 0, 0]])
    np.testing.assert_array_equal(engines._before_eos(tokens), [2, 4, 0])


@pytest.mark.slow
def test_the_command_writes_what_it_measured(tmp_path):
    sizes = {"sources": 2, "samples": 4, "source_length": 8, "target_length": 8, "rounds": 2}
    flags = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, "-m", "tests.benchmarks.sampling", "--model=nano", *flags, "--real_lengths", "--peers="]
    done = subprocess.run([*command, f"--json={tmp_path / 'result.json'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    ours = result["engines"]["rest_jax"]
    assert ours["tokens_per_second"] > 0 and ours["times_ours"] == 1 and 0 < ours["share"] < 1
    assert len(ours["tokens_per_second_of_rounds"]) == 2 and 0 < ours["mean_length"] <= 8
    assert ours["host_peak"] > 1e7 and ours["compile_seconds"] > 0
    assert "rest_jax" in done.stdout and "limit" in done.stdout


def test_a_peer_that_was_named_and_is_not_there_is_refused(monkeypatch):
    from tests.benchmarks.sampling import __main__ as command

    monkeypatch.setitem(command.PACKAGES, "t5x", ("no_such_package", "install it so"))
    with pytest.raises(SystemExit, match="install it so"):
        command.chosen_peers("t5x")
    with pytest.raises(SystemExit, match="none of"):
        command.chosen_peers("t6x")
    assert "t5x" not in command.chosen_peers(None)
