"""Static embeddings on a small model in model2vec's layout, in which words of two languages share a vector."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rest_jax.checkpoints import safetensors_files
from rest_jax.checkpoints.tensors import of_array
from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.errors import UserError
from rest_jax.rewards.embeddings import StaticEmbeddings
from tests.rewards.tiny_embeddings import MEANINGS, write_model

DEMO = SentencePieceVocabulary("rest_jax://tasks/demo_data/vocab.model")
LENGTH = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its folder, its tokenizer and its tokens' weighted vectors."""
    folder = tmp_path_factory.mktemp("embeddings") / "model"
    return str(folder), *write_model(folder, shared=True)


def tokens(texts: list[str], length: int = LENGTH) -> np.ndarray:
    rows = np.zeros((len(texts), length), np.int32)
    for row, text in zip(rows, texts, strict=True):
        ids = [*DEMO.encode(text), 1][:length]
        row[: len(ids)] = ids
    return rows


def score(reward, params, source: str, samples: list[str]) -> np.ndarray:
    batch = {"samples": tokens(samples)[None], "sources": tokens([source]), "references": tokens([""])}
    return np.asarray(jax.jit(reward.score)(params, batch)[reward.name])[0]


def test_a_translation_beats_what_says_something_else(model):
    reward = StaticEmbeddings(model[0])
    found = score(
        reward, reward.init(DEMO), "Himmel die Erde", ["the heaven the earth", "earth heaven", "heaven", "water", ""]
    )
    assert found[0] > 0.99 and found[1] > 0.99, found
    assert found[1] > found[2] > found[3] > found[4] == 0.0


def test_it_is_the_cosine_of_the_models_own_embeddings(model):
    """Where pieces are words, or spelled as the model's tokens, nothing is approximate."""
    folder, tokenizer, vectors = model
    reward = StaticEmbeddings(folder)
    params = reward.init(DEMO)

    def embedding(text: str) -> np.ndarray:
        return vectors[tokenizer.encode(text, add_special_tokens=False).ids].mean(axis=0)

    for source, sample in [("Himmel", "heaven"), ("Himmel heaven Erde", "water"), (" ".join(MEANINGS), "earth the")]:
        a, b = embedding(source), embedding(sample)
        expected = (1 + a @ b / np.linalg.norm(a) / np.linalg.norm(b)) / 2
        np.testing.assert_allclose(score(reward, params, source, [sample]), expected, atol=1e-6)


def test_vectors_may_be_shared_and_weighted_in_the_file_or_not(model, tmp_path):
    write_model(tmp_path / "plain", shared=False)
    plain, shared = StaticEmbeddings(str(tmp_path / "plain")).init(DEMO), StaticEmbeddings(model[0]).init(DEMO)
    np.testing.assert_allclose(plain["table"], shared["table"], atol=1e-7)
    assert plain["table"].shape == (DEMO.vocab_size, 16)
    assert not plain["table"][:3].any()
    assert not plain["table"][[i for i in range(DEMO.vocab_size) if DEMO.is_byte(i)]].any()


def test_the_source_may_have_the_prefix_of_its_task(model):
    bare = StaticEmbeddings(model[0])
    prefixed = dataclasses.replace(bare, source_prefix="water: ")
    samples = ["heaven", "water"]
    expected = score(bare, bare.init(DEMO), "Himmel", samples)
    np.testing.assert_array_equal(score(prefixed, prefixed.init(DEMO), "water: Himmel", samples), expected)
    assert score(bare, bare.init(DEMO), "water: Himmel", samples)[0] < expected[0]


@pytest.fixture(scope="module")
def program(model):
    reward = StaticEmbeddings(model[0])
    params, score = reward.init(DEMO), jax.jit(reward.score)
    return lambda batch: np.asarray(score(params, batch)[reward.name])


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_rewards_do_not_depend_on_padding_or_company(program, data):
    text = st.lists(st.sampled_from([*MEANINGS, "x", "Ж"]), max_size=5).map(" ".join)
    samples = data.draw(st.lists(st.lists(text, min_size=3, max_size=3), min_size=5, max_size=5))
    sources = data.draw(st.lists(text, min_size=5, max_size=5))

    def rewards(chosen, *, length: int) -> np.ndarray:
        batch = {
            "samples": np.stack([tokens(samples[i], length) for i in chosen]),
            "sources": tokens([sources[i] for i in chosen], length),
            "references": tokens([""] * len(chosen)),
        }
        return program(batch)

    whole = rewards(range(5), length=LENGTH)
    assert ((whole >= 0) & (whole <= 1)).all()
    np.testing.assert_allclose(rewards(range(5), length=40), whole, atol=1e-6)
    np.testing.assert_allclose(rewards([3], length=LENGTH), whole[[3]], atol=1e-6)


def test_a_folder_of_another_layout_is_refused(tmp_path, model):
    def refused(match: str, *, tensors=None, tokenizer: str | None = None):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_model(folder, shared=True)
        if tensors is not None:
            safetensors_files.write_tensors(folder / "model.safetensors", {k: of_array(v) for k, v in tensors.items()})
        if tokenizer is not None:
            (folder / "tokenizer.json").write_text(tokenizer)
        with pytest.raises(UserError, match=match):
            StaticEmbeddings(str(folder)).init(DEMO)

    with pytest.raises(UserError, match="has no model.safetensors"):
        StaticEmbeddings(str(tmp_path)).init(DEMO)
    vectors = np.zeros((62, 4), np.float32)
    refused("holds encoder", tensors={"encoder": vectors})
    refused("60 vectors, and its tokenizer.json", tensors={"embeddings": vectors[:60]})
    refused(r"weights \(3,\) for 62 tokens", tensors={"embeddings": vectors, "weights": np.zeros(3)})
    refused("rows 0 to 70 of 62", tensors={"embeddings": vectors, "mapping": np.arange(71)})
    refused("is no tokenizer", tokenizer="{}")
