"""The fine-tuning job in a single process, without Ray: `python -m jobs.finetune_alone`.

Options, output and result are those of `jobs.finetune` with one worker, and either program can resume a run that the
other has begun. One GPU at most.
"""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pyarrow as pa
import torch
import tyro

from jobs.command_line import exit_status, interrupt_on_sigterm
from jobs.models import resolve_model
from jobs.storage.files import Storage
from jobs.training.checkpoint import read_progress
from jobs.training.config import MAX_CPUS_PER_GPU, FinetuneConfig
from jobs.training.data import prepare_shard, read_index, write_index
from jobs.training.loop import TrainingRun
from jobs.training.report import write_training_report
from jobs.training.result import RESUME_HINT, FinetuneResult, following, read_result, summarise
from jobs.training.setup import architecture, claim_output, make_task, split_shards
from parakeet_core.errors import ConfigError


def run(config: FinetuneConfig) -> FinetuneResult:
    """Train, or finish a run begun earlier.

    Raises:
        ConfigError, CheckpointError: refused before any training.
        InputError: the storage failed in the middle; calling again resumes.
    """
    if (config.workers or 1) > 1:
        raise ConfigError(f"--workers {config.workers}: one process is one worker; use jobs.finetune for more")
    device = torch.device(config.device if config.device != "auto" else _device())
    threads = len(os.sched_getaffinity(0))
    threads = config.cpus_per_worker or (min(threads, MAX_CPUS_PER_GPU) if device.type == "cuda" else threads)
    torch.set_num_threads(threads)
    start = resolve_model(config.model, config.storage()) if config.model is not None else None
    encoder, frontend = architecture(config, start)
    output = Storage(config.output, config.storage())
    claim_output(output, config, start)
    output.remove_dead_temporaries()
    rate = frontend.sample_rate_hz
    indices = {split: prepare_here(split, config, output, rate, threads) for split in ("train", "validation")}
    task, reports = make_task(config, output, start, encoder, frontend, indices, device.type, threads)
    before = read_progress(output)
    if before is not None:
        print(f"resume     after step {before.step}", file=sys.stderr)
    try:
        with following(output, before):
            TrainingRun(task, 0, 1, device).run()
    finally:
        write_training_report(output)
    return read_result(output, reports)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare_here(split: str, config: FinetuneConfig, output: Storage, sample_rate_hz: int, threads: int) -> pa.Table:
    """The index of a split, after its audio is decoded by as many processes as there are threads.

    Nothing would restart this process after a crash, so every item is decoded in a separate process.
    """
    folder = Storage(f"{output.url}/data/{split}", output.options)
    index = read_index(folder)
    if index is not None:
        return index
    prepare = partial(
        prepare_shard, folder=folder, sample_rate_hz=sample_rate_hz, max_audio_s=config.max_audio_s, careful=True
    )
    with ThreadPoolExecutor(threads, thread_name_prefix="prepare") as pool:
        return write_index(folder, list(pool.map(prepare, split_shards(config, split, folder))))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, with the same meaning as in jobs.finetune."""
    return exit_status(lambda: _main(arguments), RESUME_HINT)


def _main(arguments: Sequence[str] | None) -> int:
    config = tyro.cli(FinetuneConfig, args=arguments, prog="python -m jobs.finetune_alone")
    interrupt_on_sigterm(f"SIGTERM: {RESUME_HINT}")
    print(summarise(run(config), config.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
