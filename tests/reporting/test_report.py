import html.parser
import json
import re

import pytest

from rest_jax.errors import UserError
from rest_jax.reporting import plots, report
from rest_jax.reporting.run_files import Translation, final_policy, phase_label, read_run
from rest_jax.reporting.table import phase_rows
from tests.reporting import synthetic_run

VOID = {"meta", "img", "source", "br"}


class Page(html.parser.HTMLParser):
    """Checks that tags nest, and collects addresses and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return synthetic_run.write_model_dir(tmp_path_factory.mktemp("run") / "demo")


@pytest.fixture(scope="module")
def page_text(model_dir):
    path = report.write_report(model_dir)
    assert path == model_dir / "report.html"
    return path.read_text(encoding="utf-8")


def test_one_file_without_outside_links(page_text):
    page = Page(page_text)
    assert len(page.addresses) == 14 and all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert not re.search(r"https?://|url\(|@import|<script", page_text)


def test_every_number_of_the_table_is_on_the_page(page_text, model_dir):
    text = Page(page_text).text
    _, rows = phase_rows(json.loads((model_dir / "summary.json").read_text())["phases"])
    for row in rows:
        assert " ".join(row) in re.sub(r"\s+", " ", text)


def test_says_what_was_gained_over_both(page_text):
    text = Page(page_text).text
    assert "0.3541 → 0.3921" in text
    assert "+0.0380 [+0.0341, +0.0420] over BC" in text
    assert "+0.0372 [+0.0330, +0.0411] over BC long" in text


def test_text_of_the_corpus_is_escaped(page_text):
    assert "<nothing>" not in page_text and "&lt;nothing&gt;" in page_text


def test_configuration_versions_and_signatures(page_text):
    text = Page(page_text).text
    for words in ("ReST.grow_steps = 2", "flax version 0.12.8", "nc:6|nw:0", "rest_jax run --gin_file=runs/smoke.gin"):
        assert words in text


def test_the_same_run_gives_the_same_bytes(page_text, model_dir):
    assert report.render(read_run(model_dir)) == page_text


def test_filters_per_source_have_no_threshold_and_still_show(tmp_path):
    path = report.write_report(synthetic_run.write_model_dir(tmp_path, global_threshold=False))
    assert "top_k(k=4)" in path.read_text()


def test_an_unfinished_run_shows_what_there_is(tmp_path, model_dir):
    summary = {"phases": [{"name": "bc", "reward": 0.35, "bleu": 20.0, "chrf": 40.0, "seconds": 60}]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = Page(report.write_report(tmp_path).read_text())
    assert "Reward by phase" in page.text and "Translations" not in page.text
    phases = json.loads((model_dir / "summary.json").read_text())["phases"]
    (tmp_path / "summary.json").write_text(json.dumps({"phases": phases[:2]}))  # Stopped after the first Grow.
    Page(report.write_report(tmp_path).read_text())


def test_a_grow_step_without_samples_above_or_without_histogram(tmp_path, model_dir):
    summary = json.loads((model_dir / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps({"phases": summary["phases"][:2]}))
    (tmp_path / "grow_1").mkdir()
    (tmp_path / "grow_1" / "stats.json").write_text(json.dumps({"count": 8, "mean": 0.0, "histogram": [0] * 100}))
    Page(report.write_report(tmp_path).read_text())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("summary.json", None, "does not exist"),
        ("summary.json", '{"phases": [', "damaged"),
        ("summary.json", "[]", "one JSON object"),
        ("summary.json", '{"phases": [{}]}', '"name"'),
        ("eval/bc.test.jsonl", '{"source_id": 1}\n', "bc.test.jsonl:1 lacks source, reference, hypothesis, reward"),
        ("eval/bc.test.jsonl", "{", "bc.test.jsonl:1 is damaged"),
        ("eval/bc.validation.samples.jsonl", '{"source_id": 1}\n', "samples.jsonl:1 lacks"),
        (
            "eval/bc.validation.samples.jsonl",
            '{"source_id": 1, "rewards": [0.1]}\n{"source_id": 2, "rewards": []}\n',
            "samples.jsonl:2 has 0 rewards",
        ),
        ("grow_1/stats.json", "oops", "stats.json is damaged"),
    ],
)
def test_damage_is_named(tmp_path, file, content, message):
    (tmp_path / "summary.json").write_text('{"phases": [{"name": "bc"}, {"name": "grow_1"}]}')
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        report.write_report(tmp_path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_an_alarm_is_seen_in_words(tmp_path, model_dir):
    summary = json.loads((model_dir / "summary.json").read_text())
    alarm = {"policy": "improve_1.1", "text": "ALARM: the reward rose, but <BLEU> fell."}
    summary |= {"phases": summary["phases"][:1], "alarms": [alarm], "held_out_metrics": ["bleu", "ter"]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = report.write_report(tmp_path).read_text()
    assert '<section class="card alarm" role="alert">ALARM: the reward rose, but &lt;BLEU&gt; fell.</section>' in page
    assert "BLEU and TER are no part of the reward" in Page(page).text


def test_a_learned_rewards_audit_is_a_section(tmp_path):
    found = {"preferred": 0.633, "low": 0.577, "high": 0.686, "equal": 0.0}
    variants = {
        "repeated": {"pairs": 297, "without_guards": found, "with_guards": {**found, "preferred": 0.003}},
        "copied_source": {"pairs": 0, "without_guards": None, "with_guards": None},
    }
    audit = {"reward": "regressor", "guards": ["not_empty"], "guards_in_reward": True, "base": "reference",
             "base_refused": 0.034, "pairs": 297, "too_long": 3, "variants": variants}  # fmt: skip
    (tmp_path / "summary.json").write_text(json.dumps({"phases": [{"name": "bc", "seconds": 1}]}))
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    text = Page(report.write_report(tmp_path).read_text()).text
    assert "Audit of the reward Audit of regressor: 297 pairs" in text and "refuse 3.4 % of the references" in text
    assert "repeated 297 63.3 % [57.7, 68.6] 0.0 % 0.3 %" in text and "copied source 0 - - - -" in text


def run_with(tmp_path, rows, comparisons=()):
    (tmp_path / "summary.json").write_text(json.dumps({"phases": rows, "comparisons": list(comparisons)}))
    return report.warnings(read_run(tmp_path))


def test_warns_when_the_gain_may_not_be_one(tmp_path):
    bc = {"name": "bc", "reward": 0.30, "bleu": 20.0, "chrf": 40.0}
    last = {"name": "improve_1.1", "reward": 0.35, "bleu": 18.0, "chrf": 41.0}
    control = {"name": "bc_long", "reward": 0.31}
    interval = {"a": "improve_1.1", "b": "bc_long", "metric": "reward", "difference": 0.04, "low": 0.03, "high": 0.05}
    assert run_with(tmp_path, [bc, {**last, "bleu": 21.0}, control], [interval]) == []
    bleu = {"a": "improve_1.1", "b": "bc", "metric": "bleu", "difference": -2.0, "low": -2.5, "high": -1.5}
    assert run_with(tmp_path, [bc, last, control], [interval, {**bleu, "high": 0.1}]) == []
    (hacked,) = run_with(tmp_path, [bc, last, control], [interval, bleu])
    assert "BLEU fell from 20.00 to 18.00" in hacked and "chrF" not in hacked
    (chance,) = run_with(tmp_path, [bc, {**last, "bleu": 21.0}, control], [{**interval, "low": -0.01}])
    assert "chance" in chance
    (longer,) = run_with(tmp_path, [bc, {**last, "bleu": 21.0}, {**control, "reward": 0.36}])
    assert "longer training" in longer
    (missing,) = run_with(tmp_path, [bc, {**last, "bleu": 21.0}])
    assert "bc_long" in missing


@pytest.mark.parametrize(
    "low, high, colour", [(0.03, 0.05, "good"), (-0.01, 0.05, ""), (0.0, 0.05, ""), (-0.05, -0.03, "bad")]
)
def test_a_difference_has_a_colour_where_its_interval_leaves_out_zero(tmp_path, low, high, colour):
    rows = [{"name": "bc", "reward": 0.30}, {"name": "improve_1.1", "reward": 0.34}]
    interval = {"a": "improve_1.1", "b": "bc", "metric": "reward", "difference": 0.04, "low": low, "high": high}
    (tmp_path / "summary.json").write_text(json.dumps({"phases": rows, "comparisons": [interval]}))
    page = report.render(read_run(tmp_path))
    assert re.findall(r'<span class="(\w*)">\+0\.0400', page) == [colour] * 2  # the tile and the table


def translations(rewards):
    return {
        i: Translation(source_id=i, source="", reference="", hypothesis=str(r), reward=r) for i, r in rewards.items()
    }


def test_examples_span_the_largest_gain_and_the_largest_loss():
    base = translations(dict.fromkeys(range(100), 0.5))
    final = translations({i: 0.5 if i == 50 else i / 100 for i in range(100)})
    chosen = report.choose_examples(base, final, count=5)
    assert chosen[0] == 99 and chosen[-1] == 0 and len(chosen) == 5
    assert chosen == sorted(chosen, reverse=True)
    assert 50 not in report.choose_examples(base, final, count=1000)  # Nothing changed there.


@pytest.mark.parametrize(
    ("before", "after", "marked"),
    [
        ("a small cat", "a big cat", "a <mark>big</mark> cat"),
        ("same", "same", "same"),
        ("a cat", "a <b> cat", "a <mark>&lt;b&gt; </mark>cat"),
        ("", "new", "<mark>new</mark>"),
        ("gone", "", ""),
    ],
)
def test_marks_the_words_that_changed(before, after, marked):
    assert report.mark_changes(before, after) == marked


def test_policies_are_told_apart_by_colour():
    names = ["bc", "improve_1.1", "improve_1.2", "improve_2.1", "bc_long"]
    for theme in (plots.LIGHT, plots.DARK):
        assert len(set(plots.phase_colors(names, theme).values())) == len(names)


def test_names():
    assert [phase_label(n) for n in ("bc", "grow_2", "improve_2.10", "bc_long")] == [
        "BC",
        "Grow 2",
        "G2 I10",
        "BC long",
    ]
    assert final_policy([{"name": n} for n in ("bc", "improve_1.1", "improve_1.2", "bc_long")]) == "improve_1.2"
    assert final_policy([{"name": "bc"}]) is None
