"""A user's project, so small that compiling its programs is nearly all that a run does."""

import gzip
from collections.abc import Mapping
from pathlib import Path

import sentencepiece

from rest_jax import paths

DEMO = "rest_jax://tasks/demo_data/train.tsv.gz"
CONFIG = """
from __gin__ import dynamic_registration
from rest_jax import filters
from rest_jax import training
from rest_jax.data import vocabulary
from rest_jax.evaluation import evaluate
from rest_jax.models import t5

include 'models/nano.gin'
include 'rewards/chrf.gin'
include 'rest.gin'

MIXTURE_OR_TASK_NAME = 'tiny_de_en'
TASK_MODULES = ('tiny_task',)
TASK_FEATURE_LENGTHS = {'inputs': 24, 'targets': 24}
VOCABULARY = @vocabulary.SentencePieceVocabulary()
t5.T5Config.emb_dim = 16
t5.T5Config.num_heads = 2
t5.T5Config.head_dim = 8
t5.T5Config.mlp_dim = 32
t5.T5Config.num_encoder_layers = 1
t5.T5Config.num_decoder_layers = 1

TRAIN_STEPS = 32
BATCH_SIZE = 8
MICROBATCHES = 2
WARMUP_STEPS = 4
EVAL_PERIOD = 16
bc/training.Training.checkpoint_period = 4
improve/training.Training.checkpoint_period = 4
NUM_SAMPLES = 4
SOURCES_PER_CHUNK = 4
GROW_FILTER = @filters.TopK()
filters.TopK.k = 2
SCHEDULE = @filters.TopKSchedule()
filters.TopKSchedule.ks = (2,)
IMPROVE_STEPS = 1
IMPROVE_TRAIN_STEPS = 32
IMPROVE_EVAL_PERIOD = 16
PATIENCE = None
EVAL_SAMPLES = 2
SELECTION_SAMPLES = 2
evaluate.Evaluation.bootstrap_resamples = 20
"""


def make_project(root: Path, *, sizes: Mapping[str, int], config: str = "") -> Path:
    """Text, a vocabulary, a module that registers the task, and `tiny.gin`: the configuration here, then `config`."""
    with gzip.open(paths.resolve(DEMO), "rt", encoding="utf-8") as file:
        lines = [line for line in file if len(line) < 160][: sum(sizes.values())]
    splits, start = {}, 0
    for split, size in sizes.items():
        splits[split] = str(root / f"{split}.tsv")
        Path(splits[split]).write_text("".join(lines[start : start + size]), encoding="utf-8")
        start += size
    (root / "text.txt").write_text("".join(line.replace("\t", "\n") for line in lines), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "text.txt"), model_prefix=str(root / "tiny"), vocab_size=400, byte_fallback=True,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2, num_threads=1,
    )  # fmt: skip
    vocabulary = str(root / "tiny.model")
    (root / "tiny_task.py").write_text(
        "from rest_jax.tasks import parallel_text\n"
        f"parallel_text.register_parallel_text('tiny_de_en', splits={splits!r}, vocabulary={vocabulary!r})\n"
    )
    cache = f"CACHE_DIR = {str(root / 'cache')!r}\n"
    model_file = f"vocabulary.SentencePieceVocabulary.sentencepiece_model_file = {vocabulary!r}\n"
    (root / "tiny.gin").write_text(CONFIG + cache + model_file + config)
    return root
