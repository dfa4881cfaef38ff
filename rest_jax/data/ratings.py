"""Rated translations, to train a reward on: tables of WMT's direct assessment, MQM's lists of errors, a Grow store.

Whatever the scale of the scores, `Ratings.scores` is in [0, 1], higher is better: linear between two scores that
become 0 and 1, cut outside.
"""

import csv
import dataclasses
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rest_jax import paths
from rest_jax.data.store import ScoredStore
from rest_jax.data.vocabulary import Vocabulary
from rest_jax.errors import UserError

Tokens = npt.NDArray[np.int32]
QUANTILES = (0.01, 0.99)
# Freitag et al. 2021 (arXiv 2104.14478): what an error costs, and the two exceptions of category.
MQM_WEIGHTS = {"major": 5.0, "minor": 1.0, "neutral": 0.0, "no-error": 0.0, "hotw-test": 0.0}
MQM_NON_TRANSLATION, MQM_MINOR_PUNCTUATION = 25.0, 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ratings:
    """Rated translations as token ids of one vocabulary, without EOS.

    Attributes:
      sources, hypotheses: [rows].
      references: [rows]; None where there are none.
      scores: float32 [rows], in [0, 1].
    """

    sources: Sequence[Tokens]
    hypotheses: Sequence[Tokens]
    references: Sequence[Tokens] | None
    scores: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.scores)

    def take(self, rows: npt.NDArray[np.int64]) -> "Ratings":
        return Ratings(
            sources=[self.sources[row] for row in rows],
            hypotheses=[self.hypotheses[row] for row in rows],
            references=None if self.references is None else [self.references[row] for row in rows],
            scores=self.scores[rows],
        )

    def source_keys(self) -> npt.NDArray[np.uint64]:
        """A hash of each row's source: rows of one source are recognised by it."""
        digests = (hashlib.sha256(np.asarray(source, np.int32).tobytes()).digest() for source in self.sources)
        return np.asarray([int.from_bytes(digest[:8], "big") for digest in digests], np.uint64)


class RatingsSource(Protocol):
    """Where ratings come from; bound in gin."""

    def read(self, vocabulary: Vocabulary) -> Ratings: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A file with one rating a line and a header, such as WMT's direct assessments (`lp src mt ref score`).

    Attributes:
      path: UTF-8 text; with commas and quotes where it ends in `.csv`, else with tabs and no quotes.
      source, hypothesis, score: names of columns.
      reference, rater: further columns, or None.
      only: column -> the value that a row must have, e.g. {'lp': 'en-de'}.
      scale: the scores that become 0 and 1, e.g. (0, 100), or (25, 0) for errors; None for the 1 % and the 99 %
        quantile of all scores.
      z_normalise: before that, (score - mean) / standard deviation of each rater's scores; needs `rater`.
      source_prefix: put before each source, if the policy's task does so.
    """

    path: str
    source: str = "src"
    hypothesis: str = "mt"
    score: str = "score"
    reference: str | None = None
    rater: str | None = None
    only: Mapping[str, str] = dataclasses.field(default_factory=dict)
    scale: tuple[float, float] | None = None
    z_normalise: bool = False
    source_prefix: str = ""

    def __post_init__(self) -> None:
        _check_scale("Table", self.scale)
        if self.z_normalise and self.rater is None:
            raise UserError("Table.z_normalise needs the column of raters: set Table.rater.")

    def read(self, vocabulary: Vocabulary) -> Ratings:
        """Raises UserError: no such file or column, or a score that is no number (names the line)."""
        columns = [self.source, self.hypothesis, self.score, *filter(None, (self.reference, self.rater)), *self.only]
        rows = []
        for line, row in _read_table(self.path, columns=columns):
            if any(row[column] != value for column, value in self.only.items()):
                continue
            try:
                score = float(row[self.score])
            except ValueError as error:
                raise UserError(
                    f"{self.path}, line {line}: column {self.score!r} has {row[self.score]!r}; a number is wanted."
                ) from error
            reference = "" if self.reference is None else row[self.reference]
            rater = "" if self.rater is None else row[self.rater]
            rows.append(_Rating(row[self.source], row[self.hypothesis], reference, rater, score))
        if not rows:
            raise UserError(f"{self.path}: no ratings" + (f" with {dict(self.only)}." if self.only else "."))
        return _ratings(
            rows,
            vocabulary=vocabulary,
            has_references=self.reference is not None,
            z_normalise=self.z_normalise,
            scale=self.scale,
            source_prefix=self.source_prefix,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MqmErrors:
    """A list of errors, one a line, as github.com/google/wmt-mqm-human-evaluation publishes them.

    A translation's score is the sum of its errors' weights: major 5, minor 1, minor Fluency/Punctuation 0.1,
    Non-translation 25, others 0. The marks <v> and </v> around an error are taken out of the text.

    Attributes:
      path: tab-separated UTF-8 text with a header.
      segment: columns that together name a translation.
      source, hypothesis, rater, category, severity: names of columns.
      scale, z_normalise, source_prefix: as `Table` has them; the default is MetricX's.
    """

    path: str
    segment: tuple[str, ...] = ("system", "doc", "seg_id")
    source: str = "source"
    hypothesis: str = "target"
    rater: str = "rater"
    category: str = "category"
    severity: str = "severity"
    scale: tuple[float, float] | None = (25.0, 0.0)
    z_normalise: bool = False
    source_prefix: str = ""

    def __post_init__(self) -> None:
        _check_scale("MqmErrors", self.scale)
        object.__setattr__(self, "segment", tuple(self.segment))

    def read(self, vocabulary: Vocabulary) -> Ratings:
        """Raises UserError: no such file or column, or a severity without a weight (names the line)."""
        columns = [self.source, self.hypothesis, self.rater, self.category, self.severity, *self.segment]
        rated: dict[tuple[str, ...], _Rating] = {}
        for line, row in _read_table(self.path, columns=columns):
            weight = self._weight(row, line=line)
            key = (*(row[column] for column in self.segment), row[self.rater])
            source, hypothesis = (re.sub(r"</?v>", "", row[column]) for column in (self.source, self.hypothesis))
            before = rated.get(key)
            score = weight if before is None else before.score + weight
            rated[key] = _Rating(source, hypothesis, "", row[self.rater], score)
        if not rated:
            raise UserError(f"{self.path}: no errors, and so no translations.")
        return _ratings(
            list(rated.values()),
            vocabulary=vocabulary,
            has_references=False,
            z_normalise=self.z_normalise,
            scale=self.scale,
            source_prefix=self.source_prefix,
        )

    def _weight(self, row: Mapping[str, str], *, line: int) -> float:
        category, severity = row[self.category].lower(), row[self.severity].lower()
        if category.startswith("non-translation"):
            return MQM_NON_TRANSLATION
        if severity not in MQM_WEIGHTS:
            raise UserError(
                f"{self.path}, line {line}: severity {row[self.severity]!r}; known are {', '.join(MQM_WEIGHTS)}."
            )
        if severity == "minor" and category.startswith("fluency/punctuation"):
            return MQM_MINOR_PUNCTUATION
        return MQM_WEIGHTS[severity]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Store:
    """A Grow step's store: samples with the reward that they were given there.

    Its filter should have kept all samples (GROW_FILTER = @filters.Threshold(), its tau below 0): from good ones alone
    nothing is learned about bad ones.

    Attributes:
      directory: of a finished Grow step, MODEL_DIR/grow_1.
      component: the label, as the store names it; None for the total reward.
      relative: labels are less the mean of their source's, so that nothing is learned about which sources are easy.
      scale: the labels that become 0 and 1; where they are relative, (-0.3, 0.3), say.
    """

    directory: str
    component: str | None = None
    relative: bool = False
    scale: tuple[float, float] | None = (0.0, 1.0)

    def __post_init__(self) -> None:
        _check_scale("Store", self.scale)

    def read(self, vocabulary: Vocabulary) -> Ratings:
        """Raises UserError: no store, tokens of another vocabulary, or no such component."""
        store = ScoredStore.open(paths.resolve(self.directory))
        if store.stats.get("vocabulary_sha256") != vocabulary.sha256:
            raise UserError(f"{self.directory}: its tokens are of another vocabulary than VOCABULARY {vocabulary!r}.")
        if self.component is not None and self.component not in store.components:
            raise UserError(
                f"Store.component is {self.component!r}; {self.directory} has {', '.join(store.components) or 'none'}."
            )
        rows = store.select(store.stored)
        labels = rows.rewards
        if self.component is not None:
            places = np.searchsorted(store.source_ids, rows.source_ids)
            labels = store.components[self.component][places, rows.sample_ids]
        known = np.flatnonzero(~np.isnan(labels))
        if not known.size:
            raise UserError(f"{self.directory}: no sample has a label; loosen GROW_FILTER and grow again.")
        scores = labels[known].astype(np.float64)
        if self.relative:
            _, who = np.unique(rows.source_ids[known], return_inverse=True)
            scores -= (np.bincount(who, weights=scores) / np.bincount(who))[who]
        return Ratings(
            sources=[_before_eos(rows.inputs(int(row)), vocabulary) for row in known],
            hypotheses=[_before_eos(rows.targets(int(row)), vocabulary) for row in known],
            references=None,
            scores=_to_scale(scores, self.scale),
        )


@dataclasses.dataclass(frozen=True)
class _Rating:
    source: str
    hypothesis: str
    reference: str
    rater: str
    score: float


def _ratings(
    rows: Sequence[_Rating],
    *,
    vocabulary: Vocabulary,
    has_references: bool,
    z_normalise: bool,
    scale: tuple[float, float] | None,
    source_prefix: str,
) -> Ratings:
    """Normalises by rater, averages the ratings of one translation, scales and tokenises."""
    scores = np.asarray([row.score for row in rows], np.float64)
    if z_normalise:
        scores = z_scores(scores, raters=[row.rater for row in rows])
    texts: dict[tuple[str, str, str], int] = {}
    group = np.zeros(len(rows), np.int64)
    for number, row in enumerate(rows):
        group[number] = texts.setdefault((row.source, row.hypothesis, row.reference), len(texts))
    means = np.bincount(group, weights=scores) / np.bincount(group)

    def encoded(strings: Iterator[str]) -> list[Tokens]:
        return [np.asarray(vocabulary.encode(text), np.int32) for text in strings]

    return Ratings(
        sources=encoded(source_prefix + source for source, _, _ in texts),
        hypotheses=encoded(hypothesis for _, hypothesis, _ in texts),
        references=encoded(reference for _, _, reference in texts) if has_references else None,
        scores=_to_scale(means, scale),
    )


def z_scores(scores: npt.NDArray[np.float64], *, raters: Sequence[str]) -> npt.NDArray[np.float64]:
    """(score - mean) / standard deviation of its rater's scores; 0 for a rater whose scores are all the same."""
    _, who = np.unique(np.asarray(raters), return_inverse=True)
    counts = np.bincount(who)
    mean = np.bincount(who, weights=scores) / counts
    centred = scores - mean[who]
    deviation = np.sqrt(np.bincount(who, weights=centred**2) / counts)[who]
    return np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)


def _to_scale(scores: npt.NDArray[np.float64], scale: tuple[float, float] | None) -> npt.NDArray[np.float32]:
    worst, best = np.quantile(scores, QUANTILES) if scale is None else scale
    if worst == best:
        raise UserError(f"all ratings are {worst:g}: there is nothing to learn from them.")
    return np.clip((scores - worst) / (best - worst), 0.0, 1.0).astype(np.float32)


def _check_scale(name: str, scale: tuple[float, float] | None) -> None:
    if scale is not None and (len(scale) != 2 or scale[0] == scale[1]):
        raise UserError(f"{name}.scale is {scale!r}; give the two scores that become 0 and 1, like (0, 100), or None.")


def _read_table(path: str, *, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, row by column)."""
    file = paths.resolve(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file of ratings.")
    comma = file.suffix == ".csv"
    csv.field_size_limit(2**31 - 1)
    with io.TextIOWrapper(file.open("rb"), encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(
            lines, delimiter="," if comma else "\t", quoting=csv.QUOTE_MINIMAL if comma else csv.QUOTE_NONE
        )
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise UserError(
                f"{path}: no column {', '.join(map(repr, missing))}; its header has "
                f"{', '.join(map(repr, reader.fieldnames or ()))}. Name the columns in gin."
            )
        for row in reader:
            if any(row[column] is None for column in columns):
                raise UserError(f"{path}, line {reader.line_num}: fewer columns than the header has.")
            yield reader.line_num, row


def _before_eos(tokens: Tokens, vocabulary: Vocabulary) -> Tokens:
    return tokens[:-1] if len(tokens) and tokens[-1] == vocabulary.eos_id else tokens
