"""`rest_jax infer`: a task's split through a checkpoint, into the JSON lines that T5X's infer.py writes."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from rest_jax import paths, run_files
from rest_jax.checkpoints import checkpointer, formats
from rest_jax.data.parallel import ParallelData
from rest_jax.data.token_dataset import TokenDataset
from rest_jax.data.vocabulary import adopt
from rest_jax.errors import UserError
from rest_jax.models.initial_params import initial_params
from rest_jax.partitioning import Partitioner
from rest_jax.sampling import Sampling
from rest_jax.sampling.samples import log_probabilities
from rest_jax.sampling.scored import chunks, draw_samples, run_chunks
from rest_jax.translate import open_output

GIN = "infer.gin"
# What a model's file and the flags above leave open, where no run's configuration says it.
FALLBACKS = {
    "CACHE_DIR": "None",
    "DROPOUT_RATE": "0.0",
    "MODEL_PARALLEL": "1",
    "RANDOM_SEED": "0",
    "REPLICAS": "1",
    "SOURCES_PER_CHUNK": "32",
    "TASK_MODULES": "()",
}
Mode = Literal["predict", "predict_with_aux", "score"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inference:
    """What is inferred with, as bound in gin/infer.gin.

    Attributes:
      model: with T5X's methods.
      data: the task.
      partitioner: the mesh and its rules.
      sampling: how predictions are decoded; with more than one sample, predictions and scores are lists.
      checkpoint_path: the parameters, in any format.
      output_dir: where the file goes.
      seed: of samples, where `sampling` is not greedy.
    """

    model: Any
    data: ParallelData
    partitioner: Partitioner
    sampling: Sampling
    checkpoint_path: str
    output_dir: str
    seed: int = 0


def run(
    inference: Inference,
    *,
    mode: Mode = "predict_with_aux",
    split: str = "test",
    shard_id: int = 0,
    num_shards: int = 1,
) -> Path:
    """Writes `{task}-{mode}.jsonl-{shard}-of-{shards}`, whole or not at all, and returns its path.

    Each line has `inputs` (the texts, `inputs_pretokenized` and `targets_pretokenized`) and by mode

      predict:          `prediction`, the text
      predict_with_aux: that, and `aux.scores`, its log-probability (natural log, all tokens incl. EOS)
      score:            `score`, the log-probability of the task's own target

    Args:
      inference: the model, its parameters and the task.
      mode: see above.
      split: of the task.
      shard_id, num_shards: this call does the examples `shard_id`, `shard_id + num_shards`, ..., as T5X deals them.

    Raises:
      UserError: shards that do not fit together, no such checkpoint or task, or ones that do not fit the model.
    """
    if not 0 <= shard_id < num_shards:
        raise UserError(
            f"--shard_id is {shard_id} and --num_shards {num_shards}; legal are 0 <= shard_id < num_shards."
        )
    inference.partitioner.check_batch_divisible(inference.sampling.sources_per_chunk, "SOURCES_PER_CHUNK")
    found = formats.find_checkpoint(inference.checkpoint_path, field="CHECKPOINT_PATH")
    run_files.check_same_vocabulary("CHECKPOINT_PATH", found, vocabulary_sha256=inference.data.vocabulary.sha256)
    abstract = jax.eval_shape(lambda: initial_params(inference.model, jax.random.key(0)))
    checkpointer.check_fits(str(found), abstract_params=abstract)
    dataset = inference.data.open(split)
    params = checkpointer.load_params(str(found), abstract_params=abstract, partitioner=inference.partitioner)
    name = f"{inference.data.task}-{mode}.jsonl-{shard_id:05d}-of-{num_shards:05d}"
    folder = paths.resolve(inference.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"INFER_OUTPUT_DIR {inference.output_dir!r} cannot be made: {error}") from error
    indices = np.arange(shard_id, len(dataset), num_shards)
    with open_output(str(folder / name)) as file:
        for line in _lines(inference, params, dataset, indices, mode=mode):
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return folder / name


def _lines(
    inference: Inference, params: Any, dataset: TokenDataset, indices: np.ndarray, *, mode: Mode
) -> Iterator[dict[str, Any]]:
    """The file's objects, in the order of `indices`."""
    lengths, sampling = inference.data.lengths, inference.sampling
    predict = functools.partial(
        _predict, sampling=sampling, max_length=lengths["targets"], mesh=inference.partitioner.mesh
    )
    results: dict[int, Any] = {}
    for _, group, result in run_chunks(
        list(enumerate(chunks(dataset, indices=indices, sampling=sampling, max_source_length=lengths["inputs"]))),
        program=jax.jit(functools.partial(_score if mode == "score" else predict, model=inference.model)),
        params=params,
        reward_params=None,
        dataset=dataset,
        sampling=sampling,
        target_length=lengths["targets"],
        partitioner=inference.partitioner,
        seed=inference.seed,
        stream=0,
    ):
        fetched = jax.device_get(result)
        for row, index in enumerate(group.indices):
            results[int(index)] = {name: values[row] for name, values in fetched.items()}
    vocabulary = adopt(inference.model.output_vocabulary)
    for index in map(int, indices):
        result = results[index]
        line: dict[str, Any] = {
            "inputs": {
                "inputs_pretokenized": dataset.inputs_text(index),
                "targets_pretokenized": dataset.targets_text(index),
            }
        }
        if mode == "score":
            line["score"] = float(result["scores"])
        else:
            texts, scores = vocabulary.decode_batch(result["tokens"].tolist()), result["scores"].tolist()
            line["prediction"] = texts if sampling.num_samples > 1 else texts[0]
            if mode == "predict_with_aux":
                line["aux"] = {"scores": scores if sampling.num_samples > 1 else scores[0]}
        yield line


def _predict(
    params: Any,
    reward_params: None,
    batch: Mapping[str, jax.Array],
    seed: jax.Array,
    stream: jax.Array,
    *,
    model: Any,
    sampling: Sampling,
    max_length: int,
    mesh: Mesh,
) -> dict[str, jax.Array]:
    """Tokens `[batch, num_samples, max_length]` and scores `[batch, num_samples]`."""
    samples = draw_samples(
        params, batch, seed, stream, model=model, sampling=sampling, max_length=max_length, mesh=mesh
    )
    return {"tokens": samples.tokens, "scores": samples.log_probs}


def _score(
    params: Any,
    reward_params: None,
    batch: Mapping[str, jax.Array],
    seed: jax.Array,
    stream: jax.Array,
    *,
    model: Any,
) -> dict[str, jax.Array]:
    """Scores `[batch]` of the references."""
    targets = batch["references"][:, None]
    scores = log_probabilities(model, params, encoder_input_tokens=batch["encoder_input_tokens"], tokens=targets)
    return {"scores": scores[:, 0]}
