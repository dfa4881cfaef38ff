"""What docs/rewards.md shows works as it stands there, and so do the shipped files of gin/rewards/."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from rest_jax import cli, config
from rest_jax.data.vocabulary import ByteVocabulary
from rest_jax.rest import ReST
from rest_jax.rewards import language
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
HACKING = (ROOT / "docs" / "reward_hacking.md").read_text()


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


@pytest.mark.slow
def test_the_language_guard_as_shown(tmp_path):
    (text,) = re.findall(r"^```gin\n(.*?)^```$", HACKING, re.MULTILINE | re.DOTALL)
    texts = {"de": ["Und Gott sprach: Es werde Licht."] * 2, "en": ["And God said: Let there be light."] * 2}
    language.write(tmp_path / "lid.npz", language.train(texts))
    (tmp_path / "mine.gin").write_text(text.replace("lid.npz", str(tmp_path / "lid.npz")))
    config.load(gin_files=[str(tmp_path / "mine.gin")], bindings=[PLACE])
    rest = config.build(ReST)
    check_reward(rest.reward, has_references=True, languages=rest.languages)
    source, reference = "Und Gott sprach: Es werde Licht.", "And God said: Let there be light."
    assert score(rest.reward, source=source, reference=reference, sample=reference)["total"] == 1.0
    found = score(rest.reward, source=source, reference=reference, sample="Und Gott sprach: Es war Licht.")
    assert (found["guard/right_language"], found["total"]) == (0.0, 0.0)


@pytest.mark.parametrize("command", re.findall(r"^python -m rest_jax (.*)$", HACKING, re.MULTILINE))
def test_commands_as_shown_are_understood(command, tmp_path, monkeypatch, capsys):
    """Up to the first file that does not exist here; an option that is unknown would print the usage."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(command.replace("/tmp/", f"{tmp_path}/"))) == 2
    assert capsys.readouterr().err.startswith("rest_jax: ")


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
