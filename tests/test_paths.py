"""Paths on disk; those in buckets are `test_cloud_paths.py`'s."""

from pathlib import Path

import pytest

from rest_jax import paths

VOCABULARY = "rest_jax://tasks/demo_data/vocab.model"


def test_local_paths_are_pathlibs():
    for text, expected in (("runs/a", "runs/a"), ("/runs/a", "/runs/a"), ("~/a", str(Path.home() / "a")), ("", ".")):
        found = paths.resolve(text)
        assert isinstance(found, Path) and str(found) == expected and not paths.in_bucket(found)
    assert paths.resolve("odd/name://x") == Path("odd/name://x")  # no scheme: there is a slash before
    assert paths.resolve(VOCABULARY).is_file()


def test_json_is_whole_or_absent(tmp_path):
    path = tmp_path / "bc" / "RESULT.json"
    with pytest.raises(TypeError):
        paths.write_json(path, {"good": 1, "bad": object()})
    assert not path.parent.exists()
    paths.write_json(path, {"good": 1})
    assert path.read_text() == '{\n "good": 1\n}\n'
    assert [child.name for child in path.parent.iterdir()] == ["RESULT.json"]
