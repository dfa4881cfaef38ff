"""A tiny T5 whose every parameter matters: position biases and kernels far from their initial values."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.sampling import decode

VOCAB, EMBEDDING = 27, 32  # Pieces of the vocabulary, and rows of the embedding, padded past it.


@dataclasses.dataclass(frozen=True, eq=False)
class Tiny:
    """A model and what tests ask of it."""

    model: EncoderDecoderModel
    params: dict

    @property
    def config(self) -> t5.T5Config:
        return self.model.module.config

    @functools.cached_property
    def logits(self):
        """Teacher-forced logits `[batch, T, V]` as a function of (params, batch)."""
        return jax.jit(self.model.compute_logits)

    @functools.cached_property
    def _score(self):
        return jax.jit(self.model.score_batch)

    def score(self, sources, targets):
        """log π(target|source) by teacher forcing, `[batch, S]`, `[batch, N, T]` -> `[batch, N]`."""
        batch, num_samples, length = targets.shape
        rows = jnp.reshape(targets, (batch * num_samples, length))
        scores = self._score(
            self.params,
            {
                "encoder_input_tokens": jnp.repeat(sources, num_samples, axis=0),
                "decoder_input_tokens": jnp.pad(rows[:, :-1], ((0, 0), (1, 0))),
                "decoder_target_tokens": rows,
            },
        )
        return np.asarray(scores).reshape(batch, num_samples)


@functools.cache
def make_tiny(*, vocab=VOCAB, embedding=EMBEDDING, eos=1, seed=0, eos_scale=1.0, **kwargs) -> Tiny:
    """`eos_scale` above 1 scales EOS's logit, so that some prefixes end almost surely and others almost never."""
    sizes = dict(emb_dim=16, num_heads=2, num_encoder_layers=1, num_decoder_layers=2, head_dim=8, mlp_dim=24)
    config = t5.T5Config(vocab_size=embedding, **{**sizes, **kwargs})
    model = EncoderDecoderModel(t5.Transformer(config), None, SimpleNamespace(vocab_size=vocab, eos_id=eos))
    shapes = {"encoder_input_tokens": (1, 1), "decoder_input_tokens": (1, 1)}
    params = jax.jit(lambda key: model.get_initial_variables(key, shapes)["params"])(jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def stir(path, leaf):
        names = [key.key for key in path]
        spread = {"scale": 0.3, "rel_embedding": 1.0}.get(names[-1], 0.05)
        leaf = leaf + spread * rng.normal(size=leaf.shape).astype(np.float32)
        return leaf.at[:, eos].multiply(eos_scale) if "logits_dense" in names else leaf

    return Tiny(model, jax.tree_util.tree_map_with_path(stir, params))


def padded_sources(lengths, *, width=None, vocab=VOCAB, seed=0):
    """int32 `[len(lengths), width]` random sources; each row is a function of (seed, row) alone."""
    width = max(lengths) if width is None else width
    rows = np.zeros((len(lengths), width), np.int32)
    for row, length in enumerate(lengths):
        rows[row, :length] = np.random.default_rng((seed, row)).integers(2, vocab, length)
    return rows


@functools.cache
def compiled_decode(model, **settings):
    """`decode` with `settings` as a program of (params, sources, source_ids, seed, stream)."""

    @jax.jit
    def run(params, sources, source_ids, seed, stream):
        return decode(
            model,
            params,
            encoder_input_tokens=sources,
            source_ids=source_ids,
            seed=seed,
            stream=stream,
            **settings,
        )

    return run


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    return make_tiny()
