"""`demo_de_en`: 28,600 German-English Bible verses that come with the package, in the public domain.

Where they are from: demo_data/README.md.
"""

import pathlib

from rest_jax.tasks import parallel_text

DATA_DIR = pathlib.Path(__file__).parent / "demo_data"

parallel_text.register_parallel_text(
    "demo_de_en",
    splits={
        "train": DATA_DIR / "train.tsv.gz",
        "validation": DATA_DIR / "valid.tsv.gz",
        "test": DATA_DIR / "test.tsv.gz",
    },
    vocabulary=DATA_DIR / "vocab.model",
)
