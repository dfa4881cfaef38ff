"""Adequacy by static cross-lingual embeddings: the cosine of a source and a sample, by one table lookup for each token.

For models in the layout of model2vec (github.com/MinishLab/model2vec), such as `minishlab/potion-multilingual-128M`:
`model.safetensors` has a vector for each token of `tokenizer.json`, and a text's embedding is their weighted mean.

The table has a row for each piece of the policy's vocabulary, computed once on the host: the weighted sum over the
tokens that the model's tokenizer cuts the piece into, or the vector of the token that is spelled as the piece is. A
cosine does not see the difference of sums and means, so what is approximate is the cutting alone: a word of several
policy pieces is read piece by piece. Pieces of single bytes have no vector.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from rest_jax import paths
from rest_jax.checkpoints import safetensors_files
from rest_jax.errors import UserError
from rest_jax.rewards.base import Reward, RewardBatch, RewardVocabulary
from rest_jax.rewards.joined_input import without_prefix

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
_SPACE = "\u2581"


@dataclasses.dataclass(frozen=True)
class StaticEmbeddings(Reward):
    """(1 + cosine) / 2 of the mean vectors of source and sample; 0 where one of them has no vector.

    Attributes:
      directory: of the model.
      source_prefix: text that the task puts before each source, such as 'translate German to English: '; left out.
      label: its name in the store, where a run has several.
    """

    directory: str
    source_prefix: str = ""
    label: str = "embeddings"

    @property
    def name(self) -> str:
        return self.label

    @property
    def learned(self) -> bool:
        return True

    def init(self, vocabulary: RewardVocabulary) -> dict[str, Any]:
        """Raises UserError: a file is missing, damaged or of another layout, or `tokenizers` is not installed."""
        folder = paths.resolve(self.directory)
        for name in (WEIGHTS, TOKENIZER):
            if not (folder / name).is_file():
                raise UserError(
                    f"StaticEmbeddings.directory: {str(folder)!r} has no {name}. Give the folder of a model2vec model, "
                    "e.g. a download of minishlab/potion-multilingual-128M."
                )
        return {
            "table": piece_vectors(vocabulary, tokenizer=_open_tokenizer(folder), vectors=_token_vectors(folder)),
            "source_prefix": np.asarray(vocabulary.encode(self.source_prefix.strip()), np.int32),
            "eos_id": np.int32(vocabulary.eos_id),
        }

    def score(self, params: dict[str, jax.Array], batch: RewardBatch) -> dict[str, jax.Array]:
        table, eos_id = params["table"], params["eos_id"]
        # [batch, 1, dim], [batch, num_samples, dim]
        sources = vector_sums(table, without_prefix(batch["sources"], params["source_prefix"]), eos_id)[:, None]
        samples = vector_sums(table, batch["samples"], eos_id)
        norms = jnp.linalg.norm(sources, axis=-1) * jnp.linalg.norm(samples, axis=-1)
        cosines = jnp.sum(sources * samples, axis=-1) / jnp.where(norms > 0, norms, 1.0)
        return {self.name: jnp.where(norms > 0, jnp.clip((1.0 + cosines) / 2.0, 0.0, 1.0), 0.0)}


def vector_sums(table: jax.Array, tokens: jax.Array, eos_id: jax.Array) -> jax.Array:
    """Sum of the vectors of each text's tokens before EOS, one position after the other.

    So memory is that of one position, and padding, which adds zeros, changes no bit.

    Args:
      table: `[vocab_size, dim]`; the row of padding is 0.
      tokens: int32 `[..., length]`.
      eos_id: the vocabulary's.

    Returns:
      float32 `[..., dim]`.
    """
    before_eos = jnp.cumsum(tokens == eos_id, axis=-1) == 0
    positions = jnp.moveaxis(jnp.where(before_eos, tokens, 0), -1, 0)

    def add(total: jax.Array, ids: jax.Array) -> tuple[jax.Array, None]:
        return total + jnp.take(table, ids, axis=0, mode="clip"), None

    return jax.lax.scan(add, jnp.zeros((*tokens.shape[:-1], table.shape[1]), table.dtype), positions)[0]


def piece_vectors(
    vocabulary: RewardVocabulary, *, tokenizer: Any, vectors: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The table: float32 `[vocab_size, dim]`, 0 for pieces without a text or a vector.

    Args:
      vocabulary: the policy's.
      tokenizer: the model's, a `tokenizers.Tokenizer`.
      vectors: weighted vectors of its tokens, `[tokens, dim]`.
    """
    table = np.zeros((vocabulary.vocab_size, vectors.shape[1]), np.float32)
    unknown = getattr(tokenizer.model, "unk_token", None)
    skipped = tokenizer.token_to_id(unknown) if unknown is not None else None
    texts: dict[int, str] = {}
    for piece_id in range(1, vocabulary.vocab_size):
        if vocabulary.is_control(piece_id) or vocabulary.is_unknown(piece_id) or vocabulary.is_byte(piece_id):
            continue
        piece = vocabulary.id_to_piece(piece_id)
        same = tokenizer.token_to_id(piece)
        if same is not None and same != skipped:
            table[piece_id] = vectors[same]
        elif text := piece.replace(_SPACE, " ").strip():
            texts[piece_id] = text
    encoded = tokenizer.encode_batch(list(texts.values()), add_special_tokens=False)
    for piece_id, encoding in zip(texts, encoded, strict=True):
        table[piece_id] = vectors[[token for token in encoding.ids if token != skipped]].sum(axis=0)
    return table


def _token_vectors(folder: Path) -> npt.NDArray[np.float32]:
    """Weighted vectors of the model's tokens, float32 `[tokens, dim]`.

    Newer files have a weight for each token, and may share vectors: `mapping` is then the row of each token.
    """
    stored = safetensors_files.open_tensors(folder / WEIGHTS)
    known = {"embeddings", "weights", "mapping"}
    if "embeddings" not in stored or len(stored["embeddings"].shape) != 2 or stored.keys() - known:
        raise UserError(
            f"StaticEmbeddings.directory: {str(folder / WEIGHTS)!r} holds {', '.join(sorted(stored))}; a model of "
            "model2vec has a matrix 'embeddings', and may have 'weights' and 'mapping'."
        )
    vectors = stored["embeddings"].read().astype(np.float32)
    if "mapping" in stored:
        mapping = stored["mapping"].read()
        if mapping.size and not 0 <= mapping.min() <= mapping.max() < len(vectors):
            raise UserError(
                f"StaticEmbeddings.directory: {str(folder / WEIGHTS)!r} maps tokens to rows {mapping.min()} to "
                f"{mapping.max()} of {len(vectors)}. Fetch it again."
            )
        vectors = vectors[mapping]
    if "weights" in stored:
        weights = stored["weights"].read().astype(np.float32)
        if weights.shape != (len(vectors),):
            raise UserError(
                f"StaticEmbeddings.directory: {str(folder / WEIGHTS)!r} has weights {weights.shape} for "
                f"{len(vectors)} tokens. Fetch it again."
            )
        vectors = vectors * weights[:, None]
    tokens = _open_tokenizer(folder).get_vocab_size()
    if tokens != len(vectors):
        raise UserError(
            f"StaticEmbeddings.directory: {str(folder)!r} has {len(vectors)} vectors, and its {TOKENIZER} {tokens} "
            "tokens. The files belong to different models."
        )
    return vectors


def _open_tokenizer(folder: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "StaticEmbeddings reads the model's tokenizer.json with the package 'tokenizers', which is not installed: "
            "pip install 'rest_jax[embeddings]'."
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(
            f"StaticEmbeddings.directory: {str(folder / TOKENIZER)!r} is no tokenizer: {error}. Fetch it again."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
