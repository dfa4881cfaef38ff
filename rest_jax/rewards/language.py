"""A guard against the wrong language: a linear identifier on character n-grams, by lookups in the graph.

A text's score for a language is the sum over its n-grams of log p(n-gram | language), from counts of monolingual text
(multinomial naive Bayes). An n-gram stands under a hash of its code points in a table of fixed size; probabilities are
kept as whole numbers, so a sum depends on the text alone, not on padding or on the order of addition.
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from rest_jax import paths
from rest_jax.errors import UserError
from rest_jax.rewards import characters
from rest_jax.rewards.base import Reward, RewardBatch, RewardVocabulary
from rest_jax.rewards.guards import GUARD_PREFIX
from rest_jax.rewards.lexical import in_fitting_width

ORDERS = (1, 2, 3, 4)
BUCKETS = 1 << 18
# Whole numbers per unit of natural logarithm; int16 then reaches down to log p = -32, one in 10^13.
SCALE = 1024
# Lengths, in characters, between which `accuracy_by_length` tells sentences apart.
LENGTHS = (1, 10, 20, 40, 80, 160)
_FEWEST_SENTENCES = 100
_TRAINING_ROWS, _TRAINING_WIDTH = 512, 256


class Identifier(NamedTuple):
    """`table`: int16 `[BUCKETS, languages]`, log-probabilities times `SCALE`; `languages`: their names."""

    table: npt.NDArray[np.int16]
    languages: tuple[str, ...]


class LanguageParams(NamedTuple):
    """`characters`: of the vocabulary, with whitespace; `table`: see `Identifier`; `target`: the column wanted."""

    characters: characters.CharacterTable
    table: jax.Array
    target: jax.Array


@dataclasses.dataclass(frozen=True)
class RightLanguage(Reward):
    """No other language of the identifier is more likely than `language` by more than a factor of exp(`margin`).

    Short texts and names, of which no language is much more likely, are passed. A language that the identifier was not
    trained on is taken for the nearest one: train it on all that a policy may fall into, the sources' before all.

    Attributes:
      path: file of `python -m rest_jax train_language_id`.
      language: that samples must be in, as it was named then and in LANGUAGES.
      margin: in natural logarithms.
    """

    path: str
    language: str
    margin: float = 5.0

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise UserError(f"RightLanguage.margin is {self.margin}; it must be at least 0.")

    @property
    def name(self) -> str:
        return f"{GUARD_PREFIX}right_language"

    @property
    def languages(self) -> tuple[str, ...]:
        return (self.language,)

    def init(self, vocabulary: RewardVocabulary) -> LanguageParams:
        """Raises UserError: no identifier there, or one that does not know the language."""
        identifier = read(self.path)
        if self.language not in identifier.languages:
            raise UserError(
                f"RightLanguage.language is {self.language!r}; {self.path!r} knows {', '.join(identifier.languages)}."
            )
        return LanguageParams(
            characters=characters.character_table(vocabulary, whitespace="folded"),
            table=jnp.asarray(identifier.table),
            target=jnp.asarray(identifier.languages.index(self.language), jnp.int32),
        )

    def score(self, params: LanguageParams, batch: RewardBatch) -> dict[str, jax.Array]:
        # [batch, num_samples, languages]
        scores = in_fitting_width(
            params.characters, batch["samples"], lambda codes: language_scores(params.table, codes)
        )
        behind = jnp.max(scores, axis=-1) - scores[..., params.target]
        return {self.name: (behind <= round(self.margin * SCALE)).astype(jnp.float32)}


def hashed_ngrams(codes: jax.Array) -> list[jax.Array]:
    """For each of `ORDERS`: the bucket of the n-gram that starts at each character, `BUCKETS` where none does.

    Args:
      codes: int32 `[..., width]`, code points, 0 past the end.

    Returns:
      int32 `[..., width]` each.
    """
    width = codes.shape[-1]
    buckets = []
    hashed = jnp.zeros(codes.shape, jnp.uint32)
    for order in range(1, max(ORDERS) + 1):
        ahead = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, order - 1)])[..., order - 1 :][..., :width]
        # FNV-1a on whole characters (Fowler, Noll, Vo); its low bits are good once high ones are folded in.
        hashed = (hashed ^ ahead.astype(jnp.uint32)) * jnp.uint32(16777619) + jnp.uint32(order)
        folded = (hashed ^ (hashed >> 15)) * jnp.uint32(2246822519)
        folded = (folded ^ (folded >> 13)) % jnp.uint32(BUCKETS)
        if order in ORDERS:
            buckets.append(jnp.where(ahead > 0, folded.astype(jnp.int32), BUCKETS))
    return buckets


def language_scores(table: jax.Array, codes: jax.Array) -> jax.Array:
    """log p(text | language) times `SCALE`, int32 `[..., languages]`, of code points int32 `[..., width]`."""
    scores = jnp.zeros((*codes.shape[:-1], table.shape[1]), jnp.int32)
    for buckets in hashed_ngrams(codes):
        found = jnp.take(table, buckets, axis=0, mode="fill", fill_value=0)
        scores += jnp.sum(found, axis=-2, dtype=jnp.int32)
    return scores


def split(texts: Mapping[str, Sequence[str]], *, held_out: float) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Distinct sentences of each language in two parts, at random: to train on, and this share to measure on.

    Raises:
      UserError: a language has too few.
    """
    trained, rest = {}, {}
    for language, sentences in texts.items():
        distinct = list(dict.fromkeys(text for sentence in sentences if (text := sentence.strip())))
        if len(distinct) < _FEWEST_SENTENCES:
            raise UserError(
                f"--text {language}=...: {len(distinct)} different sentences; at least {_FEWEST_SENTENCES} are needed, "
                "and some ten thousand are of use."
            )
        order = np.random.default_rng(0).permutation(len(distinct))
        first = max(round(held_out * len(distinct)), 1)
        rest[language] = [distinct[k] for k in order[:first]]
        trained[language] = [distinct[k] for k in order[first:]]
    return trained, rest


def train(texts: Mapping[str, Sequence[str]]) -> Identifier:
    """Counts n-grams.

    Every language is given the same weight, and an n-gram that a language never had the same small probability in all,
    so that the amount of text does not matter.

    Args:
      texts: language -> sentences.
    """
    counts = np.stack([_counts(sentences) for sentences in texts.values()], axis=1)  # [BUCKETS, languages]
    totals = counts.sum(axis=0)
    smallest = 0.5 / totals.min()
    probabilities = np.maximum(counts / totals, smallest)
    table = np.round(np.log(probabilities) * SCALE).astype(np.int16)
    return Identifier(table=table, languages=tuple(texts))


def accuracy_by_length(
    identifier: Identifier, texts: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, dict[str, float]]]:
    """How often the likeliest language is the right one, by the number of characters.

    Args:
      identifier: to be measured.
      texts: language -> sentences that it was not trained on, for languages of the identifier.

    Returns:
      language -> '10-19' and the like -> sentences, accuracy, and `refused`: the share that `RightLanguage` with its
      default margin refuses though they are in that language.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for language, sentences in texts.items():
        scores = _scores(identifier, sentences)
        behind = scores.max(axis=1) - scores[:, identifier.languages.index(language)]
        lengths = np.asarray([len(text) for text in sentences])
        found[language] = {}
        for low, high in zip(LENGTHS, (*LENGTHS[1:], None), strict=True):
            chosen = behind[(lengths >= low) & (lengths < (np.inf if high is None else high))]
            if chosen.size:
                found[language][f"{low}-" if high is None else f"{low}-{high - 1}"] = {
                    "sentences": chosen.size,
                    "accuracy": float(np.mean(chosen == 0)),
                    "refused": float(np.mean(chosen > round(RightLanguage.margin * SCALE))),
                }
    return found


def write(path: Path, identifier: Identifier) -> None:
    """Writes an identifier as *.npz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"languages": identifier.languages, "orders": ORDERS, "scale": SCALE}
    file = io.BytesIO()
    np.savez_compressed(file, table=identifier.table, facts=np.array(json.dumps(facts)))
    paths.write_bytes(path, file.getvalue())


def read(path: str) -> Identifier:
    """Reads what `write` wrote.

    Raises:
      UserError: it is missing, or something else.
    """
    file = paths.resolve(path)
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
            table, facts = content["table"], json.loads(str(content["facts"]))
        languages = tuple(facts["languages"])
        fitting = facts["orders"] == list(ORDERS) and facts["scale"] == SCALE
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"RightLanguage.path: {str(file)!r} is no language identifier ({error}). Make one: "
            "python -m rest_jax train_language_id."
        ) from error
    if not fitting or table.dtype != np.int16 or table.shape != (BUCKETS, len(languages)):
        raise UserError(f"RightLanguage.path: {str(file)!r} is of another version. Train it again.")
    return Identifier(table=table, languages=languages)


def _batches(sentences: Sequence[str]) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]]:
    """Places in `sentences`, and code points `[_TRAINING_ROWS, width]`; a long sentence stands in several rows."""
    pieces = [
        (place, text[start : start + _TRAINING_WIDTH])
        for place, text in enumerate(f" {' '.join(sentence.split())}" for sentence in sentences)
        for start in range(0, len(text), _TRAINING_WIDTH)
    ]
    batches = []
    for first in range(0, len(pieces), _TRAINING_ROWS):
        chosen = pieces[first : first + _TRAINING_ROWS]
        codes = np.zeros((_TRAINING_ROWS, _TRAINING_WIDTH), np.int32)
        for row, (_, text) in zip(codes, chosen, strict=False):
            row[: len(text)] = [ord(character) for character in text]
        batches.append((np.asarray([place for place, _ in chosen]), codes))
    return batches


def _counts(sentences: Sequence[str]) -> npt.NDArray[np.int64]:
    """How often each bucket occurs, `[BUCKETS]`."""
    counts = np.zeros(BUCKETS + 1, np.int64)
    program = jax.jit(lambda codes: jnp.stack(hashed_ngrams(codes)))
    for _, codes in _batches(sentences):
        counts += np.bincount(np.asarray(program(codes)).ravel(), minlength=BUCKETS + 1)
    return counts[:BUCKETS]


def _scores(identifier: Identifier, sentences: Sequence[str]) -> npt.NDArray[np.int64]:
    """`[sentences, languages]`."""
    scores = np.zeros((len(sentences), len(identifier.languages)), np.int64)
    program = jax.jit(language_scores)
    for places, codes in _batches(sentences):
        np.add.at(scores, places, np.asarray(program(identifier.table, codes))[: len(places)])
    return scores
