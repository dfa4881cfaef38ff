"""A reward that `python -m rest_jax train_reward` has trained: a T5 regressor.

Its directory holds `reward.json` (network, input, vocabulary), the vocabulary's file and the parameters, and stands by
itself. Source and sample are joined in the graph: their ids as they are where the policy has the same vocabulary, else
retokenised, each by itself, as in training.

The score is the network's, cut to [0, 1]. What 0 and 1 mean is what its labels were scaled to: see `data/ratings.py`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rest_jax import paths
from rest_jax.checkpoints import checkpointer, formats, tensors
from rest_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from rest_jax.errors import UserError
from rest_jax.models.regressor import fresh_head, regress, with_head
from rest_jax.models.t5 import T5Config, Transformer
from rest_jax.rewards.base import Reward, RewardBatch, RewardVocabulary
from rest_jax.rewards.joined_input import JoinedInput, split
from rest_jax.rewards.retokenization import Retokenizer
from rest_jax.rewards.row_groups import score_rows

REWARD_FILE, VOCABULARY_FILE, PARAMS = "reward.json", "vocabulary.model", "params"
Params = Any


@dataclasses.dataclass(frozen=True)
class RegressorFiles:
    """What `reward.json` says.

    Attributes:
      config: the network's.
      joined: how an input is made.
      length: most tokens of an input; what is longer is cut at its end.
      vocabulary_sha256: of the vocabulary whose ids it reads.
    """

    config: T5Config
    joined: JoinedInput
    length: int
    vocabulary_sha256: str

    @property
    def module(self) -> Transformer:
        return Transformer(self.config)

    def abstract_params(self) -> Params:
        """Shapes of the parameters."""
        return jax.eval_shape(lambda key: initial_regressor(self.module, key), jax.random.key(0))


def initial_regressor(module: Transformer, key: jax.Array) -> Params:
    """Fresh parameters of a regressor on `module`."""
    tokens = jnp.ones((1, 1), jnp.int32)
    params = module.init(key, tokens, tokens, tokens, enable_dropout=False)["params"]
    return with_head(params, fresh_head(jax.random.fold_in(key, 1), module.config.emb_dim))


@dataclasses.dataclass(frozen=True)
class Regressor(Reward):
    """A trained reward.

    Attributes:
      directory: what `train_reward` wrote.
      rows_per_step: samples that are encoded together on a data shard; bounds memory.
      label: its name in the store, where a run has several.
    """

    directory: str
    rows_per_step: int = 64
    label: str = "regressor"

    def __post_init__(self) -> None:
        if self.rows_per_step < 1:
            raise UserError(f"Regressor.rows_per_step is {self.rows_per_step}; it must be at least 1.")

    @property
    def name(self) -> str:
        return self.label

    @property
    def learned(self) -> bool:
        return True

    @property
    def requires_reference(self) -> bool:
        return "reference" in read(self.directory).joined.fields

    def init(self, vocabulary: RewardVocabulary) -> dict[str, Any]:
        """The network's tensors as they lie in the file, its vocabulary's EOS, and tables where the policy has another.

        Raises:
          UserError: no reward there, or one whose vocabulary is neither the policy's nor a SentencePiece unigram model.
        """
        files = read(self.directory)
        opened = formats.open_checkpoint(str(paths.resolve(self.directory) / PARAMS), field="Regressor.directory")
        tensors.check_same_names_and_shapes(
            have={name: leaf.shape for name, leaf in opened.tensors.items()},
            want=tensors.flat_shapes(files.abstract_params()),
            what=f"Regressor.directory: {self.directory!r}",
            advice="Train the reward again.",
        )
        params = {"params": tensors.unflatten(opened.tensors)}
        sha256 = getattr(vocabulary, "sha256", None)
        if sha256 == files.vocabulary_sha256:
            return params | {"eos_id": np.int32(vocabulary.eos_id)}
        if not self._vocabulary.is_file():
            raise UserError(
                f"Regressor.directory: {self.directory!r} reads another vocabulary than the policy's (sha256 "
                f"{files.vocabulary_sha256[:12]}... and {str(sha256)[:12]}...), and texts are retokenised for "
                "SentencePiece unigram models alone. Train a reward with the policy's: python -m rest_jax train_reward "
                "with the same VOCABULARY."
            )
        return params | {
            "eos_id": np.int32(SentencePieceVocabulary(str(self._vocabulary)).eos_id),
            "retokenizer": self._retokenizer("sample", length=files.length).init(vocabulary),
        }

    @property
    def _vocabulary(self) -> Path:
        return paths.resolve(self.directory) / VOCABULARY_FILE

    def _retokenizer(self, field: str, *, length: int) -> Retokenizer:
        return Retokenizer(sentencepiece_model_file=str(self._vocabulary), template=f"{{{field}}}", max_tokens=length)

    def score(self, params: dict[str, Any], batch: RewardBatch) -> dict[str, jax.Array]:
        files = read(self.directory)
        num_sources, num_samples, _ = batch["samples"].shape
        # [batch, 1 or num_samples, length]
        texts = {
            "source": batch["sources"][:, None],
            "sample": batch["samples"],
            "reference": batch["references"][:, None],
        }
        texts = {name: texts[name] for name in {*files.joined.fields, "sample"}}
        if "retokenizer" in params:
            texts = {
                name: self._retokenizer(name, length=files.length)(params["retokenizer"], {name: tokens}).ids
                for name, tokens in texts.items()
            }
        # -> [batch * num_samples, length]
        texts = {
            name: jnp.repeat(tokens, num_samples // tokens.shape[1], axis=1).reshape(num_sources * num_samples, -1)
            for name, tokens in texts.items()
        }
        inputs = files.joined.join_rows(texts, eos_id=params["eos_id"])[:, : files.length]
        scores = score_inputs(
            files.module,
            params["params"],
            inputs,
            joined=files.joined,
            eos_id=params["eos_id"],
            rows_per_step=self.rows_per_step,
        )
        return {self.name: jnp.clip(scores, 0.0, 1.0).reshape(num_sources, num_samples)}


def score_inputs(
    module: Transformer,
    params: Params,
    inputs: jax.Array,
    *,
    joined: JoinedInput,
    eos_id: jax.typing.ArrayLike,
    rows_per_step: int,
) -> jax.Array:
    """The network's scores float32 `[rows]` of joined inputs int32 `[rows, length]` (`joined_input`, `row_groups`)."""

    def network(rows: jax.Array) -> jax.Array:
        if not joined.sample_in_decoder:
            return regress(module, params, rows)[:, 0]
        source, sample, last = split(rows, eos_id=eos_id)
        scores = regress(module, params, source, decoder_input_tokens=sample)
        return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]

    return score_rows(network, inputs, rows_per_step=rows_per_step)


def read(directory: str) -> RegressorFiles:
    """Reads reward.json.

    Raises:
      UserError: there is none.
    """
    path = paths.resolve(directory) / REWARD_FILE
    if not path.is_file():
        raise UserError(
            f"Regressor.directory: {directory!r} has no {REWARD_FILE}; give what python -m rest_jax train_reward wrote "
            "(its REWARD_DIR)."
        )
    values = json.loads(path.read_text(encoding="utf-8"))
    return RegressorFiles(
        config=T5Config(**values["config"]),
        joined=JoinedInput(
            constants=tuple(map(tuple, values["constants"])),
            fields=tuple(values["fields"]),
        ),
        length=values["length"],
        vocabulary_sha256=values["vocabulary"]["sha256"],
    )


def write(
    directory: Path, *, files: RegressorFiles, params: Params, vocabulary: Vocabulary, facts: dict[str, Any]
) -> None:
    """Writes a reward's directory, reward.json last: what has one is whole.

    Args:
      directory: made if need be; what a training before this one left there is replaced.
      files, params: the reward.
      vocabulary: whose ids it reads; its file is copied.
      facts: further entries of reward.json, such as what the labels were.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / REWARD_FILE).unlink(missing_ok=True)
    checkpointer.save_params(directory / PARAMS, params)
    described: dict[str, Any] = {"sha256": vocabulary.sha256, "kind": type(vocabulary).__name__}
    if isinstance(vocabulary, SentencePieceVocabulary):
        (directory / VOCABULARY_FILE).write_bytes(vocabulary.path.read_bytes())
    if isinstance(vocabulary, SentencePieceVocabulary | ByteVocabulary):
        described["extra_ids"] = vocabulary.extra_ids
    values = {
        "config": dataclasses.asdict(files.config),
        "constants": files.joined.constants,
        "fields": files.joined.fields,
        "length": files.length,
        "vocabulary": described,
        **facts,
    }
    paths.write_text(directory / REWARD_FILE, json.dumps(values, indent=1) + "\n")
