"""Decoding with T5X's own model and network: the policy's samples and probabilities, whatever T5X's defaults are.

Skipped where t5x is absent; docs/t5x.md says what it needs.
"""

import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.errors import UserError
from rest_jax.models.initial_params import initial_params
from rest_jax.sampling import LogitProcessing, Samples, decode, t5x_model
from tests.sampling.conftest import EMBEDDING, VOCAB, compiled_decode, make_tiny, padded_sources

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what T5X imports
    models = pytest.importorskip("t5x.models")
    from t5x.examples.scalable_t5 import network as scalable_network
    from t5x.examples.t5 import network

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
VOCABULARY = SimpleNamespace(vocab_size=VOCAB, eos_id=1)
SIZES = dict(
    vocab_size=EMBEDDING,
    emb_dim=16,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=2,
    head_dim=8,
    mlp_dim=24,
    mlp_activations=("gelu", "linear"),
    dtype="float32",
)
MODEL = models.EncoderDecoderModel(network.Transformer(network.T5Config(**SIZES)), VOCABULARY, VOCABULARY, None)
SOURCES = np.concatenate([padded_sources([6, 3, 5]), np.zeros((1, 6), np.int32)])  # the last is a filler
IDS = np.arange(4, dtype=np.uint32)
GREEDY, PLAIN = LogitProcessing(temperature=0.0), LogitProcessing()


@pytest.fixture(scope="module")
def tiny():
    """Our model; T5X's takes the same parameters."""
    return make_tiny()


def draw(
    params, sources=SOURCES, source_ids=IDS, *, model=MODEL, seed=0, stream=0, processing=PLAIN, **settings
) -> Samples:
    settings = {"num_samples": 3, "max_length": 7, **settings}
    run = compiled_decode(model, processing=processing, **settings)
    return jax.device_get(run(params, sources, source_ids, seed, stream))


def test_greedy_decoding_is_our_own_models(tiny):
    theirs = draw(tiny.params, num_samples=1, processing=GREEDY)
    ours = draw(tiny.params, model=tiny.model, num_samples=1, processing=GREEDY)
    np.testing.assert_array_equal(theirs.tokens, ours.tokens)
    np.testing.assert_array_equal(theirs.hit_eos, ours.hit_eos)
    np.testing.assert_allclose(theirs.log_probs, ours.log_probs, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"processing": LogitProcessing(temperature=0.5)}, {"beam_size": 4}], ids=str)
def test_log_probabilities_are_the_policys_own(tiny, settings):
    drawn = draw(tiny.params, **settings)
    np.testing.assert_allclose(drawn.log_probs[:3], tiny.score(SOURCES, drawn.tokens)[:3], atol=1e-4)


def test_samples_are_legal_and_fillers_empty(tiny):
    drawn = draw(tiny.params, num_samples=40)
    assert drawn.tokens.max() < VOCAB < EMBEDDING
    for tokens, length, hit_eos in zip(
        drawn.tokens[:3].reshape(-1, 7), drawn.lengths[:3].ravel(), drawn.hit_eos[:3].ravel(), strict=True
    ):
        assert tokens[:length].all() and not tokens[length:].any()
        assert (tokens == 1).sum() == hit_eos == (tokens[length - 1] == 1)
    assert drawn.hit_eos[:3].any() and not drawn.hit_eos[:3].all()
    assert not drawn.tokens[3].any() and not drawn.log_probs[3].any() and not drawn.hit_eos[3].any()


def test_first_tokens_come_as_often_as_the_tempered_policy_says(tiny):
    """T5X's default, one candidate, would give the most probable token each time."""
    count, temperature = 2000, 0.7
    processing = LogitProcessing(temperature=temperature)
    drawn = draw(tiny.params, num_samples=count, max_length=1, processing=processing)
    frequencies = np.stack([np.bincount(row, minlength=VOCAB) for row in drawn.tokens[:3, :, 0]]) / count
    batch = {
        "encoder_input_tokens": SOURCES[:3],
        "decoder_input_tokens": np.zeros((3, 1), np.int32),
        "decoder_target_tokens": np.ones((3, 1), np.int32),
    }
    logits = np.asarray(tiny.logits(tiny.params, batch))[:, 0, :VOCAB].astype(np.float64) / temperature
    expected = np.exp(logits) * (np.arange(VOCAB) > 0)
    expected /= expected.sum(axis=-1, keepdims=True)
    # A frequency's standard deviation is at most sqrt(p (1 - p) / 2000); 5 of them, and one draw.
    assert (np.abs(frequencies - expected) < 5 * np.sqrt(expected * (1 - expected) / count) + 1 / count).all()


@pytest.mark.parametrize("processing", [LogitProcessing(top_k=2), LogitProcessing(top_p=0.3)], ids=["top_k", "top_p"])
def test_truncation_leaves_the_tokens_that_ours_leaves(tiny, processing):
    settings = dict(num_samples=300, max_length=1, processing=processing)
    theirs, ours = draw(tiny.params, **settings), draw(tiny.params, model=tiny.model, **settings)
    for row in range(3):
        assert set(theirs.tokens[row].ravel()) == set(ours.tokens[row].ravel())


def test_the_place_of_a_sample_says_nothing_about_its_score(tiny):
    log_probs = draw(tiny.params, num_samples=40).log_probs[:3]
    assert not any((np.diff(row) >= 0).all() or (np.diff(row) <= 0).all() for row in log_probs)


def test_draws_are_a_function_of_seed_stream_and_sources(tiny):
    first = draw(tiny.params)
    np.testing.assert_array_equal(first.tokens, draw(tiny.params).tokens)
    for change in ({"seed": 1}, {"stream": 1}, {"source_ids": IDS + 1}):
        assert (draw(tiny.params, **change).tokens[:3] != first.tokens[:3]).any()
    keys = [
        t5x_model.chunk_key(seed=seed, stream=stream, source_ids=jnp.asarray(ids))
        for seed in range(2)
        for stream in range(2)
        for ids in ([0, 1, 2], [3, 4, 5], [1, 1, 1])
    ]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)


def test_a_beam_gives_its_best_first(tiny):
    beam = draw(tiny.params, num_samples=3, beam_size=4, beam_alpha=0.0)
    greedy = draw(tiny.params, num_samples=1, processing=GREEDY)
    ended = beam.hit_eos[:3]
    assert ended.any()
    for log_probs, known in zip(beam.log_probs[:3], ended, strict=True):
        assert (np.diff(log_probs[known]) <= 1e-5).all()
    both = greedy.hit_eos[:3, 0] & ended[:, 0]
    assert (beam.log_probs[:3, 0] >= greedy.log_probs[:3, 0] - 1e-5)[both].all()


def scalable_params(params):
    """As scalable_t5 keeps them: attention's kernels have a dimension for heads, and layers lie on axis 1."""

    def split(path, leaf):
        names = [key.key for key in path]
        if names[-1] != "kernel" or names[-2] not in ("query", "key", "value", "out"):
            return leaf
        if names[-2] == "out":  # [joined, layers, emb_dim] -> [heads, layers, head_dim, emb_dim]
            return leaf.reshape(2, 8, *leaf.shape[1:]).swapaxes(1, 2)
        return leaf.reshape(*leaf.shape[:2], 2, 8)  # [emb_dim, layers, joined] -> [..., heads, head_dim]

    return jax.tree_util.tree_map_with_path(split, params)


def test_scanned_layers_decode_as_ours_with_a_bias_in_each_layer():
    config = scalable_network.T5Config(**SIZES, scan_layers=True, remat_policy="minimal")
    model = models.EncoderDecoderModel(scalable_network.Transformer(config), VOCABULARY, VOCABULARY, None)
    scanned = make_tiny(scan_layers=True, relative_bias_per_layer=True)
    params = scalable_params(scanned.params)
    abstract = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract)
    theirs = draw(params, model=model, num_samples=1, processing=GREEDY)
    ours = draw(scanned.params, model=scanned.model, num_samples=1, processing=GREEDY)
    np.testing.assert_array_equal(theirs.tokens, ours.tokens)
    np.testing.assert_allclose(theirs.log_probs, ours.log_probs, atol=1e-4)
    drawn = draw(params, model=model)
    np.testing.assert_allclose(drawn.log_probs[:3], scanned.score(SOURCES, drawn.tokens)[:3], atol=1e-4)


@pytest.mark.parametrize(
    ("model", "processing", "message"),
    [
        (MODEL, LogitProcessing(epsilon=0.01), "epsilon is 0.01"),
        (MODEL, LogitProcessing(top_k=2, top_p=0.5), "one of them"),
        (SimpleNamespace(), PLAIN, "or one of T5X's"),
    ],
    ids=["epsilon", "top_k and top_p", "another model"],
)
def test_what_t5x_has_not_is_refused(tiny, model, processing, message):
    with pytest.raises(UserError, match=message):
        decode(
            model,
            tiny.params,
            encoder_input_tokens=SOURCES,
            source_ids=IDS,
            num_samples=1,
            max_length=2,
            processing=processing,
        )
