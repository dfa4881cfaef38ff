"""summary.json: the design's schema, and numbers that are those of the marks and of the evaluation files."""

import hashlib
import json

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF

from rest_jax.reporting.table import format_table
from rest_jax.summary import VERSIONS_OF, summarise

SOURCES, SAMPLES = 40, 4
SENTENCES = ["the cat sat on the mat today", "a dog ran over the green hill", "we saw two ships in the bay"]
POLICIES = {"bc": (0.30, 3), "improve_1.1": (0.38, 1), "bc_long": (0.31, 3)}
SIGNATURES = {"bleu": "b|v", "chrf": "c|v", "ter": "t|v"}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def evaluation(model_dir, name, *, mean, errors):
    """A policy's files, with a reward that is better where `mean` is and a text with so many wrong words."""
    generator = np.random.default_rng(len(name))
    rewards = np.clip(mean + generator.normal(0, 0.05, (SOURCES, SAMPLES)), 0, 1).round(6)
    references = [SENTENCES[i % 3] + f" {i}" for i in range(SOURCES)]
    # U+2028 ends a line for str.splitlines, and must not for the reader.
    hypotheses = [" ".join(["x\u2028"] * errors + text.split()[errors:]) for text in references]
    write_lines(
        model_dir / "eval" / f"{name}.validation.samples.jsonl",
        [{"source_id": i, "source": "s", "reference": references[i], "samples": [hypotheses[i]] * SAMPLES,
          "rewards": row.tolist()}
         for i, row in enumerate(rewards)],
    )  # fmt: skip
    write_lines(
        model_dir / "eval" / f"{name}.test.jsonl",
        [{"source_id": i, "source": "s", "reference": r, "hypothesis": h, "reward": 0.5}
         for i, (r, h) in enumerate(zip(references, hypotheses, strict=True))],
    )  # fmt: skip
    return rewards, references, hypotheses


@pytest.fixture
def run(tmp_path):
    """A MODEL_DIR's evaluation files, and the marks of its phases."""
    results, files = {}, {}
    for name, (mean, errors) in POLICIES.items():
        if name == "improve_1.1":
            results["grow_1"] = {
                "name": "grow_1", "count": 640, "distinct": 600, "kept": 200, "mean": 0.29, "sources": 40,
                "seconds": 5.5,
            }  # fmt: skip
        files[name] = evaluation(tmp_path, name, mean=mean, errors=errors)
        selection = {"selection": {"pairs": 80, "references": 20}} if name.startswith("improve") else {}
        results[name] = {
            "name": name, "best_step": 4, "best_reward": mean, "steps": 8, "target_tokens": 900,
            "history": [[0, 0.2], [4, mean]], "seconds": 10.25, **selection,
        }  # fmt: skip
        results[f"evaluate_{name}"] = {
            "name": f"evaluate_{name}", "reward": float(files[name][0].mean()), "bleu": 10.0, "chrf": 30.0, "ter": 70.0,
            "test_reward": 0.5, "best_of_n": [0.3, 0.4], "samples": 160, "distinct": 150, "signatures": SIGNATURES,
            "seconds": 2.5,
        }  # fmt: skip
    (tmp_path / "config.gin").write_text("A = 1\n")
    return tmp_path, results, files


def summary_of(run, *, num_resamples=200, results=None, held_out=()):
    model_dir, marks, _ = run
    facts = {
        "task": "demo",
        "parameters": 7,
        "mesh": {"replica": 1, "data": 1, "model": 1},
        "held_out_metrics": list(held_out),
    }
    return summarise(
        model_dir, marks if results is None else results, num_resamples=num_resamples, seed=0, facts=facts
    )  # fmt: skip


def test_phases_have_the_designs_fields_in_order(run):
    summary = summary_of(run)
    assert [phase["name"] for phase in summary["phases"]] == ["bc", "grow_1", "improve_1.1", "bc_long"]
    for phase in summary["phases"]:
        wanted = {"name", "samples", "distinct", "kept", "seconds"}
        if phase["name"] != "grow_1":
            wanted |= {"reward", "bleu", "chrf", "ter", "best_of_n", "steps", "best_step"}
        assert wanted <= phase.keys()
    grow = summary["phases"][1]
    assert [grow[key] for key in ("samples", "distinct", "kept", "sources", "mean_reward", "seconds")] == [
        640, 600, 200, 40, 0.29, 5.5,
    ]  # fmt: skip
    improve = summary["phases"][2]
    assert (improve["kept"], improve["samples"], improve["seconds"]) == (80, 0, 12.75)  # training and evaluation
    json.dumps(summary, allow_nan=False)


def test_a_policys_reward_is_the_mean_of_its_file(run):
    for phase in summary_of(run)["phases"]:
        if phase["name"] in POLICIES:
            path = run[0] / "eval" / f"{phase['name']}.validation.samples.jsonl"
            rewards = [json.loads(line)["rewards"] for line in path.read_text(encoding="utf-8").split("\n") if line]
            np.testing.assert_allclose(phase["reward"], np.mean(rewards), rtol=1e-12)


def test_the_last_rest_policy_is_compared_with_bc_and_with_the_control(run):
    files = run[2]
    comparisons = {(c["a"], c["b"], c["metric"]): c for c in summary_of(run)["comparisons"]}
    assert set(comparisons) == {
        ("improve_1.1", other, metric) for other in ("bc", "bc_long") for metric in ("reward", "bleu", "chrf")
    }
    for other in ("bc", "bc_long"):
        by_reward = comparisons["improve_1.1", other, "reward"]
        difference = files["improve_1.1"][0].mean(axis=1) - files[other][0].mean(axis=1)
        np.testing.assert_allclose(by_reward["difference"], difference.mean(), rtol=1e-9)
        # The interval is about 1.96 standard errors on either side; 200 resamples know its ends to some 15 %.
        error = difference.std() / np.sqrt(SOURCES)
        for end, expected in (("low", -1.96 * error), ("high", 1.96 * error)):
            np.testing.assert_allclose(by_reward[end] - by_reward["difference"], expected, rtol=0.35)
        for metric, scorer in (("bleu", BLEU(force=True)), ("chrf", CHRF())):
            scores = [
                scorer.corpus_score(files[name][2], [files[name][1]]).score for name in ("improve_1.1", other)
            ]  # fmt: skip
            found = comparisons["improve_1.1", other, metric]
            np.testing.assert_allclose(found["difference"], scores[0] - scores[1], rtol=1e-9)
            assert found["low"] <= found["difference"] <= found["high"]


def test_where_chrf_is_held_out_of_the_reward_samples_are_compared_by_it(run):
    comparisons = {(c["b"], c["metric"]): c for c in summary_of(run, held_out=("bleu", "chrf"))["comparisons"]}
    for other in ("bc", "bc_long"):
        _, references, _ = run[2][other]
        means = [
            np.mean([CHRF().sentence_score(h, [r]).score for h, r in zip(run[2][name][2], references, strict=True)])
            for name in ("improve_1.1", other)
        ]
        found = comparisons[other, "samples' chrF"]
        np.testing.assert_allclose(found["difference"], means[0] - means[1], rtol=1e-9)
        assert 0 < found["low"] <= found["difference"] <= found["high"]
    assert "samples' chrF" not in {c["metric"] for c in summary_of(run, held_out=("bleu", "ter"))["comparisons"]}


def test_alarms_of_all_steps_stand_together(run):
    assert summary_of(run, num_resamples=0)["alarms"] == []
    alarm = {"policy": "improve_1.1", "start": "bc", "metric": "bleu", "text": "ALARM: words"}
    marks = {**run[1], "evaluate_improve_1.1": {**run[1]["evaluate_improve_1.1"], "alarms": [alarm]}}
    summary = summary_of(run, num_resamples=0, results=marks)
    assert summary["alarms"] == [alarm]
    assert "ALARM: words" in format_table(summary)


def test_the_same_seed_gives_the_same_intervals(run):
    assert summary_of(run)["comparisons"] == summary_of(run)["comparisons"]


def test_without_resamples_there_are_no_comparisons(run):
    assert summary_of(run, num_resamples=0)["comparisons"] == []


def test_the_rest_of_the_page(run):
    summary = summary_of(run, num_resamples=0)
    assert summary["signatures"] == SIGNATURES
    assert summary["config_sha256"] == hashlib.sha256(b"A = 1\n").hexdigest()
    assert summary["versions"].keys() == {"python", *VERSIONS_OF}
    assert (summary["task"], summary["parameters"]) == ("demo", 7)
    (run[0] / "config.gin").unlink()
    assert summary_of(run, num_resamples=0)["config_sha256"] is None


@pytest.mark.parametrize("finished", [0, 1, 2, 3, 4])
def test_a_run_that_is_under_way_has_what_is_finished(run, finished):
    results = dict(list(run[1].items())[:finished])
    summary = summary_of(run, results=results)
    assert [phase["name"] for phase in summary["phases"]] == [
        name for name in results if not name.startswith("evaluate_")
    ]  # fmt: skip
    assert summary["comparisons"] == []  # only BC is measured so far
    assert all(("reward" in phase) == (f"evaluate_{phase['name']}" in results) for phase in summary["phases"])
