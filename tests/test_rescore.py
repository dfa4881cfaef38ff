"""A store under another reward: equal to scoring its samples under that reward in the first place."""

import dataclasses
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from rest_jax.data.parallel import ParallelData
from rest_jax.data.store import ChunkRows, ChunkSources, ScoredStore, StoreWriter
from rest_jax.data.token_dataset import TokenDataset, TokenRow, write_token_dataset
from rest_jax.data.vocabulary import ByteVocabulary
from rest_jax.errors import UserError
from rest_jax.evaluation.evaluate import Evaluation
from rest_jax.filters import Constant, Threshold, distinct
from rest_jax.grow import Growing
from rest_jax.improve import Improving
from rest_jax.optimizers import adamw
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.rescore import rescore
from rest_jax.rest import ReST
from rest_jax.rewards.base import leaves
from rest_jax.rewards.bleu import BLEU
from rest_jax.rewards.chrf import ChrF
from rest_jax.rewards.combinations import Guarded, MeanOfRanks, Min, WeightedSum
from rest_jax.rewards.guards import NotCopied, NotEmpty
from rest_jax.sampling.scored import Sampling
from rest_jax.training import Training

BYTES = ByteVocabulary()
NUM_SOURCES, NUM_SAMPLES, LENGTH = 21, 4, 48
SUM = WeightedSum((ChrF(), BLEU()), (0.5, 0.5))
WORDS = ["the", "light", "was", "good", "and", "God", "called", "it", "day", "in", "the", "beginning"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenisedData(ParallelData):
    directory: Path

    def open(self, split: str) -> TokenDataset:
        return TokenDataset.open(self.directory)


def tokens(text: str) -> list[int]:
    return [*BYTES.encode(text), 1]


def texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(2, 7))) for _ in range(NUM_SOURCES)]


SAMPLES = [list(samples) for samples in zip(*(texts(seed) for seed in range(NUM_SAMPLES)), strict=True)]
for samples in SAMPLES[::3]:
    samples[2] = samples[0]  # a copy, whose tokens no store keeps
SAMPLES[4][1] = ""
REFERENCES, SOURCES = texts(10), texts(11)


def padded(rows: list[str]) -> np.ndarray:
    array = np.zeros((len(rows), LENGTH), np.int32)
    for target, text in zip(array, rows, strict=True):
        target[: len(tokens(text))] = tokens(text)
    return array


def scored(reward, samples: list[list[str]]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Components and totals `[S, N]`, of all samples at once."""
    batch = {
        "samples": np.stack([padded(row) for row in samples]),
        "references": padded(REFERENCES),
        "sources": padded(SOURCES),
    }
    components = jax.jit(reward.score)(reward.init(BYTES), batch)
    return jax.device_get(components), np.asarray(jax.jit(reward.combine)(components))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> ReST:
    directory = tmp_path_factory.mktemp("data") / "train"
    rows = [
        TokenRow(tokens(source), tokens(reference), source, reference)
        for source, reference in zip(SOURCES, REFERENCES, strict=True)
    ]
    write_token_dataset(directory, rows, info={})
    sampling = Sampling(num_samples=NUM_SAMPLES, sources_per_chunk=8)
    training = Training(steps=1, batch_size=8, learning_rate=1.0, optimizer=adamw)
    return ReST(
        model_dir="unused",
        model=None,
        data=TokenisedData(
            task="demo", vocabulary=BYTES, lengths={"inputs": LENGTH, "targets": LENGTH}, directory=directory
        ),
        reward=SUM,
        partitioner=Partitioner(make_mesh()),
        bc=training,
        growing=Growing(sampling=sampling),
        improving=Improving(training=training, schedule=Constant(Threshold(0.0))),
        evaluation=Evaluation(sampling=sampling),
    )


def write_store(directory: Path, reward, *, threshold: float = -1.0) -> ScoredStore:
    """As Grow leaves it: two chunks, sources out of order."""
    components, totals = scored(reward, SAMPLES)
    references, reference_totals = scored(reward, [[text] for text in REFERENCES])
    valid = np.asarray(distinct(np.stack([padded(row) for row in SAMPLES])))
    writer = StoreWriter(directory, process_index=0)
    for chunk, ids in enumerate((np.arange(13, NUM_SOURCES), np.arange(13))):
        s, n = np.nonzero((totals[ids] > threshold) & valid[ids])
        s = ids[s]
        writer.write(
            chunk,
            ChunkRows(
                source_ids=s,
                sample_ids=n,
                inputs=[tokens(SOURCES[i]) for i in s],
                targets=[tokens(SAMPLES[i][k]) for i, k in zip(s, n, strict=True)],
                log_probs=-totals[s, n],
                rewards={name: values[s, n] for name, values in components.items()},
                total_rewards=totals[s, n],
                hit_eos=np.ones(len(s), bool),
                policy_step=3,
            ),
            ChunkSources(
                source_ids=ids,
                rewards=totals[ids],
                valid=valid[ids],
                reference_rewards=reference_totals[ids, 0],
                components={name: values[ids] for name, values in components.items()},
                reference_components={name: values[ids, 0] for name, values in references.items()},
            ),
            {},
        )
    scorers = {name: repr(leaf) for name, leaf in leaves(reward).items()}
    writer.finish({"vocabulary_sha256": BYTES.sha256, "reward": reward.name, "rewards": scorers, "hit_eos": 1.0})
    return ScoredStore.open(directory)


def assert_same_samples(found: ScoredStore, store: ScoredStore) -> None:
    a, b = found.select(found.stored), store.select(store.stored)
    for name in ("source_ids", "sample_ids", "log_probs", "hit_eos", "policy_steps"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    for row in range(len(b)):
        np.testing.assert_array_equal(a.inputs(row), b.inputs(row))
        np.testing.assert_array_equal(a.targets(row), b.targets(row))


@pytest.mark.parametrize(
    "reward",
    [
        SUM,
        MeanOfRanks((BLEU(), ChrF())),
        *(pytest.param(reward, marks=pytest.mark.slow) for reward in (Min((ChrF(), BLEU())), ChrF())),
    ],
    ids=lambda reward: reward.name,
)
def test_a_new_combination_of_what_is_stored_needs_no_tokens(tmp_path, config, reward):
    store = write_store(tmp_path / "grow_1", SUM, threshold=0.4)  # dropped samples count in ranks too
    before = {path.name: path.read_bytes() for path in (tmp_path / "grow_1").iterdir()}
    nowhere = dataclasses.replace(config.data, directory=tmp_path / "absent")
    table = rescore(dataclasses.replace(config, reward=reward, data=nowhere), store=store, output=tmp_path / "new")
    found = ScoredStore.open(tmp_path / "new")
    _, totals = scored(reward, SAMPLES)
    np.testing.assert_array_equal(found.rewards, totals)
    np.testing.assert_array_equal(found.reference_rewards, np.ones(NUM_SOURCES, np.float32))
    np.testing.assert_array_equal(found.valid, store.valid)
    assert sorted(found.components) == ["bleu", "chrf"]
    np.testing.assert_array_equal(found.components["bleu"], store.components["bleu"])
    assert_same_samples(found, store)
    stored = found.select(found.stored)
    places = np.searchsorted(found.source_ids, stored.source_ids)
    np.testing.assert_array_equal(stored.rewards, totals[places, stored.sample_ids])
    assert found.stats["reward"] == reward.name and found.stats["rewards"] == store.stats["rewards"]
    assert found.stats["hit_eos"] == 1.0 and found.stats["count"] == totals.size
    np.testing.assert_allclose(found.stats["mean"], totals.mean(), rtol=1e-6)
    assert [line.split()[0] for line in table.splitlines()] == ["component", "bleu", "chrf", "total:"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "grow_1").iterdir()} == before


@pytest.mark.slow
def test_an_added_reward_scores_as_if_it_had_been_there(tmp_path, config):
    store = write_store(tmp_path / "grow_1", ChrF())
    wanted = Guarded(WeightedSum((ChrF(), BLEU()), (0.3, 0.7)), (NotEmpty(), NotCopied()))
    rescore(dataclasses.replace(config, reward=wanted), store=store, output=tmp_path / "new")
    found, there = ScoredStore.open(tmp_path / "new"), write_store(tmp_path / "other", wanted)
    known = found.stored
    assert (known == store.valid).all() and not known.all()
    assert np.isnan(found.rewards[~known]).all(), "copies were not stored, so they have no new reward"
    np.testing.assert_array_equal(found.rewards[known], there.rewards[known])
    for name, values in there.components.items():
        np.testing.assert_array_equal(found.components[name][known], values[known])
        np.testing.assert_array_equal(found.reference_components[name], there.reference_components[name])
    np.testing.assert_array_equal(found.reference_rewards, there.reference_rewards)
    assert found.rewards[4, 1] == 0.0
    assert found.stats["guards"] == {"not_empty": 1, "not_copied": 0}
    assert found.stats["rewards"] == there.stats["rewards"]
    assert_same_samples(found, store)
    # Once more, without anything to score: what had no value has none now, though its guard's is unknown too.
    fewer = Guarded(BLEU(), (NotEmpty(), NotCopied()))
    rescore(dataclasses.replace(config, reward=fewer), store=found, output=tmp_path / "again")
    again = ScoredStore.open(tmp_path / "again")
    np.testing.assert_array_equal(np.isnan(again.rewards), ~known)
    np.testing.assert_array_equal(again.rewards[known], scored(fewer, SAMPLES)[1][known])
    same = [len(set(row[mask])) <= 1 for row, mask in zip(again.rewards, known, strict=True)]
    assert again.stats["zero_variance_sources"] == np.mean(same)


def test_what_grow_dropped_can_only_be_left_out(tmp_path, config):
    store = write_store(tmp_path / "grow_1", ChrF(), threshold=0.5)
    dropped = int((store.valid & ~store.stored).sum())
    assert dropped
    wanted = dataclasses.replace(config, reward=SUM)
    with pytest.raises(UserError, match=f"bleu can not be added.*dropped {dropped} samples.*--stored_only"):
        rescore(wanted, store=store, output=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    rescore(wanted, store=store, output=tmp_path / "new", stored_only=True)
    found = ScoredStore.open(tmp_path / "new")
    np.testing.assert_array_equal(found.valid, store.stored)
    assert np.isnan(found.rewards[~store.stored]).all() and not np.isnan(found.rewards[store.stored]).any()


def refused(match: str, config: ReST, store: ScoredStore, output: Path) -> None:
    with pytest.raises(UserError, match=match):
        rescore(config, store=store, output=output)
    assert not output.exists()


def test_what_can_not_be_is_refused(tmp_path, config):
    store, output = write_store(tmp_path / "grow_1", ChrF()), tmp_path / "new"
    with pytest.raises(UserError, match="--output.*exists"):
        rescore(config, store=store, output=tmp_path)
    refused("ChrF.*under the same name", dataclasses.replace(config, reward=ChrF(char_order=3)), store, output)
    refused("from 0 to 2", dataclasses.replace(config, reward=WeightedSum((ChrF(),), (2.0,))), store, output)
    other = dataclasses.replace(config.data, vocabulary=ByteVocabulary(extra_ids=1))
    refused("another vocabulary", dataclasses.replace(config, data=other), store, output)
    rows = [TokenRow(tokens(text), tokens("x"), text, "x") for text in REFERENCES]
    write_token_dataset(tmp_path / "elsewhere", rows, info={})
    other = dataclasses.replace(config.data, directory=tmp_path / "elsewhere")
    refused("sources are not those", dataclasses.replace(config, data=other), store, output)
    old = dataclasses.replace(store, components={}, stats={"reward": "chrf"})
    refused("grow again", config, old, output)
