"""The engines that the benchmark compares, each in a process of its own.

    python -m tests.benchmarks.sampling.engines ENGINE FOLDER

reads the task from FOLDER/task.json, the sources from FOLDER/sources.npy and the weights from FOLDER/model, a Hugging
Face folder, and answers JSON lines: {"do": "draw", "seed": 1}, {"do": "greedy"}, {"do": "peak"}.

Processes of their own, because each engine then has its own memory, which can be measured; because the thread pools of
XLA, OpenMP and TensorFlow would share cores and libraries in one; and because ours runs as it is used, without
TensorFlow. A process that is not asked waits for its input and takes no core.
"""

import argparse
import dataclasses
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

GREEDY_LENGTH = 8
# ctranslate2_int8 computes something else than the others: for information.
ENGINES = ("rest_jax", "t5x", "transformers", "ctranslate2", "ctranslate2_int8")
PACKAGES = {
    "t5x": ("t5x", "see docs/t5x.md"),
    "transformers": ("transformers", "pip install torch transformers"),
    "ctranslate2": ("ctranslate2", "pip install ctranslate2 torch transformers"),
    "ctranslate2_int8": ("ctranslate2", "pip install ctranslate2 torch transformers"),
}


@dataclasses.dataclass(frozen=True)
class Task:
    """What is drawn, by every engine alike.

    Attributes:
      config: of the network, T5Config's fields.
      num_samples: N, of each source.
      target_length: most tokens of a sample.
      temperature: of the draws, from the whole vocabulary.
      dtype: of activations; of the weights too where an engine has but one.
      threads: the machine's cores.
      sampling: fields of rest_jax's Sampling that are not as they come.
    """

    config: dict[str, Any]
    num_samples: int
    target_length: int
    temperature: float
    dtype: str
    threads: int
    sampling: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Engine:
    """Attributes:
    draw: seed -> tokens before EOS of each sample, `[sources * num_samples]`, when all samples are on the host.
    greedy: -> tokens `[sources, GREEDY_LENGTH]` and their log-probabilities `[sources]`.
    device_peak: -> peak bytes of an accelerator's memory; None where that is not known or there is none.
    compile_seconds: None where nothing is compiled.
    """

    draw: Callable[[int], npt.NDArray[np.int64]]
    greedy: Callable[[], tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]
    device_peak: Callable[[], int | None]
    compile_seconds: float | None = None


def rest_jax_engine(folder: Path, task: Task, sources: npt.NDArray[np.int32]) -> Engine:
    import jax

    from rest_jax.models import t5
    from rest_jax.models.encoder_decoder import EncoderDecoderModel
    from rest_jax.sampling import LogitProcessing, Sampling
    from rest_jax.sampling.scored import draw_samples

    model = EncoderDecoderModel(t5.Transformer(t5.T5Config(**task.config)), None, None)
    params = _params(folder)
    batch = jax.device_put({"encoder_input_tokens": sources, "source_ids": np.arange(len(sources), dtype=np.uint32)})
    sampling = Sampling(
        num_samples=task.num_samples, sources_per_chunk=len(sources),
        processing=LogitProcessing(temperature=task.temperature), **task.sampling,
    )  # fmt: skip
    start = time.perf_counter()
    program = (
        jax.jit(functools.partial(draw_samples, model=model, sampling=sampling, max_length=task.target_length))
        .lower(params, batch, np.uint32(0), np.uint32(0))
        .compile()
    )
    compile_seconds = time.perf_counter() - start

    def draw(seed: int) -> npt.NDArray[np.int64]:
        samples = jax.device_get(program(params, batch, np.uint32(seed), np.uint32(0)))
        return (samples.lengths - samples.hit_eos).ravel()

    def greedy() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        best = dataclasses.replace(sampling, num_samples=1, processing=LogitProcessing(temperature=0.0))
        run = jax.jit(functools.partial(draw_samples, model=model, sampling=best, max_length=GREEDY_LENGTH))
        samples = jax.device_get(run(params, batch, np.uint32(0), np.uint32(0)))
        return samples.tokens[:, 0], samples.log_probs[:, 0]

    return Engine(draw, greedy, _jax_device_peak, compile_seconds)


def t5x_engine(folder: Path, task: Task, sources: npt.NDArray[np.int32]) -> Engine:
    """T5X's model and network, by `predict_batch_with_aux` with its own `temperature_sample`."""
    import jax
    import jax.numpy as jnp
    from t5x import decoding, models
    from t5x.examples.t5 import network

    from rest_jax.data.vocabulary import EOS_ID
    from rest_jax.sampling.samples import log_probabilities

    known = {field.name for field in dataclasses.fields(network.T5Config)}
    module = network.Transformer(network.T5Config(**{k: v for k, v in task.config.items() if k in known}))
    vocabulary = argparse.Namespace(eos_id=EOS_ID, vocab_size=task.config["vocab_size"])
    model = models.EncoderDecoderModel(
        module, vocabulary, vocabulary, optimizer_def=None, decode_fn=decoding.temperature_sample
    )
    params = _params(folder)

    def predict(params: Any, key: Any, *, length: int, num_decodes: int, temperature: float) -> Any:
        batch = {
            "encoder_input_tokens": jnp.asarray(sources),
            "decoder_input_tokens": jnp.zeros((len(sources), length), jnp.int32),
        }
        tokens, _ = model.predict_batch_with_aux(
            params, batch, rng=key, return_all_decodes=True, num_decodes=num_decodes,
            decoder_params={"temperature": temperature, "topk": 0},
        )  # fmt: skip
        return tokens  # [sources, num_decodes, length], ends with EOS, then padding

    options: dict[str, Any] = {
        "num_decodes": task.num_samples,
        "temperature": task.temperature,
        "length": task.target_length,
    }
    start = time.perf_counter()
    program = jax.jit(functools.partial(predict, **options)).lower(params, jax.random.key(0)).compile()
    compile_seconds = time.perf_counter() - start

    def draw(seed: int) -> npt.NDArray[np.int64]:
        return _before_eos(jax.device_get(program(params, jax.random.key(seed))).reshape(-1, task.target_length))

    def greedy() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        run = jax.jit(functools.partial(predict, num_decodes=1, temperature=0.0, length=GREEDY_LENGTH))
        tokens = run(params, jax.random.key(0))
        log_probs = log_probabilities(model, params, encoder_input_tokens=jnp.asarray(sources), tokens=tokens)
        return np.asarray(tokens[:, 0]), np.asarray(log_probs[:, 0])

    return Engine(draw, greedy, _jax_device_peak, compile_seconds)


def transformers_engine(folder: Path, task: Task, sources: npt.NDArray[np.int32]) -> Engine:
    import torch
    import transformers

    torch.set_num_threads(task.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "model", dtype=getattr(torch, task.dtype))
    network = network.to(device).eval()
    tokens = torch.from_numpy(sources.astype(np.int64)).to(device)
    inputs = {"input_ids": tokens, "attention_mask": (tokens > 0).long()}

    def generate(*, max_new_tokens: int) -> npt.NDArray[np.int64]:
        with torch.inference_mode():
            drawn = network.generate(
                **inputs, do_sample=True, top_k=0, top_p=1.0, temperature=task.temperature,
                num_return_sequences=task.num_samples, max_new_tokens=max_new_tokens,
            )  # fmt: skip
        return drawn[:, 1:].cpu().numpy()  # without the start token

    def draw(seed: int) -> npt.NDArray[np.int64]:
        torch.manual_seed(seed)
        return _before_eos(generate(max_new_tokens=task.target_length))

    def greedy() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        with torch.inference_mode():
            best = network.generate(
                **inputs, do_sample=False, max_new_tokens=GREEDY_LENGTH, output_scores=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            scores = network.compute_transition_scores(best.sequences, best.scores, normalize_logits=True)
        tokens = best.sequences[:, 1:]
        log_probs = scores.float().masked_fill(tokens == 0, 0.0).sum(-1)  # padding after EOS has a score there too
        return _padded(tokens.cpu().numpy()), log_probs.cpu().numpy()

    generate(max_new_tokens=2)
    return Engine(draw, greedy, torch.cuda.max_memory_allocated if device == "cuda" else lambda: None)


def ctranslate2_engine(
    folder: Path, task: Task, sources: npt.NDArray[np.int32], *, compute_type: str | None = None
) -> Engine:
    import ctranslate2
    import torch

    class Converter(ctranslate2.converters.TransformersConverter):
        """ctranslate2 4.8's, which scales the logits where config.json ties them, as transformers 5 always says."""

        def load_model(self, *arguments: Any, **options: Any) -> Any:
            model = super().load_model(*arguments, **options)
            model.config.tie_word_embeddings = False
            return model

    compute_type = compute_type or task.dtype
    converted = folder / f"ctranslate2_{compute_type}"
    Converter(str(folder / "model")).convert(str(converted))
    ctranslate2.set_random_seed(0)
    translator = ctranslate2.Translator(
        str(converted), device="cuda" if torch.cuda.is_available() else "cpu", compute_type=compute_type,
        inter_threads=1, intra_threads=task.threads,
    )  # fmt: skip
    pieces = json.loads((converted / "shared_vocabulary.json").read_text(encoding="utf-8"))
    ids = {piece: number for number, piece in enumerate(pieces)}
    inputs = [[pieces[token] for token in row if token] for row in sources]

    def translate(**options: Any) -> Any:
        return translator.translate_batch(inputs, beam_size=1, max_batch_size=0, min_decoding_length=0, **options)

    def sample(*, max_length: int) -> npt.NDArray[np.int64]:
        results = translate(
            num_hypotheses=task.num_samples, sampling_topk=0, sampling_temperature=task.temperature,
            max_decoding_length=max_length,
        )  # fmt: skip
        return np.array([len(hypothesis) for result in results for hypothesis in result.hypotheses])

    def draw(seed: int) -> npt.NDArray[np.int64]:
        del seed  # Its generators are seeded once, and go on.
        return sample(max_length=task.target_length)

    def greedy() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        results = translate(
            sampling_topk=1, max_decoding_length=GREEDY_LENGTH, return_scores=True, length_penalty=0,
            return_end_token=True,
        )  # fmt: skip
        tokens = np.concatenate([_padded(np.array([[ids[p] for p in r.hypotheses[0]]])) for r in results])
        return tokens, np.array([result.scores[0] for result in results])

    sample(max_length=2)
    return Engine(draw, greedy, lambda: None)


FACTORIES: dict[str, Callable[..., Engine]] = {
    "rest_jax": rest_jax_engine,
    "t5x": t5x_engine,
    "transformers": transformers_engine,
    "ctranslate2": ctranslate2_engine,
    "ctranslate2_int8": functools.partial(ctranslate2_engine, compute_type="int8"),
}


def _params(folder: Path) -> Any:
    """The weights as a tree on the device."""
    import jax

    from rest_jax.checkpoints import hugging_face, tensors

    leaves = hugging_face.open_folder(folder / "model").tensors
    return jax.device_put(tensors.unflatten({name: tensor.read() for name, tensor in leaves.items()}))


def _jax_device_peak() -> int | None:
    import jax

    statistics = jax.devices()[0].memory_stats()  # None on CPU
    return None if statistics is None else statistics["peak_bytes_in_use"]


def _before_eos(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`[n, length]` -> `[n]`: tokens before EOS (1), or all where there is none."""
    ended = tokens == 1
    return np.where(ended.any(axis=1), ended.argmax(axis=1), tokens.shape[1])


def _padded(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """`[n, length]` -> `[n, GREEDY_LENGTH]`."""
    return np.pad(tokens, ((0, 0), (0, GREEDY_LENGTH - tokens.shape[1])))


def _forget_peak() -> None:
    """Starts the resident set's peak anew, on Linux (proc(5), clear_refs): loading and compiling are left out."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak() -> int:
    """The resident set's peak, bytes, since it was last forgotten."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    # What libraries print goes to the errors; the answers have the output for themselves.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    task = Task(**json.loads((folder / "task.json").read_text(encoding="utf-8")))
    engine = FACTORIES[name](folder, task, np.load(folder / "sources.npy"))
    _forget_peak()
    answer({"compile_seconds": engine.compile_seconds})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "draw":
            start = time.perf_counter()
            lengths = engine.draw(request["seed"])
            answer({"seconds": time.perf_counter() - start, "lengths": lengths.tolist()})
        elif request["do"] == "greedy":
            tokens, log_probs = engine.greedy()
            answer({"tokens": tokens.tolist(), "log_probs": np.asarray(log_probs, np.float64).tolist()})
        else:
            answer({"host_peak": _peak(), "device_peak": engine.device_peak()})


if __name__ == "__main__":
    main()
