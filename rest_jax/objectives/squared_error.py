"""What a learned reward is trained on: the squared difference of score and label, as MetricX."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rest_jax.data.vocabulary import eos_id_of
from rest_jax.models.regressor import regress


def squared_error(
    model: Any, params: Any, batch: Mapping[str, jax.Array], dropout_rng: jax.Array | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum over labelled inputs of (score - label)^2.

    Args:
      model: whose `module` is the network.
      params: a regressor's (`models.regressor`).
      batch: features of `data.batching`, with `decoder_target_labels [batch, steps]`; every target ends in EOS.
      dropout_rng: key for dropout; None for none.

    Returns:
      The summed loss (scalar float32), and it, the number of inputs and that of their tokens by the names that training
      reads.
    """
    scores = regress(
        model.module,
        params,
        batch["encoder_input_tokens"],
        decoder_input_tokens=batch["decoder_input_tokens"],
        encoder_segment_ids=batch.get("encoder_segment_ids"),
        decoder_segment_ids=batch.get("decoder_segment_ids"),
        dropout_rng=dropout_rng,
    )
    # The score is that of the step at which the target ends.
    ends = batch["decoder_target_tokens"] == eos_id_of(model.output_vocabulary)
    weights = batch["decoder_loss_weights"] * ends
    loss = jnp.sum(weights * jnp.square(scores - batch["decoder_target_labels"]))
    tokens = jnp.sum(batch["encoder_input_tokens"] > 0, dtype=jnp.float32)
    return loss, {"loss": loss, "weight_sum": jnp.sum(weights), "tokens": tokens}
