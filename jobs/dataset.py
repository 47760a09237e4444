"""Transcripts for an existing Ray Dataset: one function for users who have their own pipeline."""

from typing import Literal

import pyarrow as pa
import ray
import ray.data
import torch

from jobs.models import ModelReference, resolve_model
from jobs.storage.connections import StorageOptions
from jobs.table.schema import WORD_TYPE, round_words
from parakeet_core.errors import ErrorKind, InputError
from parakeet_core.transcriber import Transcriber, Transcript

BATCH_ROWS = 64  # enough clips to form batches of similar length, few enough that a lost actor costs little
COLUMNS = {
    "status": pa.string(),
    "text": pa.string(),
    "confidence": pa.float32(),
    "words": pa.list_(WORD_TYPE),
    "duration_s": pa.float64(),
    "error_kind": pa.string(),
    "error_message": pa.string(),
}


def transcribe_dataset(
    dataset: ray.data.Dataset,
    model: str,
    audio_column: str = "audio",
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = "float32",
    actors: tuple[int, int] = (1, 2),
    batch_rows: int = BATCH_ROWS,
    storage: StorageOptions | None = None,
) -> ray.data.Dataset:
    """Add transcripts to the rows of a dataset; lazy, like any Ray Data transformation.

    Args:
        audio_column: encoded audio as bytes, or the Hugging Face form `{bytes, path}`.
        model, device, dtype: as the options of the job.
        actors: fewest and most; each takes one CPU, and one GPU on cuda.
        batch_rows: rows that an actor processes at a time.

    Returns:
        The dataset with the columns of `COLUMNS`, which replace any columns of the same names: if your reference column
        is called `text`, rename it first. A row whose audio cannot be decoded has status "error" and the reason. Rows
        are neither dropped nor added. Unlike in the job, nothing is committed or resumed.

    Raises:
        CheckpointError: the model cannot be used.
    """
    reference = resolve_model(model, storage or StorageOptions())
    return dataset.map_batches(
        _TranscribeColumn,
        fn_constructor_args=(reference, audio_column, device, dtype),
        batch_size=batch_rows,
        batch_format="pyarrow",
        num_cpus=1,
        num_gpus=1 if device == "cuda" else 0,
        compute=ray.data.ActorPoolStrategy(min_size=actors[0], max_size=actors[1]),
    )


NO_BYTES = Transcript(
    error=InputError(ErrorKind.BAD_RECORD, "the row holds no encoded audio; expected bytes or a struct with bytes")
)


class _TranscribeColumn:
    def __init__(self, model: ModelReference, audio_column: str, device: str, dtype: str):
        torch.set_num_threads(1)
        self.transcriber = Transcriber(model.load(dtype, device))
        self.audio_column = audio_column

    def __call__(self, table: pa.Table) -> pa.Table:
        audio = [_encoded(value) for value in table[self.audio_column].to_pylist()]
        found = iter(self.transcriber.transcribe([content for content in audio if content is not None]))
        rows = [_columns(NO_BYTES if content is None else next(found)) for content in audio]
        for name, kind in COLUMNS.items():
            values = pa.array([row[name] for row in rows], kind)
            position = table.schema.get_field_index(name)
            table = table.append_column(name, values) if position < 0 else table.set_column(position, name, values)
        return table


def _encoded(value: object) -> bytes | None:
    """The bytes of a cell. A path in it is not opened: a dataset must not choose files of the worker."""
    if isinstance(value, dict):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None


def _columns(transcript: Transcript) -> dict:
    if transcript.error is not None:
        error = {"error_kind": str(transcript.error.kind), "error_message": transcript.error.message}
        return dict.fromkeys(COLUMNS) | {"status": "error"} | error
    return dict.fromkeys(COLUMNS) | {
        "status": "ok" if transcript.text else "empty",
        "text": transcript.text,
        "confidence": transcript.confidence,
        "words": round_words(transcript.words),
        "duration_s": transcript.duration_s,
    }
