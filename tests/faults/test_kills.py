"""The job is killed and run again: the table must be that of an undisturbed run.

Every kill is a real signal to a real process. Random moments come from SEED, which is printed. `long_run.py` does
the same many times over.
"""

import json
import os
import random

import pytest
from kills import (
    Trial,
    account,
    fail_device,
    kill_actor,
    kill_all,
    kill_chained_actor,
    kill_driver,
    kill_in_commits,
    kill_node,
    parts_of,
    resumed,
    start_two,
    stop_job,
    terminate_driver,
)
from ray_nodes import RayNodes

SEED = int(os.environ.get("FAULT_SEED", "20261122"))


@pytest.fixture
def trial(source, options, tmp_path, request) -> Trial:
    print(f"seed {SEED}")
    return Trial(source, tmp_path / "out", options, random.Random(f"{SEED} {request.node.name}"))


def test_run_ended_in_four_ways_and_resumed(trial, undisturbed):
    """SIGTERM, the driver killed, all of Ray killed, everything killed between a part's writing and its rename."""
    terminate_driver(trial)
    kill_driver(trial)
    kill_all(trial)
    done = {part.name: part.stat().st_mtime_ns for part in (trial.output / "transcripts").iterdir()}
    resumed(kill_in_commits("before", victim="session"))(trial)
    now = {part.name: part.stat().st_mtime_ns for part in (trial.output / "transcripts").iterdir()}
    assert {name: now[name] for name in done} == done  # committed parts were not written again
    assert parts_of(trial.output) == parts_of(undisturbed)


@pytest.mark.parametrize("kind", ["chained", "feature"])
def test_killed_actor_is_replaced_and_the_run_goes_on(kind, trial, undisturbed):
    (kill_chained_actor if kind == "chained" else kill_actor(kind))(trial)
    assert parts_of(trial.output) == parts_of(undisturbed)


def test_worker_whose_device_fails_is_replaced_and_says_why(trial, undisturbed):
    fail_device(trial)
    assert parts_of(trial.output) == parts_of(undisturbed)
    (left,) = (trial.output / "events").glob("worker-*.jsonl")
    record = json.loads(left.read_text())
    assert record["event"] == "worker_ended"
    assert "CUDA error: unspecified launch failure" in record["cause"]


def test_workers_killed_at_every_moment_of_a_commit(trial, undisturbed):
    kill_in_commits("half", "before", "after", victim="worker")(trial)
    assert parts_of(trial.output) == parts_of(undisturbed)


def test_of_two_drivers_at_once_one_is_told_or_both_are_right(trial, undisturbed):
    start_two(trial)
    assert account(trial.output, undisturbed).is_right


def test_node_lost_and_job_stopped_on_a_cluster_of_three(trial, undisturbed, tmp_path):
    with RayNodes(dashboard=True) as cluster:
        cluster.add_node()
        cluster.add_node()
        kill_node(cluster)(trial)
        assert parts_of(trial.output) == parts_of(undisturbed)
        trial.output = tmp_path / "stopped"
        stop_job(cluster)(trial)
        assert parts_of(trial.output) == parts_of(undisturbed)
