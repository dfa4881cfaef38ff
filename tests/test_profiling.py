"""Traces of some training steps."""

import gzip

import jax.numpy as jnp
import pytest

from rest_jax.errors import UserError
from rest_jax.profiling import ProfiledSteps


def test_steps_in_the_window_are_traced_once(tmp_path):
    profiled = ProfiledSteps.parse("1:3", tmp_path)
    traces = lambda: sorted(tmp_path.rglob("*.xplane.pb"))  # noqa: E731
    for _ in range(2):  # two phases
        for step in range(5):
            profiled.before(step, waits_for=jnp.zeros(()))
            assert bool(traces()) == (step >= 3 or len(traces()) == 1)
        profiled.stop(waits_for=jnp.zeros(()))
    # Where TensorBoard looks: plugins/profile/TIME/HOST.xplane.pb.
    assert len(traces()) == 1 and traces()[0].parts[-4:-2] == ("plugins", "profile")
    (trace,) = tmp_path.rglob("*.trace.json.gz")
    assert b"traceEvents" in gzip.decompress(trace.read_bytes())


def test_a_phase_that_ends_in_the_window_ends_the_trace(tmp_path):
    profiled = ProfiledSteps.parse("0:9", tmp_path)
    profiled.before(0, waits_for=None)
    profiled.stop(waits_for=None)
    assert list(tmp_path.rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["10", "5:5", "7:3", "a:b", ":4", "-1:3"])
def test_windows_without_steps_are_refused(tmp_path, text):
    with pytest.raises(UserError, match="--profile_steps.*FIRST:LAST"):
        ProfiledSteps.parse(text, tmp_path)
