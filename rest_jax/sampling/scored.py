"""Drawing and scoring in one program, over a data set chunk by chunk: what Grow and evaluation share."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from rest_jax.data.batching import LengthGroup, length_groups
from rest_jax.data.token_dataset import TokenDataset
from rest_jax.data.vocabulary import adopt
from rest_jax.errors import UserError
from rest_jax.partitioning import Partitioner, trace_mesh
from rest_jax.rewards.base import Reward
from rest_jax.sampling.cache import CACHE_TYPES
from rest_jax.sampling.processors import LogitProcessing
from rest_jax.sampling.sampler import decode
from rest_jax.sampling.samples import Samples

Params = Any
Program = Callable[..., dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How translations are drawn.

    Attributes:
      num_samples: samples per source, N.
      sources_per_chunk: sources that one call of the program encodes together, over all devices.
      processing: temperature and truncation; the paper's are T = 0.8 and none.
      beam_size: 0 samples; otherwise beam search of this size, whose N best hypotheses take the samples' place.
      beam_alpha: the beam's length penalty.
      length_multiple: source lengths are padded to multiples of this; each is one compilation.
      slots: samples that a device decodes at a time; None for as many as are of use and fit. Changes no
        sample. A CPU never has fewer than 64.
      cache_dtype: type of self-attention's keys and values, one of `cache.CACHE_TYPES`: 'bfloat16' halves what each
        position reads of them, 'int8' halves it again; None for the activations'.
      target_prefix: text that every translation is made to start with, such as the tag of a target language; the
        task's targets start with it too. sacreBLEU and `translate` leave it out.
    """

    num_samples: int
    sources_per_chunk: int
    processing: LogitProcessing = LogitProcessing(temperature=0.8)
    beam_size: int = 0
    beam_alpha: float = 0.6
    length_multiple: int = 32
    slots: int | None = None
    cache_dtype: str | None = None
    target_prefix: str = ""

    def __post_init__(self) -> None:
        for name in ("num_samples", "sources_per_chunk", "length_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"Sampling.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.slots is not None and self.slots < 1:
            raise UserError(f"Sampling.slots is {self.slots}; it must be at least 1, or None for as many as fit.")
        if self.cache_dtype is not None and self.cache_dtype not in CACHE_TYPES:
            raise UserError(
                f"Sampling.cache_dtype is {self.cache_dtype!r}; it must be one of {', '.join(map(repr, CACHE_TYPES))}, "
                "or None for the activations' type."
            )
        if self.beam_size and self.beam_size < self.num_samples:
            raise UserError(
                f"Sampling.beam_size is {self.beam_size}; it must be 0 (sample), or at least num_samples "
                f"{self.num_samples}, since the beam gives its best hypotheses."
            )


def draw_samples(
    params: Params,
    batch: Mapping[str, jax.Array],
    seed: jax.Array,
    stream: jax.Array | int,
    *,
    model: Any,
    sampling: Sampling,
    max_length: int,
    mesh: Mesh | None = None,
    reward_bytes: int = 0,
) -> Samples:
    """`sampler.decode` as `sampling` says; the arguments are those of `sample_and_score`."""
    sources = batch["encoder_input_tokens"]
    prefix = prefix_tokens(model, sampling, max_length=max_length)
    return decode(
        model,
        params,
        encoder_input_tokens=sources,
        source_ids=batch["source_ids"],
        num_samples=sampling.num_samples,
        max_length=max_length,
        processing=sampling.processing,
        beam_size=sampling.beam_size,
        beam_alpha=sampling.beam_alpha,
        seed=seed,
        stream=stream,
        prefix_tokens=jnp.broadcast_to(prefix, (len(sources), len(prefix))) if len(prefix) else None,
        slots=sampling.slots,
        cache_dtype=sampling.cache_dtype,
        mesh=mesh,
        reward_bytes=reward_bytes,
    )


def prefix_tokens(model: Any, sampling: Sampling, *, max_length: int) -> npt.NDArray[np.int32]:
    """The ids of `sampling.target_prefix` in the policy's output vocabulary, `[prefix_length]`.

    Raises:
      UserError: the vocabulary can not spell it, or it leaves no room for a translation.
    """
    if not sampling.target_prefix:
        return np.zeros(0, np.int32)
    vocabulary = adopt(model.output_vocabulary)
    tokens = vocabulary.encode(sampling.target_prefix)
    if vocabulary.unk_id in tokens or len(tokens) >= max_length:
        raise UserError(
            f"Sampling.target_prefix is {sampling.target_prefix!r}, in the policy's vocabulary the ids {tokens}: it "
            f"must have no unknown piece (id {vocabulary.unk_id}) and fewer tokens than a translation may have "
            f"({max_length})."
        )
    return np.asarray(tokens, np.int32)


def without_prefix(text: str, sampling: Sampling) -> str:
    """A translation or a reference without `sampling.target_prefix`."""
    prefix = sampling.target_prefix.strip()
    return text.removeprefix(prefix).lstrip() if prefix else text


def sample_and_score(
    params: Params,
    reward_params: Params,
    batch: Mapping[str, jax.Array],
    seed: jax.Array,
    stream: jax.Array,
    *,
    model: Any,
    reward: Reward,
    sampling: Sampling,
    max_length: int,
    mesh: Mesh | None = None,
    reward_bytes: int = 0,
) -> dict[str, Any]:
    """Encodes each source once, draws N samples of it and scores them.

    Args:
      params: the policy's.
      reward_params: the reward's.
      batch: `encoder_input_tokens [batch, source_length]`, `references [batch, target_length]`, `source_ids [batch]`;
        a row of padding is a filler.
      seed, stream: see `sampler.source_keys`; the stream is the Grow step.
      model, reward, sampling: what draws, what scores, and how many.
      max_length: most tokens of a sample.
      mesh: the mesh on which the batch lies; None for one device.
      reward_bytes: what `reward_params` take of each device's memory.

    Returns:
      samples (`Samples`), components `{name: [batch, num_samples]}`, rewards `[batch, num_samples]`,
      reference_components `{name: [batch, 1]}`, reference_rewards `[batch]` and real `[batch]` (False for fillers).
    """
    samples = draw_samples(
        params,
        batch,
        seed,
        stream,
        model=model,
        sampling=sampling,
        max_length=max_length,
        mesh=mesh,
        reward_bytes=reward_bytes,
    )

    def score(tokens: jax.Array) -> dict[str, jax.Array]:
        with trace_mesh(mesh):
            return reward.score(
                reward_params,
                {"samples": tokens, "references": batch["references"], "sources": batch["encoder_input_tokens"]},
            )

    components = score(samples.tokens)
    reference_components = score(batch["references"][:, None, :])
    return {
        "samples": samples,
        "components": components,
        "rewards": reward.combine(components),
        "reference_components": reference_components,
        "reference_rewards": reward.combine(reference_components)[:, 0],
        "real": jnp.any(batch["encoder_input_tokens"] > 0, axis=-1),
    }


def chunks(
    dataset: TokenDataset, *, indices: npt.NDArray[np.int64], sampling: Sampling, max_source_length: int
) -> list[LengthGroup]:
    """Groups `indices` of the data set by source length; `LengthGroup.indices` index the data set."""
    groups = length_groups(
        dataset.source_lengths[indices],
        batch_size=sampling.sources_per_chunk,
        max_length=max_source_length,
        multiple=sampling.length_multiple,
    )
    return [dataclasses.replace(group, indices=indices[group.indices]) for group in groups]


def chunk_batch(
    dataset: TokenDataset, group: LengthGroup, *, sources_per_chunk: int, target_length: int
) -> dict[str, np.ndarray]:
    """The program's input for one group, `[sources_per_chunk, ...]`, fillers at the end."""
    inputs = np.zeros((sources_per_chunk, group.padded_length), np.int32)
    references = np.zeros((sources_per_chunk, target_length), np.int32)
    source_ids = np.zeros(sources_per_chunk, np.uint32)
    for row, index in enumerate(group.indices):
        source, reference = dataset.inputs(int(index)), dataset.targets(int(index))
        inputs[row, : len(source)] = source[: group.padded_length]
        references[row, : len(reference)] = reference[:target_length]
        source_ids[row] = dataset.source_ids[index]
    return {"encoder_input_tokens": inputs, "references": references, "source_ids": source_ids}


def run_chunks(
    groups: list[tuple[int, LengthGroup]],
    *,
    program: Program,
    params: Params,
    reward_params: Params,
    dataset: TokenDataset,
    sampling: Sampling,
    target_length: int,
    partitioner: Partitioner,
    seed: int,
    stream: int,
) -> Iterator[tuple[int, LengthGroup, dict[str, Any]]]:
    """Runs a compiled program over numbered groups, one call ahead of its results' reader.

    Yields each group with its results, still on the device. A reader that stops early loses at most one chunk's work.
    """
    waiting: tuple[int, LengthGroup, dict[str, Any]] | None = None
    for number, group in groups:
        batch = chunk_batch(dataset, group, sources_per_chunk=sampling.sources_per_chunk, target_length=target_length)
        result = program(params, reward_params, partitioner.put_batch(batch), np.uint32(seed), np.uint32(stream))
        if waiting is not None:
            yield waiting
        waiting = (number, group, result)
    if waiting is not None:
        yield waiting


def choose_sources(*, num_sources: int, max_sources: int | None, seed: int, stream: int) -> npt.NDArray[np.int64]:
    """Which sources a Grow step samples: all, or a random subset keyed by (seed, stream); in rising order."""
    if max_sources is None or max_sources >= num_sources:
        return np.arange(num_sources)
    raw = np.random.Philox(np.random.SeedSequence((seed, stream))).random_raw(num_sources)
    return np.sort(np.argsort(raw, kind="stable")[:max_sources])
