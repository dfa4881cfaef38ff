"""model-info.txt: T5X's lines, from which a user sees what is sharded how."""

import re

import jax
import numpy as np

from rest_jax import model_info
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.models.initial_params import initial_params
from rest_jax.partitioning import Partitioner, make_mesh, standard_logical_axis_rules

CONFIG = t5.T5Config(
    vocab_size=32, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24, num_encoder_layers=1, num_decoder_layers=1
)
LINE = re.compile(r"Variable (\S+) +size (\d+) +shape (\(.*?\)) +partition spec (\(.*\))")


def test_each_parameter_has_a_line_and_the_total_stands_last() -> None:
    model = EncoderDecoderModel(t5.Transformer(CONFIG), None, None)
    abstract = jax.eval_shape(lambda: initial_params(model, jax.random.key(0)))
    rules = standard_logical_axis_rules(parameter_partitioning_dims=2)
    *lines, total = model_info.describe(abstract, Partitioner(make_mesh(model=2), rules)).splitlines()
    found = {match[1]: match.groups()[1:] for line in lines if (match := LINE.fullmatch(line))}
    assert len(found) == len(lines) == len(jax.tree.leaves(abstract))
    assert found["token_embedder/embedding"] == ("512", "(vocab=32, embed=16)", "('model', 'data')")
    assert found["encoder/layers_0/mlp/wi_0/kernel"] == ("384", "(embed=16, mlp=24)", "('data', 'model')")
    assert found["decoder/decoder_norm/scale"][1] == "(embed=16)"
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract))
    assert total == f"Total number of parameters: {count}"
    assert sum(int(size) for size, _, _ in found.values()) == count
