"""Keeps start-up notes that C++ libraries write to the terminal out of the run's own log."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator

# TensorFlow 2.21 writes these whatever TF_CPP_MIN_LOG_LEVEL says, among them an "E" for a machine without a GPU:
# W0000 00:00:1795366400.677162    4888 cuda_platform.cc:52] failed call to cuInit: ...
# normalizer.cc(51) LOG(INFO) precompiled_charsmap is empty. use identity normalization.
_CHATTER = re.compile(
    rb"[IWE]\d{4} [\d:. ]+ [\w/]+\.cc:\d+\] |WARNING: All log messages before absl::|\w+\.cc\(\d+\) LOG\(INFO\) "
)


@contextlib.contextmanager
def without_chatter() -> Iterator[None]:
    """Holds back what is written to file descriptor 2 inside, then writes on all but the known notes.

    Nothing else is lost: other threads' lines come a little late, and after an error everything is written.
    """
    with tempfile.TemporaryFile() as held:
        saved = os.dup(2)
        os.dup2(held.fileno(), 2)
        failed = True
        try:
            yield
            failed = False
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            for line in held:
                if failed or not _CHATTER.match(line):
                    os.write(2, line)
