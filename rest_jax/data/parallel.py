"""The run's parallel data: a seqio task's splits as tokenised Arrow shards."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rest_jax import paths
from rest_jax.data import token_index
from rest_jax.data.token_dataset import TokenDataset
from rest_jax.data.vocabulary import Vocabulary, adopt
from rest_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelData:
    """Which text a run trains, selects and tests on.

    Attributes:
      task: seqio task or mixture.
      vocabulary: the policy's, ours or seqio's; it must be the task's own.
      lengths: `{'inputs': S, 'targets': T}`, most tokens incl. EOS; longer texts are trimmed.
      task_modules: modules to import because they register the task.
      cache_dir: where tokenised splits are kept; None for `$XDG_CACHE_HOME/rest_jax`.
      train_split, eval_split, test_split: D, D_eval (checkpoints are chosen on it), and the one that is only reported.
    """

    task: str
    vocabulary: Vocabulary
    lengths: Mapping[str, int]
    task_modules: tuple[str, ...] = ()
    cache_dir: str | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    test_split: str = "test"

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", adopt(self.vocabulary))
        if sorted(self.lengths) != ["inputs", "targets"] or any(length < 2 for length in self.lengths.values()):
            raise UserError(
                f"TASK_FEATURE_LENGTHS is {dict(self.lengths)!r}; it must be like {{'inputs': 128, 'targets': 128}}, "
                "each at least 2 (a token and EOS)."
            )
        if isinstance(self.task_modules, str):
            raise UserError(
                f"TASK_MODULES is the string {self.task_modules!r}; it must be a tuple: ({self.task_modules!r},)"
            )

    @property
    def cache(self) -> Path:
        if self.cache_dir is not None:
            return paths.local(self.cache_dir, "CACHE_DIR")
        return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rest_jax"

    @property
    def splits(self) -> tuple[str, str, str]:
        return self.train_split, self.eval_split, self.test_split

    def check(self) -> None:
        """Finds what `open` would refuse, for all splits, without writing anything.

        Raises:
          UserError: see `open`.
        """
        unknown = [split for split in dict.fromkeys(self.splits) if self._tokenised(split) is None]
        if unknown:
            vocabularies = self._seqio().check_task(
                self.task, splits=unknown, lengths=self.lengths, module_imports=self.task_modules
            )
            self._check_vocabulary(vocabularies)

    def open(self, split: str) -> TokenDataset:
        """The tokenised split. The first time it is tokenised, which needs the [seqio] extra; later nothing does.

        Raises:
          UserError: no such task or split, faulty text, or a task with another vocabulary than the policy's.
        """
        directory = self._tokenised(split)
        if directory is None:
            seqio_tasks = self._seqio()
            self._check_vocabulary(
                seqio_tasks.check_task(
                    self.task, splits=[split], lengths=self.lengths, module_imports=self.task_modules
                )
            )
            directory = seqio_tasks.tokenize_task(
                self.task,
                split=split,
                lengths=self.lengths,
                cache_dir=self.cache,
                module_imports=self.task_modules,
            )
            files, code = seqio_tasks.provenance(self.task, split=split, module_imports=self.task_modules)
            token_index.record(self.cache, **self._key(split), directory=directory, files=files, code=code)
        dataset = TokenDataset.open(directory)
        self._check_vocabulary(dataset.info.get("vocabularies", {}))
        return dataset

    def _tokenised(self, split: str) -> Path | None:
        return token_index.find(self.cache, **self._key(split))

    def _key(self, split: str) -> dict[str, Any]:
        return {
            "task": self.task,
            "split": split,
            "lengths": self.lengths,
            "vocabulary": self.vocabulary.sha256,
            "modules": tuple(self.task_modules),
        }

    def _check_vocabulary(self, vocabularies: Mapping[str, str]) -> None:
        """Raises UserError unless both sides of the task are tokenised with the policy's vocabulary."""
        for feature, sha256 in vocabularies.items():
            if sha256 != self.vocabulary.sha256:
                raise UserError(
                    f"VOCABULARY is {self.vocabulary!r} (sha256 {self.vocabulary.sha256[:12]}...), but the "
                    f"task {self.task!r} makes its {feature} with another one (sha256 {sha256[:12]}...). Give the "
                    "vocabulary that the task was registered with, or register the task with this one."
                )

    def _seqio(self) -> Any:
        # Imported here because it loads TensorFlow, which a machine that only grows and improves need not have.
        try:
            from rest_jax.data import seqio_tasks
        except (ImportError, UserError) as error:
            raise UserError(
                f"MIXTURE_OR_TASK_NAME {self.task!r} with this vocabulary and these lengths is not tokenised in "
                f"CACHE_DIR {str(self.cache)!r}, and to do that needs the [seqio] extra: pip install "
                f"'rest_jax[seqio]', or copy CACHE_DIR from a machine that has it ({error})."
            ) from error
        return seqio_tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnreadData(ParallelData):
    """For a dry run: data that is checked, and not tokenised; every split has no rows."""

    def open(self, split: str) -> TokenDataset:
        nothing = np.zeros(0, np.int32)
        return TokenDataset(
            source_ids=nothing.astype(np.int64),
            source_lengths=nothing,
            target_lengths=nothing,
            info={},
            _shards=(),
            _starts=(),
        )
