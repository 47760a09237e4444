"""The Ray Data graph of the job, and how its actors share a cluster. The one file that builds it.

    todo shards -> PrepareShards (CPU actors) -> RecogniseShards (GPU actors) -> CommitShards (CPU) -> results

Without a GPU one actor per CPU runs the three stages in turn (`ChainedStages`), unless the feature pool is sized by the
user: nothing has to wait for anything else there, no bytes go through the object store, and fewer processes start.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pyarrow as pa
import ray
import ray.data

from jobs.config import PoolSize, TranscribeConfig
from jobs.models import ModelReference
from jobs.planning.shards import AUTO_MAX_S
from jobs.stages import TASKS_PER_ACTOR, ChainedStages, CommitShards, PrepareShards, RecogniseShards
from jobs.storage.connections import StorageOptions
from jobs.storage.files import Storage
from parakeet_core.audio import DEFAULT_MAX_DURATION_S
from parakeet_core.errors import ConfigError

# Shares of a CPU that Ray accounts for. The commit actors and the actors of a GPU take none: they must find a place
# even when feature actors hold every CPU.
CHAINED_SHARE = 1.0
FEATURE_SHARE = 1.0
CPU_MODEL_SHARE = 0.5  # beside stated feature actors: the operating system divides the cores, backpressure the work
GPU_CALLS = 2  # shards in a GPU's actor at a time: the device works on one while the host packs or unpacks the other
MODELS_PER_COMMIT_ACTOR = 8  # text and Parquet of one shard take about 1 % of the model's time on a CPU

GPU = "GPU"  # Ray's name of the resource

PROCESS_BYTES = 600 << 20  # a worker with torch, pyarrow and soundfile loaded; measured 450 MiB
READ_AHEAD_BYTES = 256 << 20  # encoded bytes that a feature actor may hold (reading.ReadLimits)
FEATURE_COPIES = 4  # of a shard's features at a time: rows, table, packed block, and Ray's copy of it; measured 3 + 1
# Of one shard; the second of two budgets. An item that ends its worker costs one of these, and with the next try it is
# a row of the first budget, --max-error-rate (reading/isolation.py). The others are for what no item is to blame for:
# spot nodes take few shards twice, and a shard that lost six workers meets what stays: too little memory, a defect.
LOST_WORKER_RETRIES = 5
FEATURE_BYTES_PER_S = 80 * 100 * 4  # float32, 80 mel bins: the larger of the two feature types
SAMPLE_BYTES_PER_S = 16000 * 4  # float32
BLOCK_BYTES_LIMIT = 1 << 30  # above the largest shard's features, so that Ray does not count a shard as several blocks


@dataclass(frozen=True)
class Resources:
    """What the actors of a run ask Ray for.

    Attributes:
        device: "cpu" or "cuda".
        feature_pool, model_pool: fewest and most actors. No feature pool: the model actors run all stages.
        model_cpus: CPUs accounted to each model actor.
        features: "cpu" or "gpu": which actors compute features.
        model_start: model actors that are started at once, without waiting for Ray Data to see that they are needed.
        model_resource: custom resource that each model actor takes one of.
        awaited: what model actors run on, if no node of the cluster has it now.
        feature_bytes, model_bytes: memory accounted to each actor.
    """

    device: str
    feature_pool: PoolSize | None
    model_pool: PoolSize
    model_cpus: float
    feature_bytes: int
    model_bytes: int
    features: str = "cpu"
    model_start: int = 1
    model_resource: str | None = None
    awaited: str | None = None

    def describe(self) -> str:
        """The pools in words."""
        model = f"{self.model_pool[0]}-{self.model_pool[1]} model actors"
        if self.awaited:
            model += f"; waits for a node with {self.awaited}"
        if self.feature_pool is None:
            return f"{model}, each reading, decoding and writing its own shards"
        return f"{self.feature_pool[0]}-{self.feature_pool[1]} feature and {model}"


def plan_resources(
    config: TranscribeConfig,
    device: str,
    cluster: dict[str, float],
    shards: int,
    shard_audio_s: float,
    weight_bytes: int,
    grows: bool = True,
) -> Resources:
    """Pools that fit the cluster as it is now; stated pool sizes are taken as they are, for clusters that grow.

    Args:
        device: "cpu" or "cuda".
        cluster: `ray.cluster_resources()`.
        shard_audio_s: of the longest.
        shards: to do; more actors than shards would be idle.
        weight_bytes: of the model in the dtype it runs in.
        grows: whether nodes may come to the cluster.

    Raises:
        ConfigError: the smallest pools do not fit the cluster's memory, or the cluster has none of what model actors
            run on while no size of their pool says that it will grow, or it cannot grow.
    """
    cpus = max(int(cluster.get("CPU", 1)), 1)
    slot = config.model_resource or (GPU if device == "cuda" else None)  # what places for model actors are counted in
    slots = int(cluster.get(slot, 0)) if slot else cpus
    if not slots and not grows:
        raise ConfigError(
            f"--device {device}, but the cluster that was started on this machine has no {slot}, and no node comes to "
            "it; name the cluster to join with --ray-address"
        )
    if not slots and config.model_actors is None:
        raise ConfigError(
            f"--device {device}, but the cluster has no {slot} now; if it is to add such nodes, say how many: "
            "--model-actors N"
        )
    model_pool = config.model_actors or (1, _at_most(slots, shards))
    feature_pool = config.feature_actors
    if feature_pool is None and slot:
        feature_pool = (1, _at_most(cpus - 1, shards))
    bytes_per_s = SAMPLE_BYTES_PER_S if config.features == "gpu" else FEATURE_BYTES_PER_S
    model_bytes = PROCESS_BYTES + 2 * weight_bytes
    model_cpus = 0.0 if slot else CPU_MODEL_SHARE
    awaited = None if slots else slot
    if feature_pool and not slot and feature_pool[0] * FEATURE_SHARE + model_pool[0] * CPU_MODEL_SHARE > cpus:
        awaited = f"CPUs for model actors: feature actors take {feature_pool[0] * FEATURE_SHARE:g} of {cpus}"
    # A manifest may say anything of a length, but no item is decoded beyond the limit.
    seconds = min(shard_audio_s, max(config.shard_audio_s or 0, DEFAULT_MAX_DURATION_S))
    usual_s = config.shard_audio_s or AUTO_MAX_S
    if seconds > usual_s and cluster.get("memory"):  # one long item: tried with what there is, not refused with all
        fewest = feature_pool[0] if feature_pool else min(model_pool[0], slots)
        others = min(model_pool[0], slots) * model_bytes + (fewest * PROCESS_BYTES if feature_pool else 0)
        spare = (cluster["memory"] - others) / fewest - READ_AHEAD_BYTES
        seconds = max(usual_s, min(seconds, spare / (FEATURE_COPIES * bytes_per_s)))
    feature_bytes = READ_AHEAD_BYTES + int(FEATURE_COPIES * seconds * bytes_per_s)
    resources = Resources(
        device=device,
        feature_pool=feature_pool,
        model_pool=model_pool,
        model_cpus=model_cpus if feature_pool else CHAINED_SHARE,
        feature_bytes=PROCESS_BYTES + feature_bytes,
        model_bytes=model_bytes if feature_pool else model_bytes + feature_bytes,
        features=config.features,
        model_resource=config.model_resource,
        awaited=awaited,
    )
    _check_memory(resources, cluster, slots)
    fit = min(slots, cluster.get("memory", math.inf) // resources.model_bytes)
    return replace(resources, model_start=int(min(max(fit, model_pool[0]), model_pool[1])))


def _at_most(wanted: int, shards: int) -> int:
    return max(1, min(wanted, shards))


def _check_memory(resources: Resources, cluster: dict[str, float], slots: int) -> None:
    """Refuse what would wait for ever. Model actors without a slot now are for nodes that bring their own memory."""
    features = resources.feature_pool[0] * resources.feature_bytes if resources.feature_pool else 0
    asked = features + min(resources.model_pool[0], slots) * resources.model_bytes
    available = cluster.get("memory", 0)
    if available and asked > available:
        raise ConfigError(
            f"the smallest pools need {asked / 2**30:.1f} GiB of memory, the cluster gives Ray "
            f"{available / 2**30:.1f} GiB; use fewer --feature-actors or a larger node, or start another --output with "
            "a smaller --shard-audio-s"
        )


def run_shards(
    todo: pa.Table,
    output: Storage,
    storage: StorageOptions,
    model: ModelReference,
    dtype: str,
    resources: Resources,
    fingerprint: str,
    provenance: dict[str, str],
) -> Iterator[dict]:
    """Transcribe and commit shards; yields one dict per committed shard, as they finish.

    Args:
        todo: rows of `jobs.planning.store.SHARD_SCHEMA`.
        storage: how to reach the sources.
    """
    feature_dtype = "float32" if dtype == "float32" else "float16"
    prepare = (PrepareShards, (output, storage, model.config.frontend, feature_dtype, resources.features))
    recognise = (RecogniseShards, (output, model, dtype, resources.device, feature_dtype))
    commit = (CommitShards, (output, model.tokenizer, model.config.encoder_frame_s, fingerprint, provenance))
    taken = {resources.model_resource} - {None} | ({GPU} if resources.device == "cuda" else set())
    calls = GPU_CALLS if GPU in taken else 1
    model_pool = _pool(resources.model_pool, resources.model_cpus, resources.model_bytes, calls, resources.model_start)
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = BLOCK_BYTES_LIMIT
    context.execution_no_progress_timeout_s = -1  # Ray Data gives up after 30 minutes; a spot node may take longer
    tasks = [{name: row[name] for name in ("shard", "plan_file", "row_group", "items")} for row in todo.to_pylist()]
    with ray.data.DataContext.current(context):
        dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
        if resources.feature_pool is None:
            chain = ([prepare, recognise, commit],)
            dataset = dataset.map_batches(ChainedStages, fn_constructor_args=chain, **model_pool)
        else:
            model_pool |= {"num_gpus": len(taken & {GPU}), "resources": dict.fromkeys(taken - {GPU}, 1.0)}
            commit_pool = (1, -(-resources.model_pool[1] // MODELS_PER_COMMIT_ACTOR))
            dataset = (
                dataset.map_batches(
                    prepare[0],
                    fn_constructor_args=prepare[1],
                    **_pool(resources.feature_pool, FEATURE_SHARE, resources.feature_bytes),
                )
                .map_batches(recognise[0], fn_constructor_args=recognise[1], **model_pool)
                .map_batches(commit[0], fn_constructor_args=commit[1], **_pool(commit_pool, 0, PROCESS_BYTES))
            )
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch.to_pylist()


def _pool(size: PoolSize, cpus: float, memory: int, calls: int = 1, start: int | None = None) -> dict:
    """Arguments of `map_batches` for a stage whose actors work on `calls` shards at a time, and have as many waiting.

    With fewer waiting the pool would not grow: Ray Data adds an actor when there are 1.75 times as many shards in the
    actors as these work on (`actor_pool_util_upscaling_threshold`).

    Args:
        start: actors to begin with, the fewest by default.
    """
    return {
        "batch_size": 1,  # a shard, which is the block's only row; with GPUs Ray Data wants to be told
        "batch_format": "pyarrow",
        "zero_copy_batch": True,
        "num_cpus": cpus,
        "memory": memory,
        "max_task_retries": LOST_WORKER_RETRIES,
        "compute": ray.data.ActorPoolStrategy(
            min_size=size[0],
            max_size=size[1],
            initial_size=start,
            max_tasks_in_flight_per_actor=calls * TASKS_PER_ACTOR,
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=calls > 1,
        ),
    }
