"""`ray job submit` to a head with token authentication, from a working directory, on two S3 servers.

One head serves all tests. Ray's command exits with 0 or 1 and gives the job's own exit status in words.
"""

import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from job_layouts import PROMPTS, TINY_EN
from job_process import REPO
from ray_nodes import RayNodes
from s3_server import S3Server, free_port

from jobs.report.progress import LINE_EVERY_S
from jobs.storage.files import Storage

moto_server = pytest.importorskip("moto.server", reason="needs moto[s3], flask and flask-cors")

START_S = 180.0  # a head takes 10 s on free cores
JOB_S = 300.0
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        address: of its dashboard, which accepts jobs.
        environment: for commands that may use it.
    """

    address: str
    environment: dict[str, str]

    def submit(self, *arguments: str, **variables: str) -> tuple[int, str]:
        """Submit the transcription job and wait for it; (exit status of `ray job submit`, what it printed)."""
        command = [str(RAY), "job", "submit", "--working-dir", str(REPO), "--", "python", "-m", "jobs.transcribe"]
        done = subprocess.run(
            [*command, "--model-actors", "1", "--device", "cpu", *arguments],
            env=self.environment | variables,
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=JOB_S,
            check=False,
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def head(s3_server):
    """A head with token authentication; jobs find the S3 credentials in its environment."""
    folder = Path(tempfile.mkdtemp(prefix="ph-", dir="/tmp"))  # not tmp_path: paths of sockets must be short
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONUNBUFFERED": "1"}
    environment |= {"PATH": f"{RAY.parent}:{environment['PATH']}", "PARAKEET_CACHE": str(folder / "models")}
    environment |= s3_server.variables()
    command = [str(RAY), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2", "--num-gpus=0"]
    command += ["--object-store-memory=200000000", f"--temp-dir={folder / 'ray'}", f"--port={free_port()}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}", f"--ray-client-server-port={free_port()}"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    with open(folder / "start.log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not answers(f"{address}/api/jobs/", environment["RAY_AUTH_TOKEN"]):
            assert process.poll() is None, (folder / "start.log").read_text()
            assert time.monotonic() < deadline, (folder / "start.log").read_text()
            time.sleep(0.5)
        yield Head(address, environment | {"RAY_API_SERVER_ADDRESS": address})
    finally:
        RayNodes.kill_node(process)
        shutil.rmtree(folder, ignore_errors=True)


def answers(url: str, token: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})  # noqa: S310 - the loopback
    try:
        with urllib.request.urlopen(request, timeout=5):  # noqa: S310
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def moto(s3_server):
    """A second implementation of S3, in this process."""
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(f"http://{host}:{port}", s3_server.key, s3_server.secret, Path("/nonexistent"))
    finally:
        server.stop()


def fill(storage: Storage, prompts: int) -> None:
    """Store a model and some prompts."""
    for path in TINY_EN.iterdir():
        storage.write_atomic(f"model/{path.name}", path.read_bytes())
    for path in sorted(PROMPTS.glob("*.flac"))[:prompts]:
        storage.write_atomic(f"in/{path.name}", path.read_bytes())


def arguments(storage: Storage, endpoint_url: str) -> list[str]:
    named = {"input": "in", "output": "out", "model": "model"}
    return [part for option, name in named.items() for part in (f"--{option}", f"{storage.url}/{name}")] + [
        *("--s3-endpoint-url", endpoint_url, "--shard-audio-s", "20", "--storage-patience-s", "5")
    ]


def entrypoint_status(printed: str) -> int:
    """The job's own exit status, found as cluster/README.md says."""
    found = re.search(r"failed with exit code (\d+)", printed)
    return int(found[1]) if found else 0


def test_exit_statuses_and_progress_come_back_on_rclone(head, s3_server):
    storage = Storage(f"s3://{s3_server.bucket()}/job", s3_server.options)
    fill(storage, prompts=20)
    with FaultProxy(s3_server.endpoint_url) as proxy:

        def slow_then_expired(request) -> str | None:
            """The second part waits until a line of progress is due; then the credentials expire."""
            if request.method != "PUT" or "/transcripts/" not in request.path:
                return None
            if len(proxy.written_parts()) == 1:
                time.sleep(LINE_EVERY_S)
            return "expired_token" if len(proxy.written_parts()) >= 3 else None

        proxy.plan = slow_then_expired
        status, printed = head.submit(*arguments(storage, proxy.endpoint_url))
    assert (status, entrypoint_status(printed)) == (1, 1), printed
    assert "ExpiredToken" in printed
    assert "run the same command again" in printed
    assert re.search(r"\d+ s of about \d+ s \| RTFx .* \| ok \d+ empty 0 errors 0", printed), "no line of progress"

    status, printed = head.submit(*arguments(storage, s3_server.endpoint_url))
    assert (status, entrypoint_status(printed)) == (0, 0), printed
    assert "items   20 in = 20 ok + 0 empty + 0 errors" in printed

    status, printed = head.submit(*arguments(storage, s3_server.endpoint_url), "--dtype", "bfloat16")
    assert (status, entrypoint_status(printed)) == (1, 2), printed
    assert re.search(r"error: .* another configuration", printed)


def test_a_complete_job_over_its_error_budget_on_moto(head, moto):
    storage = Storage("s3://speech/job", moto.options)
    storage.fs.call_s3("create_bucket", Bucket="speech")
    fill(storage, prompts=6)
    storage.write_atomic("in/text.wav", b"this is not audio at all, " * 50)
    status, printed = head.submit(*arguments(storage, moto.endpoint_url))
    assert (status, entrypoint_status(printed)) == (1, 3), printed
    (submission,) = set(re.findall(r"raysubmit_\w+", printed))
    command = f"ray job status {submission} 2>&1 | grep -o 'failed with exit code [0-9]*'"  # as cluster/README.md says
    found = subprocess.run(["bash", "-c", command], env=head.environment, stdout=subprocess.PIPE, text=True, check=True)
    assert found.stdout == "failed with exit code 3\n"
    assert "items   7 in = 6 ok + 0 empty + 1 errors" in printed
    assert len(storage.list_names("out/transcripts")) > 1
    assert storage.exists("out/receipt.json")


@pytest.mark.parametrize("token", ["0" * 64, ""])
def test_a_wrong_token_is_refused(head, token, s3_server):
    storage = Storage(f"s3://{s3_server.bucket()}/job", s3_server.options)
    changed = {"RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    status, printed = head.submit(*arguments(storage, s3_server.endpoint_url), **changed)
    assert status != 0
    assert re.search(r"(?i)unauthori[sz]ed|authentication|token", printed), printed
    assert answers(f"{head.address}/api/jobs/", head.environment["RAY_AUTH_TOKEN"])
    assert not answers(f"{head.address}/api/jobs/", token)
    assert storage.list_names("out") == []
