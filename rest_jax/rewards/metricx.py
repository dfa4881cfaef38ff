"""MetricX-23 and MetricX-24 (Juraska et al. 2023, 2024) as rewards, from their published weights.

An mT5 reads `source: ... candidate: ...` without EOS; its decoder makes one step on token 0, and one row of its head is
an error of 0 to 25, lower is better (github.com/google-research/metricx). The reward is 1 - error / 25.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax.checkpoints import formats, model_config, tensors
from rest_jax.checkpoints.attention_heads import joined_heads
from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.errors import UserError
from rest_jax.models.regressor import regress
from rest_jax.models.t5 import T5Config, Transformer
from rest_jax.rewards.base import Reward, RewardBatch, RewardVocabulary
from rest_jax.rewards.joined_input import JoinedInput, without_prefix
from rest_jax.rewards.retokenization import Retokenizer
from rest_jax.rewards.row_groups import score_rows

MAX_ERROR = 25.0
_HEAD, _EMBEDDING = "decoder/logits_dense/kernel", "token_embedder/embedding"
# Published embeddings have their rows filled up to a multiple of this.
_ROW_MULTIPLE = 128
_DTYPES = ("bfloat16", "float32")


class Version(NamedTuple):
    """How the predictor of a version makes an input.

    Attributes:
      without_reference, with_reference: templates.
      max_length: tokens to which it cuts an input with its EOS, which it then takes away.
    """

    without_reference: str
    with_reference: str
    max_length: int


VERSIONS: Mapping[str, Version] = {
    "24": Version(
        "source: {source} candidate: {sample}", "source: {source} candidate: {sample} reference: {reference}", 1536
    ),
    "23": Version("candidate: {sample} source: {source}", "candidate: {sample} reference: {reference}", 1024),
}


@dataclasses.dataclass(frozen=True)
class MetricX(Reward):
    """1 - clip(error, 0, 25) / 25.

    Attributes:
      checkpoint: the model's folder, config.json and *.safetensors, or what `python -m rest_jax import` made of it.
      vocabulary: mT5's spiece.model. Where the policy has another, its texts are retokenised in the graph.
      version: '24', or '23'. The models of 23 come in two kinds, with a reference, and without (`qe`).
      with_reference: the reference is read as well.
      dtype: of the weights and activations, 'bfloat16' or 'float32'; the error is float32.
      max_length: most tokens of an input, counted as the published predictor does; None for the version's own.
      rows_per_step: samples that go through the network together on each data shard; bounds memory.
      source_prefix: text that the task puts before each source, such as 'translate German to English: '; left out.
      head_row: row of the head that is the error; mT5's <extra_id_10>.
      label: its name in the store, where a run has several.
    """

    checkpoint: str
    vocabulary: str
    version: str = "24"
    with_reference: bool = False
    dtype: str = "bfloat16"
    max_length: int | None = None
    rows_per_step: int = 32
    source_prefix: str = ""
    head_row: int = 250089
    label: str = "metricx"

    def __post_init__(self) -> None:
        for name, legal in (("version", tuple(VERSIONS)), ("dtype", _DTYPES)):
            if getattr(self, name) not in legal:
                raise UserError(
                    f"MetricX.{name} is {getattr(self, name)!r}; it must be one of {', '.join(map(repr, legal))}."
                )
        if self.rows_per_step < 1:
            raise UserError(f"MetricX.rows_per_step is {self.rows_per_step}; it must be at least 1.")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"MetricX.max_length is {self.max_length}; it must be at least 2, or None.")

    @property
    def name(self) -> str:
        return self.label

    @property
    def learned(self) -> bool:
        return True

    @property
    def requires_reference(self) -> bool:
        return self.with_reference

    @property
    def template(self) -> str:
        version = VERSIONS[self.version]
        return version.with_reference if self.with_reference else version.without_reference

    @property
    def _retokenizer(self) -> Retokenizer:
        # The predictor cuts an input with its EOS, which it takes away afterwards.
        longest = (self.max_length or VERSIONS[self.version].max_length) - 1
        return Retokenizer(sentencepiece_model_file=self.vocabulary, template=self.template, max_tokens=longest)

    def init(self, vocabulary: RewardVocabulary) -> dict[str, Any]:
        """The network's tensors as they lie in the files, and the ids of the template's constants.

        Raises:
          UserError: a file is missing or damaged, the network is none of MetricX's, or the vocabularies do not fit.
        """
        own = _open_vocabulary(self.vocabulary)
        network = _network(self.checkpoint, head_row=self.head_row, dtype=self.dtype)
        rows = network[_EMBEDDING].shape[0]
        if not 0 <= rows - own.vocab_size < _ROW_MULTIPLE:
            raise UserError(
                f"MetricX.vocabulary: {self.vocabulary!r} has {own.vocab_size} pieces, and the embedding of "
                f"{self.checkpoint!r} {rows} rows. Give the spiece.model of the mT5 that it was made from."
            )
        params = {
            "network": tensors.unflatten(network),
            "source_prefix": np.asarray(vocabulary.encode(self.source_prefix.strip()), np.int32),
        }
        if own.sha256 != getattr(vocabulary, "sha256", None):
            return params | {"retokenizer": self._retokenizer.init(vocabulary)}
        joined = JoinedInput.from_template(self.template, own)
        constants = [np.asarray(constant, np.int32) for constant in joined.constants]
        return params | {"constants": constants, "eos_id": np.int32(own.eos_id)}

    def score(self, params: dict[str, Any], batch: RewardBatch) -> dict[str, jax.Array]:
        return {self.name: 1.0 - jnp.clip(self.errors(params, batch), 0.0, MAX_ERROR) / MAX_ERROR}

    def errors(self, params: dict[str, Any], batch: RewardBatch) -> jax.Array:
        """What the network says, before it is cut to [0, 25]. float32 `[batch, num_samples]`."""
        # [batch, 1 or num_samples, length]
        texts = {
            "source": without_prefix(batch["sources"], params["source_prefix"])[:, None],
            "sample": batch["samples"],
            "reference": batch["references"][:, None],
        }
        texts = {name: texts[name] for name in self._retokenizer.fields}
        num_sources, num_samples, _ = batch["samples"].shape
        if "retokenizer" in params:
            inputs = self._retokenizer(params["retokenizer"], texts).ids.reshape(num_sources * num_samples, -1)
        else:
            joined = JoinedInput(constants=tuple(params["constants"]), fields=tuple(texts))
            rows = {
                name: jnp.repeat(tokens, num_samples // tokens.shape[1], axis=1).reshape(num_sources * num_samples, -1)
                for name, tokens in texts.items()
            }
            inputs = joined.join_rows(rows, eos_id=params["eos_id"])[:, : self._retokenizer.max_tokens]

        network = params["network"]
        module = Transformer(dataclasses.replace(_config_of(network), dtype=self.dtype))
        errors = score_rows(lambda rows: regress(module, network, rows)[:, 0], inputs, rows_per_step=self.rows_per_step)
        return errors.reshape(num_sources, num_samples)


def _open_vocabulary(path: str) -> SentencePieceVocabulary:
    try:
        return SentencePieceVocabulary(path)
    except UserError as error:
        raise UserError(f"MetricX.vocabulary: {error}") from error


def _network(checkpoint: str, *, head_row: int, dtype: str) -> dict[str, tensors.LazyTensor]:
    """Name -> tensor of the network, its layers stacked and its head reduced to one row.

    Matrices have `dtype`. What is small is float32 in any case: norms, position biases and the head.
    """
    opened = formats.open_checkpoint(checkpoint, field="MetricX.checkpoint")
    leaves = joined_heads(opened.tensors)
    what = f"MetricX.checkpoint: {str(opened.directory)!r}"
    shapes = {name: tensor.shape for name, tensor in leaves.items()}
    inferred = model_config.infer_config(shapes, what=what)
    if inferred.logits_via_embedding:
        raise UserError(f"{what} has no head of its own, and MetricX's have: lm_head. Fetch the whole folder.")
    tensors.check_same_names_and_shapes(
        have=shapes,
        want=model_config.expected_shapes(inferred),
        what=what,
        advice="Give a folder of google/metricx-23-* or google/metricx-24-*.",
    )
    if opened.config is not None and _comparable(opened.config) != _comparable(inferred):
        raise UserError(
            f"{what}: its config.json tells of {opened.config}, and MetricX's networks are mT5s: {inferred}. "
            "Give a folder of google/metricx-23-* or google/metricx-24-*."
        )
    rows = leaves[_HEAD].shape[1]
    if not 0 <= head_row < rows:
        raise UserError(f"MetricX.head_row is {head_row}, and the head of {checkpoint!r} has {rows} rows.")
    if not tensors.is_scanned(leaves):
        leaves = tensors.stacked(leaves)

    def stored(name: str, tensor: tensors.LazyTensor) -> tensors.LazyTensor:
        if name == _HEAD:
            return tensors.with_dtype(tensors.column(tensor, head_row), np.float32)
        is_matrix = name.endswith("/kernel") or name == _EMBEDDING
        return tensors.with_dtype(tensor, jnp.dtype(dtype) if is_matrix else np.float32)

    return {name: stored(name, tensor) for name, tensor in leaves.items()}


def _config_of(network: Mapping[str, Any]) -> T5Config:
    return model_config.infer_config(tensors.flat_shapes(network), what="MetricX")


def _comparable(config: T5Config) -> T5Config:
    """Without what does not change a score."""
    return dataclasses.replace(config, dtype="float32", dropout_rate=0.0, scan_layers=False, remat_policy="none")
