"""The three stages of the job, as Ray actors over core steps; the one place where an item's error becomes its row.

    shard -> PrepareShards (read, decode, log-mel) -> RecogniseShards (model) -> CommitShards (text, part)

Between stages a shard travels as a block (`jobs.blocks`).
"""

import ctypes
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import numpy as np
import pyarrow as pa
import torch

from jobs.blocks import StageClock, pack_shard, unpack_shard, worker_name
from jobs.models import ModelReference
from jobs.planning.store import read_shard
from jobs.reading.isolation import ShardDecoder, was_restarted
from jobs.reading.items import ReadItem, SourceFile, read_items
from jobs.storage.connections import StorageOptions, scrub
from jobs.storage.files import Storage
from jobs.table.parts import commit_part, part_name
from jobs.table.schema import TRANSCRIPT_SCHEMA, file_metadata, part_facts, round_words, word_error_rate
from jobs.worker_end import end_worker
from parakeet_core.config import FrontendConfig
from parakeet_core.device import device_failed
from parakeet_core.engine import Engine
from parakeet_core.errors import ErrorKind, InputError, WorkerError
from parakeet_core.features import LogMelFrontend
from parakeet_core.tokenizer import Tokenizer
from parakeet_core.words import Tokens, group_words

SILENCE_DBFS = -120.0  # floor of the rms_dbfs column: below the noise of 16-bit audio, and finite
CLIPPED_LEVEL = 0.999  # of full scale: samples one 16-bit step below it also count as clipped
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BLOCK_BYTES = 32 << 20  # larger blocks go back to the system at once; the most that glibc accepts
KEPT_BYTES = 256 << 20  # more than a model actor's states need
# oneDNN caches the code of a matrix product for each shape, with its memory. Layers share shapes, batches hardly ever
# do: with the default of 1024 entries a model actor in half precision takes 100 to 200 MiB more and is no faster.
CACHED_PRIMITIVES = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64"

ITEM_FIELDS = [
    pa.field("id", pa.string()),
    pa.field("source", pa.string()),
    pa.field("member", pa.string()),
    pa.field("offset_s", pa.float64()),
    pa.field("duration_s", pa.float64()),
    pa.field("channel", pa.int32()),
    pa.field("reference", pa.string()),
    pa.field("extra", pa.string()),
    pa.field("sample_rate_hz", pa.int32()),
    pa.field("rms_dbfs", pa.float32()),
    pa.field("clipped_ratio", pa.float32()),
    pa.field("error_kind", pa.string()),
    pa.field("error_message", pa.string()),
]
PREPARED_SCHEMA = pa.schema(
    [
        *ITEM_FIELDS,
        pa.field("frames", pa.int32()),
        pa.field("features", pa.large_binary()),
        pa.field("samples", pa.large_binary()),  # instead of features, if the model actors compute these
        pa.field("sample_step", pa.float32()),  # the value of one unit in `samples`
    ]
)
PCM_STEP = 1 / 32768  # of 16-bit samples at full scale 1.0: samples of 16-bit recordings travel unchanged
TOKEN_FIELDS = [
    pa.field("token_ids", pa.list_(pa.int32())),
    pa.field("starts", pa.list_(pa.int32())),
    pa.field("ends", pa.list_(pa.int32())),
    pa.field("scores", pa.list_(pa.float32())),
    pa.field("blank_ratio", pa.float32()),
]
RECOGNISED_SCHEMA = pa.schema([*ITEM_FIELDS, *TOKEN_FIELDS])
TASKS_PER_ACTOR = 2  # for each call, one in progress and one waiting, so that no actor idles; a lost actor loses all


class ChainedStages:
    """Several stages as one actor.

    Args:
        stages: (class, constructor arguments) of each, in order.
    """

    def __init__(self, stages: list[tuple[type, tuple]]):
        self.stages = [stage(*arguments) for stage, arguments in stages]

    def __call__(self, block: pa.Table) -> pa.Table:
        for stage in self.stages:
            block = stage(block)
        return block


class PrepareShards:
    """Shard of the plan -> items with features, or with samples for `RecogniseShards` to make features of.

    Args:
        output: where the plan is stored.
        storage: how to reach the sources.
        frontend: of the model.
        feature_dtype: "float16" when the model runs in half precision, else "float32", so that a float32 job equals the
            reference. Samples travel as 16-bit integers in the first case, as float32 in the second.
        features: "cpu" for features, "gpu" for samples.
    """

    def __init__(
        self, output: Storage, storage: StorageOptions, frontend: FrontendConfig, feature_dtype: str, features: str
    ):
        torch.set_num_threads(1)  # one actor per CPU: more threads would fight over the same cores
        self.output, self.storage = output, storage
        self.frontend = LogMelFrontend(frontend)
        self.dtype, self.features = np.dtype(feature_dtype), features
        self.decoder = ShardDecoder(careful_shards=TASKS_PER_ACTOR if was_restarted() else 0)

    def __call__(self, block: pa.Table) -> pa.Table:
        task = block.slice(0, 1).to_pylist()[0]
        clock = StageClock(feature_worker=worker_name(), feature_worker_again=was_restarted())
        rows = clock.timed("storage", read_shard, self.output, task["plan_file"], task["row_group"])
        with self.decoder.shard():
            prepared = [self._prepare(item, clock) for item in self._items(rows, clock)]
        if task["items"] and len(prepared) != task["items"]:
            raise RuntimeError(f"shard {task['shard']}: {len(prepared)} rows for {task['items']} planned items")
        columns = {field.name: [row.get(field.name) for row in prepared] for field in PREPARED_SCHEMA}
        return pack_shard(task["shard"], pa.table(columns, schema=PREPARED_SCHEMA), clock)

    def _items(self, rows: pa.Table, clock: StageClock) -> Iterator[ReadItem]:
        """Items as they arrive; waiting for them counts as storage time."""
        items = read_items(rows, self.storage)
        while (item := clock.timed("storage", next, items, None)) is not None:
            yield item

    def _prepare(self, item: ReadItem, clock: StageClock) -> dict:
        row = {field.name: getattr(item, field.name, None) for field in ITEM_FIELDS}
        try:
            return row | self._prepared_columns(item, clock)
        except InputError as error:
            return row | {"error_kind": str(error.kind), "error_message": error.message}
        except WorkerError:
            raise  # nothing can be decoded here, whatever the item
        except Exception as error:  # noqa: BLE001 - a defect met by one item must not end a job of a million others
            message = scrub(f"{type(error).__name__}: {error}; please report this with the item", self.storage)
            return row | {"error_kind": str(ErrorKind.UNEXPECTED), "error_message": message}

    def _prepared_columns(self, item: ReadItem, clock: StageClock) -> dict:
        if isinstance(item.payload, InputError):
            raise item.payload
        audio = clock.timed("decode", self._decode, item)
        columns = {
            "duration_s": round(audio.duration_s, 6),
            "sample_rate_hz": audio.info.sample_rate_hz,
            **measure_level(audio.waveform),
        }
        if self.features == "gpu":
            return columns | clock.timed("features", self._samples, audio.waveform)
        features, _ = clock.timed("features", self.frontend, [audio.waveform])
        payload = features[0].numpy().astype(self.dtype, copy=False).tobytes()
        return columns | {"frames": features.shape[1], "features": payload}

    def _samples(self, waveform: np.ndarray) -> dict:
        """A waveform [S] for another process; the 16-bit step is larger if it is louder than full scale."""
        frames = self.frontend.config.frames(len(waveform))
        if self.dtype == np.float32:
            return {"frames": frames, "samples": waveform.tobytes(), "sample_step": 1.0}
        step = np.float32(max(PCM_STEP, float(np.abs(waveform).max(initial=0.0)) / 32767))
        pcm = np.rint(waveform / step).clip(-32768, 32767).astype(np.int16)
        return {"frames": frames, "samples": pcm.tobytes(), "sample_step": float(step)}

    def _decode(self, item: ReadItem):
        try:
            return self.decoder.load(
                item.payload,
                self.frontend.config.sample_rate_hz,
                offset_s=item.offset_s or 0.0,
                duration_s=item.duration_s,
                channel="mix" if item.channel is None else item.channel,
            )
        finally:
            if isinstance(item.payload, SourceFile):
                item.payload.close()
                item.payload.raise_error()  # a storage failure that the decoder saw as an end of file


def measure_level(waveform: np.ndarray) -> dict[str, float]:
    """Loudness and clipping of a waveform [S]: root mean square in dB of full scale, share of samples at full scale."""
    if not len(waveform):
        return {"rms_dbfs": SILENCE_DBFS, "clipped_ratio": 0.0}
    power = float(np.dot(waveform, waveform)) / len(waveform)
    return {
        "rms_dbfs": round(max(10 * np.log10(max(power, 1e-30)), SILENCE_DBFS), 2),
        "clipped_ratio": float((np.abs(waveform) >= CLIPPED_LEVEL).mean()),
    }


class RecogniseShards:
    """Items with features or samples -> items with tokens, on one GPU or one CPU thread. Calls may overlap.

    Args:
        output: where a worker whose GPU fails records that, before it ends and another takes its place.
        model, dtype, device: what runs, and where.
        feature_dtype: as for `PrepareShards`.
    """

    def __init__(self, output: Storage, model: ModelReference, dtype: str, device: str, feature_dtype: str):
        torch.set_num_threads(1)  # several actors with one thread each are faster than one with several
        if device == "cpu":
            keep_freed_memory()
            os.environ.setdefault(*CACHED_PRIMITIVES)
        self.output = output
        checkpoint = model.load(dtype, device)
        self.engine = Engine(checkpoint)
        self.n_mels = checkpoint.config.frontend.n_mels
        self.feature_dtype = np.dtype(feature_dtype)

    def __call__(self, block: pa.Table) -> pa.Table:
        shard, items, clock = unpack_shard(block)
        clock.model_worker, clock.model_worker_again = worker_name(), was_restarted()
        clock.not_compiled = self.engine.not_compiled or ""
        try:
            results = self._recognise(items, clock)
        except RuntimeError as error:
            if device_failed(error):
                end_worker(self.output, f"shard {shard}: {error}")
            raise
        recognised = _with_errors(items.select([field.name for field in ITEM_FIELDS]), results)
        tokens = [_token_columns(results.get(index)) for index in range(items.num_rows)]
        for field in TOKEN_FIELDS:
            recognised = recognised.append_column(field, pa.array([row[field.name] for row in tokens], field.type))
        return pack_shard(shard, recognised, clock)

    def _recognise(self, items: pa.Table, clock: StageClock) -> dict[int, Tokens | InputError]:
        """The result of the model for each item that has frames, by the item's index."""
        wanted = [index for index, frames in enumerate(items["frames"].to_pylist()) if frames is not None]
        features = self._features(items, wanted, clock)
        return dict(zip(wanted, self.engine.recognise(features, busy=partial(clock.add, "model")), strict=True))

    def _features(self, items: pa.Table, wanted: list[int], clock: StageClock) -> list[torch.Tensor]:
        """Features of the items at `wanted`: as received, or computed from samples on the model's device."""
        if items["samples"].null_count < items.num_rows:
            stored = np.float32 if self.feature_dtype == np.float32 else np.int16
            samples = [self._array(items["samples"][i], stored) for i in wanted]
            steps = [items["sample_step"][i].as_py() for i in wanted]
            return clock.timed("features", self.engine.extract_features, samples, steps)
        return [self._array(items["features"][i], self.feature_dtype).unflatten(0, (-1, self.n_mels)) for i in wanted]

    def _array(self, value: pa.Scalar, dtype: type) -> torch.Tensor:
        """The numbers of a binary cell, without copying."""
        array = np.frombuffer(value.as_buffer(), dtype=dtype)
        return torch.from_numpy(array if len(array) else array.copy())  # torch refuses the address of an empty buffer


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees for its next batch; does nothing with another C library.

    By default glibc returns a batch's states to the system and requests the memory anew, page by page: 5 % of the job's
    time with a small model in bfloat16. See mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.system() == "Linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT_BLOCK_BYTES)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def _token_columns(result: Tokens | InputError | None) -> dict:
    """The values of `TOKEN_FIELDS`; all null for an item that has an error instead of tokens."""
    if not isinstance(result, Tokens):
        return dict.fromkeys(field.name for field in TOKEN_FIELDS)
    columns = {"token_ids": result.ids, "starts": result.starts, "ends": result.ends, "scores": result.scores}
    return columns | {"blank_ratio": result.blank_ratio}


def _with_errors(items: pa.Table, results: dict[int, Tokens | InputError]) -> pa.Table:
    """The items, with the errors of those that the model stage found not to fit the device even alone."""
    errors = {index: result for index, result in results.items() if isinstance(result, InputError)}
    if not errors:
        return items
    rows = items.to_pylist()
    for index, error in errors.items():
        rows[index] |= {"error_kind": str(error.kind), "error_message": error.message}
    return pa.Table.from_pylist(rows, schema=items.schema)


class CommitShards:
    """Items with tokens -> a committed part and one row about it.

    Args:
        output: where the table is stored.
        tokenizer, encoder_frame_s: of the model.
        fingerprint: of the job, part of each part's name.
        provenance: stored in each part's metadata.
    """

    def __init__(
        self,
        output: Storage,
        tokenizer: Tokenizer,
        encoder_frame_s: float,
        fingerprint: str,
        provenance: dict[str, str],
    ):
        self.output, self.tokenizer, self.encoder_frame_s = output, tokenizer, encoder_frame_s
        self.fingerprint, self.provenance = fingerprint, provenance

    def __call__(self, block: pa.Table) -> pa.Table:
        shard, items, clock = unpack_shard(block)
        table = clock.timed("write", self.transcripts, items)
        facts = part_facts(table)
        metadata = file_metadata(self.provenance, facts, {"shard": shard})
        name = part_name(shard, self.fingerprint)
        part_bytes = clock.timed("write", commit_part, self.output, name, table, metadata)
        result = {"shard": shard, "part_bytes": part_bytes, "facts": json.dumps(vars(facts)), **asdict(clock)}
        return pa.Table.from_pylist([result])

    def transcripts(self, items: pa.Table) -> pa.Table:
        """Rows of `TRANSCRIPT_SCHEMA`, in the order of the items."""
        return pa.Table.from_pylist([self._row(item) for item in items.to_pylist()], schema=TRANSCRIPT_SCHEMA)

    def _row(self, item: dict) -> dict:
        row = {name: item.get(name) for name in TRANSCRIPT_SCHEMA.names}
        if item["error_kind"] is not None:
            return row | {"status": "error"}
        tokens = Tokens(
            *(np.asarray(item[name]) for name in ("token_ids", "starts", "ends", "scores")),
            blank_ratio=item["blank_ratio"],
        )
        text = self.tokenizer.decode(item["token_ids"])
        return row | {
            "status": "ok" if text else "empty",
            "text": text,
            "confidence": round(float(tokens.scores.mean()), 4) if len(tokens.ids) else None,
            "words": round_words(group_words(tokens, self.tokenizer, self.encoder_frame_s)),
            "chars_per_s": round(len(text) / item["duration_s"], 3) if item["duration_s"] else None,
            "wer": None if item["reference"] is None else word_error_rate(item["reference"], text),
        }
