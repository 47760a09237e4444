"""Model actors on a cluster that starts without a place for them, gains two, loses one, and is free of them at the end.

A model actor takes a pretended GPU or a custom resource. Nodes that have it are added by hand, and once by Ray's
autoscaler.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from job_process import session_members, wait_until, write_manifest
from kills import Trial, parts_of
from ray_nodes import RayNodes

SLOT = {"GPU": 1.0}
HELD = 4  # shards that a model actor has at work or waiting (pipeline.GPU_CALLS * stages.TASKS_PER_ACTOR)


def test_model_actors_come_go_and_leave_with_their_nodes(source, options, undisturbed, tmp_path):
    trial = Trial(source, tmp_path / "out", options, random.Random(0))
    shards = len(parts_of(undisturbed))
    with RayNodes(head_cpus=2, quick=True) as cluster:
        # More feature actors are wanted than there are CPUs: the model actors must still find a place.
        pools = ("--model-resource", "GPU", "--model-actors", "1:2", "--feature-actors", "1:8")
        impatient = {"RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S": "3"}  # Ray Data's limit; the job must wait longer
        job = trial.start("--ray-address", cluster.address, *pools, variables=cluster.environment | impatient)
        job.wait_until(lambda: actors(cluster.head, "PrepareShards"), "feature actors")
        assert not job.parts()

        first = cluster.add_node(cpus=1, resources=SLOT)
        job.wait_for_parts(1)
        (first_model,) = actors(first, "RecogniseShards")
        os.kill(first_model, signal.SIGSTOP)  # as slow as a worker can be: it keeps the shards that it holds
        second = cluster.add_node(cpus=1, resources=SLOT)
        job.wait_for_parts(shards - HELD)  # the second does all the others
        (second_model,) = actors(second, "RecogniseShards")

        cluster.nodes.remove(first)
        cluster.kill_node(first)
        assert trial.end(job) == 0, trial.printed
        wait_until(lambda: not actors(second, "MapWorker"), "end of the actors")
    assert parts_of(trial.output) == parts_of(undisturbed)
    assert "waits for a node with GPU" in trial.printed[-1]
    workers = shards_by_model_worker(trial.output)
    assert set(workers) >= {first_model, second_model}
    assert sum(workers.values()) == shards


@pytest.mark.slow
@pytest.mark.parametrize(("resource", "repeats"), [("slot", 12), ("GPU", 40)])
def test_the_autoscaler_brings_nodes_while_there_is_work(resource, repeats, tmp_path):
    """0, 2 and 0 nodes. Ray Data asks for a second GPU after half a minute, when it knows the speed of the stages."""
    items = write_manifest(tmp_path / "items.jsonl", repeats)
    trial = Trial(tmp_path / "items.jsonl", tmp_path / "out", ("--shard-audio-s", "60"), random.Random(0))
    with RayNodes(head_cpus=2, grows_by={"CPU": 1, resource: 1}) as cluster:
        pools = ("--model-resource", resource, "--model-actors", "1:2", "--feature-actors", "1:8")
        started = time.monotonic()
        job = trial.start("--ray-address", cluster.address, *pools, variables=cluster.environment)
        for count in (1, 2):
            job.wait_until(lambda: len(actors(cluster.head, "RecogniseShards")) == count, f"{count} model actors")  # noqa: B023
            print(f"{count} model actors after {time.monotonic() - started:.0f} s, {job.parts()} parts")
            assert cluster.count_nodes() >= 1 + count
        assert trial.end(job) == 0, trial.printed
        print(f"end after {time.monotonic() - started:.0f} s")
        wait_until(lambda: cluster.count_nodes() == 1, "end of the nodes")
        print(f"no node any more after {time.monotonic() - started:.0f} s")
    ids = ds.dataset(trial.output / "transcripts").to_table(columns=["id"])["id"].to_pylist()
    assert (len(ids), len(set(ids))) == (items, items)
    assert len(shards_by_model_worker(trial.output)) == 2


def actors(node, name: str) -> list[int]:
    """Process ids of the actors of a stage on a node."""
    return session_members(node.pid, name)


def shards_by_model_worker(output: Path) -> dict[int, int]:
    """Process id -> shards that its model actor did, as the events say."""
    shards: dict[int, int] = {}
    for file in sorted((output / "events").iterdir()):
        for line in file.read_text().splitlines():
            event = json.loads(line)
            if event["event"] == "shard":
                worker = int(event["model_worker"].rpartition(":")[2])
                shards[worker] = shards.get(worker, 0) + 1
    return shards
