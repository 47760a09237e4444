"""Training without Ray: the task of a worker over some of the carried prompts, made in this process."""

import json
from pathlib import Path

import pyarrow as pa
import torch
from small_models import TINY_EN, small_model, write_hf

from jobs.models import resolve_model
from jobs.storage.connections import StorageOptions
from jobs.storage.files import Storage
from jobs.training import setup
from jobs.training.config import FinetuneConfig
from jobs.training.data import prepare_shard
from jobs.training.loop import TrainingRun, TrainingTask
from jobs.training.setup import architecture, claim_output, split_shards

PROMPTS = TINY_EN.parent / "prompts"

# Without what is random in training, so that a run is compared with another of other micro-batches or workers.
PLAIN = {"dropout": 0.0, "speed_factors": (1.0,), "freq_masks": 0, "time_masks": 0}


def prompt_manifest(path: Path, first: int, last: int, **changes) -> str:
    """A manifest of the carried prompts `first` to `last` by length, with absolute paths.

    Args:
        changes: keys of every line.
    """
    records = [json.loads(line) for line in (PROMPTS / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    records.sort(key=lambda record: record["duration"])
    lines = [
        json.dumps(record | {"audio_filepath": str(PROMPTS / record["audio_filepath"])} | changes)
        for record in records[first:last]
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def small_checkpoint(folder: Path) -> str:
    """A model of some thousand random weights with the carried tokenizer: a step takes some hundredths of a second."""
    return str(folder / "small") if (folder / "small").exists() else str(write_hf(folder / "small", small_model()))


def training_config(train: str, validation: str, output: Path, **options) -> FinetuneConfig:
    defaults = {"device": "cpu", "cpus_per_worker": 1, "workers": 1}
    if "model_config" not in options:
        defaults["model"] = small_checkpoint(Path(train).parent)
    return FinetuneConfig(**defaults | options, train=(train,), validation=(validation,), output=str(output))


def prepare(config: FinetuneConfig, split: str) -> pa.Table:
    """The index of a split, prepared by this process."""
    folder = Storage(f"{config.output}/data/{split}", config.storage())
    shards = split_shards(config, split, folder)
    return pa.concat_tables([prepare_shard(shard, folder, 16_000, config.max_audio_s) for shard in shards])


def make_task(config: FinetuneConfig) -> TrainingTask:
    """What the job hands to its workers, made without Ray."""
    start = resolve_model(config.model, StorageOptions()) if config.model else None
    output = Storage(config.output, config.storage())
    claim_output(output, config, start)
    encoder, frontend = architecture(config, start)
    indices = {split: prepare(config, split) for split in ("train", "validation")}
    return setup.make_task(config, output, start, encoder, frontend, indices, "cpu", 1)[0]


def train(config: FinetuneConfig, rank: int = 0, world: int = 1) -> TrainingRun:
    """Run the loop in this process, as a worker does."""
    run = TrainingRun(make_task(config), rank, world, torch.device("cpu"))
    run.run()
    return run
