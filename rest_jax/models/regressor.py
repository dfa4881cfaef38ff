"""A T5 that scores: MetricX's form (Juraska et al. 2023, 2024), on the network and the parameter tree of `t5.py`.

The encoder reads source and translation, the decoder makes one step on token 0, and one row of an untied head gives the
score. Or the decoder reads the translation, as a policy's does, and its last step gives the score. So the tree is a
Transformer's whose `decoder/logits_dense/kernel` is `[emb_dim, 1]`; nothing is scaled by 1/sqrt(emb_dim), whatever
`logits_via_embedding` says.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.models.attention import pair_mask
from rest_jax.models.t5 import Transformer

Params = Any


def regress(
    module: Transformer,
    params: Params,
    encoder_input_tokens: jax.Array,
    *,
    decoder_input_tokens: jax.Array | None = None,
    encoder_segment_ids: jax.Array | None = None,
    decoder_segment_ids: jax.Array | None = None,
    dropout_rng: jax.Array | None = None,
) -> jax.Array:
    """Scores, unbounded: what they mean is the checkpoint's to say.

    A row's score depends neither on its padding nor on the other rows.

    Args:
      module: the network; of its head only the one row is read.
      params: its tree with a head of one row.
      encoder_input_tokens: int `[rows, length]`, 0 is padding.
      decoder_input_tokens: int `[rows, steps]`, what the decoder reads, from token 0 on; None for steps on it alone.
      encoder_segment_ids, decoder_segment_ids: int `[rows, length]` and `[rows, steps]` where several inputs are packed
        in a row, as `data.packing` does; 0 for none.
      dropout_rng: key for dropout; None for none.

    Returns:
      float32 `[rows, steps]`, of what the encoder read and the decoder up to this step.
    """
    if decoder_input_tokens is None:
        shape = (len(encoder_input_tokens), 1) if decoder_segment_ids is None else decoder_segment_ids.shape
        decoder_input_tokens = jnp.zeros(shape, jnp.int32)
    steps = jnp.ones_like(decoder_input_tokens) if decoder_segment_ids is None else decoder_segment_ids
    enable_dropout = dropout_rng is not None

    def decoder_states(module: Any) -> jax.Array:
        # [rows, length] -> [rows, length, emb_dim] -> [rows, steps, emb_dim]
        encoded = module.encode(encoder_input_tokens, encoder_segment_ids, enable_dropout)
        mask = pair_mask(steps > 0, steps > 0, decoder_segment_ids, decoder_segment_ids)
        mask &= np.tril(np.ones((steps.shape[1],) * 2, bool))
        cross_mask = pair_mask(steps > 0, encoder_input_tokens > 0, decoder_segment_ids, encoder_segment_ids)
        start = module.token_embedder(decoder_input_tokens)
        return module.decoder(start, encoded, mask, cross_mask, enable_dropout)

    # The decoder without its head, which has a row for each of the vocabulary's ids.
    headless = module.clone(config=dataclasses.replace(module.config, logits_via_embedding=True))
    rngs = {} if dropout_rng is None else {"dropout": dropout_rng}
    states: Any = headless.apply({"params": params}, rngs=rngs, method=decoder_states)
    return jnp.einsum("rtd,d->rt", states.astype(jnp.float32), params["decoder"]["logits_dense"]["kernel"][:, 0])


def with_head(params: Params, head: Any) -> Params:
    """The tree with `head` `[emb_dim, 1]` in the place of the Transformer's own, if it has one."""
    return {**params, "decoder": {**params["decoder"], "logits_dense": {"kernel": head}}}


def fresh_head(key: jax.Array, emb_dim: int) -> jax.Array:
    """Float32 `[emb_dim, 1]`, drawn as a row of T5 1.1's head is."""
    return jax.nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")(key, (emb_dim, 1), jnp.float32)
