"""The shipped model files: every one builds, and the public sizes have the public numbers of parameters."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import gin
import jax
import pytest

from rest_jax import config
from rest_jax.models import t5
from rest_jax.models.encoder_decoder import EncoderDecoderModel

FILES = sorted(path.stem for path in (Path(__file__).parents[2] / "gin" / "models").glob("*.gin"))

# Parameters of the checkpoints on Hugging Face, and rows of their embeddings.
PUBLIC = {
    "t5_1_0_small": 60_506_624,
    "t5_1_0_base": 222_903_552,
    "t5_1_0_large": 737_668_096,
    "t5_1_0_3b": 2_851_598_336,
    "t5_1_0_11b": 11_307_321_344,
    "t5_1_1_small": 76_961_152,
    "t5_1_1_base": 247_577_856,
    "t5_1_1_large": 783_150_080,
    "t5_1_1_xl": 2_849_757_184,
    "t5_1_1_xxl": 11_135_332_352,
    "mt5_small": 300_176_768,
    "mt5_base": 582_401_280,
    "mt5_large": 1_229_581_312,
    "mt5_xl": 3_742_619_648,
    "mt5_xxl": 12_921_057_280,
    "umt5_small": 306_601_984,
    "umt5_base": 592_043_520,
    "umt5_xl": 3_768_356_864,
    "umt5_xxl": 12_972_531_712,
    "byt5_small": 299_637_760,
    "byt5_base": 581_653_248,
    "byt5_large": 1_228_183_552,
    "byt5_xl": 3_737_801_728,
    "byt5_xxl": 12_906_899_328,
    "madlad400_3b": 2_940_374_016,
    "madlad400_7b": 8_296_829_952,
    "madlad400_10b": 10_712_586_240,
}
EMBEDDING_ROWS = {"t5": 32128, "mt5": 250112, "byt5": 384, "umt5": 256384, "madlad400": 256000}


# What a run needs besides a model file.
RUN = ("MODEL_DIR='/nowhere'", "MIXTURE_OR_TASK_NAME='x'", "TASK_FEATURE_LENGTHS={}", "TRAIN_STEPS=1", "BATCH_SIZE=1")


def build(name: str, *bindings: str) -> EncoderDecoderModel:
    own_vocabulary = name.startswith("byt5")
    given = [*RUN, *bindings, *([] if own_vocabulary else ["VOCABULARY=None"])]
    config.load(gin_files=[f"models/{name}.gin", "rewards/chrf.gin", "rest.gin"], bindings=given)
    with gin.unlock_config():
        if not own_vocabulary:
            # Pieces without sentinels, where there is padding for them.
            vocab_size = EMBEDDING_ROWS.get(name.split("_")[0], 1000 + 384) - 384
            gin.bind_parameter("VOCABULARY/macro.value", SimpleNamespace(vocab_size=vocab_size, eos_id=1))
        return gin.query_parameter("MODEL/macro.value").scoped_configurable_fn()


def count(model_config: t5.T5Config) -> int:
    # Stacked layers are traced once, and are as many numbers.
    return _count(EncoderDecoderModel(t5.Transformer(dataclasses.replace(model_config, scan_layers=True)), None, None))


def _count(model: EncoderDecoderModel) -> int:
    shapes = {"encoder_input_tokens": (1, 1), "decoder_input_tokens": (1, 1)}
    variables = jax.eval_shape(lambda: model.get_initial_variables(jax.random.key(0), shapes))
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("name", FILES)
def test_every_model_file_builds_and_public_sizes_have_the_public_numbers_of_parameters(name: str) -> None:
    model_config = build(name).module.config
    if name in PUBLIC:
        assert count(model_config) == PUBLIC[name]
        assert model_config.vocab_size == EMBEDDING_ROWS[name.split("_")[0]]
        assert model_config.dtype == "bfloat16"
    else:
        assert model_config.vocab_size == 1024  # that of `build`, rounded up
        assert count(model_config) > 1e6


def test_every_public_size_has_a_file() -> None:
    assert set(PUBLIC) < set(FILES)


def test_stacked_layers_are_as_many_parameters_as_separate_ones() -> None:
    # What `count` counts.
    for per_layer in (False, True):
        model_config = t5.T5Config(50, 16, 2, 3, 2, 4, 24, relative_bias_per_layer=per_layer)
        model = EncoderDecoderModel(t5.Transformer(model_config), None, None)
        assert _count(model) == count(model_config)


def test_families_differ_where_they_should() -> None:
    t5_1_0, umt5, byt5 = (build(name).module.config for name in ("t5_1_0_small", "umt5_small", "byt5_small"))
    assert t5_1_0.mlp_activations == ("relu",) and t5_1_0.logits_via_embedding
    assert umt5.relative_bias_per_layer and umt5.mlp_activations == ("gelu", "linear")
    assert (byt5.num_encoder_layers, byt5.num_decoder_layers) == (12, 4)
    assert build("byt5_small").output_vocabulary.vocab_size == 384


def test_scanning_and_rematerialisation_are_macros() -> None:
    model_config = build("t5_1_1_xxl", "SCAN_LAYERS=True", "REMAT_POLICY='minimal'").module.config
    assert model_config.scan_layers and model_config.remat_policy == "minimal"
