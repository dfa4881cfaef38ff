"""What docs/rewards.md shows works as it stands there, and so do the shipped files of gin/rewards/."""

import re
from pathlib import Path

import numpy as np
import pytest

from rest_jax import config
from rest_jax.data.vocabulary import ByteVocabulary
from rest_jax.rest import ReST
from rest_jax.rewards.base import check_comparable, check_reward, leaves

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "docs" / "rewards.md").read_text(), re.MULTILINE | re.DOTALL)
(OWN_REWARD,) = (text for language, text in BLOCKS if language == "python")
EXAMPLES = [text for language, text in BLOCKS if language == "gin"]
NAMES = [
    ["chrf", "bleu"],
    ["chrf++", "bleu", "guard/not_empty", "guard/length_ratio", "guard/script"],
    ["chrf", "same_question"],
]
PLACE = "MODEL_DIR='/nowhere'"


def score(reward, *, source: str, reference: str, sample: str) -> dict[str, float]:
    vocabulary = ByteVocabulary()

    def tokens(text: str) -> np.ndarray:
        return np.asarray([[*vocabulary.encode(text), 1]], np.int32)

    batch = {"samples": tokens(sample)[:, None], "references": tokens(reference), "sources": tokens(source)}
    components = reward.score(reward.init(vocabulary), batch)
    return {name: float(values[0, 0]) for name, values in components.items()} | {
        "total": float(reward.combine(components)[0, 0])
    }


@pytest.mark.parametrize(("text", "names"), list(zip(EXAMPLES, NAMES, strict=True)), ids=["combine", "guard", "own"])
def test_examples_run(tmp_path, monkeypatch, text, names):
    (tmp_path / "my_rewards.py").write_text(OWN_REWARD)
    (tmp_path / "mine.gin").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    config.load(gin_files=[str(tmp_path / "mine.gin")], bindings=[PLACE])
    reward = config.build(ReST).reward
    check_reward(reward, has_references=True)
    check_comparable(reward)
    assert list(leaves(reward)) == names
    found = score(reward, source="Was ist das?", reference="What is this?", sample="What is this?")
    assert found == dict.fromkeys([*names, "total"], 1.0)


def test_the_own_reward_is_a_part_like_any_other(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(OWN_REWARD)
    (tmp_path / "mine.gin").write_text(EXAMPLES[-1])
    monkeypatch.syspath_prepend(tmp_path)
    config.load(gin_files=[str(tmp_path / "mine.gin")], bindings=[PLACE])
    found = score(config.build(ReST).reward, source="Ja?", reference="Yes?", sample="Yes.")
    assert found["same_question"] == 0.0
    assert found["total"] == pytest.approx(0.9 * found["chrf"], abs=1e-6) and found["chrf"] > 0


# Learned rewards need files of weights; their own tests read their gin files.
LEARNED = re.compile("metricx|embeddings|regressor")


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (ROOT / "gin" / "rewards").glob("*.gin") if not LEARNED.match(path.name))
)
def test_shipped_rewards_fit_into_a_run(name):
    config.load(gin_files=["runs/smoke.gin", f"rewards/{name}"], bindings=[PLACE])
    reward = config.build(ReST).reward
    check_reward(reward, has_references=True)
    text = "This is a sentence of some length."
    assert score(reward, source="Dies ist ein Satz von einiger Länge.", reference=text, sample=text)["total"] == 1.0
