"""T5X's model methods: sums and weights, packing, scoring, prediction."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.errors import UserError
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel

CONFIG = t5.T5Config(
    vocab_size=50, emb_dim=16, num_heads=2, num_encoder_layers=2, num_decoder_layers=2, head_dim=4, mlp_dim=24
)
# (source, target) lengths of the pairs below.
PAIRS = ((4, 3), (6, 5), (2, 6), (5, 1))


def make_model(config=CONFIG, **kwargs):
    return EncoderDecoderModel(t5.Transformer(config), None, None, **kwargs)


def make_params(model):
    shapes = {"encoder_input_tokens": (2, 8), "decoder_input_tokens": (2, 8)}
    return model.get_initial_variables(jax.random.key(0), shapes)["params"]


def pairs():
    rng = np.random.default_rng(0)
    return [(rng.integers(2, 50, s).astype(np.int32), rng.integers(2, 50, t).astype(np.int32)) for s, t in PAIRS]


def shift_right(target):
    return np.concatenate([[0], target[:-1]]).astype(np.int32)


def unpacked(length=8):
    def stack(rows):
        return np.stack([np.pad(row, (0, length - len(row))) for row in rows])

    targets = stack([target for _, target in pairs()])
    return {
        "encoder_input_tokens": stack([source for source, _ in pairs()]),
        "decoder_input_tokens": stack([shift_right(target) for _, target in pairs()]),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }


def packed(length=24):
    """All pairs in one row."""

    def join(rows):
        row = np.concatenate(rows).astype(np.int32)
        return np.pad(row, (0, length - len(row)))[None]

    sources, targets = [s for s, _ in pairs()], [t for _, t in pairs()]
    batch = {
        "encoder_input_tokens": join(sources),
        "decoder_input_tokens": join([shift_right(t) for t in targets]),
        "decoder_target_tokens": join(targets),
    }
    batch["decoder_loss_weights"] = (batch["decoder_target_tokens"] > 0).astype(np.float32)
    for side, rows in (("encoder", sources), ("decoder", targets)):
        batch[f"{side}_segment_ids"] = join([np.full(len(row), i + 1) for i, row in enumerate(rows)])
        batch[f"{side}_positions"] = join([np.arange(len(row)) for row in rows])
    return batch


def test_packed_and_unpacked_batches_have_the_same_loss_metrics_and_gradient():
    model = make_model(label_smoothing=0.1, z_loss=1e-3)
    params = make_params(model)
    gradient = jax.jit(jax.grad(lambda p, batch: model.loss_fn(p, batch, None), has_aux=True))
    (grad_a, metrics_a), (grad_b, metrics_b) = gradient(params, unpacked()), gradient(params, packed())
    for name in metrics_a:
        np.testing.assert_allclose(metrics_a[name], metrics_b[name], rtol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(grad_a), jax.tree.leaves(grad_b), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


def test_loss_and_metrics_are_sums_over_weighted_tokens():
    model, batch = make_model(), unpacked()
    params = make_params(model)
    batch["decoder_loss_weights"] *= np.array([[0.25], [1.0], [2.0], [0.0]], np.float32)
    loss, metrics = model.loss_fn(params, batch, None)
    logits = np.asarray(model.compute_logits(params, batch), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    nll = -np.take_along_axis(log_probs, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, (nll * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss)
    np.testing.assert_allclose(metrics["cross_entropy"], (nll * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["weight_sum"], weights.sum())
    np.testing.assert_allclose(metrics["correct"], ((logits.argmax(-1) == targets) * weights).sum())
    assert metrics["z_loss"] == 0.0
    np.testing.assert_allclose(model.score_batch(params, batch), -(nll * weights).sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(model.eval_fn(params, batch)[0], loss)


def test_cross_entropy_metric_is_not_smoothed():
    params, batch = make_params(make_model()), unpacked()
    plain = make_model().loss_fn(params, batch, None)[1]
    smoothed = make_model(label_smoothing=0.2, z_loss=0.1).loss_fn(params, batch, None)[1]
    np.testing.assert_allclose(smoothed["cross_entropy"], plain["cross_entropy"], rtol=1e-6)
    assert abs(float(smoothed["loss"] - plain["loss"])) > 0.1
    assert smoothed["z_loss"] > 0.0


def test_dropout_key_decides_the_loss():
    config = t5.T5Config(50, 16, 2, 1, 1, 4, 24, dropout_rate=0.3)
    model, batch = make_model(config), unpacked()
    params = make_params(model)
    losses = [float(model.loss_fn(params, batch, jax.random.key(seed))[0]) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert float(model.loss_fn(params, batch, None)[0]) == float(model.eval_fn(params, batch)[0])


@pytest.mark.parametrize(
    ("factor", "expected"),
    [(4.0, lambda nll, w: nll.sum() / 4), ("NUM_REAL_TARGET_TOKENS", lambda nll, w: nll.sum() / w.sum())]
    + [("NUM_TOTAL_TARGET_TOKENS", lambda nll, w: nll.sum() / w.size)]
    + [("AVERAGE_PER_SEQUENCE", lambda nll, w: (nll.sum(1) / w.sum(1)).sum())],
)
def test_loss_normalizing_factors(factor, expected):
    batch, plain = unpacked(), make_model()
    params = make_params(plain)
    nll = np.stack(
        [-plain.score_batch(params, {**batch, "decoder_loss_weights": np.eye(8)[[i] * 4]}) for i in range(8)], axis=1
    ) * np.asarray(batch["decoder_loss_weights"])
    loss = make_model(loss_normalizing_factor=factor).loss_fn(params, batch, None)[0]
    np.testing.assert_allclose(loss, expected(nll, batch["decoder_loss_weights"]), rtol=1e-5)
    if factor == "AVERAGE_PER_SEQUENCE":
        in_one_row = make_model(loss_normalizing_factor=factor).loss_fn(params, packed(), None)[0]
        np.testing.assert_allclose(in_one_row, loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"label_smoothing": 1.0}, "LABEL_SMOOTHING"),
        ({"z_loss": -0.1}, "Z_LOSS"),
        ({"loss_normalizing_factor": "MEAN"}, "NUM_REAL_TARGET_TOKENS"),
        ({"loss_normalizing_factor": 0.0}, "LOSS_NORMALIZING_FACTOR"),
    ],
)
def test_impossible_arguments_name_the_macro(kwargs, match):
    with pytest.raises(UserError, match=match):
        make_model(**kwargs)


def test_vocab_size_comes_from_the_vocabulary():
    sizes = dict(emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=4, mlp_dim=24)
    module = t5.Transformer(t5.T5Config(vocab_size=None, **sizes))
    model = EncoderDecoderModel(
        module, SimpleNamespace(vocab_size=100, eos_id=1), SimpleNamespace(vocab_size=129, eos_id=1)
    )
    assert model.module.config.vocab_size == 256
    with pytest.raises(UserError, match="VOCABULARY"):
        EncoderDecoderModel(module, None, None)
    module = t5.Transformer(t5.T5Config(vocab_size=None, vocab_multiple=100, **sizes))
    assert EncoderDecoderModel(module, None, SimpleNamespace(vocab_size=101)).module.config.vocab_size == 200


@pytest.mark.parametrize(("rows", "pieces"), [(50, 51), (250112, 32100)], ids=["too few rows", "another vocabulary's"])
def test_an_embedding_that_does_not_fit_the_vocabulary_says_both_sizes(rows, pieces):
    module = t5.Transformer(dataclasses.replace(CONFIG, vocab_size=rows))
    with pytest.raises(UserError, match=rf"vocab_size={rows} .* has {pieces} pieces.*VOCABULARY"):
        EncoderDecoderModel(module, None, SimpleNamespace(vocab_size=pieces))


@pytest.mark.parametrize(("rows", "pieces"), [(32128, 32000), (384, 259), (256384, 256000), (256000, 256000)])
def test_sentinels_and_padding_are_no_mismatch(rows, pieces):
    module = t5.Transformer(dataclasses.replace(CONFIG, vocab_size=rows))
    assert EncoderDecoderModel(module, None, SimpleNamespace(vocab_size=pieces)).module is module


def test_initial_variables_are_a_function_of_the_key_alone():
    model = make_model()
    long = {"encoder_input_tokens": (3, 9), "decoder_input_tokens": (3, 5)}
    other = model.get_initial_variables(jax.random.key(0), long)["params"]
    jax.tree.map(np.testing.assert_array_equal, make_params(model), other)
    with pytest.raises(UserError, match="decoder_input_tokens"):
        model.get_initial_variables(jax.random.key(0), {"encoder_input_tokens": (1, 1)})


def test_predictions_ascend_by_score_and_their_scores_are_log_probabilities():
    model, batch = make_model(), unpacked()
    params = make_params(model)
    decodes, aux = model.predict_batch_with_aux(
        params, batch, rng=jax.random.key(1), num_decodes=5, return_all_decodes=True
    )
    assert decodes.shape == (4, 5, 8)
    assert (np.diff(aux["scores"], axis=1) >= 0).all()
    best, best_aux = model.predict_batch_with_aux(params, batch, rng=jax.random.key(1), num_decodes=5)
    np.testing.assert_array_equal(best, decodes[:, -1])
    np.testing.assert_array_equal(best_aux["scores"], aux["scores"][:, -1])
    rescored = {
        **batch,
        "decoder_target_tokens": best,
        "decoder_input_tokens": np.pad(best[:, :-1], ((0, 0), (1, 0))),
        "decoder_loss_weights": (best > 0).astype(jnp.float32),
    }
    np.testing.assert_allclose(model.score_batch(params, rescored), best_aux["scores"], rtol=1e-4, atol=1e-4)


def test_prediction_without_a_key_is_greedy_and_repeatable():
    model, batch = make_model(), unpacked()
    params = make_params(model)
    first = model.predict_batch(params, batch)
    np.testing.assert_array_equal(first, model.predict_batch(params, batch))
    assert first.shape == (4, 8)
    with pytest.raises(UserError, match="num_decodes"):
        model.predict_batch_with_aux(params, batch, num_decodes=3)
    with pytest.raises(UserError, match="num_decodes"):
        model.predict_batch_with_aux(params, batch, num_decodes=0)
    with pytest.raises(UserError, match="prompt_with_targets"):
        model.predict_batch_with_aux(params, batch, prompt_with_targets=True)


def test_a_bound_decode_fn_takes_the_place_of_sampling():
    def decode_fn(model, params, tokens, *, num_decodes, max_length, rng, offset):
        ids = jnp.arange(num_decodes)[None, :, None] + offset + 0 * tokens[:, :1, None]
        return jnp.broadcast_to(ids, (4, num_decodes, max_length)), -jnp.broadcast_to(ids[..., 0], (4, num_decodes))

    model = make_model(decode_fn=decode_fn)
    options = {"offset": 7, "num_decodes": 3, "return_all_decodes": True}
    decodes, aux = model.predict_batch_with_aux({}, unpacked(), decoder_params=options)
    np.testing.assert_array_equal(decodes[0, :, 0], [9, 8, 7])
    np.testing.assert_array_equal(aux["scores"][0], [-9, -8, -7])
