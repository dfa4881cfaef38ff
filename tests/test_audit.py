"""Audits of rewards of which one knows what they fall for."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rest_jax import audit
from rest_jax.data.parallel import ParallelData
from rest_jax.data.vocabulary import ByteVocabulary
from rest_jax.errors import UserError
from rest_jax.partitioning import Partitioner, make_mesh
from rest_jax.reporting.audit_table import format_audit
from rest_jax.rewards.base import Reward
from rest_jax.rewards.chrf import ChrF
from rest_jax.rewards.combinations import Guarded, MeanOfRanks, Min, WeightedSum, unguarded
from rest_jax.rewards.corruptions import CORRUPTIONS, in_language_of
from rest_jax.rewards.guards import NotCopied, NotEmpty
from rest_jax.sampling import Sampling

DATA = ParallelData(task="none", vocabulary=ByteVocabulary(), lengths={"inputs": 96, "targets": 128})
SENTENCES = [
    ("Am Anfang schuf Gott Himmel und Erde.", "In the beginning God created heaven and earth."),
    ("Und die Erde war wüst und leer.", "And the earth was waste and empty."),
    ("Und Gott sprach: Es werde Licht!", "And God said: Let there be light!"),
    ("Wo ist das Haus meines Bruders?", "Where is the house of my brother?"),
    ("Wir gehen morgen früh ans Meer.", "Tomorrow morning we go to the sea."),
    ("Sie hat drei Kinder und einen Hund.", "She has three children and a dog."),
]
PAIRS = [audit.Pair(source=source, reference=reference) for source, reference in SENTENCES]
HYPOTHESES = [dataclasses.replace(pair, hypothesis=f"{pair.reference[:-1]} x.") for pair in PAIRS]


@dataclasses.dataclass(frozen=True)
class Longest(Reward):
    """More tokens are better: what a lazy learned reward may come to."""

    name = "longest"

    def init(self, vocabulary):
        return None

    def score(self, params, batch):
        return {self.name: jnp.sum(batch["samples"] > 0, axis=-1) / batch["samples"].shape[-1]}


def result_of(reward, pairs=PAIRS, **options):
    return audit.audit(
        reward,
        pairs,
        params=reward.init(DATA.vocabulary),
        data=DATA,
        sampling=Sampling(num_samples=1, sources_per_chunk=4),
        partitioner=Partitioner(mesh=make_mesh(data=1, model=1, replica=1, devices=jax.devices()[:1])),
        **options,
    )


def test_a_reward_of_length_falls_for_what_is_longer_until_guards_refuse_it():
    result = result_of(Longest())
    assert list(result["variants"]) == [*CORRUPTIONS, "wrong_language"]
    assert (result["base"], result["base_refused"], result["guards_in_reward"]) == ("reference", 0.0, False)
    repeated = result["variants"]["repeated"]
    assert repeated["pairs"] == result["pairs"] == len(PAIRS)
    assert repeated["without_guards"]["preferred"] == 1.0 and repeated["without_guards"]["low"] < 1.0
    assert repeated["with_guards"]["preferred"] == 0.0
    for kind in ("truncated", "with_omissions", "empty"):
        assert result["variants"][kind]["without_guards"]["preferred"] == 0.0
    assert result["variants"]["permuted"]["without_guards"] == pytest.approx(
        {"preferred": 0.0, "low": 0.0, "high": 0.3903, "equal": 1.0}, abs=1e-4
    )  # Wilson's interval of 0 of 6: 1.96^2 / (6 + 1.96^2)


def test_guards_of_the_reward_itself_are_told_apart():
    result = result_of(Guarded(Longest(), (NotEmpty(),)))
    assert (result["guards"], result["guards_in_reward"]) == (["not_empty"], True)
    assert result["variants"]["repeated"]["with_guards"]["preferred"] == 1.0
    text = format_audit(result)
    assert "Guards (its own): not_empty" in text and "100.0 % [61.0, 100.0]" in text


def test_a_reward_that_reads_references_is_audited_with_hypotheses():
    result = result_of(ChrF(), HYPOTHESES)
    assert result["base"] == "hypothesis"
    for kind in ("copied_source", "empty", "unrelated", "wrong_language", "gibberish"):
        assert result["variants"][kind]["without_guards"]["preferred"] == 0.0, kind
    with pytest.raises(UserError, match="--hypotheses"):
        result_of(ChrF())


def test_what_is_too_long_or_unchanged_is_left_out():
    long = audit.Pair(source="kurz", reference="x" * 128)
    short = audit.Pair(source="Ja.", reference="Yes")
    result = result_of(Longest(), [*PAIRS, long, short])
    assert (result["pairs"], result["too_long"]) == (len(PAIRS) + 1, 1)
    same = audit.Pair(source="Ja", reference="Ja")
    assert result_of(Longest(), [same])["variants"]["copied_source"] == {
        "pairs": 0,
        "without_guards": None,
        "with_guards": None,
    }
    with pytest.raises(UserError, match="none fits"):
        result_of(Longest(), [long])


def test_a_prefix_is_no_part_of_a_copy_and_a_third_language_can_be_given():
    prefixed = [dataclasses.replace(pair, source=f"translate: {pair.source}") for pair in PAIRS]
    plain = result_of(Longest())["variants"]["copied_source"]
    assert result_of(Longest(), prefixed, source_prefix="translate: ")["variants"]["copied_source"] == plain
    result = result_of(Longest(), wrong_language=in_language_of(["Ceci est un texte français assez long, non ?" * 2]))
    assert result["variants"]["wrong_language"]["without_guards"]["preferred"] == 1.0


def test_ranks_can_not_be_audited():
    with pytest.raises(UserError, match="ranks"):
        result_of(MeanOfRanks((Longest(),)))


def test_unguarded_takes_off_guards_wherever_they_stand():
    guarded = Guarded(ChrF(), (NotEmpty(),))
    nested = WeightedSum((Min((guarded, Longest())), Guarded(guarded, (NotCopied(),))), (0.5, 0.5))
    assert unguarded(nested) == WeightedSum((Min((ChrF(), Longest())), ChrF()), (0.5, 0.5))


def test_pairs_of_files(tmp_path):
    for name, lines in (("de", ["a", "", "c"]), ("en", ["A", "B", "C"]), ("short", ["A"])):
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    sources, references = str(tmp_path / "de"), str(tmp_path / "en")
    found = audit.read_pairs(sources, references, source_prefix="> ", num_pairs=9, seed=0)
    assert found == [audit.Pair(source="> a", reference="A"), audit.Pair(source="> c", reference="C")]
    assert len(audit.read_pairs(sources, references, references, num_pairs=1, seed=0)) == 1
    with pytest.raises(UserError, match="3, 1 lines"):
        audit.read_pairs(sources, str(tmp_path / "short"), num_pairs=9, seed=0)
    with pytest.raises(UserError, match="missing"):
        audit.read_pairs(sources, str(tmp_path / "missing"), num_pairs=9, seed=0)
