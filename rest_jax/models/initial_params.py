"""Fresh parameters of any model with T5X's methods, as a plain tree."""

from typing import Any

import flax.core
import jax
import jax.numpy as jnp

from rest_jax.errors import UserError

Params = Any
_SHAPES = {"encoder_input_tokens": (1, 1), "decoder_input_tokens": (1, 1)}
# T5X takes features for float32 where nothing is said.
_TYPES = dict.fromkeys(_SHAPES, jnp.int32)


def initial_params(model: Any, key: jax.Array) -> Params:
    """`model.get_initial_variables`, its parameters alone, in dicts: T5X's come frozen, and with their axes' names.

    Raises:
      UserError: the embedding has fewer rows than the model's vocabularies have ids.
    """
    params = flax.core.unfreeze(model.get_initial_variables(key, _SHAPES, _TYPES)["params"])
    embedding = params.get("token_embedder", {}).get("embedding")
    vocabularies = [v for v in (model.input_vocabulary, model.output_vocabulary) if v is not None]
    size = max((vocabulary.vocab_size for vocabulary in vocabularies), default=0)
    if embedding is not None and embedding.shape[0] < size:
        raise UserError(
            f"MODEL has an embedding of {embedding.shape[0]} rows, but VOCABULARY has {size} ids. Raise the network's "
            "vocab_size, or give the vocabulary that the model was made for."
        )
    return params
