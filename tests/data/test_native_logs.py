"""Only the known notes are dropped, and nothing after an error."""

import os

import pytest

from rest_jax.data.native_logs import without_chatter

NOTES = (
    "WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\n"
    "I0000 00:00:1795366417.632789    4888 port.cc:153] oneDNN custom operations are on.\n"
    "E0000 00:00:1795366420.677162    4888 cuda_platform.cc:52] failed call to cuInit: INTERNAL: CUDA error\n"
    "normalizer.cc(51) LOG(INFO) precompiled_charsmap is empty. use identity normalization.\n"
)
OTHERS = "step 400/2000 | loss 2.1\nF0000 a fatal error\nnormalizer.cc(51) LOG(ERROR) broken\n"


def test_other_lines_pass(capfd: pytest.CaptureFixture[str]) -> None:
    with without_chatter():
        os.write(2, (NOTES + OTHERS + NOTES).encode())
    os.write(2, b"after\n")
    assert capfd.readouterr().err == OTHERS + "after\n"


def test_everything_is_shown_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImportError), without_chatter():
        os.write(2, (NOTES + OTHERS).encode())
        raise ImportError("no library")
    assert capfd.readouterr().err == NOTES + OTHERS
