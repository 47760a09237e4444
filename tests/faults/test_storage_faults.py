"""The real job over a real S3 server that fails on purpose, and over a full disk.

A fault that passes must leave no trace in the table. A fault that stays must end the run in bounded time with one line
that says why, and a rerun after it must give the table of an undisturbed run.
"""

import io
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fault_proxy import PASSING, FaultProxy, Plan, Request, no_fault, seeded_faults
from job_layouts import PROMPTS, TINY_EN, part_bytes
from job_process import REPO, write_manifest
from job_samples import audio_bytes, tar_bytes

from jobs.reading.containers import read_tar
from jobs.sources.reader import SourceReader
from jobs.storage.connections import StorageOptions
from jobs.storage.files import Storage
from jobs.transcribe import main

SEED = int(os.environ.get("FAULT_SEED", "20261122"))
PROMPTS_READ = 44
PATIENCE_S = 5  # instead of 90: a fault that stays should not cost the test minutes
END_S = 240  # a run that cannot continue has ended by then: patience, pending retries, start of Ray, on busy cores


class Bucket:
    """A bucket with the bundled prompts under `in/`; jobs reach it through a proxy."""

    def __init__(self, server, proxy: FaultProxy):
        self.server, self.proxy, self.name = server, proxy, server.bucket()
        shutil.copytree(PROMPTS, server.folder / self.name / "in", ignore=shutil.ignore_patterns("*.jsonl", "*.md"))

    def run(self, output: str, *options: str) -> int:
        arguments = ["--input", f"s3://{self.name}/in", "--output", f"s3://{self.name}/{output}"]
        arguments += ["--model", str(TINY_EN), "--device", "cpu", "--model-actors", "1", "--shard-audio-s", "20"]
        return main([*arguments, *options])

    def parts(self, output: str) -> dict[str, bytes]:
        """Name -> content, bypassing the proxy."""
        return part_bytes(self.server.folder / self.name / output)

    def options(self, **options) -> StorageOptions:
        return StorageOptions(self.proxy.endpoint_url, "us-east-1", self.server.key, self.server.secret, **options)


@pytest.fixture(scope="module")
def bucket(s3_server):
    with FaultProxy(s3_server.endpoint_url) as proxy, pytest.MonkeyPatch.context() as environment:
        for name, value in s3_server.variables(proxy.endpoint_url).items():
            environment.setenv(name, value)
        yield Bucket(s3_server, proxy)


@pytest.fixture
def proxy(bucket):
    """The proxy; its faults are for this test only."""
    bucket.proxy.made.clear()
    yield bucket.proxy
    bucket.proxy.plan, bucket.proxy.listing_lag_s = no_fault, 0.0


@pytest.fixture(scope="module")
def undisturbed(bucket, ray_cluster) -> dict[str, bytes]:
    assert bucket.run("undisturbed") == 0
    parts = bucket.parts("undisturbed")
    assert sum(pq.read_metadata(io.BytesIO(part)).num_rows for part in parts.values()) == PROMPTS_READ
    assert len(parts) > 5
    return parts


class Watcher(threading.Thread):
    """Continuously reads every part that the server shows; keeps those that are not whole."""

    def __init__(self, storage: Storage):
        super().__init__(daemon=True)
        self.storage, self.broken, self.read, self.stopped = storage, [], 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.05):
            for name in self.storage.list_names("transcripts"):
                try:
                    pq.read_table(io.BytesIO(self.storage.read_bytes(f"transcripts/{name}")))
                    self.read += 1
                except (OSError, ValueError) as error:
                    self.broken.append((name, error))

    def __enter__(self) -> "Watcher":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self.join()


def first_of(matches, fault: str, otherwise: Plan = no_fault) -> Plan:
    """The first request that matches fails, the others fail or not as `otherwise` says."""
    lock, done = threading.Lock(), []

    def plan(request: Request) -> str | None:
        with lock:
            if not done and matches(request):
                done.append(request)
                return fault
        return otherwise(request)

    return plan


def is_part(request: Request) -> bool:
    return request.method == "PUT" and "/transcripts/part-" in request.path


def after_parts(proxy: FaultProxy, count: int, fault: str) -> Plan:
    """All requests fail once so many parts are written."""

    def plan(_: Request) -> str | None:
        return fault if len(proxy.written_parts()) >= count else None

    proxy.written_at.clear()
    return plan


def test_faults_that_pass_leave_no_trace(bucket, proxy, undisturbed):
    """A third of all requests fail in bursts, one socket hangs while audio is read, and one while a part is written."""
    print(f"seed {SEED}")
    faults = seeded_faults(SEED, rate=0.33, burst=3, faults=PASSING)
    hung_read = first_of(lambda request: request.is_read and request.path.endswith(".flac"), "hang", faults)
    proxy.plan = first_of(is_part, "hang", hung_read)
    with Watcher(Storage(f"s3://{bucket.name}/passing", bucket.server.options)) as watcher:
        assert bucket.run("passing") == 0
    assert bucket.parts("passing") == undisturbed
    assert proxy.made.keys() == {*PASSING, "hang"}, proxy.made
    assert proxy.made["hang"] == 2
    assert watcher.read
    assert not watcher.broken
    print(dict(proxy.made))


@pytest.mark.parametrize("fault", ["expired_token", pytest.param("slow_down", marks=pytest.mark.slow)])
def test_a_fault_that_stays_ends_the_run_and_a_rerun_finishes_it(fault, bucket, proxy, undisturbed, capsys):
    output = f"stays-{fault}"
    proxy.plan = after_parts(proxy, 2, fault)
    started = time.monotonic()
    assert bucket.run(output, "--storage-patience-s", str(PATIENCE_S)) == 1
    assert time.monotonic() - started < END_S
    end = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.startswith("stopped: ")
    assert {"expired_token": "refuses access", "slow_down": "failed after retries"}[fault] in end
    assert "run the same command again" in end
    proxy.plan = no_fault
    stopped_with = bucket.parts(output)
    assert 2 <= len(stopped_with) < len(undisturbed)
    assert stopped_with.items() <= undisturbed.items()
    assert bucket.run(output) == 0
    assert bucket.parts(output) == undisturbed


@pytest.mark.parametrize("reading", ["files", "tars"])
def test_credentials_that_expire_stop_a_run_whose_output_lies_elsewhere(
    reading, bucket, proxy, ray_cluster, tmp_path, capsys
):
    """The output accepts all parts: only reading can notice, and what it cannot read must not become rows."""
    folder = bucket.server.folder / bucket.name / reading
    prompts = {path.name: path.read_bytes() for path in sorted(PROMPTS.glob("*.flac"))[:12]}
    folder.mkdir()
    for number, (name, content) in enumerate(prompts.items()):
        if reading == "files":
            (folder / name).write_bytes(content)
        else:
            (folder / f"{number:02d}.tar").write_bytes(tar_bytes({name: content}))
    arguments = ["--input", f"s3://{bucket.name}/{reading}", "--output", str(tmp_path / "out"), "--model", str(TINY_EN)]
    arguments += ["--device", "cpu", "--model-actors", "1", "--shard-audio-s", "5"]

    def plan(_: Request) -> str | None:
        parts = tmp_path / "out/transcripts"
        return "expired_token" if parts.exists() and any(parts.iterdir()) else None

    proxy.plan = plan
    assert main(arguments) == 1
    end = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.startswith("stopped: ")
    assert "(ExpiredToken)" in end
    assert "run the same command again" in end
    stopped_with = part_bytes(tmp_path / "out")
    assert stopped_with
    proxy.plan = lambda _: "expired_token"
    other = [str(tmp_path / "new") if value == str(tmp_path / "out") else value for value in arguments]
    assert main(other) == 2
    assert "(ExpiredToken)" in capsys.readouterr().err
    proxy.plan = no_fault
    assert main(arguments) == 0
    parts = part_bytes(tmp_path / "out")
    assert stopped_with.items() <= parts.items()
    assert sum(pq.read_metadata(io.BytesIO(part)).num_rows for part in parts.values()) == len(prompts)


def test_objects_that_cannot_be_read_are_rows_until_they_can(bucket, proxy, undisturbed):
    broken = sorted(path.name for path in PROMPTS.glob("*.flac"))[:2]
    faults = {broken[0]: "internal_error", broken[1]: "short"}

    def once_planned(request: Request) -> str | None:
        """Not before: planning reads the headers of some files, and would estimate other lengths without them."""
        planned = any(path.endswith("/plan/plan-0000.json") for path in list(proxy.written_at))
        return faults.get(request.path.rsplit("/", 1)[-1]) if planned and request.is_read else None

    proxy.written_at.clear()
    proxy.plan = once_planned
    options = ("--storage-patience-s", str(PATIENCE_S))
    assert bucket.run("rows", *options) == 3
    rows = [row for part in bucket.parts("rows").values() for row in pq.read_table(io.BytesIO(part)).to_pylist()]
    assert len(rows) == PROMPTS_READ
    assert {row["id"]: row["error_kind"] for row in rows if row["error_kind"]} == dict.fromkeys(broken, "storage")
    assert all("after retries" in row["error_message"] for row in rows if row["error_kind"])
    proxy.plan = no_fault
    assert bucket.run("rows") == 3  # what is committed is not read again
    assert bucket.run("rows", "--retry-errors") == 0
    assert bucket.parts("rows") == undisturbed


def test_a_listing_that_lags_changes_nothing(bucket, proxy, undisturbed, capsys):
    proxy.listing_lag_s = 3600.0
    assert bucket.run("lagging") == 0
    assert bucket.parts("lagging") == undisturbed
    assert "nothing to do" not in capsys.readouterr().err
    assert proxy.made["lagged"]
    assert bucket.run("lagging") == 0
    assert bucket.parts("lagging") == undisturbed


def test_a_long_stream_and_single_blocks_survive_what_passes(bucket, proxy):
    """A tar of 30 MB, read in blocks, each of which may be cut short."""
    members = {f"{number:02d}.wav": audio_bytes(60.0) for number in range(16)}
    (bucket.server.folder / bucket.name / "long.tar").write_bytes(tar_bytes(members))
    # Two of four requests fail, whatever request number the earlier tests have reached.
    proxy.plan = lambda request: PASSING[request.number // 4 % len(PASSING)] if request.number % 4 < 2 else None
    items = list(read_tar("long.tar", f"s3://{bucket.name}/long.tar", SourceReader(bucket.options())))
    assert {item.member: item.payload for item in items} == members
    assert sum(proxy.made.values()) > 2, proxy.made


def test_a_dead_store_costs_the_patience_once_and_not_once_per_object(bucket, proxy):
    proxy.plan = lambda _: "slow_down"
    options = replace(bucket.options(patience_s=PATIENCE_S), region="eu-north-1")  # a connection of its own
    storage = Storage(f"s3://{bucket.name}/dead", options)
    storage.fs.config_kwargs["retries"] = {"mode": "standard", "total_max_attempts": 1}  # botocore's would take minutes
    started = time.monotonic()
    for number in range(20):
        with pytest.raises(Exception, match="SlowDown"):
            storage.read_bytes(f"{number}")
    assert PATIENCE_S / 2 < time.monotonic() - started < 4 * PATIENCE_S
    proxy.plan = no_fault
    storage.write_atomic("0", b"back")
    assert storage.read_bytes("0") == b"back"


FULL_DISK = """
mount -t tmpfs -o size={size} none {disk} || exit 77
{job}; echo "status $?"
ls {disk}/out/transcripts | wc -l
find {disk}/out/.tmp -type f | wc -l
mount -o remount,size=100m {disk}
{job}; echo "status $?"
cp -r {disk}/out/transcripts {kept}
"""


def test_a_full_disk_stops_the_run_and_room_lets_it_finish(ray_cluster, tmp_path):
    """The output is on a small separate filesystem, in a user and mount namespace, which does not require root."""
    write_manifest(tmp_path / "items.jsonl", 1)
    options = ["--input", str(tmp_path / "items.jsonl"), "--model", str(TINY_EN), "--device", "cpu"]
    options += ["--shard-audio-s", "20", "--model-actors", "1", "--output"]
    assert main([*options, str(tmp_path / "whole")]) == 0
    whole = part_bytes(tmp_path / "whole")
    assert len(whole) > 5
    (tmp_path / "disk").mkdir()
    # Room for the plan and about half of the parts; tmpfs counts pages of 4 KiB.
    plan = sum(-(-path.stat().st_size // 4096) for path in (tmp_path / "whole/plan").iterdir()) + 2
    pages = plan + sum(-(-len(part) // 4096) for part in whole.values()) // 2
    job = " ".join([sys.executable, "-m", "jobs.transcribe", *options, str(tmp_path / "disk/out")])
    values = {"disk": tmp_path / "disk", "kept": tmp_path / "kept", "job": job, "size": 4096 * pages}
    script = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK.format(**values)]
    try:
        done = subprocess.run(script, cwd=REPO, capture_output=True, text=True, timeout=END_S, check=False)
    except FileNotFoundError:
        pytest.skip("needs unshare of util-linux")
    if done.returncode in (1, 77) and "status" not in done.stdout:
        pytest.skip(f"no user namespace with a mount here: {done.stderr.strip()[:200]}")
    lines = done.stdout.splitlines()
    first = lines.index("status 1"), lines.index("status 0")
    assert first[0] < first[1], done.stdout + done.stderr
    parts, temporaries = (int(line) for line in lines[first[0] + 1 : first[0] + 3])
    assert 0 <= parts < len(whole)
    assert temporaries == 0
    assert "no space is left there" in done.stderr
    assert part_bytes_of(tmp_path / "kept") == whole


def part_bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
