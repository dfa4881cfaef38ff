"""Fresh parameters: a plain tree from models that freeze theirs; an embedding that is too small is refused."""

from types import SimpleNamespace

import flax.core
import jax
import jax.numpy as jnp
import pytest

from rest_jax.errors import UserError
from rest_jax.models.initial_params import initial_params


def model(*, rows: int, ids: int) -> SimpleNamespace:
    """As T5X's: frozen variables, axes' names beside the parameters, features of a type that must be said."""

    def get_initial_variables(key, input_shapes, input_types):
        assert set(input_types.values()) == {jnp.int32} and input_types.keys() == input_shapes.keys()
        params = {"token_embedder": {"embedding": jax.random.normal(key, (rows, 4))}}
        return flax.core.freeze({"params": params, "params_axes": {}})

    vocabulary = SimpleNamespace(vocab_size=ids)
    return SimpleNamespace(
        get_initial_variables=get_initial_variables, input_vocabulary=None, output_vocabulary=vocabulary
    )


def test_parameters_come_alone_and_in_dicts() -> None:
    params = initial_params(model(rows=32, ids=27), jax.random.key(0))
    assert type(params) is dict and type(params["token_embedder"]) is dict and list(params) == ["token_embedder"]


def test_an_embedding_smaller_than_the_vocabulary_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(UserError, match="32 rows, but VOCABULARY has 33 ids"):
        jax.eval_shape(lambda: initial_params(model(rows=32, ids=33), jax.random.key(0)))
