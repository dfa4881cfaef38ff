"""The folder in which users put corpora that nobody may redistribute, and the vocabularies trained on any corpus.

```
$REST_JAX_DATA_DIR/          (~/rest_jax_data when the variable is not set)
  iwslt14.de-en/             <corpus>.<languages>, one folder for both directions
    train.de  train.en       line-aligned, plain or with .gz; valid.* and, where no official test set is fetched, test.*
    vocab.model              `python -m rest_jax vocab` writes it
```
"""

import os
from pathlib import Path

from rest_jax.tasks import text_sources


def folder(corpus: str, languages: tuple[str, str]) -> Path:
    """The corpus' folder. `languages` in the order of the folder's name, English last where it takes part."""
    root = Path(os.environ.get("REST_JAX_DATA_DIR", "~/rest_jax_data")).expanduser()
    return root / f"{corpus}.{'-'.join(languages)}"


def vocabulary(corpus: str, languages: tuple[str, str]) -> Path:
    """Where the vocabulary of both directions stands."""
    return folder(corpus, languages) / "vocab.model"


def split(corpus: str, languages: tuple[str, str], *, name: str, source: str, target: str) -> text_sources.TextFiles:
    """The line-aligned files `<name>.<source>` and `<name>.<target>`, with `.gz` where only that is there."""
    files = []
    for language in (source, target):
        plain = folder(corpus, languages) / f"{name}.{language}"
        compressed = plain.with_name(f"{plain.name}.gz")
        files.append(os.fspath(compressed if compressed.exists() and not plain.exists() else plain))
    return text_sources.TextFiles(tuple(files))
