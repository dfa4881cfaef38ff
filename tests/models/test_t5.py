"""The network: T5X's tree, its counts, its numerics, and what masks must hold."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.errors import UserError
from rest_jax.models import attention, t5

TINY = t5.T5Config(
    vocab_size=50, emb_dim=16, num_heads=2, num_encoder_layers=2, num_decoder_layers=2, head_dim=4, mlp_dim=24
)

# name: emb_dim, heads, layers, head_dim, mlp_dim, published number of parameters.
PUBLISHED = {
    "small": (512, 6, 8, 64, 1024, 76_961_152),
    "base": (768, 12, 12, 64, 2048, 247_577_856),
    "large": (1024, 16, 24, 64, 2816, 783_150_080),
    "xl": (2048, 32, 24, 64, 5120, 2_849_757_184),
    "xxl": (4096, 64, 24, 64, 10240, 11_135_332_352),
}


def init(config, seed=0):
    tokens = jnp.ones((1, 1), jnp.int32)
    return t5.Transformer(config).init(jax.random.key(seed), tokens, tokens, tokens, enable_dropout=False)["params"]


def paths(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in flat}


def apply(params, config, source, target_in, target, **kwargs):
    kwargs.setdefault("enable_dropout", False)
    return t5.Transformer(config).apply({"params": params}, source, target_in, target, **kwargs)


def random_tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(2, 50, shape).astype(np.int32)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    emb_dim, heads, layers, head_dim, mlp_dim, count = PUBLISHED[name]
    config = t5.T5Config(32128, emb_dim, heads, layers, layers, head_dim, mlp_dim)
    shapes = jax.eval_shape(lambda: init(config))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


def test_tree_is_t5x_name_for_name():
    expected = {"token_embedder/embedding": (50, 16), "decoder/logits_dense/kernel": (16, 50)}
    for stack in ("encoder", "decoder"):
        expected[f"{stack}/relpos_bias/rel_embedding"] = (2, 32)
        expected[f"{stack}/{stack}_norm/scale"] = (16,)
    attentions = {"encoder": ["attention"], "decoder": ["self_attention", "encoder_decoder_attention"]}
    norms = {
        "encoder": ["pre_attention_layer_norm", "pre_mlp_layer_norm"],
        "decoder": ["pre_self_attention_layer_norm", "pre_cross_attention_layer_norm", "pre_mlp_layer_norm"],
    }
    for stack in ("encoder", "decoder"):
        for layer in (0, 1):
            prefix = f"{stack}/layers_{layer}"
            for name in attentions[stack]:
                for projection in ("query", "key", "value"):
                    expected[f"{prefix}/{name}/{projection}/kernel"] = (16, 8)
                expected[f"{prefix}/{name}/out/kernel"] = (8, 16)
            for norm in norms[stack]:
                expected[f"{prefix}/{norm}/scale"] = (16,)
            expected |= {f"{prefix}/mlp/{name}/kernel": (16, 24) for name in ("wi_0", "wi_1")}
            expected[f"{prefix}/mlp/wo/kernel"] = (24, 16)
    params = paths(init(TINY))
    assert {name: leaf.shape for name, leaf in params.items()} == expected
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype("float32")}


def test_t5_1_0_has_an_ungated_layer_and_tied_logits():
    config = t5.T5Config(50, 16, 2, 1, 1, 4, 24, mlp_activations=("relu",), logits_via_embedding=True)
    params = init(config)
    names = set(paths(params))
    assert "decoder/layers_0/mlp/wi/kernel" in names
    assert not any("wi_0" in name or "logits_dense" in name for name in names)
    source, target = random_tokens((2, 5)), random_tokens((2, 4), 1)
    logits = apply(params, config, source, target, target)
    doubled = {**params, "token_embedder": {"embedding": params["token_embedder"]["embedding"]}}
    np.testing.assert_array_equal(logits, apply(doubled, config, source, target, target))
    assert logits.shape == (2, 4, 50)


def test_initial_scales():
    config = t5.T5Config(1000, 256, 4, 1, 1, 64, 512)
    params = paths(init(config))
    std = {name: float(np.std(leaf)) for name, leaf in params.items()}
    assert std["token_embedder/embedding"] == pytest.approx(1.0, rel=0.03)
    assert std["encoder/layers_0/attention/key/kernel"] == pytest.approx(1 / 16, rel=0.03)
    assert std["encoder/layers_0/attention/query/kernel"] == pytest.approx(1 / 16 / 8, rel=0.03)
    assert std["encoder/layers_0/mlp/wo/kernel"] == pytest.approx(512**-0.5, rel=0.03)


def dense_reference(params, config, source, target_in):
    """The whole network in float64 numpy for unpadded rows, written from the formulas."""
    heads, width = config.num_heads, config.head_dim

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    def bias(table, length, bidirectional):
        offset = np.arange(length)[None, :] - np.arange(length)[:, None]
        return table[:, bucket_by_rule(offset, bidirectional)]

    def attend(p, x, y, logit_bias):
        def split(z, kernel):
            return (z @ kernel).reshape(*z.shape[:2], heads, width)

        q, k, v = split(x, p["query"]["kernel"]), split(y, p["key"]["kernel"]), split(y, p["value"]["kernel"])
        weights = np.exp(np.einsum("bqhk,bshk->bhqs", q, k) + logit_bias)
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("bhqs,bshk->bqhk", weights, v).reshape(*x.shape[:2], -1) @ p["out"]["kernel"]

    def mlp(p, x):
        a, b = x @ p["wi_0"]["kernel"], x @ p["wi_1"]["kernel"]
        gelu = 0.5 * a * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
        return (gelu * b) @ p["wo"]["kernel"]

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    embedding, encoder, decoder = params["token_embedder"]["embedding"], params["encoder"], params["decoder"]
    x = embedding[source]
    for i in range(config.num_encoder_layers):
        p = encoder[f"layers_{i}"]
        owner = p if config.relative_bias_per_layer else encoder
        encoder_bias = bias(owner["relpos_bias"]["rel_embedding"], source.shape[1], True)
        y = norm(x, p["pre_attention_layer_norm"]["scale"])
        x = x + attend(p["attention"], y, y, encoder_bias)
        x = x + mlp(p["mlp"], norm(x, p["pre_mlp_layer_norm"]["scale"]))
    encoded = norm(x, encoder["encoder_norm"]["scale"])
    x, length = embedding[target_in], target_in.shape[1]
    causal = np.where(np.tril(np.ones((length, length))) > 0, 0.0, -1e10)
    for i in range(config.num_decoder_layers):
        p = decoder[f"layers_{i}"]
        owner = p if config.relative_bias_per_layer else decoder
        decoder_bias = bias(owner["relpos_bias"]["rel_embedding"], length, False) + causal
        y = norm(x, p["pre_self_attention_layer_norm"]["scale"])
        x = x + attend(p["self_attention"], y, y, decoder_bias)
        y = norm(x, p["pre_cross_attention_layer_norm"]["scale"])
        x = x + attend(p["encoder_decoder_attention"], y, encoded, 0.0)
        x = x + mlp(p["mlp"], norm(x, p["pre_mlp_layer_norm"]["scale"]))
    return norm(x, decoder["decoder_norm"]["scale"]) @ decoder["logits_dense"]["kernel"]


def bucket_by_rule(offset, bidirectional, num_buckets=32, max_distance=128):
    """The paper's rule for one offset at a time."""

    def one(d):
        n, first = num_buckets, 0
        if bidirectional:
            n //= 2
            first, d = (n if d > 0 else 0), abs(d)
        else:
            d = max(-d, 0)
        exact = n // 2
        if d < exact:
            return first + d
        return first + min(n - 1, exact + int(math.log(d / exact) / math.log(max_distance / exact) * (n - exact)))

    return np.vectorize(one)(offset)


@pytest.mark.parametrize("per_layer", [False, True], ids=["T5", "UMT5"])
def test_logits_are_those_of_a_float64_reference(per_layer):
    config = dataclasses.replace(TINY, relative_bias_per_layer=per_layer)
    params = init(config)
    # Trained tables are larger than fresh ones; so that a wrong bucket or sign shows.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 20 if "rel_embedding" in str(path) else leaf * 1.3, params
    )
    source, target = random_tokens((3, 23)), random_tokens((3, 19), 1)
    logits = apply(params, config, source, target, target)
    np.testing.assert_allclose(logits, dense_reference(params, config, source, target), rtol=1e-3, atol=1e-4)


def test_umt5_has_a_table_in_every_layer_and_none_beside():
    names = {name for name in paths(init(dataclasses.replace(TINY, relative_bias_per_layer=True))) if "relpos" in name}
    assert names == {f"{s}/layers_{i}/relpos_bias/rel_embedding" for s in ("encoder", "decoder") for i in (0, 1)}


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_follow_the_rule(bidirectional):
    # Powers of two times 8 or 16 lie on an edge, where float32 and float64 may differ; the original is float32.
    offset = np.array([d for d in range(-200, 201) if abs(d) not in (16, 32, 64, 128)])
    ours = attention.relative_position_bucket(offset, bidirectional=bidirectional)
    np.testing.assert_array_equal(ours, bucket_by_rule(offset, bidirectional))


@pytest.mark.parametrize(("query_length", "key_length"), [(5, 5), (1, 7), (9, 3)])
def test_bias_and_its_gradient_are_those_of_a_gather(query_length, key_length):
    table = jax.random.normal(jax.random.key(0), (2, 32))
    offset = np.arange(key_length)[None, :] - np.arange(query_length)[:, None]
    buckets = attention.relative_position_bucket(offset, bidirectional=True)
    weights = jax.random.normal(jax.random.key(1), (2, query_length, key_length))

    def ours(table):
        bias = attention.relative_position_bias(table, query_length, key_length, bidirectional=True, max_distance=128)
        return jnp.sum(bias[0] * weights), bias[0]

    gradient, bias = jax.grad(ours, has_aux=True)(table)
    np.testing.assert_array_equal(bias, table[:, buckets])
    expected = jax.grad(lambda table: jnp.sum(table[:, buckets] * weights))(table)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_attention_is_softmax_attention_with_its_gradient():
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value = (jax.random.normal(k, (2, 5, 2, 4)) for k in keys[:3])
    table = jax.random.normal(keys[3], (1, 2, 5, 5))

    def ours(*x):
        return jnp.sum(jnp.sin(attention.attend(*x[:3], attention.repeat_over_batch(x[3], 2))))

    def plain(query, key, value, table):
        weights = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", query, key) + table, axis=-1)
        return jnp.sum(jnp.sin(jnp.einsum("bhqs,bshk->bqhk", weights, value)))

    arguments = (query, key, value, table)
    np.testing.assert_allclose(ours(*arguments), plain(*arguments), rtol=1e-5)
    for a, b in zip(jax.grad(ours, range(4))(*arguments), jax.grad(plain, range(4))(*arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_later_targets_and_padding_change_nothing():
    params = init(TINY)
    source, target = random_tokens((2, 6)), random_tokens((2, 5), 1)
    logits = apply(params, TINY, source, target, target)
    changed = target.copy()
    changed[:, 3:] = random_tokens((2, 2), 2)
    np.testing.assert_allclose(apply(params, TINY, source, changed, changed)[:, :3], logits[:, :3], atol=1e-5)
    assert not np.allclose(apply(params, TINY, source, changed, changed)[:, 3:], logits[:, 3:], atol=1e-3)
    padded = apply(params, TINY, np.pad(source, ((0, 0), (0, 4))), *(np.pad(target, ((0, 0), (0, 3))),) * 2)
    np.testing.assert_allclose(padded[:, :5], logits, atol=1e-5)
    assert np.isfinite(padded).all()


def test_dropout_is_one_mask_for_all_positions_and_a_function_of_the_key():
    x = jnp.ones((2, 6, 64))
    dropped = t5.Dropout(0.5).apply({}, x, True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_array_equal(dropped, jnp.broadcast_to(dropped[:, :1], dropped.shape))
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert not np.array_equal(dropped[0], dropped[1])
    config = t5.T5Config(50, 16, 2, 1, 1, 4, 24, dropout_rate=0.3)
    params, tokens = init(config), random_tokens((2, 5))
    runs = [
        apply(params, config, tokens, tokens, tokens, enable_dropout=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.allclose(runs[0], runs[2])


def test_bfloat16_activations_give_float32_logits_near_the_float32_ones():
    config = t5.T5Config(50, 16, 2, 2, 2, 4, 24, dtype="bfloat16")
    params, tokens = init(TINY), random_tokens((2, 5))
    half, full = (apply(params, c, tokens, tokens, tokens) for c in (config, TINY))
    assert half.dtype == jnp.float32
    assert float(jnp.max(jnp.abs(half - full))) < 0.15
    assert not np.array_equal(half, full)


def test_decoding_with_a_cache_is_refused():
    tokens = random_tokens((1, 3))
    with pytest.raises(NotImplementedError, match="rest_jax.sampling"):
        apply(init(TINY), TINY, tokens, tokens, tokens, decode=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("emb_dim", 0),
        ("num_heads", 2.5),
        ("dropout_rate", 1.0),
        ("mlp_activations", ("swish",)),
        ("mlp_activations", ()),
        ("dtype", "int8"),
        ("relative_bias_per_layer", "yes"),
        ("scan_layers", 1),
        ("remat_policy", "some"),
        ("vocab_multiple", 0),
    ],
)
def test_impossible_configurations_name_the_field(field, value):
    sizes = dict(vocab_size=50, emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, head_dim=4)
    with pytest.raises(UserError, match=field):
        t5.T5Config(**{**sizes, "mlp_dim": 24, field: value})


def test_missing_vocab_size_is_a_user_error():
    config = t5.T5Config(None, 16, 2, 1, 1, 4, 24)
    with pytest.raises(UserError, match="vocab_size"):
        init(config)
