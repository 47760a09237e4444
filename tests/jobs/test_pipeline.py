"""How the pools fit a cluster, and that a block carries a shard unharmed."""

import platform
import subprocess
import sys

import pyarrow as pa
import pytest
from job_layouts import job_config

from jobs.blocks import StageClock, pack_shard, unpack_shard
from jobs.pipeline import plan_resources
from parakeet_core import ConfigError

GIB = 2**30
NODE = {"CPU": 16.0, "GPU": 2.0, "memory": 64.0 * GIB}


def resources(device: str, cluster: dict, shards: int = 100, longest_s: float = 1800.0, grows: bool = True, **options):
    config = job_config("in", "out", **{"model_actors": None} | options)
    return plan_resources(config, device, cluster, shards, longest_s, GIB, grows)


def test_one_model_actor_per_gpu_and_a_cpu_left_beside_the_feature_actors():
    found = resources("cuda", NODE)
    assert (found.model_pool, found.feature_pool) == ((1, 2), (1, 15))
    assert found.model_cpus == 0  # its slot cannot be taken by feature actors


def test_without_gpu_each_cpu_runs_all_stages():
    found = resources("cpu", {"CPU": 4.0, "memory": 16.0 * GIB})
    assert (found.model_pool, found.feature_pool, found.model_cpus) == ((1, 4), None, 1.0)


def test_a_custom_resource_places_model_actors_as_a_gpu_does():
    found = resources("cpu", {"CPU": 4.0, "slot": 3.0, "memory": 16.0 * GIB}, model_resource="slot")
    assert (found.model_pool, found.feature_pool, found.model_cpus) == ((1, 3), (1, 3), 0)
    with pytest.raises(ConfigError, match="no slot now"):
        resources("cpu", {"CPU": 4.0}, model_resource="slot")


def test_memory_of_nodes_that_are_still_to_come_is_not_asked_of_those_that_are_there():
    assert resources("cuda", {"CPU": 4.0, "memory": 8.0 * GIB}, model_actors=(16, 16)).model_pool == (16, 16)


def test_no_more_actors_than_shards_and_stated_pools_are_taken_as_they_are():
    assert resources("cpu", NODE, shards=3).model_pool == (1, 3)
    found = resources("cuda", {"CPU": 2.0}, model_actors=(0 + 1, 64), feature_actors=(2, 128))
    assert (found.model_pool, found.feature_pool) == ((1, 64), (2, 128))


@pytest.mark.parametrize(
    ("device", "cluster", "options", "start"),
    [
        ("cpu", {"CPU": 4.0, "memory": 64.0 * GIB}, {}, 4),
        ("cpu", {"CPU": 16.0, "memory": 12.0 * GIB}, {}, 3),  # of 3.6 GiB each
        ("cuda", NODE, {"model_actors": (1, 64)}, 2),
        ("cuda", NODE, {"model_actors": (1, 1)}, 1),
        ("cuda", {"CPU": 4.0}, {"model_actors": (3, 64)}, 3),  # none has a place yet
    ],
)
def test_model_actors_that_have_a_place_start_at_once(device, cluster, options, start):
    assert resources(device, cluster, **options).model_start == start


@pytest.mark.parametrize(
    ("device", "cluster", "message"),
    [("cuda", {"CPU": 8.0}, "no GPU now"), ("cpu", {"CPU": 8.0, "memory": 1.0 * GIB}, "smallest pools need")],
)
def test_what_does_not_fit_is_refused_instead_of_waiting_for_ever(device, cluster, message):
    with pytest.raises(ConfigError, match=message):
        resources(device, cluster)


@pytest.mark.parametrize(("device", "options"), [("cuda", {}), ("cuda", {"model_resource": "slot"})])
def test_a_cluster_to_which_no_node_comes_is_not_waited_for(device, options):
    options = {**options, "model_actors": (1, 2)}
    assert resources(device, {"CPU": 2.0}, **options).awaited
    with pytest.raises(ConfigError, match="started on this machine has no (GPU|slot), .* --ray-address"):
        resources(device, {"CPU": 2.0}, grows=False, **options)
    assert resources("cpu", {"CPU": 2.0}, grows=False).awaited is None


@pytest.mark.parametrize("options", [{}, {"feature_actors": (1, 2)}, {"shard_audio_s": 3600.0}])
@pytest.mark.parametrize("memory_gib", [6.0, 7.5, 64.0])
def test_one_item_said_to_be_long_asks_for_what_there_is(options, memory_gib):
    """A manifest with "duration": 1e8 on a small node."""
    cluster = {"CPU": 4.0, "memory": memory_gib * GIB}
    usual, found = resources("cpu", cluster, **options), resources("cpu", cluster, longest_s=1e8, **options)
    largest = resources("cpu", {"CPU": 4.0}, longest_s=1e8, **options)
    assert usual.feature_bytes <= found.feature_bytes <= largest.feature_bytes
    asked = found.model_bytes + (found.feature_bytes if found.feature_pool else 0)
    assert asked <= cluster["memory"]
    assert (found.feature_bytes == largest.feature_bytes) == (memory_gib == 64.0)


def test_feature_actors_that_leave_no_cpu_are_told_of():
    """A cluster may grow, so it is no error; on one that does not nothing would be done."""
    assert "waits for a node with CPUs" in resources("cpu", {"CPU": 2.0}, feature_actors=(2, 2)).describe()
    for cpus, pool in ((3.0, (2, 4)), (2.0, (1, 2))):
        assert resources("cpu", {"CPU": cpus}, feature_actors=pool).awaited is None
    assert resources("cuda", {"CPU": 2.0, "GPU": 1.0}, feature_actors=(2, 2)).awaited is None


MEMORY_AFTER_A_BATCH = """
import sys
from pathlib import Path
import torch
from jobs.stages import keep_freed_memory

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()
before = resident_mib()
states = [torch.ones(1 << 21) for _ in range(16)]  # 8 MiB each
del states
print(resident_mib() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_memory_of_a_batch_is_kept_for_the_next_one():
    command = [sys.executable, "-c", MEMORY_AFTER_A_BATCH]
    kept, given_back = (int(subprocess.check_output([*command, how])) for how in ("kept", "given back"))
    assert given_back < 16 < 120 < kept  # of 128


def test_a_packed_shard_comes_back_as_it_was():
    table = pa.table({"id": ["a", "b"], "features": pa.array([b"", b"\x00\x01"], pa.large_binary())})
    clock = StageClock(storage_s=1.5, model_s=2.5)
    shard, found, found_clock = unpack_shard(pack_shard("0000-000001", table, clock))
    assert shard == "0000-000001"
    assert found.equals(table)
    assert found_clock == clock


def test_two_shards_in_one_block_are_a_defect():
    block = pack_shard("0000-000001", pa.table({"id": ["a"]}), StageClock())
    with pytest.raises(RuntimeError, match="2 shards"):
        unpack_shard(pa.concat_tables([block, block]))
