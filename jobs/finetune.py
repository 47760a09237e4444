"""The fine-tuning job: `python -m jobs.finetune --train URL --validation URL --model URL_OR_ID --output URL`.

    inputs -> labelled shards -> prepared audio (Ray tasks) -> labels checked -> workers (Ray Train) -> OUTPUT/model/

Exit status: 0 the run is finished; 2 refused before any training; 1 stopped in the middle (the same command resumes
from the last checkpoint).
"""

import functools
import math
import sys
import tempfile
from collections.abc import Sequence

import pyarrow as pa
import ray
import ray.train
import tyro
from ray.train.torch import TorchTrainer

from jobs.command_line import JobStoppedError, exit_status, interrupt_on_sigterm
from jobs.models import ModelReference, resolve_model
from jobs.ray_session import alive_nodes, note_local_output, quiet_ray_train, ray_session, root_cause
from jobs.storage.connections import scrub
from jobs.storage.files import Storage
from jobs.training.checkpoint import read_progress
from jobs.training.config import MAX_CPUS_PER_GPU, FinetuneConfig
from jobs.training.data import prepare_split, read_index
from jobs.training.loop import TrainingTask, train_worker
from jobs.training.report import write_training_report
from jobs.training.result import RESUME_HINT, FinetuneResult, following, read_result, summarise
from jobs.training.setup import architecture, claim_output, make_task, split_shards
from parakeet_core.config import EncoderConfig, FrontendConfig
from parakeet_core.errors import InputError, WorkerError


def run(config: FinetuneConfig) -> FinetuneResult:
    """Train, or finish a run begun earlier. The Python API of the job.

    Raises:
        ConfigError, CheckpointError: refused before any training.
        JobStoppedError: stopped in the middle; calling again resumes.
    """
    start = resolve_model(config.model, config.storage()) if config.model is not None else None
    encoder, frontend = architecture(config, start)
    try:
        output = Storage(config.output, config.storage())
        claim_output(output, config, start)
        output.remove_dead_temporaries()
        with ray_session(config.ray_address):
            quiet_ray_train()
            return _run(config, output, start, encoder, frontend)
    except (InputError, WorkerError) as error:  # the output's storage failed, or Ray did not start
        raise JobStoppedError(f"{error}; {RESUME_HINT}") from error
    except (ray.exceptions.RayError, ray.train.TrainingFailedError) as error:
        raise JobStoppedError(f"{scrub(_cause(error), config.storage())}; {RESUME_HINT}") from error


def _run(
    config: FinetuneConfig,
    output: Storage,
    start: ModelReference | None,
    encoder: EncoderConfig,
    frontend: FrontendConfig,
) -> FinetuneResult:
    nodes = alive_nodes()
    note_local_output(output, len(nodes))
    indices = {split: _prepare(split, config, output, frontend.sample_rate_hz) for split in ("train", "validation")}
    device, workers, threads = share_nodes(config, nodes)
    task, reports = make_task(config, output, start, encoder, frontend, indices, device, threads)
    before = read_progress(output)
    if before is not None:
        print(f"resume     after step {before.step}", file=sys.stderr)
    try:
        with following(output, before):
            _fit(task, workers)
    finally:
        write_training_report(output)
    return read_result(output, reports)


def _prepare(split: str, config: FinetuneConfig, output: Storage, sample_rate_hz: int) -> pa.Table:
    """Prepare the audio of a split, unless that is done, and return the split's index."""
    folder = Storage(f"{output.url}/data/{split}", output.options)
    index = read_index(folder)
    if index is not None:
        return index
    return prepare_split(split_shards(config, split, folder), folder, sample_rate_hz, config.max_audio_s)


def share_nodes(config: FinetuneConfig, nodes: list[dict[str, float]]) -> tuple[str, int, int]:
    """(device, workers, threads of each): the most threads with which every worker still fits, each on a single node.

    Args:
        nodes: resources of each node (`alive_nodes`).
    """
    device = config.device
    if device == "auto":
        device = "cuda" if any(node.get("GPU") for node in nodes) else "cpu"

    def places(threads: int) -> int:
        gpus = [node.get("GPU", 0) if device == "cuda" else math.inf for node in nodes]
        return sum(int(min(node.get("CPU", 0) // threads, limit)) for node, limit in zip(nodes, gpus, strict=True))

    workers = config.workers or (max(1, int(sum(node.get("GPU", 0) for node in nodes))) if device == "cuda" else 1)
    most = MAX_CPUS_PER_GPU if device == "cuda" else int(max((node.get("CPU", 1) for node in nodes), default=1))
    threads = config.cpus_per_worker or next((t for t in range(most, 0, -1) if places(t) >= workers), 1)
    if places(threads) < workers:
        print(
            f"note       the cluster has places for {places(threads)} of {workers} workers of {threads} CPUs"
            f"{' and a GPU' if device == 'cuda' else ''} each: training waits for nodes",
            file=sys.stderr,
        )
    return device, workers, threads


def _fit(task: TrainingTask, workers: int) -> None:
    """Run the workers to the end of training.

    Checkpoints are ours: Ray Train's would use pickle and need storage that all nodes can reach. So what Ray Train
    keeps about a run goes to a temporary folder on this machine.
    """
    config = task.config
    with tempfile.TemporaryDirectory(prefix="parakeet-train-") as scratch:
        trainer = TorchTrainer(
            functools.partial(train_worker, task),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=task.device == "cuda",
                resources_per_worker={"CPU": task.threads} | ({"GPU": 1} if task.device == "cuda" else {}),
            ),
            run_config=ray.train.RunConfig(
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=config.max_restarts),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            ),
        )
        trainer.fit()


def _cause(error: BaseException) -> str:
    """What ended a run, in one line; if several workers failed, the cause of the one with the lowest rank."""
    failures = getattr(error, "worker_failures", None)
    return root_cause(failures[min(failures)] if failures else error)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: _main(arguments), RESUME_HINT)


def _main(arguments: Sequence[str] | None) -> int:
    config = tyro.cli(FinetuneConfig, args=arguments, prog="python -m jobs.finetune")
    interrupt_on_sigterm(f"SIGTERM: {RESUME_HINT}")
    print(summarise(run(config), config.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
