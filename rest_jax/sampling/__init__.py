"""Drawing translations: samples, greedy and beam search on one incremental decoder."""

from rest_jax.sampling.processors import LogitProcessing
from rest_jax.sampling.sampler import decode, sampling_shapes
from rest_jax.sampling.samples import Samples
from rest_jax.sampling.scored import Sampling

__all__ = ["LogitProcessing", "Samples", "Sampling", "decode", "sampling_shapes"]
