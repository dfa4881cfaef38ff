"""The run's parallel data: a seqio task's splits as tokenised Arrow shards."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from rest_jax.data.token_dataset import TokenDataset
from rest_jax.data.vocabulary import SentencePieceVocabulary
from rest_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelData:
    """Which text a run trains, selects and tests on.

    Attributes:
      task: seqio task or mixture.
      vocabulary: the policy's; it must be the task's own.
      lengths: `{'inputs': S, 'targets': T}`, most tokens incl. EOS; longer texts are trimmed.
      task_modules: modules to import because they register the task.
      cache_dir: where tokenised splits are kept; None for `$XDG_CACHE_HOME/rest_jax`.
      train_split, eval_split, test_split: D, D_eval (checkpoints are chosen on it), and the split that is only reported.
    """

    task: str
    vocabulary: SentencePieceVocabulary
    lengths: Mapping[str, int]
    task_modules: tuple[str, ...] = ()
    cache_dir: str | None = None
    train_split: str = "train"
    eval_split: str = "validation"
    test_split: str = "test"

    def __post_init__(self) -> None:
        if sorted(self.lengths) != ["inputs", "targets"] or any(length < 2 for length in self.lengths.values()):
            raise UserError(
                f"TASK_FEATURE_LENGTHS is {dict(self.lengths)!r}; it must be like {{'inputs': 128, 'targets': 128}}, "
                "each at least 2 (a token and EOS)."
            )

    @property
    def cache(self) -> Path:
        if self.cache_dir is not None:
            return Path(self.cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "rest_jax"

    def open(self, split: str) -> TokenDataset:
        """The tokenised split; tokenises it the first time, which needs the [seqio] extra.

        Raises:
          UserError: no such task or split, faulty text, or a task that was tokenised with another vocabulary.
        """
        # Imported here because it loads TensorFlow, which a machine that only grows and improves need not have.
        try:
            from rest_jax.data import seqio_tasks
        except ImportError as error:
            raise UserError(
                f"MIXTURE_OR_TASK_NAME {self.task!r} is a seqio task, and reading it needs the [seqio] extra: "
                f"pip install 'rest_jax[seqio]' ({error})."
            ) from error
        directory = seqio_tasks.tokenize_task(
            self.task,
            split=split,
            lengths=self.lengths,
            cache_dir=self.cache,
            module_imports=self.task_modules,
        )
        return TokenDataset.open(directory)
