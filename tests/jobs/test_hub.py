"""A model by its id on the Hugging Face hub: the hub's own library fetches it from a server that acts as the hub."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from job_layouts import TINY_EN

pytest.importorskip("huggingface_hub")
REPO = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FETCH = """
import sys
from jobs.models import resolve_model
from jobs.storage.connections import StorageOptions
model = resolve_model("someone/tiny", StorageOptions())
print(model.digest)
"""


class Hub(ThreadingHTTPServer):
    """One repository, `someone/tiny`. `fetched` has the names of the requested files."""

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.fetched = files, []
        self.thread = threading.Thread(target=self.serve_forever)

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        if path.startswith("/api/models/someone/tiny/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.server.files.items()
            ]
            content = json.dumps(entries).encode()
        elif path.startswith("/api/models/someone/tiny"):
            siblings = [{"rfilename": name} for name in self.server.files]
            content = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": siblings}).encode()
        else:
            name = path.rpartition("/")[2]
            if name not in self.server.files:
                self.send_error(404)
                return
            content = self.server.files[name]
            headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            if body:
                self.server.fetched.append(name)
        self.send_response(200)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


def fetch(hub: Hub, folder: Path) -> subprocess.CompletedProcess:
    """In a separate process, because the library reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(folder), "PYTHONPATH": str(REPO)}
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", FETCH]
    return subprocess.run(command, env=os.environ | settings | quiet, capture_output=True, text=True, cwd=folder)


def test_a_repository_with_both_formats_is_fetched_in_one(tmp_path):
    files = {path.name: path.read_bytes() for path in Path(TINY_EN).iterdir()}
    with Hub(files | {"tiny.nemo": b"large", "flax_model.msgpack": b"other"}) as hub:
        done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == hashlib.sha256(files["model.safetensors"]).hexdigest()
    assert "model.safetensors" in hub.fetched
    assert not {"tiny.nemo", "flax_model.msgpack"} & set(hub.fetched)


def test_a_repository_of_a_nemo_file_alone(tmp_path):
    with Hub({"README.md": b"", "tiny.nemo": b"no archive"}) as hub:
        done = fetch(hub, tmp_path)
    assert hub.fetched == ["tiny.nemo"]
    assert "CheckpointError" in done.stderr
    assert "tiny.nemo" in done.stderr
