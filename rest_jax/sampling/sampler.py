"""N translations per source: the encoder, then the slot loop or beam search on each data shard."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from rest_jax.data.vocabulary import eos_id_of
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.partitioning import BATCH_AXES
from rest_jax.sampling import decoder, memory, t5x_model
from rest_jax.sampling.beam import beam_decode
from rest_jax.sampling.engine import Sources, draw_all
from rest_jax.sampling.processors import LogitProcessing
from rest_jax.sampling.samples import Samples, spread

_log = logging.getLogger(__name__)


def source_keys(*, seed: jax.Array | int, stream: jax.Array | int, source_ids: jax.Array) -> jax.Array:
    """One key for each (seed, stream, source): draws depend on nothing else (not on batch, slot or device).

    A draw's key is this one with the sample's index and then the position folded in.

    Args:
      seed: scalar, the run's seed.
      stream: scalar; the Grow step, or another number for draws that must not repeat a Grow step's.
      source_ids: `[batch]` integers below 2^32.

    Returns:
      Keys `[batch]`.
    """
    base = jax.random.fold_in(jax.random.key(seed), stream)
    return jax.vmap(jax.random.fold_in, (None, 0))(base, source_ids.astype(jnp.uint32))


def sampling_shapes(model: Any, shapes: Any) -> Any:
    """The tree of shapes of `model`'s parameters in the types that `decode` needs of a policy which only samples."""
    if not isinstance(model, EncoderDecoderModel):
        return shapes  # of T5X's own, whose modules are not ours to know
    return t5.narrow_kernels(shapes, model.module.config)


def decode(
    model: Any,
    params: Mapping[str, Any],
    *,
    encoder_input_tokens: jax.Array,
    source_ids: jax.Array,
    num_samples: int,
    max_length: int,
    processing: LogitProcessing,
    beam_size: int = 0,
    beam_alpha: float = 0.6,
    seed: jax.Array | int = 0,
    stream: jax.Array | int = 0,
    prefix_tokens: jax.Array | None = None,
    slots: int | None = None,
    cache_dtype: str | None = None,
    mesh: Mesh | None = None,
    reward_bytes: int = 0,
) -> Samples:
    """N translations of each source; the encoder runs once per source, not once per sample.

    Padding (id 0) and ids past the vocabulary are never produced. On CPU in float32 the tokens are the same, bit for
    bit, whatever the slots, the order of the sources and the number of devices that share them.

    Args:
      model: an `EncoderDecoderModel` around our T5, or one of T5X's (see `t5x_model.decode`). A sample ends with its
        output vocabulary's `eos_id`.
      params: T5X's tree.
      encoder_input_tokens: `[batch, source_length]`. A row of padding alone is a filler: it costs no extra steps.
      source_ids: `[batch]`, see `source_keys`.
      num_samples: N.
      max_length: most tokens of a sample, incl. EOS.
      processing: temperature and truncation; temperature 0 is greedy and reads no random numbers.
      beam_size: 0 samples; otherwise the N best of a beam of this size, best first, and `processing` is not used.
      beam_alpha: length penalty of the beam.
      seed, stream: see `source_keys`.
      prefix_tokens: `[batch, prefix_length]` that every translation of a source starts with, such as the tag of a
        target language; 0 from where it is free. They stand in the samples' tokens and count in their lengths, but not
        in their log-probability, which is that of what was drawn.
      slots: samples that each data shard decodes at a time; None for as many as are of use and fit (`memory.plan`).
      cache_dtype: of self-attention's keys and values, one of `cache.CACHE_TYPES`; None for the activations'.
      mesh: the mesh on whose ('replica', 'data') the batch lies. Each shard decodes by itself, and devices of 'model'
        together; None for one device.
      reward_bytes: what a reward's parameters take of each device's memory.

    Returns:
      Samples `[batch, num_samples, max_length]`.

    Raises:
      UserError: it would not fit into memory, or a model of T5X's own is asked for what T5X does not have.
    """
    if not isinstance(model, EncoderDecoderModel):
        return t5x_model.decode(
            model,
            params,
            encoder_input_tokens=encoder_input_tokens,
            source_ids=source_ids,
            num_samples=num_samples,
            max_length=max_length,
            processing=processing,
            beam_size=beam_size,
            beam_alpha=beam_alpha,
            seed=seed,
            stream=stream,
            prefix_tokens=prefix_tokens,
        )
    config = model.module.config
    plan = memory.plan(
        config,
        batch=encoder_input_tokens.shape[0],
        num_samples=num_samples,
        source_length=encoder_input_tokens.shape[1],
        max_length=max_length,
        slots=slots,
        beam_size=beam_size,
        cache_dtype=cache_dtype,
        mesh=mesh,
        kernel_dtype=memory.kernel_dtype(params),
        reward_bytes=reward_bytes,
    )
    _log.info("sampling: %s", plan)
    encoded = model.module.apply(
        {"params": params}, encoder_input_tokens, enable_dropout=False, method=model.module.encode
    )
    vocabulary = model.output_vocabulary
    eos_id = eos_id_of(vocabulary)
    common: dict[str, Any] = {
        "max_length": max_length,
        "vocab_size": config.vocab_size if vocabulary is None else vocabulary.vocab_size,
        "eos_id": eos_id,
        "cache_dtype": cache_dtype,
    }

    def shard(weights: decoder.Weights, sources: Sources) -> Samples:
        """Of one data shard."""
        if beam_size:
            tokens, log_probs, slot_steps = beam_decode(
                weights, config, sources=sources, beam_size=beam_size, num_best=num_samples, alpha=beam_alpha, **common
            )
        else:
            tokens, log_probs, slot_steps = draw_all(
                weights,
                config,
                sources=sources,
                layout=plan.layout,
                num_samples=num_samples,
                processing=processing,
                **common,
            )
        real = jnp.any(sources.mask, axis=-1)
        return Samples.of(tokens, log_probs, eos_id=eos_id, slot_steps=spread(slot_steps, real))

    batch = encoder_input_tokens.shape[0]
    weights = decoder.pack_weights(params, config)
    sources = Sources(
        cross=decoder.cross_attention(params, config, encoded=encoded),
        mask=encoder_input_tokens > 0,
        keys=source_keys(seed=seed, stream=stream, source_ids=source_ids),
        prefix=jnp.zeros((batch, 0), jnp.int32) if prefix_tokens is None else prefix_tokens,
    )
    if mesh is None:
        return shard(weights, sources)
    # The loops are local to a shard: shards have nothing to tell each other, and none waits for another.
    rows = PartitionSpec(BATCH_AXES)
    specs: Any = jax.tree.map(lambda _: rows, sources)
    if config.scan_layers:  # the layers' axis comes first
        specs = specs._replace(cross=jax.tree.map(lambda _: PartitionSpec(None, BATCH_AXES), sources.cross))
    return jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(PartitionSpec(), specs),
        out_specs=rows,
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )(weights, sources)
