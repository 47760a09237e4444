"""The job is killed in the middle and run again: the table must be that of a run that was never disturbed.

Every kill is a real signal to a real process. Random moments come from SEED, which is printed.
"""

import os
import random
import signal
import time
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from job_process import JobProcess, run_job, write_manifest

SEED = int(os.environ.get("FAULT_SEED", "20261122"))
REPEATS = 10  # of 44 prompts: half an hour of audio, some 15 s of work on two cores
OPTIONS = ("--shard-audio-s", "60")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("in") / "items.jsonl"
    write_manifest(path, REPEATS)
    return path


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    status, printed = run_job(source, output, *OPTIONS)
    assert status == 0, printed
    assert ds.dataset(output / "transcripts").count_rows() == REPEATS * 44
    return parts_of(output)


def parts_of(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "transcripts").iterdir())}


def finish_and_compare(source: Path, output: Path, undisturbed: dict[str, bytes]) -> str:
    status, printed = run_job(source, output, *OPTIONS)
    assert status == 0, printed
    assert parts_of(output) == undisturbed
    return printed


def test_driver_and_all_of_ray_killed_twice(source, undisturbed, tmp_path):
    rng = random.Random(SEED)
    print(f"seed {SEED}")
    output = tmp_path / "out"
    done = 0
    for round_ in range(2):
        job = JobProcess(source, output, *OPTIONS)
        job.wait_for_parts(done + rng.randint(1, 4))
        time.sleep(rng.random())
        if round_:
            job.kill_all()
        else:
            job.kill_driver()
        status, _ = job.finish()
        assert status == -signal.SIGKILL
        done = job.parts()
        assert 0 < done < len(undisturbed)
    kept = {path.name: path.stat().st_mtime_ns for path in (output / "transcripts").glob("part-*")}
    finish_and_compare(source, output, undisturbed)
    now = {path.name: path.stat().st_mtime_ns for path in (output / "transcripts").glob("part-*")}
    assert {name: now[name] for name in kept} == kept  # committed parts were not written again


def test_killed_actor_is_replaced_and_the_run_goes_on(source, undisturbed, tmp_path):
    job = JobProcess(source, tmp_path / "out", *OPTIONS)
    job.wait_for_parts(2)
    victims = job.members("ray::MapWorker")
    assert victims, "no actor process found"
    os.kill(victims[0], signal.SIGKILL)
    status, printed = job.finish()
    assert status == 0, printed
    assert parts_of(tmp_path / "out") == undisturbed
    events = "".join(path.read_text() for path in (tmp_path / "out/events").iterdir())
    assert '"event": "retry"' in events


def test_sigterm_ends_in_time_and_says_how_to_resume(source, undisturbed, tmp_path):
    job = JobProcess(source, tmp_path / "out", *OPTIONS)
    job.wait_for_parts(2)
    job.kill_driver(signal.SIGTERM)
    started = time.monotonic()
    status, printed = job.finish()
    assert status == 1
    assert "run the same command again" in printed
    assert time.monotonic() - started < 60  # a spot notice gives two minutes
    assert not [path for path in (tmp_path / "out/transcripts").iterdir() if path.name not in undisturbed]
    finish_and_compare(source, tmp_path / "out", undisturbed)
