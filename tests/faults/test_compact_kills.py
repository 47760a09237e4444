"""Merging of parts is killed with -9 at random moments and run again, while a plain reader watches.

On local disk the reader must see each item exactly once at every moment. On an object store no item is ever missing,
and each is there once after the command has run to its end. Random moments come from SEED, which is printed.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from job_process import REPO, run_job, write_manifest

sys.path.insert(0, str(REPO / "tests/jobs"))
from table_reading import read_by_glob  # noqa: E402

from jobs.storage.files import Storage  # noqa: E402

SEED = int(os.environ.get("FAULT_SEED", "20261122"))
KILLS = int(os.environ.get("FAULT_KILLS", "4"))
COMMAND = "import sys; from jobs.compact import main; print('ready', flush=True); sys.exit(main(sys.argv[1:]))"
OPTIONS = ("--replace", "--target-mb", "0.03")  # parts here are some 8 KB: the result is several files


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The output of a real job with many parts."""
    folder = tmp_path_factory.mktemp("finished")
    write_manifest(folder / "items.jsonl", 1)
    status, printed = run_job(folder / "items.jsonl", folder / "out", "--shard-audio-s", "6")
    assert status == 0, printed
    return folder / "out"


@pytest.fixture(params=["local", "s3"])
def output(request, finished, tmp_path, monkeypatch) -> Storage:
    if request.param == "local":
        shutil.copytree(finished, tmp_path / "out")
        return Storage(str(tmp_path / "out"))
    server = request.getfixturevalue("s3_server")
    for name, value in server.variables().items():
        monkeypatch.setenv(name, value)
    bucket = server.bucket()
    shutil.copytree(finished, server.folder / bucket / "out")
    return Storage(f"s3://{bucket}/out", server.options)


def start(output: Storage) -> subprocess.Popen:
    """Start the command; returns when its modules are loaded and the work begins."""
    command = [sys.executable, "-c", COMMAND, "--output", output.url, *OPTIONS]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def ids_seen(output: Storage) -> Counter:
    """How often each id is in the table; lists again if a listed file is gone."""
    while True:
        try:
            return Counter(row["id"] for row in read_by_glob(output, "transcripts"))
        except FileNotFoundError:
            continue


def test_killed_at_random_and_run_again(output, finished, tmp_path):
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    rows = read_by_glob(output, "transcripts")
    trial = Storage(str(tmp_path / "trial"))
    shutil.copytree(finished, trial.root)
    began = time.monotonic()
    process = start(trial)
    worked_from = time.monotonic()
    assert process.wait(timeout=120) == 0, process.stdout.read()
    work_s = time.monotonic() - worked_from
    print(f"start {worked_from - began:.1f} s, work {work_s:.1f} s")
    killed = 0
    for _ in range(KILLS):
        process = start(output)
        until = time.monotonic() + rng.uniform(0, work_s)
        while process.poll() is None and time.monotonic() < until:
            check(ids_seen(output), rows, output.is_local)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait(timeout=30)
        check(ids_seen(output), rows, output.is_local)
    process = start(output)
    assert process.wait(timeout=120) == 0, process.stdout.read()
    assert killed, "no kill came before the end of the work"
    assert read_by_glob(output, "transcripts") == rows
    names = output.list_names("transcripts")
    assert len(names) < 30
    again = start(output)
    assert again.wait(timeout=60) == 0
    assert "nothing to do" in again.stdout.read()
    assert output.list_names("transcripts") == names
    if output.is_local:
        assert not list(Path(output.path(".tmp")).glob("*"))


def check(seen: Counter, rows: list[dict], exactly_once: bool) -> None:
    assert seen.keys() == {row["id"] for row in rows}
    if exactly_once:
        assert set(seen.values()) == {1}
    else:
        assert set(seen.values()) <= {1, 2}
