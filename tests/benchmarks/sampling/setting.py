"""What the sampling benchmark measures: the model, its weights and the sources."""

import dataclasses
import os
from typing import Any

import gin
import numpy as np
import numpy.typing as npt

from rest_jax.data.vocabulary import EOS_ID, SentencePieceVocabulary
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel
from tests.benchmarks.sampling import weights
from tests.benchmarks.training import make_model, parse_model


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is measured; the command line's flags."""

    model: str = "t5_1_1_small"
    sources: int = 8
    samples: int = 32
    source_length: int = 64
    target_length: int = 64
    real_lengths: bool = False
    temperature: float = 1.0
    dtype: str = "float32"
    rounds: int = 3
    seed: int = 0
    sampling: tuple[tuple[str, Any], ...] = ()


def benchmark_model(name: str, *, dtype: str) -> EncoderDecoderModel:
    """The model of gin/models/NAME.gin, without a vocabulary: all ids of the embedding can be drawn."""
    try:
        parse_model(name)
        # Sizes of the project's own take their vocabulary's.
        own_size = gin.query_parameter("t5.T5Config.vocab_size") is None
        config = make_model(name, SentencePieceVocabulary(weights.DEMO_VOCABULARY) if own_size else None).module.config
    finally:
        gin.clear_config()
    config = dataclasses.replace(config, dtype=dtype, scan_layers=False, dropout_rate=0.0)
    return EncoderDecoderModel(t5.Transformer(config), None, None)


def random_sources(setting: Setting, *, vocab_size: int) -> npt.NDArray[np.int32]:
    """`[sources, source_length]`, no padding, EOS last."""
    tokens = np.random.default_rng(setting.seed).integers(
        EOS_ID + 2, vocab_size, (setting.sources, setting.source_length), dtype=np.int32
    )
    tokens[:, -1] = EOS_ID
    return tokens


def make_params(setting: Setting, model: EncoderDecoderModel) -> dict[str, Any]:
    """See weights.py."""
    return weights.random_params(
        model, seed=setting.seed, max_length=setting.target_length, temperature=setting.temperature,
        lengths=weights.demo_lengths() if setting.real_lengths else None,
    )  # fmt: skip


def cores() -> int:
    """Of this machine, that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
