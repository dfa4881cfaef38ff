"""The regressor against the network that it is made of, and against padding and company."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.models.regressor import fresh_head, regress, with_head
from rest_jax.models.t5 import T5Config, Transformer

CONFIG = T5Config(
    vocab_size=64, emb_dim=16, num_heads=2, num_encoder_layers=2, num_decoder_layers=2, head_dim=8, mlp_dim=24
)
ROW = 7


@pytest.fixture(scope="module")
def params():
    """Of a T5 1.1, with its whole head."""
    tokens = jnp.ones((1, 1), jnp.int32)
    init = jax.jit(functools.partial(Transformer(CONFIG).init, enable_dropout=False))
    return init(jax.random.key(0), tokens, tokens, tokens)["params"]


@pytest.fixture(scope="module")
def regressor_params(params):
    return with_head(params, params["decoder"]["logits_dense"]["kernel"][:, ROW : ROW + 1])


@jax.jit
def score(params, tokens, **segments):
    return regress(Transformer(CONFIG), params, tokens, **segments)


def rows(*lengths: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    tokens = np.zeros((len(lengths), width), np.int32)
    for row, length in zip(tokens, lengths, strict=True):
        row[:length] = rng.integers(1, 64, length)
    return tokens


def test_a_score_is_one_logit_of_the_first_step(params, regressor_params):
    tokens = rows(9, 4, width=9)
    start, target = np.zeros((2, 1), np.int32), np.ones((2, 1), np.int32)
    apply = jax.jit(functools.partial(Transformer(CONFIG).apply, enable_dropout=False))
    logits = apply({"params": params}, tokens, start, target)
    scores = score(regressor_params, tokens)
    np.testing.assert_allclose(scores[:, 0], logits[:, 0, ROW], rtol=1e-5, atol=1e-6)
    # So too on a T5 1.0, which has no head of its own: nothing is scaled by its width.
    shared = Transformer(dataclasses.replace(CONFIG, logits_via_embedding=True))
    np.testing.assert_array_equal(jax.jit(functools.partial(regress, shared))(regressor_params, tokens), scores)


def test_a_score_depends_neither_on_padding_nor_on_company(regressor_params):
    together = score(regressor_params, rows(12, 3, 7, width=20))[:, 0]
    for row, length in enumerate((12, 3, 7)):
        alone = score(regressor_params, rows(12, 3, 7, width=20)[row : row + 1, :length])
        np.testing.assert_allclose(together[row], alone[0, 0], rtol=2e-5, atol=1e-6)


def test_packed_inputs_score_as_each_alone(regressor_params):
    one, two = rows(5, 8, width=8)
    packed = np.concatenate([one[:5], two, np.zeros(3, np.int32)])[None]
    segments = np.asarray([[1] * 5 + [2] * 8 + [0] * 3], np.int32)
    scores = score(
        regressor_params,
        packed,
        encoder_segment_ids=segments,
        decoder_segment_ids=np.asarray([[1, 2, 0, 0]], np.int32),
    )
    alone = score(regressor_params, np.stack([one, two]))
    np.testing.assert_allclose(scores[0, :2], alone[:, 0], rtol=2e-5, atol=1e-6)


def test_a_fresh_head_gives_scores_of_about_unit_variance():
    head = fresh_head(jax.random.key(0), 4096)
    assert head.shape == (4096, 1)
    assert 0.9 < float(jnp.sum(head**2)) < 1.1


def test_a_decoder_that_reads_sees_what_stood_before(regressor_params):
    source, sample = rows(6, width=6), rows(5, width=5)[:, :4]
    decoder = np.concatenate([[[0]], sample], axis=1)
    scores = score(regressor_params, source, decoder_input_tokens=decoder)
    assert scores.shape == (1, 5)
    other = np.concatenate([decoder[:, :3], 63 - decoder[:, 3:]], axis=1)
    changed = score(regressor_params, source, decoder_input_tokens=other)
    np.testing.assert_allclose(scores[0, :3], changed[0, :3], rtol=2e-5, atol=1e-6)
    assert abs(float(scores[0, 4] - changed[0, 4])) > 1e-3
    # The first step is the one on token 0.
    np.testing.assert_allclose(scores[0, 0], score(regressor_params, source)[0, 0], rtol=2e-5, atol=1e-6)
