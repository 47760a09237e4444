"""Ray does not start: nothing is done, one line says so, and the same command works later."""

import os
import signal
import socket

import pyarrow.dataset as ds
import pytest
from job_process import PROMPTS, JobProcess, run_job

RAYLET = "core/src/ray/raylet/raylet"  # the command that `ray.init` waits for


def kill_raylet(job: JobProcess) -> None:
    job.wait_until(lambda: job.members(RAYLET), "a raylet")
    for pid in job.members(RAYLET):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow  # Ray waits for 30 s
def test_ray_that_does_not_start_the_first_time_is_started_again(tmp_path):
    job = JobProcess(PROMPTS / "prompts.jsonl", tmp_path / "out")
    kill_raylet(job)
    status, printed = job.finish()
    assert status == 0, printed
    assert "Ray did not start within its 30 s; trying once more" in printed
    assert ds.dataset(tmp_path / "out" / "transcripts").count_rows() == 44


@pytest.mark.slow  # Ray waits for 30 s, twice
def test_ray_that_does_not_start_stops_the_job_before_it_begins(tmp_path):
    source, output = PROMPTS / "prompts.jsonl", tmp_path / "out"
    job = JobProcess(source, output)
    for _ in range(2):
        kill_raylet(job)
        job.wait_until(lambda: not job.members(RAYLET), "the end of the raylet")
    status, printed = job.finish()
    assert status == 1, printed
    assert "Traceback" not in printed
    stopped = [line for line in printed.splitlines() if line.startswith("stopped: ")]
    assert len(stopped) == 1, printed
    assert "Ray did not start on this machine (The current node timed out during startup)" in stopped[0]
    assert "run the same command again" in stopped[0]
    assert not (output / "transcripts").exists()
    status, printed = run_job(source, output)
    assert status == 0, printed
    assert ds.dataset(output / "transcripts").count_rows() == 44


def test_what_is_no_address_is_refused(tmp_path):
    status, printed = run_job(PROMPTS / "prompts.jsonl", tmp_path / "out", "--ray-address", "nonsense")
    assert status == 2, printed
    assert printed.splitlines()[-1] == "error: Ray at 'nonsense' cannot be used: Invalid address format: nonsense"


def test_a_cluster_that_is_not_there_is_named_within_a_minute(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take the port meanwhile
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        status, printed = run_job(PROMPTS / "prompts.jsonl", tmp_path / "out", "--ray-address", address)
    assert status == 1, printed
    assert "Traceback" not in printed
    assert f"no Ray cluster answers at {address}" in printed.splitlines()[-1]
    assert not (tmp_path / "out/transcripts").exists()


def test_a_gpu_that_is_not_on_this_machine_is_not_waited_for(tmp_path):
    pools = ("--device", "cuda", "--model-actors", "1")
    status, printed = run_job(PROMPTS / "prompts.jsonl", tmp_path / "out", *pools)
    assert status == 2, printed
    assert "started on this machine has no GPU" in printed.splitlines()[-1]
    assert not (tmp_path / "out/job.json").exists()


@pytest.mark.slow  # Ray waits for 35 s
def test_what_listens_and_is_no_head_is_named_within_a_minute(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        status, printed = run_job(PROMPTS / "prompts.jsonl", tmp_path / "out", "--ray-address", address)
    assert status == 1, printed
    assert "Traceback" not in printed
    assert f"Ray at {address} was not joined" in printed.splitlines()[-1]
