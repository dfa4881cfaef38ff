"""A trained reward's directory, and what it gives in the graph."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from rest_jax.checkpoints import checkpointer
from rest_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary
from rest_jax.errors import UserError
from rest_jax.models.regressor import regress
from rest_jax.models.t5 import T5Config
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.rewards import regressor
from rest_jax.rewards.base import check_reward
from rest_jax.rewards.joined_input import IN_DECODER, WITH_REFERENCE, WITHOUT_REFERENCE, JoinedInput

BYTES, DEMO = ByteVocabulary(), SentencePieceVocabulary("rest_jax://tasks/demo_data/vocab.model")
CONFIG = T5Config(
    vocab_size=384, emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=8, mlp_dim=16
)
SOURCES = ["Am Anfang schuf Gott", "Licht", "Es werde"]
SAMPLES = [["In the beginning", "At first"], ["Light", "light and light"], ["Let there be", ""]]


def ids(texts: list[str], length: int, vocabulary=BYTES) -> np.ndarray:
    rows = np.zeros((len(texts), length), np.int32)
    for row, text in zip(rows, texts, strict=True):
        tokens = [*vocabulary.encode(text), vocabulary.eos_id][:length]
        row[: len(tokens)] = tokens
    return rows


def reward_batch(*, rows: slice = slice(None), length: int = 24) -> dict[str, np.ndarray]:
    sources = ids(SOURCES, length)[rows]
    return {
        "samples": np.stack([ids(texts, length) for texts in SAMPLES])[rows],
        "sources": sources,
        "references": ids([texts[0] for texts in SAMPLES], length)[rows],
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward")
    return write(path, WITHOUT_REFERENCE)


def write(path, template: str, vocabulary=BYTES, *, seed: int = 0) -> str:
    files = regressor.RegressorFiles(
        config=dataclasses.replace(CONFIG, vocab_size=vocabulary.vocab_size),
        joined=JoinedInput.from_template(template, vocabulary),
        length=70,
        vocabulary_sha256=vocabulary.sha256,
    )
    params = jax.jit(lambda key: regressor.initial_regressor(files.module, key))(jax.random.key(seed))
    regressor.write(path, files=files, params=params, vocabulary=vocabulary, facts={"labels": "none"})
    return str(path)


def on_device(params):
    return checkpointer.put_params(params, Partitioner(make_mesh(devices=jax.devices()[:1])))


def scores(directory: str, batch, *, vocabulary=BYTES, **fields) -> np.ndarray:
    reward = regressor.Regressor(directory, **fields)
    params = on_device(reward.init(vocabulary))
    return np.asarray(reward.combine(jax.jit(reward.score)(params, batch)))


def test_scores_are_the_networks_on_the_joined_text(directory):
    files = regressor.read(directory)
    assert files.config == dataclasses.replace(CONFIG, vocab_size=BYTES.vocab_size)
    params = on_device(regressor.Regressor(directory).init(BYTES))["params"]
    found = scores(directory, reward_batch())
    network = jax.jit(lambda tokens: regress(files.module, params, tokens)[0, 0])
    for row, source in enumerate(SOURCES):
        for column, sample in enumerate(SAMPLES[row]):
            tokens = files.joined.join({"source": BYTES.encode(source), "sample": BYTES.encode(sample)})
            row_alone = np.zeros((1, 70), np.int32)
            row_alone[0, : len(tokens)] = tokens[:70]
            alone = network(row_alone)
            np.testing.assert_allclose(found[row, column], np.clip(alone, 0, 1), rtol=1e-4, atol=1e-5)
    assert np.ptp(found) > 0.01


def test_a_reward_depends_neither_on_padding_nor_on_company(directory):
    together = scores(directory, reward_batch(), rows_per_step=1)
    np.testing.assert_allclose(scores(directory, reward_batch(length=40)), together, rtol=1e-4, atol=1e-5)
    alone = scores(directory, reward_batch(rows=slice(1, 2)))
    np.testing.assert_allclose(alone[0], together[1], rtol=1e-4, atol=1e-5)


def test_a_reward_whose_decoder_reads_the_sample(tmp_path):
    directory = write(tmp_path / "decoder", IN_DECODER)
    files, params = regressor.read(directory), on_device(regressor.Regressor(directory).init(BYTES))["params"]
    found = scores(directory, reward_batch())
    sample = np.asarray([[0, *BYTES.encode("At first")]], np.int32)
    source = np.asarray([BYTES.encode(SOURCES[0])], np.int32)
    alone = jax.jit(functools.partial(regress, files.module))(params, source, decoder_input_tokens=sample)[0, -1]
    np.testing.assert_allclose(found[0, 1], np.clip(alone, 0, 1), rtol=1e-4, atol=1e-5)
    assert np.ptp(found) > 0.01


def test_what_a_reward_needs_is_read_from_its_directory(directory, tmp_path):
    assert not regressor.Regressor(directory).requires_reference
    with_reference = regressor.Regressor(write(tmp_path / "with", WITH_REFERENCE))
    assert with_reference.requires_reference
    with pytest.raises(UserError, match="no reference"):
        check_reward(dataclasses.replace(with_reference), has_references=False)


@pytest.mark.parametrize("template", [WITH_REFERENCE, IN_DECODER])
def test_a_policy_with_another_vocabulary_is_retokenised(template, tmp_path):
    own = write(tmp_path / "reward", template, DEMO, seed=1)  # one whose scores are not all below 0
    tokens = {
        vocabulary: {
            "samples": np.stack([ids(texts, 70, vocabulary) for texts in SAMPLES]),
            "sources": ids(SOURCES, 70, vocabulary),
            "references": ids([texts[0] for texts in SAMPLES], 70, vocabulary),
        }
        for vocabulary in (BYTES, DEMO)
    }
    expected = scores(own, tokens[DEMO], vocabulary=DEMO)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(scores(own, tokens[BYTES], vocabulary=BYTES), expected, rtol=1e-4, atol=1e-5)


def test_another_vocabulary_and_a_missing_directory_are_refused(directory, tmp_path):
    with pytest.raises(UserError, match="another vocabulary"):
        regressor.Regressor(directory).init(ByteVocabulary(extra_ids=3))
    with pytest.raises(UserError, match=r"no reward\.json"):
        regressor.Regressor(str(tmp_path / "nothing")).init(BYTES)
