"""The command `compile` on fake devices of this machine: every program, a learned reward, what does not fit, --auto."""

import dataclasses
import json

import jax
import pytest

from rest_jax import filters
from rest_jax.aot import auto, command
from rest_jax.data.parallel import ParallelData
from rest_jax.data.vocabulary import ByteVocabulary
from rest_jax.errors import UserError
from rest_jax.evaluation.evaluate import Evaluation
from rest_jax.grow import Growing
from rest_jax.improve import Improving
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.models.t5 import T5Config, Transformer
from rest_jax.optimizers import adafactor
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.rest import ReST
from rest_jax.rewards import regressor
from rest_jax.rewards.joined_input import WITHOUT_REFERENCE, JoinedInput
from rest_jax.sampling import memory
from rest_jax.sampling.scored import Sampling
from rest_jax.training import Training

BYTES = ByteVocabulary()
POLICY = T5Config(
    vocab_size=264, emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=8,
    mlp_dim=16,
)  # fmt: skip
# Larger than the policy, so that it shows in the memory plan.
REWARD = dataclasses.replace(POLICY, emb_dim=64, mlp_dim=512)
NAMES = ["bc", "grow", "improve", "evaluate"]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    directory = tmp_path_factory.mktemp("reward")
    files = regressor.RegressorFiles(
        config=REWARD,
        joined=JoinedInput.from_template(WITHOUT_REFERENCE, BYTES),
        length=70,
        vocabulary_sha256=BYTES.sha256,
    )
    params = jax.jit(lambda key: regressor.initial_regressor(files.module, key))(jax.random.key(0))
    regressor.write(directory, files=files, params=params, vocabulary=BYTES, facts={})
    return regressor.Regressor(str(directory))


@pytest.fixture
def config(reward, tmp_path):
    """Nothing of it is there: neither text, nor a policy."""
    sampling = Sampling(num_samples=2, sources_per_chunk=8)
    training = Training(steps=1, batch_size=8, learning_rate=1e-3, optimizer=adafactor)
    return ReST(
        model_dir=str(tmp_path / "run"),
        model=EncoderDecoderModel(Transformer(POLICY), BYTES, BYTES),
        data=ParallelData(task="nowhere", vocabulary=BYTES, lengths={"inputs": 16, "targets": 16}),
        reward=reward,
        partitioner=Partitioner(make_mesh(model=2)),
        bc=training,
        growing=Growing(sampling=sampling, filter=filters.Threshold(0.0)),
        improving=Improving(training=training, schedule=filters.AboveMean()),
        evaluation=Evaluation(sampling=sampling),
    )


def test_every_program_of_a_run_is_compiled_and_a_learned_reward_counts(config, tmp_path, capsys):
    command.run(config, phases=command.PHASES, json_file=str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["mesh"] == {"replica": 1, "data": 4, "model": 2}
    programs = {each["program"]: each for each in found["programs"]}
    assert list(programs)[:3] == ["bc", "grow", "improve"] and len(programs) > 3
    assert all(each["fits"] and each["flops"] > 0 and each["total"] > 0 for each in programs.values())
    parts = dict(programs["grow"]["sampling_parts"])
    whole = sum(leaf.dtype.itemsize * leaf.size for leaf in jax.tree.leaves(reward_arrays(config)))
    assert whole / 2 < parts["reward's parameters"] < whole  # its kernels lie over 'model' too
    # A processor's clock is in no table: no time, rather than one of nothing.
    assert "seconds" not in programs["grow"] and not programs["grow"]["timed"]
    assert "time         not known" in capsys.readouterr().out


def reward_arrays(config):
    alone = Partitioner(make_mesh(devices=jax.devices()[:1]))
    return regressor.checkpointer.put_params(config.reward.init(BYTES), alone)


def test_what_does_not_fit_is_named_after_all_were_tried(config, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "device_bytes", lambda device: 100_000)
    with pytest.raises(UserError, match="grow does not fit: "):
        command.run(config, phases=("grow", "improve"), json_file=str(tmp_path / "found.json"))
    grow, improve = json.loads((tmp_path / "found.json").read_text())["programs"]
    assert (grow["program"], grow["fits"]) == ("grow", False) and "reward's parameters" in grow["reason"]
    assert improve["fits"]
    with pytest.raises(UserError, match="No mesh of 8 devices was found that holds grow:"):
        command.search(config, phases=("grow",), json_file=str(tmp_path / "ranked.json"))
    assert json.loads((tmp_path / "ranked.json").read_text())["ranked"] == {"grow": []}


def test_the_search_ranks_the_meshes_that_the_model_divides_by(config, tmp_path, capsys):
    widths = [choice.model_parallel for choice in auto.candidates(config, phases=("improve",))]
    assert widths == [1, 1, 2, 2]  # of two heads; parameters whole, and over 'data'
    split = ("embed", "data")
    rules = [choice.config.partitioner.rules for choice in auto.candidates(config, phases=("improve",))]
    assert [split in each for each in rules] == [False, True, False, True]
    assert {tuple(rule for rule in each if rule != split) for each in rules} == {config.partitioner.rules}
    command.search(config, phases=("improve",), json_file=str(tmp_path / "ranked.json"))
    ranked = json.loads((tmp_path / "ranked.json").read_text())["ranked"]["improve"]
    assert len(ranked) == 4
    assert [each["roofline_seconds"] for each in ranked] == sorted(each["roofline_seconds"] for each in ranked)
    assert "improve 1. MODEL_PARALLEL=" in capsys.readouterr().out


def test_a_phase_that_no_mesh_divides_is_named_though_others_are_ranked(config, tmp_path):
    config = dataclasses.replace(config, bc=dataclasses.replace(config.bc, batch_size=7))
    with pytest.raises(UserError, match="that holds bc:"):
        command.search(config, phases=("bc", "improve"), json_file=str(tmp_path / "ranked.json"))
    assert len(json.loads((tmp_path / "ranked.json").read_text())["ranked"]["improve"]) == 4
