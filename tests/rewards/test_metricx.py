"""MetricX against what PyTorch computes on the same weights (tests/fixtures/make_metricx_fixture.py)."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.checkpoints import checkpointer, safetensors_files
from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.errors import UserError
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.models.t5 import T5Config, Transformer
from rest_jax.partitioning import Partitioner, make_mesh, trace_mesh
from rest_jax.rewards.base import leaves
from rest_jax.rewards.joined_input import without_prefix
from rest_jax.rewards.metricx import MetricX
from rest_jax.sampling import Sampling
from rest_jax.sampling.scored import sample_and_score

FOLDER = pathlib.Path(__file__).parents[1] / "fixtures" / "metricx"
GOLDEN = json.loads((FOLDER / "golden.json").read_text(encoding="utf-8"))
VOCABULARY = SentencePieceVocabulary(str(FOLDER / "spiece.model"))
ONE_DEVICE = Partitioner(make_mesh(devices=jax.devices()[:1]))
METRICX = MetricX(
    str(FOLDER), str(FOLDER / "spiece.model"), head_row=GOLDEN["head_row"], dtype="float32", rows_per_step=4
)
# Float32's rounding; the fixture's head stretches one narrow direction of the states. 2.5e-4 of an error of 0 to 25.
TOLERANCE = 1e-5
PREFIX = "translate German to English: "


def padded(texts: list[str], length: int, vocabulary: SentencePieceVocabulary) -> np.ndarray:
    rows = np.zeros((len(texts), length), np.int32)
    for row, text in zip(rows, texts, strict=True):
        ids = [*vocabulary.encode(text), 1][:length]
        row[: len(ids)] = ids
    return rows


def batch_of(texts, *, length: int, prefix: str = "", vocabulary=VOCABULARY) -> dict[str, np.ndarray]:
    return {
        "samples": np.stack([padded(text["samples"], length, vocabulary) for text in texts]),
        "sources": padded([prefix + text["source"] for text in texts], length, vocabulary),
        "references": padded([text["reference"] for text in texts], length, vocabulary),
    }


def scored(reward: MetricX, batch, partitioner: Partitioner = ONE_DEVICE, *, vocabulary=VOCABULARY) -> np.ndarray:
    params = checkpointer.put_params(reward.init(vocabulary), partitioner)

    @jax.jit
    def program(params, batch):
        with trace_mesh(partitioner.mesh):
            return reward.score(params, batch)

    return np.asarray(program(params, partitioner.put_batch(batch))[reward.name])


def rewards_of(errors) -> np.ndarray:
    return 1 - np.clip(np.asarray(errors), 0, 25) / 25


def longest(texts, vocabulary=VOCABULARY) -> int:
    """Tokens of the longest source or sample, with EOS."""
    return 1 + max(len(vocabulary.encode(text)) for row in texts for text in [row["source"], *row["samples"]])


LONGEST = longest(GOLDEN["texts"])


@pytest.mark.parametrize(
    ("version", "with_reference", "count"),
    [
        ("24", False, 8),
        pytest.param("24", True, 3, marks=pytest.mark.slow),
        pytest.param("23", False, 3, marks=pytest.mark.slow),
        ("23", True, 3),
    ],
)
def test_rewards_are_those_of_pytorch(version, with_reference, count):
    reward = dataclasses.replace(METRICX, version=version, with_reference=with_reference)
    texts = GOLDEN["texts"][:count]
    expected = GOLDEN["errors"][version + ("_reference" if with_reference else "")][:count]
    np.testing.assert_allclose(
        scored(reward, batch_of(texts, length=longest(texts))), rewards_of(expected), atol=TOLERANCE
    )
    assert reward.requires_reference == with_reference


def test_a_long_input_is_cut_where_the_predictor_cuts_it():
    reward = dataclasses.replace(METRICX, max_length=GOLDEN["cut_length"])
    found = scored(reward, batch_of(GOLDEN["texts"], length=LONGEST))
    np.testing.assert_allclose(found, rewards_of(GOLDEN["errors_cut"]["24"]), atol=TOLERANCE)
    assert np.abs(found - rewards_of(GOLDEN["errors"]["24"])).max() > 0.01


@pytest.mark.slow
def test_a_mesh_splits_rows_and_weights_and_changes_no_reward():
    partitioner = Partitioner(make_mesh(data=4, model=2))
    files = METRICX.init(VOCABULARY)
    params = checkpointer.put_params(files, partitioner)
    kernel = params["network"]["encoder"]["encoder"]["mlp"]["wo"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (12, 3, 16) and kernel.shape == (24, 3, 16)
    on_first = sum(
        leaf.addressable_shards[0].data.nbytes if isinstance(leaf, jax.Array) else leaf.nbytes
        for leaf in jax.tree.leaves(params)
    )
    assert checkpointer.bytes_on_device(files, partitioner) == on_first
    assert checkpointer.bytes_on_device(files, ONE_DEVICE) > 1.9 * on_first

    def program(params, batch):
        with trace_mesh(partitioner.mesh):
            return METRICX.score(params, batch)[METRICX.name]

    batch = partitioner.put_batch(batch_of(GOLDEN["texts"], length=LONGEST))
    compiled = jax.jit(program).lower(params, batch).compile()
    np.testing.assert_allclose(compiled(params, batch), rewards_of(GOLDEN["errors"]["24"]), atol=TOLERANCE)
    # No device computes what is another's. An encoder layer's tokens are [rows * width, emb_dim]; together there are
    # four times as many.
    tokens = max(int(rows) for rows in re.findall(r"f32\[(\d+),16\]", compiled.as_text()))
    assert METRICX.rows_per_step * 128 < tokens <= METRICX.rows_per_step * 256


@pytest.mark.slow
def test_the_program_that_draws_scores_its_samples_on_a_mesh():
    partitioner = Partitioner(make_mesh(data=4, model=2))
    model = EncoderDecoderModel(Transformer(T5Config(384, 16, 2, 1, 1, 8, 16)), VOCABULARY, VOCABULARY)
    shapes = {"encoder_input_tokens": (1, 1), "decoder_input_tokens": (1, 1)}
    policy = model.get_initial_variables(jax.random.key(0), shapes)["params"]
    texts = batch_of(GOLDEN["texts"], length=12)
    batch = {
        "encoder_input_tokens": texts["sources"],
        "references": texts["references"][:, :8],
        "source_ids": np.arange(8, dtype=np.uint32),
    }
    files = METRICX.init(VOCABULARY)
    program = functools.partial(
        sample_and_score,
        model=model,
        reward=METRICX,
        sampling=Sampling(num_samples=2, sources_per_chunk=8),
        max_length=8,
        mesh=partitioner.mesh,
        reward_bytes=checkpointer.bytes_on_device(files, partitioner),
    )
    result = jax.jit(program)(
        jax.device_put(policy, partitioner.param_shardings(policy)),
        checkpointer.put_params(files, partitioner),
        partitioner.put_batch(batch),
        np.uint32(0),
        np.uint32(1),
    )
    drawn = {**batch, "sources": texts["sources"], "samples": np.asarray(result["samples"].tokens)}
    np.testing.assert_allclose(result["rewards"], scored(METRICX, drawn), atol=TOLERANCE)
    drawn["samples"] = drawn["references"][:, None]
    np.testing.assert_allclose(result["reference_rewards"], scored(METRICX, drawn)[:, 0], atol=TOLERANCE)


def test_the_source_may_have_the_prefix_of_its_task():
    reward = dataclasses.replace(METRICX, source_prefix=PREFIX)
    texts = GOLDEN["texts"][:2]
    found = scored(reward, batch_of(texts, length=96, prefix=PREFIX))
    np.testing.assert_allclose(found, rewards_of(GOLDEN["errors"]["24"][:2]), atol=TOLERANCE)
    rows = jnp.asarray([[5, 6, 7, 8, 0], [5, 9, 7, 8, 1]])
    assert without_prefix(rows, jnp.asarray([5, 6])).tolist() == [[7, 8, 0, 0, 0], [5, 9, 7, 8, 1]]


def test_bfloat16_is_near():
    texts = GOLDEN["texts"][:1]
    found = scored(dataclasses.replace(METRICX, dtype="bfloat16"), batch_of(texts, length=longest(texts)))
    assert np.abs(found - rewards_of(GOLDEN["errors"]["24"][:1])).max() < 0.05


PARAMS = checkpointer.put_params(METRICX.init(VOCABULARY), ONE_DEVICE)
PROGRAM = jax.jit(METRICX.score)
TEXT = st.text(st.sampled_from("abc äЖ.,1-"), max_size=20)


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_rewards_do_not_depend_on_padding_or_company(data):
    texts = [
        {name: data.draw(TEXT) for name in ("source", "reference")}
        | {"samples": data.draw(st.lists(TEXT, min_size=3, max_size=3))}
        for _ in range(5)
    ]

    def score(chosen, length):
        return np.asarray(PROGRAM(PARAMS, batch_of([texts[i] for i in chosen], length=length))[METRICX.name])

    whole = score(range(5), 40)
    np.testing.assert_allclose(score(range(5), 48), whole, atol=TOLERANCE)
    np.testing.assert_allclose(score([3], 40), whole[[3]], atol=TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"version": "25"}, "MetricX.version is '25'.*'24', '23'"),
        ({"dtype": "int8"}, "MetricX.dtype is 'int8'.*'bfloat16', 'float32'"),
        ({"rows_per_step": 0}, "MetricX.rows_per_step is 0"),
        ({"max_length": 1}, "MetricX.max_length is 1"),
        ({"checkpoint": "nowhere"}, "MetricX.checkpoint: .*nowhere"),
        ({"vocabulary": "nowhere"}, "MetricX.vocabulary: .*nowhere"),
        ({"head_row": 384}, "MetricX.head_row is 384.*384 rows"),
    ],
)
def test_bad_settings_name_the_field(settings, match):
    with pytest.raises(UserError, match=match):
        dataclasses.replace(METRICX, **settings).init(VOCABULARY)


def test_a_policy_may_have_another_vocabulary():
    policy = SentencePieceVocabulary("rest_jax://tasks/demo_data/vocab.model")
    texts = GOLDEN["texts"][:4]
    batch = batch_of(texts, length=longest(texts, policy), vocabulary=policy)
    reward = dataclasses.replace(METRICX, max_length=224)
    found = scored(reward, batch, vocabulary=policy)
    np.testing.assert_allclose(found, rewards_of(GOLDEN["errors"]["24"][:4]), atol=TOLERANCE)


def test_a_vocabulary_that_is_not_the_networks_is_refused():
    demo = SentencePieceVocabulary("rest_jax://tasks/demo_data/vocab.model")
    with pytest.raises(UserError, match="has 2048 pieces, and the embedding of .* 384 rows"):
        dataclasses.replace(METRICX, vocabulary="rest_jax://tasks/demo_data/vocab.model").init(demo)


def test_a_network_that_is_none_of_metricx_is_refused(tmp_path):
    def changed(name: str, *, drop: str = "", **settings) -> MetricX:
        folder = tmp_path / name
        shutil.copytree(FOLDER, folder)
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
        weights = safetensors_files.open_tensors(FOLDER / "model.safetensors")
        safetensors_files.write_tensors(
            folder / "model.safetensors", {key: tensor for key, tensor in weights.items() if key != (drop or None)}
        )
        return dataclasses.replace(METRICX, checkpoint=str(folder))

    with pytest.raises(UserError, match="MetricX.checkpoint: .*missing encoder.block.0.layer.1.layer_norm.weight"):
        changed("missing", drop="encoder.block.0.layer.1.layer_norm.weight").init(VOCABULARY)
    with pytest.raises(UserError, match="no head of its own"):
        changed("headless", drop="lm_head.weight", tie_word_embeddings=True).init(VOCABULARY)
    with pytest.raises(UserError, match="MetricX's networks are mT5s"):
        changed("relu", feed_forward_proj="gated-silu").init(VOCABULARY)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match="MetricX.checkpoint: .*Convert them to safetensors"):
        dataclasses.replace(METRICX, checkpoint=str(pickled)).init(VOCABULARY)


def test_it_stands_under_its_label():
    assert list(leaves(dataclasses.replace(METRICX, label="qe"))) == ["qe"]
