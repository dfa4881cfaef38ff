"""The shipped reward files, and the example of docs/rewards_learned.md, fit into a run."""

import re
from pathlib import Path

import pytest

from rest_jax import config
from rest_jax.rest import ReST

ROOT = Path(__file__).parents[2]
PLACE = "MODEL_DIR='unused'"
# Macros that files ask for; their rewards open nothing before `init`.
ASKED = {name: f"{name}='folder'" for name in ("METRICX_CHECKPOINT", "METRICX_VOCABULARY", "EMBEDDINGS_DIR")}
LEARNED = ("embeddings", "metricx_23_qe_large", "metricx_23_qe_xl", "metricx_23_qe_xxl")
LEARNED += ("metricx_24_large", "metricx_24_xl", "metricx_24_xxl")


def reward_of(path: str):
    text = (ROOT / "gin" / path).read_text(encoding="utf-8") if not Path(path).is_absolute() else Path(path).read_text()
    asked = [binding for name, binding in ASKED.items() if name in text or "include" in text]
    config.load(gin_files=["runs/smoke.gin", path], bindings=[PLACE, *asked])
    return config.build(ReST).reward


@pytest.mark.parametrize("name", LEARNED)
def test_shipped_rewards_fit_into_a_run(name):
    reward = reward_of(f"rewards/{name}.gin")
    assert not reward.requires_reference and reward.range == (0.0, 1.0)
    if name.startswith("metricx"):
        assert reward.version == name.split("_")[1]


def test_the_example_of_the_page_fits_into_a_run(tmp_path):
    page = (ROOT / "docs" / "rewards_learned.md").read_text(encoding="utf-8")
    example = re.search(r"```\n# my_reward.gin\n(.*?)```", page, re.DOTALL)[1]
    (tmp_path / "my_reward.gin").write_text(example)
    reward = reward_of(str(tmp_path / "my_reward.gin"))
    assert [part.name for part in reward.reward.parts] == ["metricx", "embeddings"]
