"""Settings that must stand before JAX or TensorFlow is imported, and fixtures for real text."""

import os

# Tests that need a mesh get eight devices on any machine; the others see them and use one.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the tests' time is compiling programs that run once: the passes that make them fast are left out.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
).strip()
# A test that would download something must fail, not wait for a network; TFDS's mock data does not look.
os.environ.setdefault("TFDS_DATA_DIR", "/nonexistent/tfds")

from collections.abc import Iterator

import hypothesis
import jax
import pytest

# The outcome of a run is a function of the code: the examples are the same each time, and a slow machine fails none.
hypothesis.settings.register_profile("rest_jax", max_examples=50, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("rest_jax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with runs of several processes first: started last, the longest of all would end alone."""
    items.sort(key=lambda item: item.get_closest_marker("multiprocess") is None)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """A file's compiled programs are of no use to the next; thousands of them take gigabytes."""
    yield
    jax.clear_caches()
