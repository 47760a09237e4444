"""Model actors on a cluster that starts without a place for them, gains two, loses one, and is left by all in the end.

What a model actor takes is a custom resource, as a GPU is: nodes with it are added by hand where an autoscaler would.
"""

import json
import os
import random
import signal
from pathlib import Path

from job_process import session_members, wait_until
from kills import Trial, parts_of
from ray_nodes import RayNodes

SLOT = {"slot": 1.0}
HELD = 2  # shards that a model actor has at work or waiting (stages.TASKS_PER_ACTOR)


def test_model_actors_come_go_and_leave_with_their_nodes(source, options, undisturbed, tmp_path):
    trial = Trial(source, tmp_path / "out", options, random.Random(0))
    shards = len(parts_of(undisturbed))
    with RayNodes(head_cpus=2, quick=True) as cluster:
        # More feature actors are wanted than CPUs are there: the model actors must find theirs all the same.
        pools = ("--model-resource", "slot", "--model-actors", "1:2", "--feature-actors", "1:8")
        job = trial.start("--ray-address", cluster.address, *pools, variables=cluster.environment)
        job.wait_until(lambda: actors(cluster.head, "PrepareShards"), "feature actors")
        assert not job.parts()

        first = cluster.add_node(cpus=1, resources=SLOT)
        job.wait_for_parts(1)
        (first_model,) = actors(first, "RecogniseShards")
        os.kill(first_model, signal.SIGSTOP)  # as slow as a worker can be: it keeps the shards in its hands
        second = cluster.add_node(cpus=1, resources=SLOT)
        job.wait_for_parts(shards - HELD)  # the second does all others
        (second_model,) = actors(second, "RecogniseShards")

        cluster.nodes.remove(first)
        cluster.kill_node(first)
        assert trial.end(job) == 0, trial.printed
        wait_until(lambda: not actors(second, "MapWorker"), "end of the actors")
    assert parts_of(trial.output) == parts_of(undisturbed)
    assert "waits for a node with slot" in trial.printed[-1]
    workers = shards_by_model_worker(trial.output)
    assert set(workers) >= {first_model, second_model}
    assert sum(workers.values()) == shards


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
