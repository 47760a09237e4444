"""The Ray Data graph of the job. The one file that builds it.

    todo shards -> PrepareShards (CPU actors) -> RecogniseShards (GPU actors) -> CommitShards (CPU) -> results

Without a GPU, unless the user sets the size of the feature pool, one actor per CPU runs the three stages in turn
(`ChainedStages`): no stage waits for another, no bytes go through Ray's object store, and fewer processes start.
`resources.py` decides how many actors there are and what they may take.
"""

from collections.abc import Iterator

import pyarrow as pa
import ray
import ray.data

from jobs.config import PoolSize
from jobs.models import ModelReference
from jobs.resources import FEATURE_SHARE, GPU, PROCESS_BYTES, Resources
from jobs.stages import TASKS_PER_ACTOR, ChainedStages, CommitShards, PrepareShards, RecogniseShards
from jobs.storage.connections import StorageOptions
from jobs.storage.files import Storage

GPU_CALLS = 2  # shards at a time in a GPU's actor: the device works on one while the host packs or unpacks the other
MODELS_PER_COMMIT_ACTOR = 8  # text and Parquet of one shard take about 1 % of the model's time on a CPU
# Of one shard; the second of two budgets. An item that ends its worker costs one of these retries; on the next try it
# becomes an error row, which counts in the first budget, --max-error-rate (reading/isolation.py). The other retries are
# for failures that no item causes: few shards lose a spot node twice, and a shard that has lost six workers has met a
# cause that stays, such as too little memory or a defect.
LOST_WORKER_RETRIES = 5


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
    context.target_max_block_size = resources.block_bytes
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

    With fewer waiting the pool would not grow: Ray Data adds an actor when the actors hold 1.75 times as many shards as
    they work on (`actor_pool_util_upscaling_threshold`).

    Args:
        start: actors to begin with; by default the smallest size of the pool.
    """
    return {
        "batch_size": 1,  # a shard, which is the block's only row; with GPUs Ray Data requires a size
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
