"""Options and prepared data -> the workers' task: architecture, tokenizer, labels. Also claims the output for a run."""

import dataclasses
import hashlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

import parakeet_core
from jobs.models import ModelReference
from jobs.storage.files import Storage
from jobs.table.schema import normalise_words
from jobs.training.config import FinetuneConfig
from jobs.training.labels import LabelReport, Utterances, label_utterances, plain_text
from jobs.training.loop import MODEL_FOLDER, TrainingTask
from jobs.training.sources import LabelledShard, labelled_shards
from parakeet_core.checkpoint_hf import read_encoder_config
from parakeet_core.config import EncoderConfig, FrontendConfig, ModelConfig, differing_files
from parakeet_core.errors import ConfigError
from parakeet_core.export import checkpoint_files
from parakeet_core.tokenizer import SentencePieceTokenizer, Tokenizer
from parakeet_core.tokenizer_training import train_tokenizer

RUN_FILE, LABELS_FILE = "finetune.json", "labels.json"
TOKENIZER_FILE = f"{MODEL_FOLDER}/tokenizer.model"


def claim_output(output: Storage, config: FinetuneConfig, start: ModelReference | None) -> None:
    """Mark an output as this run's, or check that it is.

    Raises:
        ConfigError: it belongs to another run.
    """
    origin = start.digest if start else hashlib.sha256(Path(config.model_config).read_bytes()).hexdigest()
    options = json.loads(json.dumps(config.decisive_options()))
    record = {"fingerprint": config.fingerprint(origin), "weights_sha256": origin, "options": options}
    record |= {"code_version": parakeet_core.__version__, "files": start.files if start else {}}
    output.write_atomic(RUN_FILE, json.dumps(record, indent=1).encode(), exclusive=True)
    try:
        found = json.loads(output.read_bytes(RUN_FILE))
        same, options_found = found["fingerprint"] == record["fingerprint"], found["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{output.url}/{RUN_FILE}: not a record of this program ({error})") from error
    if not same:
        changed = [f"{name} {options_found.get(name)} there, {options[name]} here" for name in options]
        changed = [
            text for name, text in zip(options, changed, strict=True) if options_found.get(name) != options[name]
        ]
        raise ConfigError(
            f"{output.url} holds another run ({'; '.join(changed) or 'other weights to start from'}); "
            "use another --output, or the same options"
        )
    # Outputs of earlier versions do not record these files; their runs continue without the check.
    if found.get("files") and (changed := differing_files(found["files"], record["files"])):
        raise ConfigError(
            f"{output.url} was begun with another {changed} beside the same weights to start from; restore that "
            "file, or use another --output"
        )


def architecture(config: FinetuneConfig, start: ModelReference | None) -> tuple[EncoderConfig, FrontendConfig]:
    """Encoder and front end, from the checkpoint or from --model-config, with the dropout of --dropout.

    Raises:
        CheckpointError: --model-config does not describe an encoder.
    """
    if start is not None:
        encoder, frontend = start.config.encoder, start.config.frontend
    else:
        encoder = read_encoder_config(Path(config.model_config))
        frontend = FrontendConfig(n_mels=encoder.n_mels)
    if config.dropout is not None:
        rates = dict.fromkeys(("dropout", "activation_dropout", "attention_dropout"), config.dropout)
        rates |= {name: min(getattr(encoder, name), config.dropout) for name in ("dropout_positions", "layerdrop")}
        encoder = dataclasses.replace(encoder, **rates)
    return encoder, frontend


def split_shards(config: FinetuneConfig, split: str, folder: Storage) -> list[LabelledShard]:
    """The labelled shards of a split, whose plans are kept in `folder`. Raises ConfigError."""
    return labelled_shards(
        getattr(config, split),
        folder,
        config.storage(),
        config.min_confidence,
        config.allow_local_paths,
        config.allow_http,
    )


def make_task(
    config: FinetuneConfig,
    output: Storage,
    start: ModelReference | None,
    encoder: EncoderConfig,
    frontend: FrontendConfig,
    indices: dict[str, pa.Table],
    device: str,
    threads: int,
) -> tuple[TrainingTask, dict[str, LabelReport]]:
    """The workers' task, and a report on the labels of each split. Also writes that report and the model's files.

    Args:
        indices: of the prepared audio of "train" and "validation".

    Raises:
        ConfigError: there is nothing to train on, or nothing to validate on.
    """
    tokenizer = choose_tokenizer(config, start, indices["train"], output)
    model = model_config(encoder, frontend, tokenizer, config, start)
    splits = label_splits(config, model, tokenizer, **indices)
    write_label_report(output, splits)
    for split, (utterances, report) in splits.items():
        print(describe_labels(split, utterances, report, frontend.frame_s), file=sys.stderr)
    write_model_files(output, model, tokenizer)
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
    return task, {split: report for split, (_, report) in splits.items()}


def choose_tokenizer(
    config: FinetuneConfig, start: ModelReference | None, index: pa.Table, output: Storage
) -> Tokenizer:
    """The checkpoint's, or a new one from the training texts, which is built once and kept in the output.

    Raises:
        ConfigError: the texts do not yield that many pieces.
    """
    if config.vocab_size is None:
        return start.tokenizer
    if not output.exists(TOKENIZER_FILE):
        usable = index.filter(index["rejection"].is_null())["text"].to_pylist()
        texts = [text for text in usable if text.strip()]
        if config.text_form != "raw":  # a new tokenizer has no capitals unless they are asked for
            texts = [normalise_words(text) for text in texts]
        output.write_atomic(TOKENIZER_FILE, train_tokenizer(texts, config.vocab_size).content())
    return SentencePieceTokenizer(output.read_bytes(TOKENIZER_FILE))


def model_config(
    encoder: EncoderConfig, frontend: FrontendConfig, tokenizer: Tokenizer, config: FinetuneConfig, start
) -> ModelConfig:
    """Configuration of the model that is trained. In a new vocabulary the blank comes after the last piece."""
    if config.vocab_size is None:
        return dataclasses.replace(start.config, encoder=encoder)
    return ModelConfig(encoder, frontend, vocab_size=len(tokenizer.pieces) + 1, blank_id=len(tokenizer.pieces))


def label_splits(
    config: FinetuneConfig, model: ModelConfig, tokenizer: Tokenizer, train: pa.Table, validation: pa.Table
) -> dict[str, tuple[Utterances, LabelReport]]:
    """Check the labels of both splits.

    Raises:
        ConfigError: one of them has no usable item.
    """
    plain = plain_text(config.text_form, tokenizer)
    fastest = max(config.speed_factors)
    splits = {
        "train": label_utterances(train, tokenizer, model, plain, config.min_audio_s, fastest),
        "validation": label_utterances(validation, tokenizer, model, plain),
    }
    for split, (utterances, report) in splits.items():
        if not len(utterances):
            reasons = ", ".join(f"{count} {reason}" for reason, count in report.rejected.items())
            raise ConfigError(
                f"--{split}: none of {report.items} items can be used ({reasons or 'the input is empty'})"
            )
    return splits


def write_model_files(output: Storage, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Write everything in OUTPUT/model/ except the weights, which the first measurement writes."""
    for name, content in checkpoint_files(model, tokenizer).items():
        output.write_atomic(f"{MODEL_FOLDER}/{name}", content)


def write_label_report(output: Storage, splits: dict[str, tuple[Utterances, LabelReport]]) -> None:
    record = {split: asdict(report) for split, (_, report) in splits.items()}
    output.write_atomic(LABELS_FILE, json.dumps(record, indent=1, ensure_ascii=False).encode())


def describe_labels(split: str, utterances: Utterances, report: LabelReport, frame_s: float) -> str:
    """One line for people: `train   1601 of 1700 items, 2.57 h; left out: 99 no_text`."""
    left_out = ", ".join(f"{count} {reason}" for reason, count in report.rejected.items())
    hours = utterances.total_frames * frame_s / 3600
    return f"{split:<11}{report.used:,} of {report.items:,} items, {hours:.2f} h" + (
        f"; left out: {left_out} (examples in {LABELS_FILE})" if left_out else ""
    )
