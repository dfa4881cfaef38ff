"""What a checkpoint says of its model: T5Config from the tree, the tree from T5Config, and T5Config as gin text."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from rest_jax.checkpoints import tensors
from rest_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from rest_jax.errors import UserError
from rest_jax.models import t5

Shapes = Mapping[str, tuple[int, ...]]


@functools.lru_cache(maxsize=4)
def expected_shapes(config: t5.T5Config) -> Shapes:
    """Name -> shape of every parameter of the network."""
    token = jnp.ones((1, 1), jnp.int32)
    module = t5.Transformer(config)
    variables = jax.eval_shape(
        lambda key: module.init(key, token, token, token, enable_dropout=False), jax.random.key(0)
    )
    return tensors.flat_shapes(variables["params"])


def infer_config(shapes: Shapes, *, what: str) -> t5.T5Config:
    """The T5Config whose tree has these names and shapes.

    What no shape tells is taken to be as in the public T5s: gelu where the feed-forward layer is gated and relu where
    it is not, a largest distance of 128, dropout 0.1.

    Args:
      shapes: name -> shape.
      what: names the checkpoint in messages.

    Raises:
      UserError: this is no tree of a T5.
    """
    scanned = tensors.is_scanned(shapes)
    one = "{0}/{0}/" if scanned else "{0}/layers_0/"
    encoder, decoder = one.format("encoder"), one.format("decoder")
    per_layer = f"{encoder}relpos_bias/rel_embedding" in shapes
    bias = shapes.get(f"{encoder if per_layer else 'encoder/'}relpos_bias/rel_embedding")
    embedding = shapes.get("token_embedder/embedding")
    query = shapes.get(f"{decoder}self_attention/query/kernel")
    hidden = shapes.get(f"{encoder}mlp/wo/kernel")
    if bias is None or embedding is None or query is None or hidden is None:
        listed = ", ".join(sorted(shapes)[:6])
        raise UserError(
            f"{what} holds no encoder-decoder T5: its parameters are {listed}, .... Names must be T5X's, such as "
            "token_embedder/embedding and encoder/layers_0/attention/query/kernel."
        )
    depth = {
        stack: shapes[f"{stack}/{stack}/mlp/wo/kernel"][t5.SCAN_AXIS]
        if f"{stack}/{stack}/mlp/wo/kernel" in shapes
        else len({name.split("/")[1] for name in shapes if re.match(rf"{stack}/layers_\d+/", name)})
        for stack in ("encoder", "decoder")
    }
    activations = ("gelu", "linear") if f"{encoder}mlp/wi_0/kernel" in shapes else ("relu",)
    return t5.T5Config(
        vocab_size=embedding[0],
        emb_dim=embedding[1],
        num_heads=bias[0],
        num_encoder_layers=depth["encoder"],
        num_decoder_layers=depth["decoder"],
        head_dim=query[-1] // bias[0],
        mlp_dim=hidden[0],
        mlp_activations=activations,
        dropout_rate=0.1,
        logits_via_embedding="decoder/logits_dense/kernel" not in shapes,
        relative_attention_num_buckets=bias[-1],
        relative_bias_per_layer=per_layer,
        scan_layers=scanned,
    )


def gin_text(config: t5.T5Config, *, comment: str, vocabulary: str | None) -> str:
    """A gin file of the model, for use after those of a run: `--gin_file=runs/... --gin_file=DEST/config.gin`.

    Args:
      config: of the network.
      comment: one line on where it comes from.
      vocabulary: gin text of VOCABULARY, e.g. '@vocabulary.ByteVocabulary()' and lines after it; None where the
        checkpoint has none.
    """
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    # The macros of gin/models/bases/t5.gin: one that a run's model file sets must be used in this file too.
    macros = {"dropout_rate": "DROPOUT_RATE", "scan_layers": "SCAN_LAYERS", "remat_policy": "REMAT_POLICY"}
    sizes = "\n".join(
        f"  {name} = {f'%{macros[name]}' if name in macros else repr(value)}" for name, value in fields.items()
    )
    imports = "from rest_jax.data import vocabulary\n" if vocabulary else ""
    return f"""\
# {comment}
#
# Give it after the gin file of a run, whose model and vocabulary it replaces.
# Commonly overridden: DROPOUT_RATE, LABEL_SMOOTHING, Z_LOSS, SCAN_LAYERS, REMAT_POLICY, t5.T5Config.dtype.
from __gin__ import dynamic_registration
{imports}from rest_jax.models import encoder_decoder
from rest_jax.models import t5

MODEL = @encoder_decoder.EncoderDecoderModel()
VOCABULARY = {vocabulary or "%gin.REQUIRED"}
DROPOUT_RATE = {config.dropout_rate!r}
LABEL_SMOOTHING = 0.0
Z_LOSS = 0.0001
LOSS_NORMALIZING_FACTOR = None
SCAN_LAYERS = {config.scan_layers!r}
REMAT_POLICY = {config.remat_policy!r}

encoder_decoder.EncoderDecoderModel:
  module = @t5.Transformer()
  input_vocabulary = %VOCABULARY
  output_vocabulary = %VOCABULARY
  label_smoothing = %LABEL_SMOOTHING
  z_loss = %Z_LOSS
  loss_normalizing_factor = %LOSS_NORMALIZING_FACTOR

t5.Transformer.config = @t5.T5Config()
t5.T5Config:
{sizes}
"""


def vocabulary_text(vocabulary: Vocabulary, *, model_file: Path) -> str:
    """VOCABULARY as gin text; `model_file` is where a SentencePiece vocabulary's file will be."""
    name = f"vocabulary.{type(vocabulary).__name__}"
    lines = [f"@{name}()"]
    if isinstance(vocabulary, SentencePieceVocabulary):
        lines.append(f"{name}.sentencepiece_model_file = {str(model_file)!r}")
    if isinstance(vocabulary, SentencePieceVocabulary | ByteVocabulary):
        lines.append(f"{name}.extra_ids = {vocabulary.extra_ids}")
    return "\n".join(lines)
