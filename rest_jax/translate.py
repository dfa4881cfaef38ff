"""Translating lines of text with a policy: one line in, one line out, in order."""

import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import jax
import numpy as np

from rest_jax import paths, run_files
from rest_jax.checkpoints import checkpointer
from rest_jax.data.batching import length_groups
from rest_jax.data.vocabulary import adopt
from rest_jax.errors import UserError
from rest_jax.models.initial_params import initial_params
from rest_jax.partitioning import Partitioner
from rest_jax.rest import phase_directory
from rest_jax.sampling import LogitProcessing, Samples, Sampling
from rest_jax.sampling.scored import draw_samples, without_prefix

Params = Any
# Lines that are read, sorted by length and translated together, in chunks: bounds memory, and how long a pipe waits.
BLOCK_CHUNKS = 32


@dataclasses.dataclass(frozen=True)
class Translation:
    """One line's translations: samples in the order drawn, or a beam's, best first."""

    source: str
    texts: tuple[str, ...]
    log_probs: tuple[float, ...]  # natural log, summed over all tokens incl. EOS

    def as_json(self) -> str:
        content = {"source": self.source, "samples": self.texts, "log_probs": [round(p, 4) for p in self.log_probs]}
        return json.dumps(content, ensure_ascii=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Translator:
    """A policy that translates text.

    Attributes:
      model: with T5X's methods; its vocabularies are `data.vocabulary`'s.
      params: the policy's.
      partitioner: the mesh.
      sampling: how many translations of a line, and how.
      source_length, target_length: most tokens of a line and of its translation, incl. EOS; longer lines are cut.
      prefix: put before each line, as the task does that the policy was trained on.
      seed: of samples. A line's draws depend on it and on the line's number alone.
    """

    model: Any
    params: Params
    partitioner: Partitioner
    sampling: Sampling
    source_length: int
    target_length: int
    prefix: str = ""
    seed: int = 0

    def translate(
        self, lines: Iterable[str], *, on_cut: Callable[[int], None] = lambda number: None
    ) -> Iterator[Translation]:
        """Translates lines, without their ends, in order; an empty line gives empty translations.

        Args:
          lines: read in blocks, so a stream of any length is fine.
          on_cut: called with the number, from 1, of each line that was cut at `source_length`.
        """
        program = jax.jit(self._program)
        stream = iter(lines)
        first = 0
        block_size = self.sampling.sources_per_chunk * BLOCK_CHUNKS
        while block := list(islice(stream, block_size)):
            yield from self._block(program, block, first=first, on_cut=on_cut)
            first += len(block)

    def _program(self, params: Params, sources: jax.Array, source_ids: jax.Array, seed: jax.Array) -> Samples:
        batch = {"encoder_input_tokens": sources, "source_ids": source_ids}
        return draw_samples(
            params,
            batch,
            seed,
            0,
            model=self.model,
            sampling=self.sampling,
            max_length=self.target_length,
            mesh=self.partitioner.mesh,
        )

    def _block(
        self, program: Callable[..., Samples], block: Sequence[str], *, first: int, on_cut: Callable[[int], None]
    ) -> list[Translation]:
        source_vocabulary, target_vocabulary = adopt(self.model.input_vocabulary), adopt(self.model.output_vocabulary)
        empty = [""] * self.sampling.num_samples
        results = [Translation(line, tuple(empty), (0.0,) * len(empty)) for line in block]
        filled = np.asarray([index for index, line in enumerate(block) if line.strip()], np.int64)
        if not len(filled):
            return results
        tokens = []
        for index in filled:
            ids = [*source_vocabulary.encode(self.prefix + block[index].strip()), source_vocabulary.eos_id]
            if len(ids) > self.source_length:
                on_cut(first + int(index) + 1)
                ids = [*ids[: self.source_length - 1], source_vocabulary.eos_id]
            tokens.append(ids)
        rows = self.sampling.sources_per_chunk
        groups = length_groups(
            [len(ids) for ids in tokens],
            batch_size=rows,
            max_length=self.source_length,
            multiple=self.sampling.length_multiple,
        )
        for group in groups:
            sources = np.zeros((rows, group.padded_length), np.int32)
            source_ids = np.zeros(rows, np.uint32)
            for row, member in enumerate(group.indices):
                sources[row, : len(tokens[member])] = tokens[member]
                source_ids[row] = first + filled[member]
            batch = self.partitioner.put_batch({"sources": sources, "source_ids": source_ids})
            drawn = program(self.params, batch["sources"], batch["source_ids"], np.uint32(self.seed))
            sampled, log_probs = jax.device_get((drawn.tokens, drawn.log_probs))
            for row, member in enumerate(group.indices):
                index = int(filled[member])
                decoded = target_vocabulary.decode_batch(sampled[row].tolist())
                texts = [without_prefix(text, self.sampling) for text in decoded]
                results[index] = Translation(
                    block[index], tuple(_one_line(text) for text in texts), tuple(float(p) for p in log_probs[row])
                )
        return results


def _one_line(text: str) -> str:
    """Line ends that a policy spelled in bytes would break "one line in, one line out"."""
    return text.replace("\r", " ").replace("\n", " ")


def read_lines(file: BinaryIO, *, name: str) -> Iterator[str]:
    """Lines of UTF-8 text without their ends.

    Raises:
      UserError: bytes that are no UTF-8; names the line.
    """
    for number, line in enumerate(file, start=1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}:{number}: text that is not UTF-8 (byte {error.start + 1} of the line is "
                f"0x{error.object[error.start]:02x}); convert the file, e.g. with `iconv -f latin1 -t utf-8`"
            ) from error


@contextmanager
def open_input(path: str | None) -> Iterator[Iterable[str]]:
    """Lines of a file, or of standard input where `path` is None or '-'."""
    if path in (None, "-"):
        yield read_lines(sys.stdin.buffer, name="standard input")
        return
    try:
        file = paths.resolve(path).open("rb")  # closed below, outside of what the UserError covers
    except OSError as error:
        raise UserError(f"input {path!r} cannot be read ({error.strerror}); give the path of a UTF-8 file") from error
    with file:
        yield read_lines(file, name=str(path))


@contextmanager
def open_output(path: str | None) -> Iterator[TextIO]:
    """A file that appears when all of it is written, or standard output where `path` is None or '-'."""
    if path in (None, "-"):
        yield sys.stdout
        sys.stdout.flush()
        return
    final = paths.resolve(path)
    if paths.in_bucket(final):
        text = io.StringIO()
        yield text
        paths.write_text(final, text.getvalue())
        return
    partial = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        file = partial.open("w", encoding="utf-8", newline="\n")
    except OSError as error:
        raise UserError(
            f"--output {path!r} cannot be written ({error.strerror}); give a file in a folder that exists"
        ) from error
    try:
        with file:
            yield file
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)


def make_sampling(
    *,
    num_samples: int | None,
    beam_size: int,
    beam_alpha: float,
    temperature: float,
    top_p: float,
    sources_per_chunk: int,
    target_prefix: str,
) -> Sampling:
    """How lines are translated: greedily, by beam search, or with `num_samples` by sampling.

    Raises:
      UserError: values out of range.
    """
    if num_samples is not None and num_samples < 1:
        raise UserError(f"--num_samples is {num_samples}; it must be at least 1.")
    if beam_size < 1:
        raise UserError(f"--beam_size is {beam_size}; it must be 1 (greedy, or samples) or more.")
    greedy = num_samples is None or beam_size > 1
    return Sampling(
        num_samples=num_samples or 1,
        sources_per_chunk=sources_per_chunk,
        processing=LogitProcessing(temperature=0.0)
        if greedy
        else LogitProcessing(temperature=temperature, top_p=top_p),
        beam_size=beam_size if beam_size > 1 else 0,
        beam_alpha=beam_alpha,
        target_prefix=target_prefix,
    )


def open_translator(
    config: Any, *, checkpoint: str | None, policy: str | None, sampling: Sampling, prefix: str, seed: int
) -> Translator:
    """The translator of a run's policy, or of a checkpoint of its model.

    Args:
      config: the `rest.ReST`; its data is not opened.
      checkpoint: a checkpoint; None for a policy of the run's own.
      policy: the phase whose policy it is; None for MODEL_DIR/policy, the last.
      sampling, prefix, seed: see `Translator`.

    Raises:
      UserError: no such phase or checkpoint, one that does not fit the model or the vocabulary.
    """
    config.partitioner.check_batch_divisible(sampling.sources_per_chunk, "--sources_per_chunk")
    path = checkpointer.find_checkpoint(checkpoint or _policy_path(paths.resolve(config.model_dir), policy))
    vocabulary = config.data.vocabulary
    run_files.check_same_vocabulary("checkpoint", path, vocabulary_sha256=vocabulary.sha256)
    abstract = jax.eval_shape(lambda: initial_params(config.model, jax.random.key(0)))
    return Translator(
        model=config.model,
        params=checkpointer.load_params(str(path), abstract_params=abstract, partitioner=config.partitioner),
        partitioner=config.partitioner,
        sampling=sampling,
        source_length=config.data.lengths["inputs"],
        target_length=config.data.lengths["targets"],
        prefix=prefix,
        seed=seed,
    )


def _policy_path(model_dir: Path, phase: str | None) -> str:
    """The checkpoint that a phase kept."""
    if phase is None:
        if not (model_dir / "policy").is_dir():
            raise UserError(
                f"--model_dir {str(model_dir)!r} has no policy/ yet: the run has not evaluated any. Name a finished "
                "phase with --policy, or give --checkpoint."
            )
        return str(model_dir / "policy")
    directory = phase_directory(model_dir, phase)
    try:
        result = json.loads((directory / "RESULT.json").read_text(encoding="utf-8"))
        return str(checkpointer.step_directory(directory, result["best_step"]))
    except (OSError, KeyError) as error:
        marks = [*model_dir.glob("*/RESULT.json"), *model_dir.glob("*/*/RESULT.json")]
        finished = ", ".join(str(mark.parent.relative_to(model_dir)) for mark in sorted(marks))
        raise UserError(
            f"--policy {phase!r}: {str(directory)!r} holds no finished policy; finished are {finished or 'none'}. "
            "Phases are bc, bc_long, improve_1.2 (Grow step 1, Improve step 2)."
        ) from error
