"""How many actors run the stages, and what each asks of the cluster. Knows nothing of the graph that they form.

Ray places an actor on a node that has the memory the actor asks for, and then lets it take more, until the node is full
and workers are killed. So what is asked for here must be what the longest shard takes.
"""

import math
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from jobs.config import PoolSize, TranscribeConfig
from jobs.models import ModelReference
from jobs.planning.shards import AUTO_MAX_S
from jobs.planning.store import read_shard
from jobs.storage.files import Storage
from parakeet_core.audio import DEFAULT_MAX_DURATION_S
from parakeet_core.checkpoint import resolve_dtype
from parakeet_core.errors import ConfigError

# CPUs, as Ray accounts for them. Commit actors and GPU actors take none: they must find a place even when feature
# actors hold every CPU.
CHAINED_SHARE = 1.0
FEATURE_SHARE = 1.0
CPU_MODEL_SHARE = 0.5  # beside a stated feature pool: the system divides the cores, backpressure the work
GPU = "GPU"  # Ray's name of the resource

PROCESS_BYTES = 600 << 20  # a worker with torch, pyarrow and soundfile loaded; measured 450 MiB
READ_AHEAD_BYTES = 256 << 20  # encoded bytes that a feature actor may hold (reading.ReadLimits)
# Copies of a shard's features held at a time: rows, table, packed block, buffers that the table has outgrown, and Ray's
# copy of the block; measured 4 + 1, with tars of 3 h, in float16 and in float32.
FEATURE_COPIES = 5
ITEM_BYTES_PER_S = 2 * 16000 * 4  # of a long item while it is decoded: float32 samples, in an array that grows
BLOCK_BYTES = 1 << 30  # in addition to the longest shard's features: more than its rows and the error of estimates


@dataclass(frozen=True)
class Work:
    """What is to be done, as far as the number of actors and their memory depend on it.

    Attributes:
        shards: number to do; more actors than shards would be idle.
        shard_audio_s: of the longest shard with several items, that is, a usual shard or a container of any length.
        item_audio_s: of the longest item that is a shard of its own, up to the limit to which it is decoded.
        bytes_per_s: bytes that a second of audio takes between the stages.
        weight_bytes: of the model in the dtype it runs in.
        container: the container that is the longest shard of several items, if it is one.
    """

    shards: int
    shard_audio_s: float
    item_audio_s: float
    bytes_per_s: float
    weight_bytes: int
    container: str | None = None


def measure_work(output: Storage, todo: pa.Table, model: ModelReference, features: str, dtype: str) -> Work:
    """What the remaining shards require.

    Args:
        output: where their plan is stored.
        todo: rows of `jobs.planning.store.SHARD_SCHEMA`.
        features: "cpu" or "gpu", where they are computed.
        dtype: that the model runs in.
    """
    # A shard longer than usual is one row of the plan. A manifest may claim any length for an item, but no item is
    # decoded beyond the limit; a container of many items has no limit.
    single = pc.and_(pc.equal(todo["rows"], 1), pc.equal(todo["items"], 1))
    items, others = todo.filter(single), todo.filter(pc.invert(single))
    longest = others.sort_by([("audio_s", "descending")]).slice(0, 1).to_pylist()
    frontend, itemsize = model.config.frontend, 4 if dtype == "float32" else 2  # float32, or float16 and int16
    return Work(
        shards=todo.num_rows,
        shard_audio_s=longest[0]["audio_s"] if longest else 0.0,
        item_audio_s=min(pc.max(items["audio_s"]).as_py() or 0.0, DEFAULT_MAX_DURATION_S),
        bytes_per_s=itemsize * (frontend.sample_rate_hz if features == "gpu" else frontend.n_mels / frontend.frame_s),
        weight_bytes=model.parameters * resolve_dtype(dtype).itemsize,
        container=_container(output, longest[0]) if longest and longest[0]["audio_s"] > AUTO_MAX_S else None,
    )


def _container(output: Storage, shard: dict) -> str | None:
    """The name of the container that a shard consists of, if it does."""
    if shard["rows"] != 1:
        return None
    (row,) = read_shard(output, shard["plan_file"], shard["row_group"]).to_pylist()
    return row["source"] if row["row_group"] is None else f"row group {row['row_group']} of {row['source']}"


@dataclass(frozen=True)
class Resources:
    """What the actors of a run ask Ray for.

    Attributes:
        device: "cpu" or "cuda".
        feature_pool, model_pool: fewest and most actors. Without a feature pool the model actors run all stages.
        model_cpus: CPUs accounted to each model actor.
        features: "cpu" or "gpu": which actors compute features.
        model_start: model actors that are started at once, without waiting for Ray Data to notice that they are needed.
        model_resource: custom resource that each model actor takes one of.
        awaited: what model actors run on, if no node of the cluster has it now.
        feature_bytes, model_bytes: memory accounted to each actor.
        block_bytes: above what any shard takes between the stages, so that Ray does not count one as several blocks.
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
    block_bytes: int = BLOCK_BYTES

    @property
    def preparing_bytes(self) -> int:
        """Memory of each actor that reads and decodes."""
        return self.feature_bytes if self.feature_pool else self.model_bytes

    def describe(self) -> str:
        """The pools in words."""
        model = f"{self.model_pool[0]}-{self.model_pool[1]} model actors"
        if self.awaited:
            model += f"; waits for a node with {self.awaited}"
        if self.feature_pool is None:
            return f"{model}, each reading, decoding and writing its own shards"
        return f"{self.feature_pool[0]}-{self.feature_pool[1]} feature and {model}"


@dataclass(frozen=True)
class Places:
    """What the cluster has now.

    Attributes:
        cpus: at least 1.
        slot, slots: the resource that each model actor takes one of, None for CPUs; and how many there are.
        memory, largest_node: bytes of all nodes and of the largest; infinite where Ray does not say.
    """

    cpus: int
    slot: str | None
    slots: int
    memory: float
    largest_node: float


def plan_resources(
    config: TranscribeConfig, device: str, nodes: list[dict[str, float]], work: Work, grows: bool = True
) -> Resources:
    """Pools that fit the cluster as it is now; stated pool sizes are used unchanged, for clusters that grow.

    Args:
        device: "cpu" or "cuda".
        nodes: the resources of each node.
        grows: whether nodes may join the cluster.

    Raises:
        ConfigError: the smallest pools do not fit the cluster's memory; or the cluster has none of what model actors
            run on, and either it cannot grow or no stated size of their pool says that it will.
    """
    places = _places(config, device, nodes, grows)
    model_pool = config.model_actors or (1, _at_most(places.slots, work.shards))
    feature_pool = config.feature_actors
    if feature_pool is None and places.slot:
        # Each model actor keeps a CPU busy: that of a GPU pads and sends batches, and unpacks the results.
        feature_pool = (1, _at_most(places.cpus - max(min(places.slots, model_pool[1]), 1), work.shards))
    model_bytes = PROCESS_BYTES + 2 * work.weight_bytes
    shard_bytes = _shard_bytes(config, work, _room(places, feature_pool, model_pool, model_bytes))
    model_cpus = 0.0 if places.slot else CPU_MODEL_SHARE
    resources = Resources(
        device=device,
        feature_pool=feature_pool,
        model_pool=model_pool,
        model_cpus=model_cpus if feature_pool else CHAINED_SHARE,
        feature_bytes=PROCESS_BYTES + shard_bytes,
        model_bytes=model_bytes if feature_pool else model_bytes + shard_bytes,
        features=config.features,
        model_resource=config.model_resource,
        block_bytes=BLOCK_BYTES + int(max(work.shard_audio_s, work.item_audio_s) * work.bytes_per_s),
    )
    resources = replace(resources, awaited=_awaited(resources, places))
    _check_memory(resources, places, work)
    fit = min(places.slots, places.memory // resources.model_bytes)
    return replace(resources, model_start=int(min(max(fit, model_pool[0]), model_pool[1])))


def _places(config: TranscribeConfig, device: str, nodes: list[dict[str, float]], grows: bool) -> Places:
    """What `nodes` have for the job. Raises ConfigError if model actors would wait for ever."""
    slot = config.model_resource or (GPU if device == "cuda" else None)
    cpus = max(int(sum(node.get("CPU", 0) for node in nodes)), 1)
    slots = int(sum(node.get(slot, 0) for node in nodes)) if slot else cpus
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
    memory = [node["memory"] for node in nodes if node.get("memory")]
    return Places(cpus, slot, slots, sum(memory) or math.inf, max(memory, default=math.inf))


def _at_most(wanted: int, shards: int) -> int:
    return max(1, min(wanted, shards))


def _room(places: Places, feature_pool: PoolSize | None, model_pool: PoolSize, model_bytes: int) -> float:
    """Bytes that each reading and decoding actor may take for its shard when the pools are smallest."""
    models = min(model_pool[0], places.slots)
    if feature_pool is None:
        return min(places.memory / models, places.largest_node) - model_bytes
    return min((places.memory - models * model_bytes) / feature_pool[0], places.largest_node) - PROCESS_BYTES


def _shard_bytes(config: TranscribeConfig, work: Work, room: float) -> int:
    """Memory of the longest shard while it is read and decoded.

    A single long item is tried with the memory that there is, instead of refusing the job: its length may be a mistake
    in the manifest.
    """
    item_bytes_per_s = max(ITEM_BYTES_PER_S, FEATURE_COPIES * work.bytes_per_s)
    usual_s = min(work.item_audio_s, config.shard_audio_s or AUTO_MAX_S)
    item = max(usual_s * item_bytes_per_s, min(work.item_audio_s * item_bytes_per_s, room - READ_AHEAD_BYTES))
    return READ_AHEAD_BYTES + int(max(work.shard_audio_s * FEATURE_COPIES * work.bytes_per_s, item))


def _awaited(resources: Resources, places: Places) -> str | None:
    """What actors wait for because no node has it now; nodes that bring the slots may also bring the memory."""
    if not places.slots:
        short = resources.preparing_bytes > places.largest_node
        memory = f" and {_gib(resources.preparing_bytes)} of memory for a feature actor" if short else ""
        return f"{places.slot}{memory}"
    features = resources.feature_pool[0] * FEATURE_SHARE if resources.feature_pool else 0.0
    if features and not places.slot and features + resources.model_pool[0] * CPU_MODEL_SHARE > places.cpus:
        return f"CPUs for model actors: feature actors take {features:g} of {places.cpus}"
    return None


def _check_memory(resources: Resources, places: Places, work: Work) -> None:
    """Refuse what would wait for ever. Model actors without a slot now are left out: their nodes bring memory."""
    features = resources.feature_pool[0] * resources.feature_bytes if resources.feature_pool else 0
    asked = features + min(resources.model_pool[0], places.slots) * resources.model_bytes
    if asked > places.memory:
        found = f"the smallest pools need {_gib(asked)} of memory, the cluster gives Ray {_gib(places.memory)}"
    elif resources.preparing_bytes > places.largest_node:
        needed, largest = _gib(resources.preparing_bytes), _gib(places.largest_node)
        found = f"one actor needs {needed} of memory, the largest node gives Ray {largest}"
    else:
        return
    if work.container and not places.slots:
        return  # it is awaited
    if work.container:
        raise ConfigError(
            f"{work.container} holds about {work.shard_audio_s / 3600:.1f} h of audio, which are done as one shard: "
            f"{found}; use a larger node, or start another --output over smaller tars or row groups (100 to 500 MB)"
        )
    raise ConfigError(
        f"{found}; use fewer --feature-actors or a larger node, or start another --output with a smaller "
        "--shard-audio-s"
    )


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
