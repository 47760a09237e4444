"""The fine-tuning job: `python -m jobs.finetune --train URL --validation URL --model URL_OR_ID --output URL`.

    inputs -> labelled shards -> prepared audio (Ray tasks) -> labels checked -> workers (Ray Train) -> OUTPUT/model/

Exit status: 0 the run has come to its end; 2 refused before any training; 1 stopped in the middle (the same command
resumes from the last checkpoint).
"""

import functools
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
import ray.train
import tyro
from ray.train.torch import TorchTrainer

from jobs.models import ModelReference, resolve_model
from jobs.ray_session import quiet_ray_train, ray_session
from jobs.storage.connections import scrub
from jobs.storage.files import Storage
from jobs.training.checkpoint import Progress, read_progress
from jobs.training.config import FinetuneConfig
from jobs.training.data import prepare_split, read_index
from jobs.training.labels import LabelReport
from jobs.training.loop import TrainingTask, train_worker
from jobs.training.metrics import METRICS_FILE, describe, measurements, read_metrics
from jobs.training.report import REPORT_FILE, write_training_report
from jobs.training.setup import (
    MODEL_FOLDER,
    architecture,
    choose_tokenizer,
    claim_output,
    describe_labels,
    label_splits,
    model_config,
    write_label_report,
    write_model_files,
)
from jobs.training.sources import labelled_shards
from jobs.transcribe import EXIT_REFUSED, EXIT_STOPPED, JobStoppedError, root_cause
from parakeet_core.config import EncoderConfig, FrontendConfig
from parakeet_core.errors import InputError, ParakeetError, WorkerError

RESUME_HINT = "run the same command again to resume from the last checkpoint"
FOLLOW_EVERY_S = 2.0  # one small read of the metrics
MAX_CPUS_PER_GPU = 8  # audio is decoded beforehand, and features are made at some thousand times real time per thread


@dataclass(frozen=True)
class FinetuneResult:
    """What a run came to.

    Attributes:
        model: where the best model lies.
        wer_before: on the validation set, of what training started from.
        best_wer, best_step: of that model, on the same set.
        skipped_steps: whose gradient was not finite.
    """

    model: str
    steps: int
    wer_before: float
    best_wer: float
    best_step: int
    skipped_steps: int
    train: LabelReport
    validation: LabelReport


def run(config: FinetuneConfig) -> FinetuneResult:
    """Train, or finish what an earlier run began. The Python API of the job.

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
        with ray_session(config.ray_address) as cluster:
            quiet_ray_train()
            return _run_on(cluster, config, output, start, encoder, frontend)
    except (InputError, WorkerError) as error:  # the output's storage failed, or Ray did not start
        raise JobStoppedError(f"{error}; {RESUME_HINT}") from error
    except (ray.exceptions.RayError, ray.train.TrainingFailedError) as error:
        raise JobStoppedError(f"{scrub(_cause(error), config.storage())}; {RESUME_HINT}") from error


def _run_on(
    cluster: dict[str, float],
    config: FinetuneConfig,
    output: Storage,
    start: ModelReference | None,
    encoder: EncoderConfig,
    frontend: FrontendConfig,
) -> FinetuneResult:
    indices = {split: _prepare(split, config, output, frontend.sample_rate_hz) for split in ("train", "validation")}
    tokenizer = choose_tokenizer(config, start, indices["train"], output)
    model = model_config(encoder, frontend, tokenizer, config, start)
    splits = label_splits(config, model, tokenizer, **indices)
    write_label_report(output, splits)
    for split, (utterances, report) in splits.items():
        print(describe_labels(split, utterances, report, frontend.frame_s), file=sys.stderr)
    write_model_files(output, model, tokenizer)
    device, workers, threads = _resources(config, cluster)
    task = TrainingTask(
        config=config,
        output=output,
        model=model,
        start=start,
        keeps_head=config.vocab_size is None,
        tokenizer=tokenizer,
        train=splits["train"][0],
        validation=splits["validation"][0],
        device=device,
        threads=threads,
    )
    before = read_progress(output)
    if before is not None:
        print(f"resume     after step {before.step}", file=sys.stderr)
    try:
        with following(output, before):
            _fit(task, workers)
    finally:
        write_training_report(output)
    return _result(output, {split: report for split, (_, report) in splits.items()})


def _prepare(split: str, config: FinetuneConfig, output: Storage, sample_rate_hz: int):
    """The index of a split, its audio prepared."""
    folder = Storage(f"{output.url}/data/{split}", output.options)
    index = read_index(folder)
    if index is not None:
        return index
    shards = labelled_shards(
        getattr(config, split),
        folder,
        output.options,
        config.min_confidence,
        config.allow_local_paths,
        config.allow_http,
    )
    return prepare_split(shards, folder, sample_rate_hz, config.max_audio_s)


def _resources(config: FinetuneConfig, cluster: dict[str, float]) -> tuple[str, int, int]:
    """(device, workers, threads of each)."""
    device = config.device if config.device != "auto" else ("cuda" if cluster.get("GPU") else "cpu")
    workers = config.workers or (max(1, int(cluster.get("GPU", 1))) if device == "cuda" else 1)
    share = max(1, int(cluster.get("CPU", 1)) // workers)
    threads = config.cpus_per_worker or (min(share, MAX_CPUS_PER_GPU) if device == "cuda" else share)
    return device, workers, threads


def _fit(task: TrainingTask, workers: int) -> None:
    """Run the workers to the end of training.

    Checkpoints are ours: Ray Train's own would pickle, and would want storage of its own on all nodes. So what it keeps
    about a run goes to a temporary folder of this machine.
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


@contextmanager
def following(output: Storage, before: Progress | None) -> Iterator[None]:
    """Print lines of metrics as they come into the output, which is where the workers write them."""
    ended = threading.Event()
    seen = {line["at"] for line in read_metrics(output)} if before is not None else set()

    def follow() -> None:
        while True:
            last = ended.wait(FOLLOW_EVERY_S)
            try:
                for line in read_metrics(output):
                    if line["at"] not in seen:
                        seen.add(line["at"])
                        print(describe(line), file=sys.stderr, flush=True)
            except (InputError, ValueError) as error:  # the display may miss a line; training goes on
                print(f"{METRICS_FILE} cannot be read now: {error}", file=sys.stderr)
            if last:
                return

    thread = threading.Thread(target=follow, name="follow-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _cause(error: BaseException) -> str:
    """What ended a run, in one line; of several workers, the first that failed."""
    failures = getattr(error, "worker_failures", None)
    return root_cause(failures[min(failures)] if failures else error)


def _result(output: Storage, reports: dict[str, LabelReport]) -> FinetuneResult:
    progress = read_progress(output)
    return FinetuneResult(
        model=output.source(MODEL_FOLDER),
        steps=progress.step,
        wer_before=measurements(read_metrics(output))[0]["validation_wer"],
        best_wer=progress.best_wer,
        best_step=progress.best_step,
        skipped_steps=progress.skipped,
        **reports,
    )


def summarise(result: FinetuneResult, output: str) -> str:
    lines = [
        f"steps      {result.steps:,}"
        + (f", {result.skipped_steps} skipped: their gradient was not finite" if result.skipped_steps else ""),
        f"WER        {result.best_wer:.2%} on the validation set, after step {result.best_step:,}; "
        f"{result.wer_before:.2%} before training",
        f"model      {result.model}",
        f"report     {output.rstrip('/')}/{REPORT_FILE}",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        config = tyro.cli(FinetuneConfig, args=arguments, prog="python -m jobs.finetune")
        signal.signal(signal.SIGTERM, _stop)
        print(summarise(run(config), config.output))
        return 0
    except JobStoppedError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print(f"stopped: interrupted; {RESUME_HINT}", file=sys.stderr)
        return EXIT_STOPPED
    except ParakeetError as error:
        print(f"error: {scrub(str(error))}", file=sys.stderr)
        return EXIT_REFUSED


def _stop(signal_number: int, frame) -> None:
    """SIGTERM, as a spot node's notice or `ray job stop` sends it: end as an interrupt does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
