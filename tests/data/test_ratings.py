"""Files of ratings in the layouts of WMT, and stores."""

import numpy as np
import pytest

from rest_jax.data.ratings import MqmErrors, Store, Table, z_scores
from rest_jax.data.store import ChunkRows, ChunkSources, StoreWriter
from rest_jax.data.vocabulary import ByteVocabulary
from rest_jax.errors import UserError

BYTES = ByteVocabulary()
DA = """lp\tsrc\tmt\tref\tscore\tannotators
de-en\tJa "gut\tYes\tYes!\t80\tA
de-en\tJa "gut\tYes\tYes!\t60\tB
de-en\tNein\tNope\tNo\t20\tA
de-en\tNein\tNo\tNo\t110\tB
en-de\tNo\tNein\tNein\t99\tA
"""
MQM = """system\tdoc\tdoc_id\tseg_id\trater\tsource\ttarget\tcategory\tseverity
s1\td\t1\t1\tr1\t<v>Ja</v>\tYes\tFluency/Punctuation\tMinor
s1\td\t1\t1\tr1\tJa\t<v>Yes</v>\tAccuracy/Mistranslation\tMajor
s1\td\t1\t1\tr2\tJa\tYes\tNo-error\tNo-error
s2\td\t1\t1\tr1\tJa\tQuux\tNon-translation!\tMajor
s2\td\t1\t2\tr1\tNein\tNo\tStyle/Awkward\tMinor
"""


def texts(sequences) -> list[str]:
    return [BYTES.decode(tokens) for tokens in sequences]


def write(folder, text: str, name: str = "ratings.tsv") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_direct_assessment_is_read_and_ratings_of_one_translation_are_averaged(tmp_path):
    table = Table(path=write(tmp_path, DA), reference="ref", only={"lp": "de-en"}, scale=(0, 100), source_prefix="> ")
    found = table.read(BYTES)
    assert texts(found.sources) == ['> Ja "gut', "> Nein", "> Nein"]
    assert texts(found.hypotheses) == ["Yes", "Nope", "No"]
    assert texts(found.references) == ["Yes!", "No", "No"]
    np.testing.assert_allclose(found.scores, [0.7, 0.2, 1.0])  # 110 is cut
    keys = found.source_keys()
    assert keys[1] == keys[2] != keys[0]


def test_csv_has_quotes(tmp_path):
    path = write(tmp_path, 'src,mt,score\n"Ja, ja","Yes ""yes""",1\nNein,No,0\n', name="ratings.csv")
    found = Table(path=path, scale=(0, 1)).read(BYTES)
    assert texts(found.sources) == ["Ja, ja", "Nein"]
    assert texts(found.hypotheses)[0] == 'Yes "yes"'


def test_z_scores_are_a_raters_own():
    found = z_scores(np.asarray([0.0, 10.0, 50.0, 52.0, 7.0]), raters=["a", "a", "b", "b", "c"])
    np.testing.assert_allclose(found, [-1, 1, -1, 1, 0])


def test_z_normalised_ratings_are_scaled_by_their_quantiles(tmp_path):
    table = Table(path=write(tmp_path, DA), rater="annotators", z_normalise=True, only={"lp": "de-en"})
    # A: 80, 20 -> 1, -1; B: 60, 110 -> -1, 1; the two of "Yes" have mean 0.
    np.testing.assert_allclose(table.read(BYTES).scores, [0.5, 0.0, 1.0], atol=0.02)


def test_mqm_errors_add_up_and_raters_are_averaged(tmp_path):
    found = MqmErrors(path=write(tmp_path, MQM)).read(BYTES)
    assert texts(found.hypotheses) == ["Yes", "Quux", "No"]
    assert texts(found.sources) == ["Ja", "Ja", "Nein"]
    np.testing.assert_allclose(found.scores, [1 - (5.1 + 0) / 2 / 25, 0.0, 1 - 1 / 25], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("src\tmt\n", "no column 'score'"),
        ("src\tmt\tscore\na\tb\tgood\n", "line 2: column 'score' has 'good'"),
        ("src\tmt\tscore\na\tb\n", "line 2: fewer columns"),
        ("src\tmt\tscore\n", "no ratings"),
        ("src\tmt\tscore\na\tb\t1\nc\td\t1\n", "all ratings are 1"),
    ],
)
def test_faulty_tables_are_refused_by_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        Table(path=write(tmp_path, text)).read(BYTES)


def test_an_unknown_severity_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="line 2: severity 'Awful'"):
        MqmErrors(path=write(tmp_path, MQM.replace("\tMinor", "\tAwful", 1))).read(BYTES)
    with pytest.raises(UserError, match="no such file"):
        Table(path=str(tmp_path / "none.tsv")).read(BYTES)
    with pytest.raises(UserError, match="column of raters"):
        Table(path="x", z_normalise=True)


def make_store(directory, *, sha256: str = BYTES.sha256) -> str:
    """Two sources of two samples, of which one was dropped."""
    writer = StoreWriter(directory, process_index=0)
    rewards = np.asarray([[0.1, 0.2], [0.3, 0.4]], np.float32)
    cells = ([0, 0, 1], [0, 1, 1])
    writer.write(
        0,
        ChunkRows(
            source_ids=[5, 5, 6],
            sample_ids=[0, 1, 1],
            inputs=[[*BYTES.encode(text), 1] for text in ("one", "one", "two")],
            targets=[[*BYTES.encode("eins"), 1], BYTES.encode("zwei"), [*BYTES.encode("vier"), 1]],
            log_probs=np.zeros(3),
            rewards={"chrf": rewards[cells], "length": 1 - rewards[cells]},
            total_rewards=rewards[cells],
            hit_eos=[True, False, True],
            policy_step=1,
        ),
        ChunkSources(
            source_ids=[5, 6],
            rewards=rewards,
            valid=np.ones((2, 2), bool),
            reference_rewards=np.ones(2),
            components={"chrf": rewards, "length": 1 - rewards},
            reference_components={"chrf": np.ones(2), "length": np.ones(2)},
        ),
        {},
    )
    writer.finish({"vocabulary_sha256": sha256})
    return str(directory)


def test_a_stores_samples_have_their_reward_or_a_component_for_label(tmp_path):
    directory = make_store(tmp_path / "grow_1")
    found = Store(directory=directory).read(BYTES)
    assert texts(found.sources) == ["one", "one", "two"]
    assert texts(found.hypotheses) == ["eins", "zwei", "vier"]
    np.testing.assert_allclose(found.scores, [0.1, 0.2, 0.4])
    np.testing.assert_allclose(Store(directory=directory, component="length").read(BYTES).scores, [0.9, 0.8, 0.6])
    relative = Store(directory=directory, relative=True, scale=(-0.5, 0.5)).read(BYTES)
    np.testing.assert_allclose(relative.scores, [0.45, 0.55, 0.5], rtol=1e-6)  # 0.4 is its source's only sample
    with pytest.raises(UserError, match="has chrf, length"):
        Store(directory=directory, component="bleu").read(BYTES)
    with pytest.raises(UserError, match="another vocabulary"):
        Store(directory=directory).read(ByteVocabulary(extra_ids=3))
