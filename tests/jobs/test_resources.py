"""jobs/resources.py: how the pools fit a cluster, and that actors ask for the memory that their shards take."""

from dataclasses import replace

import pytest
from job_layouts import TINY_EN, job_config

from jobs.inputs.plan_rows import plan_batch
from jobs.models import resolve_model
from jobs.planning.shards import plan_shards
from jobs.planning.store import read_plan, write_plan
from jobs.resources import Work, measure_work, plan_resources
from jobs.storage.connections import DEFAULT_OPTIONS
from jobs.storage.files import Storage
from parakeet_core import ConfigError
from parakeet_core.audio import DEFAULT_MAX_DURATION_S

GIB = 2**30
NODE = {"CPU": 16.0, "GPU": 2.0, "memory": 64.0 * GIB}
FLOAT32, HALF = 80 * 100 * 4, 80 * 100 * 2  # bytes of features per second
USUAL = Work(shards=100, shard_audio_s=1800.0, item_audio_s=0.0, bytes_per_s=FLOAT32, weight_bytes=GIB)
TAR_S = 35 * 3600.0  # 500 MB of Opus
TAR = replace(USUAL, shard_audio_s=TAR_S, container="s3://b/a.tar")


def resources(device: str, *nodes: dict, grows: bool = True, work: Work = USUAL, **options):
    config = job_config("in", "out", **{"model_actors": None} | options)
    return plan_resources(config, device, list(nodes), work, grows)


def test_one_model_actor_per_gpu_and_a_cpu_left_for_each_beside_the_feature_actors():
    found = resources("cuda", NODE)
    assert (found.model_pool, found.feature_pool) == ((1, 2), (1, 14))
    assert resources("cuda", NODE, model_actors=(1, 1)).feature_pool == (1, 15)
    assert resources("cuda", {"CPU": 4.0, "GPU": 8.0}).feature_pool == (1, 1)
    assert found.model_cpus == 0  # its slot cannot be taken by feature actors


def test_without_gpu_each_cpu_runs_all_stages():
    found = resources("cpu", {"CPU": 4.0, "memory": 16.0 * GIB})
    assert (found.model_pool, found.feature_pool, found.model_cpus) == ((1, 4), None, 1.0)


def test_a_custom_resource_places_model_actors_as_a_gpu_does():
    found = resources("cpu", {"CPU": 4.0, "slot": 3.0, "memory": 16.0 * GIB}, model_resource="slot")
    assert (found.model_pool, found.feature_pool, found.model_cpus) == ((1, 3), (1, 1), 0)
    with pytest.raises(ConfigError, match="no slot now"):
        resources("cpu", {"CPU": 4.0}, model_resource="slot")


def test_memory_of_nodes_that_are_still_to_come_is_not_asked_of_those_that_are_there():
    assert resources("cuda", {"CPU": 4.0, "memory": 8.0 * GIB}, model_actors=(16, 16)).model_pool == (16, 16)


def test_no_more_actors_than_shards_and_stated_pools_are_taken_as_they_are():
    assert resources("cpu", NODE, work=replace(USUAL, shards=3)).model_pool == (1, 3)
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
    work = replace(USUAL, item_audio_s=DEFAULT_MAX_DURATION_S)
    usual, found = resources("cpu", cluster, **options), resources("cpu", cluster, work=work, **options)
    largest = resources("cpu", {"CPU": 4.0}, work=work, **options)
    assert usual.feature_bytes <= found.feature_bytes <= largest.feature_bytes
    asked = found.model_bytes + (found.feature_bytes if found.feature_pool else 0)
    assert asked <= cluster["memory"]
    assert (found.feature_bytes == largest.feature_bytes) == (memory_gib == 64.0)


def test_feature_actors_that_leave_no_cpu_are_told_of():
    """A cluster may grow, so this is no error; on one that does not grow, nothing would be done."""
    assert "waits for a node with CPUs" in resources("cpu", {"CPU": 2.0}, feature_actors=(2, 2)).describe()
    for cpus, pool in ((3.0, (2, 4)), (2.0, (1, 2))):
        assert resources("cpu", {"CPU": cpus}, feature_actors=pool).awaited is None
    assert resources("cuda", {"CPU": 2.0, "GPU": 1.0}, feature_actors=(2, 2)).awaited is None


@pytest.mark.parametrize(("device", "options"), [("cpu", {}), ("cpu", {"feature_actors": (1, 4)}), ("cuda", {})])
def test_a_tar_asks_for_all_its_hours(device, options):
    """No item in it is longer than the limit on an item; together they are three times that."""
    node = {"CPU": 4.0, "GPU": 1.0, "memory": 64.0 * GIB}
    for bytes_per_s in (FLOAT32, HALF):
        found = resources(device, node, work=replace(TAR, bytes_per_s=bytes_per_s), **options)
        assert found.preparing_bytes > 5 * TAR_S * bytes_per_s
        assert found.block_bytes > TAR_S * bytes_per_s
    assert found.preparing_bytes < 5 * TAR_S * FLOAT32


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ([8.0], "the smallest pools need .* GiB of memory, the cluster gives Ray 8.0 GiB"),
        ([16.0, 16.0, 16.0], "one actor needs .* GiB of memory, the largest node gives Ray 16.0 GiB"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"feature_actors": (1, 4)}])
def test_a_tar_that_no_node_can_hold_is_named_and_refused(nodes, found, options):
    nodes = [{"CPU": 4.0, "memory": gib * GIB} for gib in nodes]
    with pytest.raises(
        ConfigError, match=f"^s3://b/a.tar holds about 35.0 h of audio, .*{found}; use a larger node.*tar"
    ):
        resources("cpu", *nodes, work=TAR, **options)


def test_nodes_that_are_awaited_may_bring_the_memory_for_a_tar():
    found = resources("cuda", {"CPU": 4.0, "memory": 8.0 * GIB}, work=TAR, model_actors=(1, 4))
    assert "waits for a node with GPU and " in found.describe()


def test_what_a_plan_asks_for(tmp_path):
    """For an item of a manifest, no more than is decoded, whatever the manifest says; for a container, all of it."""
    files = {"id": ["a", "b"], "source": ["/a.wav", "/b.wav"], "audio_s": [1e8, 60.0], "items": [1, 1]}
    tars = {"id": ["t.tar"], "source": ["/t.tar"], "audio_s": [TAR_S]}
    groups = {"id": ["p#0"], "source": ["/p.parquet"], "row_group": [3], "audio_s": [2 * TAR_S], "items": [9000]}
    model = resolve_model(str(TINY_EN), DEFAULT_OPTIONS)
    for rows, expected in (
        ([("file", files)], (0.0, DEFAULT_MAX_DURATION_S, None)),
        ([("file", files), ("tar", tars)], (TAR_S, DEFAULT_MAX_DURATION_S, "/t.tar")),
        ([("tar", tars), ("parquet", groups)], (2 * TAR_S, 0.0, "row group 3 of /p.parquet")),
    ):
        with plan_shards([plan_batch(*row) for row in rows]) as plan:
            output = Storage(f"{tmp_path}/{len(rows)}{rows[0][0]}")
            todo = read_plan(output, [write_plan(output, plan)])
        found = measure_work(output, todo, model, "cpu", "float32")
        assert (found.shard_audio_s, found.item_audio_s, found.container) == expected
        assert (found.shards, found.bytes_per_s) == (todo.num_rows, FLOAT32)
    assert measure_work(output, todo, model, "cpu", "bfloat16").bytes_per_s == HALF
    assert measure_work(output, todo, model, "gpu", "bfloat16").bytes_per_s == 32_000
    assert measure_work(output, todo, model, "gpu", "float32").bytes_per_s == 64_000
