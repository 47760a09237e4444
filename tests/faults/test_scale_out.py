"""Model actors on a cluster that starts without a place for them, gains two, loses one, and is left by all in the end.

What a model actor takes is a custom resource, as a GPU is: nodes with it are added by hand where an autoscaler would.
"""

import random

import pyarrow.dataset as ds
from job_process import session_members, wait_until, write_manifest
from kills import Trial
from ray_nodes import RayNodes

REPEATS = 8  # of 44 prompts
SLOT = {"slot": 1.0}


def test_model_actors_come_go_and_leave_with_their_nodes(tmp_path):
    items = write_manifest(tmp_path / "items.jsonl", REPEATS)
    trial = Trial(tmp_path / "items.jsonl", tmp_path / "out", ("--shard-audio-s", "40"), random.Random(0))
    with RayNodes(head_cpus=2) as cluster:
        # More feature actors are wanted than CPUs are there: the model actors must find theirs all the same.
        pools = ("--model-resource", "slot", "--model-actors", "2", "--feature-actors", "1:8")
        job = trial.start("--ray-address", cluster.address, *pools, variables=cluster.environment)
        job.wait_until(lambda: actors(cluster.head, "PrepareShards"), "feature actors")
        first = cluster.add_node(cpus=1, resources=SLOT)
        job.wait_for_parts(1)
        assert actors(first, "RecogniseShards") == 1
        second = cluster.add_node(cpus=1, resources=SLOT)
        job.wait_until(lambda: actors(second, "RecogniseShards"), "a model actor on the second node")
        cluster.nodes.remove(first)
        cluster.kill_node(first)
        status = trial.end(job)
        assert status == 0, trial.printed
        wait_until(lambda: not actors(second, "MapWorker"), "end of the actors")
    ids = ds.dataset(trial.output / "transcripts").to_table(columns=["id"])["id"].to_pylist()
    assert (len(ids), len(set(ids))) == (items, items)


def actors(node, name: str) -> int:
    """Actors of a stage on a node."""
    return len(session_members(node.pid, name))
