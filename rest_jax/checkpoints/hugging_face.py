"""Folders as transformers writes them: config.json, *.safetensors, and the tokenizer's files.

Facts (transformers 4.57, models t5, mt5, umt5): matrices are transposed but for the embedding; `shared.weight` is
stored once though three modules use it; logits are scaled by D**-0.5 where `lm_head` is tied to it (T5 1.0), and not
scaled where it is a matrix of its own. From transformers 5 on `tie_word_embeddings` is always true in config.json,
whatever the file holds, and `scale_decoder_outputs` says what it said before; so the files' own names decide.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rest_jax.checkpoints import model_config, safetensors_files
from rest_jax.checkpoints.tensors import FLOATS, LazyTensor, Tensors, check_same_names_and_shapes, transposed
from rest_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from rest_jax.errors import UserError
from rest_jax.models import t5

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODEL_TYPES = ("t5", "mt5", "umt5")
SENTENCEPIECE = "spiece.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
# What goes with the weights from folder to folder, as it is.
COMPANIONS = (
    SENTENCEPIECE,
    TOKENIZER_CONFIG,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
MAX_SHARD_BYTES = 5 * 10**9

# transformers' name of an activation -> ours. "gelu" without a gate is the exact one there, ours is the tanh form.
_ACTIVATIONS = {
    "relu": ("relu",),
    "gelu_new": ("gelu",),
    "gated-gelu": ("gelu", "linear"),
    "gated-gelu_new": ("gelu", "linear"),
    "gated-relu": ("relu", "linear"),
    "gated-silu": ("silu", "linear"),
}
_EMBEDDING, _LOGITS = "token_embedder/embedding", "decoder/logits_dense/kernel"
_SHARED, _LM_HEAD = "shared.weight", "lm_head.weight"
# Further names of the embedding; where a file holds only one of them, it is the embedding.
_EMBEDDING_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# A table that T5 1.0's first conversion wrote and that no version of transformers uses.
_UNUSED = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


@dataclasses.dataclass(frozen=True)
class Folder:
    """An opened folder: our network's configuration, our names, and config.json as it is."""

    config: t5.T5Config
    tensors: Tensors
    config_json: Mapping[str, Any]


def open_folder(folder: Path) -> Folder:
    """Opens a folder; of the weights only the headers are read, or the embedding where it must be compared.

    Raises:
      UserError: config.json is not that of a T5, a file is cut off or missing, a tensor is missing, unexpected, of
        another shape or no float.
    """
    config_json = _read_json(folder / CONFIG)
    stored = dict(_stored_tensors(folder))
    what = f"{str(folder)!r}"
    embedding = _take_embedding(stored, what=what)
    for name in _UNUSED:
        stored.pop(name, None)
    lm_head = stored.get(_LM_HEAD)
    tied, scaled = _logits_of(config_json, embedding=embedding, lm_head=lm_head, what=what)
    config = _t5_config(config_json, tied=tied and scaled, what=what)
    if tied:
        stored.pop(_LM_HEAD, None)
        if not scaled:
            # Tied without the scale: our tree says this with a matrix of its own that has the same values.
            stored[_LM_HEAD] = embedding
    stored[_SHARED] = embedding
    names = hugging_face_names(config)
    shapes = model_config.expected_shapes(config)
    check_same_names_and_shapes(
        have={name: tensor.shape for name, tensor in stored.items()},
        want={theirs: _their_shape(ours, shapes[ours]) for ours, theirs in names.items()},
        what=what,
        advice=f"Its {CONFIG} and its weights belong to different models, or a file is missing.",
    )
    for name, tensor in stored.items():
        if str(tensor.dtype) not in FLOATS:
            raise UserError(f"{what}: {name} is {tensor.dtype}; weights must be {', '.join(FLOATS)}, not quantised.")
    return Folder(
        config=config,
        tensors={ours: _transposed(ours, stored[theirs]) for ours, theirs in names.items()},
        config_json=config_json,
    )


def write_weights(
    folder: Path, tensors: Tensors, *, config: t5.T5Config, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes model.safetensors, or several files and their index where they are larger than `max_shard_bytes`.

    Args:
      folder: exists.
      tensors: of separate layers, our names.
      config: of the network.
      max_shard_bytes: a file is larger only if one tensor is.
    """
    theirs = {name: _transposed(ours, tensors[ours]) for ours, name in hugging_face_names(config).items()}
    shards: list[dict[str, LazyTensor]] = [{}]
    for name, tensor in theirs.items():
        used = sum(other.nbytes for other in shards[-1].values())
        if shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        safetensors_files.write_tensors(folder / WEIGHTS, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        safetensors_files.write_tensors(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in theirs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX, index)


def write_config(
    folder: Path, *, config: t5.T5Config, dtype: str, eos_id: int | None, base: Mapping[str, Any] | None = None
) -> None:
    """Writes config.json.

    Args:
      folder: exists.
      config: of the network.
      dtype: of the weights.
      eos_id: of the vocabulary; None where it is not known: `base`'s, or T5's.
      base: config.json that the checkpoint was imported with; what our configuration does not say is kept.

    Raises:
      UserError: transformers has no such network.
    """
    by_activations = {value: key for key, value in reversed(_ACTIVATIONS.items())}
    if config.mlp_activations not in by_activations:
        raise UserError(
            f"T5Config.mlp_activations={config.mlp_activations!r} cannot be exported: transformers has "
            f"{', '.join(map(repr, by_activations))}."
        )
    base = base or {}
    model_type = "umt5" if config.relative_bias_per_layer else base.get("model_type", "t5")
    architecture = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[model_type]
    _write_json(
        folder / CONFIG,
        {
            "architectures": [f"{architecture}ForConditionalGeneration"],
            "decoder_start_token_id": 0,
            "initializer_factor": 1.0,
            "is_encoder_decoder": True,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "use_cache": True,
            **base,
            **({} if eos_id is None else {"eos_token_id": eos_id}),
            # Both readings of tied logits, transformers' 4 and 5.
            "tie_word_embeddings": config.logits_via_embedding,
            "scale_decoder_outputs": config.logits_via_embedding,
            "model_type": model_type,
            # transformers 4.56 renamed the first to the second.
            "torch_dtype": dtype,
            "dtype": dtype,
            "vocab_size": config.vocab_size,
            "d_model": config.emb_dim,
            "d_kv": config.head_dim,
            "d_ff": config.mlp_dim,
            "num_heads": config.num_heads,
            "num_layers": config.num_encoder_layers,
            "num_decoder_layers": config.num_decoder_layers,
            "feed_forward_proj": by_activations[config.mlp_activations],
            "relative_attention_num_buckets": config.relative_attention_num_buckets,
            "relative_attention_max_distance": config.relative_attention_max_distance,
            "dropout_rate": config.dropout_rate,
            "layer_norm_epsilon": t5.NORM_EPSILON,
        },
    )


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json, such as an import leaves beside its checkpoint; None where there is none."""
    return _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer's files that are there."""
    for name in COMPANIONS:
        if (source / name).is_file():
            (target / name).write_bytes((source / name).read_bytes())


def open_vocabulary(folder: Path, *, vocab_size: int) -> Vocabulary | None:
    """The vocabulary of the tokenizer's files in `folder`; None where there are none.

    Tokenizers have sentinels after the pieces, 100 in T5 and 300 in UMT5, unless their settings say otherwise or the
    embedding has no room for them (mT5 and MADLAD-400 have theirs among the pieces).
    """
    settings = _read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    extra_ids = settings.get("extra_ids")
    if extra_ids is not None and (isinstance(extra_ids, bool) or not isinstance(extra_ids, int) or extra_ids < 0):
        raise UserError(
            f"{str(folder / TOKENIZER_CONFIG)!r} has extra_ids={extra_ids!r}; it must be a whole number of at least 0."
        )
    if str(settings.get("tokenizer_class", "")).startswith("ByT5"):
        return ByteVocabulary(extra_ids=125 if extra_ids is None else extra_ids)
    model = folder / SENTENCEPIECE
    if not model.is_file():
        return None
    if extra_ids is None:
        room = vocab_size - SentencePieceVocabulary(str(model)).vocab_size
        extra_ids = max(number for number in (0, 100, 300) if number <= max(room, 0))
    return SentencePieceVocabulary(str(model), extra_ids=extra_ids)


def write_vocabulary(folder: Path, vocabulary: Any) -> None:
    """Writes the tokenizer's files, for transformers' T5Tokenizer or ByT5Tokenizer."""
    if isinstance(vocabulary, ByteVocabulary):
        settings: dict[str, Any] = {"tokenizer_class": "ByT5Tokenizer"}
    elif isinstance(vocabulary, SentencePieceVocabulary):
        (folder / SENTENCEPIECE).write_bytes(vocabulary.path.read_bytes())
        # MADLAD-400's file has no piece for padding: T5Tokenizer would add one, past the embedding's last row.
        settings = {
            "tokenizer_class": "T5Tokenizer",
            "pad_token": vocabulary.id_to_piece(vocabulary.pad_id),
            "eos_token": vocabulary.id_to_piece(vocabulary.eos_id),
            "unk_token": vocabulary.id_to_piece(vocabulary.unk_id),
        }
    else:
        return
    _write_json(folder / TOKENIZER_CONFIG, settings | {"extra_ids": vocabulary.extra_ids})


def hugging_face_names(config: t5.T5Config) -> dict[str, str]:
    """Our name -> theirs, of each parameter of a network with separate layers."""
    return dict(_names(config))


def _names(config: t5.T5Config) -> Iterator[tuple[str, str]]:
    yield _EMBEDDING, _SHARED
    self_attention = "layer.0.SelfAttention"
    for stack, layers in (("encoder", config.num_encoder_layers), ("decoder", config.num_decoder_layers)):
        attentions = {("attention" if stack == "encoder" else "self_attention"): self_attention}
        norms = {f"pre_{next(iter(attentions))}_layer_norm": "layer.0.layer_norm"}
        if stack == "decoder":
            attentions["encoder_decoder_attention"] = "layer.1.EncDecAttention"
            norms["pre_cross_attention_layer_norm"] = "layer.1.layer_norm"
        feed_forward = f"layer.{len(attentions)}"
        norms["pre_mlp_layer_norm"] = f"{feed_forward}.layer_norm"
        wi = ["wi"] if len(config.mlp_activations) == 1 else [f"wi_{i}" for i in range(len(config.mlp_activations))]
        for i in range(layers):
            ours, theirs = f"{stack}/layers_{i}", f"{stack}.block.{i}"
            for attention, module in attentions.items():
                for kernel in ("query", "key", "value", "out"):
                    letter = "o" if kernel == "out" else kernel[0]
                    yield f"{ours}/{attention}/{kernel}/kernel", f"{theirs}.{module}.{letter}.weight"
            for kernel in (*wi, "wo"):
                yield f"{ours}/mlp/{kernel}/kernel", f"{theirs}.{feed_forward}.DenseReluDense.{kernel}.weight"
            for norm, module in norms.items():
                yield f"{ours}/{norm}/scale", f"{theirs}.{module}.weight"
            if i == 0 or config.relative_bias_per_layer:
                table = f"{ours if config.relative_bias_per_layer else stack}/relpos_bias/rel_embedding"
                yield table, f"{theirs}.{self_attention}.relative_attention_bias.weight"
        yield f"{stack}/{stack}_norm/scale", f"{stack}.final_layer_norm.weight"
    if not config.logits_via_embedding:
        yield _LOGITS, _LM_HEAD


def _their_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if name == _EMBEDDING else shape[::-1]


def _transposed(name: str, tensor: LazyTensor) -> LazyTensor:
    return tensor if name == _EMBEDDING or len(tensor.shape) != 2 else transposed(tensor)


def _stored_tensors(folder: Path) -> dict[str, LazyTensor]:
    """Every tensor of the folder, under its name there."""
    index = folder / INDEX
    if not index.is_file():
        files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else sorted(folder.glob("*.safetensors"))
        return {name: tensor for file in files for name, tensor in safetensors_files.open_tensors(file).items()}
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise UserError(f"{str(index)!r} is no index of safetensors files: it has no 'weight_map'. Fetch it again.")
    # Names alone: an index must not lead out of its folder.
    files = sorted({folder / Path(str(name)).name for name in weight_map.values()})
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{str(folder)!r} lacks {', '.join(missing)}, which {INDEX} names. Fetch the whole folder.")
    tensors = {name: tensor for file in files for name, tensor in safetensors_files.open_tensors(file).items()}
    absent = sorted(weight_map.keys() - tensors.keys())
    if absent:
        raise UserError(f"{str(folder)!r}: {INDEX} names {', '.join(absent[:8])}, which no file holds. Fetch it again.")
    return tensors


def _take_embedding(stored: dict[str, LazyTensor], *, what: str) -> LazyTensor:
    """Takes the embedding out of `stored`, under whichever of its names it is."""
    names = [name for name in (_SHARED, *_EMBEDDING_ALIASES) if name in stored]
    found = [stored.pop(name) for name in names]
    if not found and _LM_HEAD in stored:
        found, names = [stored[_LM_HEAD]], [_LM_HEAD]
    if not found:
        raise UserError(f"{what} does not fit the model: missing {_SHARED}. A T5 has one embedding for both stacks.")
    for name, other in zip(names[1:], found[1:], strict=True):
        if not _equal(found[0], other):
            raise UserError(
                f"{what}: {names[0]} and {name} differ; a T5 has one embedding for both stacks, and so has rest_jax."
            )
    return found[0]


def _logits_of(
    config_json: Mapping[str, Any], *, embedding: LazyTensor, lm_head: LazyTensor | None, what: str
) -> tuple[bool, bool]:
    """Whether the logits come from the embedding, and whether they are scaled by D**-0.5."""
    says_tied = config_json.get("tie_word_embeddings", True) is not False
    scaled = bool(config_json.get("scale_decoder_outputs", says_tied))
    tied = lm_head is None or (says_tied and _equal(embedding, lm_head))
    if not tied and scaled and "scale_decoder_outputs" in config_json:
        raise UserError(
            f"{what}: {_LM_HEAD} differs from {_SHARED}, and {CONFIG} asks for scaled logits (scale_decoder_outputs). "
            "No T5 has both; correct the one that is wrong."
        )
    return tied, scaled


def _equal(first: LazyTensor, second: LazyTensor) -> bool:
    """Bit for bit, some rows at a time."""
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        return False
    rows = max(1, 2**26 // max(1, math.prod(first.shape[1:]) * first.dtype.itemsize))
    rest = tuple(slice(0, size) for size in first.shape[1:])
    for start in range(0, first.shape[0], rows):
        index = (slice(start, min(start + rows, first.shape[0])), *rest)
        one, other = (np.ascontiguousarray(tensor.read_slice(index)).view(np.uint8) for tensor in (first, second))
        if not np.array_equal(one, other):
            return False
    return True


def _t5_config(config_json: Mapping[str, Any], *, tied: bool, what: str) -> t5.T5Config:
    def number(name: str, default: int | None = None) -> int:
        value = config_json.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(f"{what}: {CONFIG} has {name}={value!r}; a T5's is a whole number.")
        return value

    model_type = config_json.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(
            f"{what}: {CONFIG} has model_type={model_type!r}; rest_jax reads the T5 family: {', '.join(MODEL_TYPES)} "
            "(ByT5, Flan-T5 and MADLAD-400 are t5 or mt5)."
        )
    activation = config_json.get("feed_forward_proj", "relu" if model_type == "t5" else "gated-gelu")
    if activation not in _ACTIVATIONS:
        raise UserError(f"{what}: {CONFIG} has feed_forward_proj={activation!r}; legal are {', '.join(_ACTIVATIONS)}.")
    epsilon = config_json.get("layer_norm_epsilon", t5.NORM_EPSILON)
    if epsilon != t5.NORM_EPSILON:
        raise UserError(f"{what}: {CONFIG} has layer_norm_epsilon={epsilon!r}; a T5's is {t5.NORM_EPSILON}.")
    start = config_json.get("decoder_start_token_id")
    if (config_json.get("pad_token_id", 0) if start is None else start) != 0:
        raise UserError(f"{what}: {CONFIG} lets targets start with token {start!r}; a T5's start with 0.")
    return t5.T5Config(
        vocab_size=number("vocab_size"),
        emb_dim=number("d_model"),
        num_heads=number("num_heads"),
        num_encoder_layers=number("num_layers"),
        num_decoder_layers=number("num_layers")
        if config_json.get("num_decoder_layers") is None
        else number("num_decoder_layers"),
        head_dim=number("d_kv"),
        mlp_dim=number("d_ff"),
        mlp_activations=_ACTIVATIONS[activation],
        dropout_rate=config_json.get("dropout_rate", 0.1),
        logits_via_embedding=tied,
        relative_attention_num_buckets=number("relative_attention_num_buckets", 32),
        relative_attention_max_distance=number("relative_attention_max_distance", 128),
        relative_bias_per_layer=model_type == "umt5",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{str(path)!r} is no JSON: {error}. Fetch it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} holds no JSON object. Fetch it again.")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
