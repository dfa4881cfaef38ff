"""Random weights of a T5 whose samples end as a distribution of lengths says, or never: in any engine, with no hook.

That a sample ends after n tokens with the probability that text has is a matter of the hazard h(t), the probability of
EOS at position t given that the sample came so far. A T5 can be made to have any h, by weights alone:

  - Some places of the residual stream are reserved: nothing random reads or writes them. CONSTANT is the same number
    for each token, and so large beside the random rest that the RMS norms divide by nearly the same number everywhere;
    START is not zero at the decoder's start token alone.
  - Head 0 of the decoder's first layer has queries of zero, so its softmax sees the table of relative position biases
    alone. Its value is START's. What it finds at position t is thus the weight of the start token, t positions ago,

        f(t) = exp(b(t)) / (exp(b(0)) + ... + exp(b(t))),    f(0) = 1,

    and b can be chosen for any f in (0, 1). It goes to PLACE.
  - EOS's logit is a sum of CONSTANT and PLACE, hence a - c f(t): one b gives the log-odds of h(t).

Biases share buckets from the 16th position on (T5's logarithmic ones), so h is right on average in each. What came of
it is measured: the benchmark prints the lengths that each engine drew. Samples of one source are independent.
"""

import gzip
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from rest_jax import paths
from rest_jax.checkpoints import tensors
from rest_jax.data.vocabulary import EOS_ID, PAD_ID, SentencePieceVocabulary
from rest_jax.models.attention import relative_position_bucket
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from rest_jax.models.initial_params import initial_params

DEMO_VOCABULARY = "rest_jax://tasks/demo_data/vocab.model"
_LINES = 8000  # of the demo's text
_CONSTANT = slice(0, 16)
_START, _PLACE = 16, 17
_RESERVED = slice(0, 18)
_CONSTANT_POWER = 4.0  # CONSTANT's share of the mean square of a token's embedding, where the random places have 1
_START_VALUE = 8.0
_WRITES = 0.3  # what layers add to the residual stream, against T5's initialisation
_NEVER = -100.0  # a logit: e-44 is no probability in float32
_LEAST, _MOST = 1e-3, 0.5  # hazards are kept between
_WEIGHTS = (1e-3, 0.9)  # f is kept between


def demo_lengths() -> npt.NDArray[np.int64]:
    """Tokens of the demo's target sentences, without EOS."""
    vocabulary = SentencePieceVocabulary(DEMO_VOCABULARY)
    with gzip.open(paths.resolve("rest_jax://tasks/demo_data/train.tsv.gz"), "rt", encoding="utf-8") as file:
        lines = itertools.islice(file, _LINES)
        return np.array([len(vocabulary.encode(line.rstrip("\n").split("\t")[1])) for line in lines])


def random_params(
    model: EncoderDecoderModel,
    *,
    seed: int,
    max_length: int,
    lengths: npt.NDArray[np.int64] | None = None,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """The model's parameters, float32, on the host.

    Args:
      model: around our T5, with separate layers and logits of their own (T5 1.1, mT5, the project's sizes).
      seed: of the random part.
      max_length: of samples.
      lengths: `[n]`, tokens before EOS of real sentences; None for samples that never end.
      temperature: that will be sampled with.

    Padding is never drawn.
    """
    config = model.module.config
    if config.logits_via_embedding or config.scan_layers or config.relative_bias_per_layer:
        raise ValueError("the weights are made for T5 1.1: logits of their own, one table of biases, separate layers")
    params = tensors.flatten(jax.device_get(initial_params(model, jax.random.key(seed))))
    params = {name: np.array(value, np.float32) for name, value in params.items()}
    _reserve(params, config.head_dim)
    logits_kernel = params["decoder/logits_dense/kernel"]
    logits_kernel[_RESERVED] = 0.0

    # What EOS's logit is made of, read off the network.
    logits_kernel[:, :2] = 0.0
    logits_kernel[_CONSTANT, 0] = 1.0
    logits_kernel[_PLACE, 1] = 1.0
    logits = _teacher_forced_logits(model, params, seed=seed, max_length=max_length)  # [rows, max_length, vocab]
    constant, start = float(logits[:, :, 0].mean()), float(logits[:, 0, 1].mean())
    log_sum = float(jax.nn.logsumexp(logits[:, :, 2:] / temperature, axis=-1).mean())

    logits_kernel[:, :2] = 0.0
    logits_kernel[_CONSTANT, PAD_ID] = _NEVER / constant
    if lengths is None:
        logits_kernel[_CONSTANT, EOS_ID] = _NEVER / constant
        return tensors.unflatten(params)
    buckets = relative_position_bucket(
        -np.arange(max_length),
        bidirectional=False,
        num_buckets=config.relative_attention_num_buckets,
        max_distance=config.relative_attention_max_distance,
    )
    log_odds = _log_odds(lengths, buckets)
    low, high = log_odds.min(), log_odds.max()
    params["decoder/relpos_bias/rel_embedding"][0] = _biases(
        (high - log_odds) / (high - low), buckets, size=config.relative_attention_num_buckets
    )
    logits_kernel[_CONSTANT, EOS_ID] = temperature * (high + log_sum) / constant
    logits_kernel[_PLACE, EOS_ID] = -temperature * (high - low) / start
    return tensors.unflatten(params)


def _reserve(params: dict[str, npt.NDArray[np.float32]], head_dim: int) -> None:
    """Makes the reserved places, and the head that says where the decoder is."""
    embedding = params["token_embedder/embedding"]
    width = embedding.shape[1]
    embedding[:, _RESERVED] = 0.0
    embedding[:, _CONSTANT] = np.sqrt(_CONSTANT_POWER * width / (_CONSTANT.stop - _CONSTANT.start))
    embedding[PAD_ID, _START] = _START_VALUE
    for name, value in params.items():
        if name.endswith("/scale"):
            value[:] = np.sqrt(1.0 + _CONSTANT_POWER)
            value[_RESERVED] = 0.0
        elif name.endswith(("/out/kernel", "/wo/kernel")):
            value *= _WRITES
            value[:, _RESERVED] = 0.0
    params["decoder/decoder_norm/scale"][[*range(_CONSTANT.stop), _PLACE]] = 1.0
    first = "decoder/layers_0"
    params[f"{first}/pre_self_attention_layer_norm/scale"][_START] = 1.0
    for kernel in ("query", "key", "value"):
        params[f"{first}/self_attention/{kernel}/kernel"][_START] = 0.0
    params[f"{first}/self_attention/query/kernel"][:, :head_dim] = 0.0
    params[f"{first}/self_attention/value/kernel"][:, :head_dim] = 0.0
    params[f"{first}/self_attention/value/kernel"][_START, 0] = 1.0
    params[f"{first}/self_attention/out/kernel"][:head_dim] = 0.0
    params[f"{first}/self_attention/out/kernel"][0, _PLACE] = 1.0


def _teacher_forced_logits(
    model: EncoderDecoderModel, params: dict[str, npt.NDArray[np.float32]], *, seed: int, max_length: int
) -> jax.Array:
    rng = np.random.default_rng(seed)
    sources, targets = rng.integers(EOS_ID + 1, model.module.config.vocab_size, (2, 4, max_length), dtype=np.int32)
    batch = {
        "encoder_input_tokens": jnp.asarray(sources),
        "decoder_input_tokens": jnp.pad(jnp.asarray(targets[:, :-1]), ((0, 0), (1, 0))),
        "decoder_target_tokens": jnp.asarray(targets),
    }
    return jax.jit(model.compute_logits)(tensors.unflatten(params), batch)


def _log_odds(lengths: npt.NDArray[np.int64], buckets: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Log-odds of the hazard at each position, the same within a bucket. -> `[max_length]`."""
    positions = np.arange(len(buckets))
    ends = (lengths[:, None] == positions).sum(axis=0)
    reached = (lengths[:, None] >= positions).sum(axis=0)
    by_bucket = np.bincount(buckets, ends) / np.maximum(np.bincount(buckets, reached), 1)
    # Where no sentence is so long, or none so short, the bounds stand.
    by_bucket = np.where(np.bincount(buckets, reached) == 0, _MOST, by_bucket)
    hazard = np.clip(by_bucket[buckets], _LEAST, _MOST)
    return np.log(hazard) - np.log1p(-hazard)


def _biases(weights: npt.NDArray[np.float64], buckets: npt.NDArray[np.int32], *, size: int) -> npt.NDArray[np.float32]:
    """Biases `[size]` with which the start token has about `weights[t]` of the softmax at position t; see above."""
    biases = np.zeros(size)
    total = 1.0  # sum of exp(bias) over the distances so far, the start token's own at distance 0 among them
    for bucket in range(1, int(buckets[-1]) + 1):
        places = np.flatnonzero(buckets == bucket)
        middle = (len(places) + 1) / 2
        weight = np.clip(weights[places[0]], *_WEIGHTS)
        # weight = e / (total + middle * e)
        exponential = weight * total / max(1.0 - middle * weight, 0.1)
        biases[bucket] = np.log(exponential)
        total += len(places) * exponential
    biases[int(buckets[-1]) + 1 :] = biases[int(buckets[-1])]
    return biases.astype(np.float32)
