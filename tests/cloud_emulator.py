"""A Google Cloud Storage of one's own on this machine (gcp-storage-emulator), in memory, with one bucket."""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest

BUCKET = "bucket"


@contextlib.contextmanager
def emulator() -> Iterator[dict[str, str]]:
    """Starts it; gives the environment in which gcsfs, TensorStore and google-cloud-storage turn to it alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    # It writes a line for each request: into a pipe that nobody reads it would come to a halt.
    server = subprocess.Popen([sys.executable, __file__, str(port)], stderr=subprocess.DEVNULL)
    try:
        _wait_for(address, server)
        yield {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            # No looking for credentials, nor for the machine's metadata server.
            "FSSPEC_GCS_TOKEN": "anon",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anybody",
            "NO_GCE_CHECK": "true",
            # The emulator has no storage control API, which gcsfs would ask for the bucket's kind at every step.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "EPATH_USE_TF": "0",
        }
    finally:
        server.terminate()
        server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            with urllib.request.urlopen(address):
                return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the emulator does not answer at {address}")
            time.sleep(0.05)


def serve(port: int) -> None:
    """What the emulator leaves out: downloads name the object's generation, and one that the client has is not sent."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import objects

    download = objects.download

    def with_generation(request: Any, response: Any, storage: Any, *args: Any, **kwargs: Any) -> None:
        download(request, response, storage, *args, **kwargs)
        if response.status >= 300:
            return
        generation = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])["generation"]
        if request.query.get("ifGenerationNotMatch") == [generation]:
            response.status = HTTPStatus.NOT_MODIFIED
            response.write_file(b"")
        response["X-Goog-Generation"] = generation

    objects.download = with_generation
    logging.disable()
    server.create_server("127.0.0.1", port, True, BUCKET).run()


@contextlib.contextmanager
def this_process_in(environment: dict[str, str]) -> Iterator[None]:
    """Sets the environment for this process too, and forgets which file systems it has used."""
    import fsspec.config
    from etils.epath import backend, gpath

    def forget() -> None:
        gpath._is_tf_installed.cache_clear()
        backend._FileSystemSpecBackend._get_filesystem.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setitem(fsspec.config.conf, "gcs", {"token": environment["FSSPEC_GCS_TOKEN"]})
        forget()
        yield
    forget()
    os.environ.pop("EPATH_USE_TF", None)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
