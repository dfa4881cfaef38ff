"""The bridge from seqio: the only file of the library that imports seqio and TensorFlow.

A task is tokenised once into an Arrow token data set (`token_dataset`); everything after reads that and needs neither.
"""

import difflib
import functools
import hashlib
import importlib
import io
import itertools
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from rest_jax.data import native_logs, token_dataset
from rest_jax.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from rest_jax.errors import UserError

# TensorFlow reads this when it is loaded.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
try:
    with native_logs.without_chatter():
        import seqio
        import tensorflow as tf

        # TensorFlow only reads text here; by default it would take all memory of the GPUs that JAX computes on.
        tf.config.set_visible_devices([], "GPU")
except ImportError as error:
    raise UserError(
        f"reading a seqio task needs the package {error.name!r}, which is not installed; run "
        "`pip install 'rest_jax[seqio]'`, or give data that is tokenised already"
    ) from error

# Version of what `tokenize_task` writes: part of every key, raised when the same task would give other rows.
_FORMAT = 1
_FEATURES = ("inputs", "targets")


def get_task(name: str, *, module_imports: Sequence[str] = ()) -> seqio.Task | seqio.Mixture:
    """Imports `module_imports`, which register tasks, and returns the task or mixture `name`.

    Raises:
      UserError: a module cannot be found, or no such task is registered.
    """
    for module in module_imports:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UserError(
                f"TASK_MODULES (--task_module): cannot import {module!r} (no module {error.name!r}); give an "
                "importable module that registers seqio tasks, e.g. 'rest_jax.tasks.demo', and put its folder on "
                "PYTHONPATH"
            ) from error
    try:
        return seqio.get_mixture_or_task(name)
    except ValueError as error:
        known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(
            f"MIXTURE_OR_TASK_NAME: no task or mixture {name!r} is registered; {hint}{_listed(known)}; name "
            f"the module that registers it in TASK_MODULES, or --task_module (given: {list(module_imports)!r})"
        ) from error


def check_task(
    name: str, *, splits: Sequence[str], lengths: Mapping[str, int], module_imports: Sequence[str] = ()
) -> dict[str, str]:
    """Finds what `tokenize_task` would refuse, for all splits, without writing anything.

    Text in files is read to its end; a TFDS set is not looked at, since that may download it.

    Returns:
      'inputs' and 'targets' -> SHA-256 of that side's vocabulary, to be compared with the policy's.

    Raises:
      UserError: see `tokenize_task`.
    """
    task = get_task(name, module_imports=module_imports)
    vocabularies: dict[str, str] = {}
    for split in splits:
        vocabularies = _key_fields(task, split=split, lengths=lengths)["vocabularies"]
        for subtask in seqio.get_subtasks(task):
            check = getattr(subtask.source, "check", None)
            if check is not None:
                check(split)
    return vocabularies


def tokenize_task(
    name: str,
    *,
    split: str,
    lengths: Mapping[str, int],
    cache_dir: str | os.PathLike[str],
    module_imports: Sequence[str] = (),
) -> pathlib.Path:
    """Tokenises one split of a seqio task into a token data set below `cache_dir` and returns its directory.

    The directory's name is a hash of the task, its text, its preprocessing, its vocabularies and the lengths: a data
    set that is there already is used as it is. Rows keep the task's order; the row number is the source id. Tokens
    longer than `lengths` are trimmed, keeping EOS where the task does (`append_eos_after_trim`); the text columns are
    whole.

    Args:
      name: seqio task or mixture with features `inputs` and `targets`.
      split: one of its splits.
      lengths: most tokens per feature, EOS included, e.g. {'inputs': 128, 'targets': 128}.
      cache_dir: folder for token data sets, made when absent.
      module_imports: modules to import first, because they register tasks.

    Raises:
      UserError: unknown task or split, missing feature, vocabulary or file, faulty text, no examples at all.
    """
    task = get_task(name, module_imports=module_imports)
    fields = _key_fields(task, split=split, lengths=lengths)
    directory = pathlib.Path(cache_dir) / token_dataset.dataset_key(**fields)
    if directory.exists():
        token_dataset.TokenDataset.open(directory)
        return directory
    rows = _Rows(task, split=split, lengths=lengths)
    token_dataset.write_token_dataset(directory, rows, info=fields)
    for feature in _FEATURES:
        if rows.at_limit[feature]:
            logging.info(
                "%s %s: %d of %d %s have %d tokens or more and are cut there",
                *(name, split, rows.at_limit[feature], rows.count, feature, lengths[feature]),
            )
    return directory


def provenance(name: str, *, split: str, module_imports: Sequence[str] = ()) -> tuple[list[str], list[str]]:
    """What the rows of a split are made from, for those who must notice a change without seqio.

    Returns:
      Files that are read (none where the source does not say), and names of the modules of sources and preprocessors.
    """
    files: list[str] = []
    modules: set[str] = set()
    for subtask in seqio.get_subtasks(get_task(name, module_imports=module_imports)):
        listed = getattr(subtask.source, "files", None)
        files += listed(split) if listed is not None else []
        modules.add(type(subtask.source).__module__)
        for step in subtask.preprocessors:
            inner = step.func if isinstance(step, functools.partial) else step
            modules.add(getattr(inner, "__module__", type(inner).__module__))
    return files, sorted(modules)


def task_text_pairs(
    name: str, *, split: str = "train", module_imports: Sequence[str] = ()
) -> Iterator[tuple[str, str]]:
    """Yields (inputs, targets) texts as the task's tokenizer would see them, without loading any vocabulary."""
    task = get_task(name, module_imports=module_imports)
    for subtask in seqio.get_subtasks(task):
        _check_split(subtask, split)
        yield from _subtask_text_pairs(subtask, split)


def train_vocabulary(
    name: str,
    *,
    output: str | os.PathLike[str],
    size: int,
    split: str = "train",
    character_coverage: float = 0.9995,
    normalization: str = "identity",
    module_imports: Sequence[str] = (),
) -> pathlib.Path:
    """Trains a SentencePiece unigram vocabulary on both sides of a task: pad 0, EOS 1, unk 2, no BOS, byte fallback.

    The same text gives the same file, byte for byte.

    Args:
      name: seqio task whose texts are read.
      output: path of the model file; must end in `.model`.
      size: number of pieces, including pad, EOS, unk and the 256 bytes.
      split: the split that is read.
      character_coverage: share of all characters that get pieces of their own; the rest are spelled in bytes.
      normalization: SentencePiece rule. 'identity' keeps the text as it is, so that decoding a reference gives it back;
        'nmt_nfkc' is SentencePiece's own default, which rewrites e.g. full-width punctuation.
      module_imports: modules to import first, because they register tasks.

    Raises:
      UserError: output with another ending, a size that the text cannot fill or that leaves no room, an empty corpus.
    """
    import sentencepiece

    path = pathlib.Path(output)
    if path.suffix != ".model":
        raise UserError(f"output: got {str(path)!r}; a SentencePiece model's name ends in '.model'")
    least = 3 + 256 + 1
    if size < least:
        raise UserError(f"size: got {size}; legal are at least {least} pieces (pad, EOS, unk, 256 bytes and some text)")
    texts = (text for pair in task_text_pairs(name, split=split, module_imports=module_imports) for text in pair)
    first = next(texts, None)
    if first is None:
        raise UserError(f"{name}, split {split!r}: the corpus is empty, so there is nothing to train a vocabulary on")
    model = io.BytesIO()
    # Only a corpus above this size is sampled; the generator is seeded so that the sample is the same one each time.
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            character_coverage=character_coverage,
            normalization_rule_name=normalization,
            byte_fallback=True,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            input_sentence_size=5_000_000,
            shuffle_input_sentence=True,
            # A constant: sums of floats in another number of threads would give another vocabulary.
            num_threads=4,
            minloglevel=1,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"size, character_coverage: SentencePiece refuses {size} pieces with coverage {character_coverage}: {error}"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_bytes(model.getvalue())
    temporary.replace(path)
    return path


class _Rows:
    """The rows of one split, counted while they pass."""

    def __init__(self, task: seqio.Task | seqio.Mixture, *, split: str, lengths: Mapping[str, int]):
        self._task = task
        self._split = split
        self._lengths = dict(lengths)
        self.count = 0
        self.at_limit = dict.fromkeys(_FEATURES, 0)

    def __iter__(self) -> Iterator[token_dataset.TokenRow]:
        # The seed is for mixtures and for preprocessors that draw random numbers: the rows must be the same each time.
        dataset = self._task.get_dataset(self._lengths, split=self._split, shuffle=False, seed=0, num_epochs=1)
        examples = dataset.as_numpy_iterator()
        with native_logs.without_chatter():  # SentencePiece's, when the first example makes it read the vocabulary
            first = next(examples, None)
        for example in examples if first is None else itertools.chain([first], examples):
            inputs, targets = (np.asarray(example[feature], np.int32) for feature in _FEATURES)
            self.count += 1
            self.at_limit["inputs"] += len(inputs) >= self._lengths["inputs"]
            self.at_limit["targets"] += len(targets) >= self._lengths["targets"]
            yield token_dataset.TokenRow(
                inputs=inputs,
                targets=targets,
                inputs_text=self._text(example, "inputs"),
                targets_text=self._text(example, "targets"),
            )
        if not self.count:
            raise UserError(
                f"{self._task.name}, split {self._split!r}: the corpus is empty; give text with at least one pair"
            )

    def _text(self, example: Mapping[str, Any], feature: str) -> str:
        text = example.get(f"{feature}_pretokenized")
        if isinstance(text, bytes):
            return text.decode("utf-8")
        # A task may leave its text out (`copy_pretokenized=False`); metrics need it, so the tokens must do.
        return str(self._task.output_features[feature].vocabulary.decode([int(token) for token in example[feature]]))


def _subtask_text_pairs(task: seqio.Task, split: str) -> Iterator[tuple[str, str]]:
    before = []
    for preprocessor in task.preprocessors:
        if getattr(preprocessor, "func", preprocessor) is seqio.preprocessors.tokenize:
            break
        before.append(preprocessor)
    else:
        raise UserError(
            f"{task.name}: has no step seqio.preprocessors.tokenize, so its vocabulary's text cannot be told"
        )
    feature = seqio.Feature(seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.string, rank=0)
    text_task = seqio.Task(
        task.name, source=task.source, preprocessors=before, output_features=dict.fromkeys(_FEATURES, feature)
    )
    dataset = text_task.get_dataset(None, split=split, shuffle=False, seed=0, trim_output_features=False)
    for example in dataset.as_numpy_iterator():
        yield example["inputs"].decode("utf-8"), example["targets"].decode("utf-8")


def _key_fields(task: seqio.Task | seqio.Mixture, *, split: str, lengths: Mapping[str, int]) -> dict[str, Any]:
    """What the rows depend on, as plain JSON values; checks the task on the way."""
    if set(lengths) != set(_FEATURES):
        raise UserError(
            f"TASK_FEATURE_LENGTHS: got {dict(lengths)!r}; legal is {{'inputs': number, 'targets': number}}"
        )
    for feature, length in lengths.items():
        if length < 2:
            raise UserError(
                f"TASK_FEATURE_LENGTHS[{feature!r}]: got {length}; legal are at least 2 tokens, of which one is EOS"
            )
        if feature not in task.output_features:
            raise UserError(
                f"{task.name}: has features {sorted(task.output_features)} but not {feature!r}; both sides are needed"
            )
    subtasks = seqio.get_subtasks(task)
    for subtask in subtasks:
        _check_split(subtask, split)
    rates = {subtask.name: task.get_rate(subtask) for subtask in subtasks} if isinstance(task, seqio.Mixture) else {}
    return {
        "format": _FORMAT,
        "task": task.name,
        "split": split,
        "lengths": {feature: int(lengths[feature]) for feature in _FEATURES},
        "vocabularies": {feature: vocabulary_sha256(task.output_features[feature].vocabulary) for feature in _FEATURES},
        "add_eos": {feature: bool(task.output_features[feature].add_eos) for feature in _FEATURES},
        "sources": {subtask.name: _describe_source(subtask.source, split) for subtask in subtasks},
        "preprocessors": {subtask.name: [_describe(step) for step in subtask.preprocessors] for subtask in subtasks},
        "rates": rates,
    }


def _check_split(task: seqio.Task, split: str) -> None:
    if split not in task.splits:
        raise UserError(f"{task.name}: has no split {split!r}; legal are {sorted(task.splits)}")


def seqio_vocabulary(vocabulary: Vocabulary) -> seqio.Vocabulary:
    """seqio's vocabulary with the same ids, which has the same `vocabulary_sha256`."""
    if isinstance(vocabulary, ByteVocabulary):
        return seqio.ByteVocabulary(vocabulary.extra_ids)
    if isinstance(vocabulary, SentencePieceVocabulary):
        return seqio.SentencePieceVocabulary(os.fspath(vocabulary.path), vocabulary.extra_ids)
    raise UserError(
        f"vocabulary: seqio has none like {vocabulary!r}; legal are SentencePieceVocabulary and ByteVocabulary of "
        "rest_jax.data.vocabulary, any seqio.Vocabulary, or the path of a SentencePiece model"
    )


def vocabulary_sha256(vocabulary: seqio.Vocabulary) -> str:
    """SHA-256 of the model file, as `data.vocabulary` gives it; for a vocabulary without a file, of its description."""
    path = getattr(vocabulary, "sentencepiece_model_file", None)
    if path is None:
        return hashlib.sha256(f"{type(vocabulary).__qualname__} {vocabulary.vocab_size}".encode()).hexdigest()
    if not tf.io.gfile.exists(path):
        raise UserError(
            f"vocabulary: the file {path} does not exist; train one with `python -m rest_jax vocab`, or correct the "
            "task's path"
        )
    with tf.io.gfile.GFile(path, "rb") as file:
        digest = hashlib.sha256(file.read())
    if vocabulary.extra_ids:
        digest.update(f"extra_ids {vocabulary.extra_ids}".encode())
    return digest.hexdigest()


def _describe_source(source: seqio.DataSource, split: str) -> str:
    # Our own file sources hash their text; any other (TFDS with its version in the name) is what its `repr` says.
    fingerprint = getattr(source, "fingerprint", None)
    return fingerprint(split) if fingerprint is not None else _without_address(repr(source))


def _describe(step: Any) -> str:
    """A preprocessor as text: the same in every process, and another text for other parameters."""
    if isinstance(step, functools.partial):
        arguments = [_describe(value) for value in step.args] + [
            f"{k}={_describe(v)}" for k, v in sorted(step.keywords.items())
        ]
        return f"{_describe(step.func)}({', '.join(arguments)})"
    if isinstance(step, seqio.CacheDatasetPlaceholder):
        return "cache"
    inner = getattr(step, "__wrapped__", None)
    name = getattr(step, "__qualname__", None)
    if name is None:
        return _without_address(repr(step))
    return f"{step.__module__}.{name}" + (f"[{_describe(inner)}]" if inner is not None else "")


def _without_address(text: str) -> str:
    return text.partition(" at 0x")[0]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return f"registered are: {shown}{', ...' if len(names) > 20 else ''}" if names else "no task is registered at all"
