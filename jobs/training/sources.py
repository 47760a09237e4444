"""Inputs with texts -> labelled shards: rows of a plan, and where their texts are.

    any input layout     planned as by the transcription job; the texts are the items' references
    a transcript output  its own plan and its table; the texts are the transcripts in which the model was confident

The plan of a split stays: files added to an input later do not change the data of a resumed run.
"""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow.parquet as pq

from jobs.inputs.scan import InputOptions, scan_input
from jobs.planning.generations import list_generations
from jobs.planning.shards import PlanOptions, plan_shards
from jobs.planning.store import read_plan, read_shard, write_plan
from jobs.reading.items import ReadItem, read_items
from jobs.storage.connections import StorageOptions, scrub
from jobs.storage.files import Storage
from jobs.table.ownership import JOB_FILE, recorded_fingerprint
from jobs.table.parts import TABLE_FOLDER, find_committed
from parakeet_core.errors import ConfigError

SHARD_AUDIO_S = 600.0  # prepared by one task and stored as one file: 19 MB of samples


@dataclass(frozen=True)
class LabelledShard:
    """A shard whose items have texts.

    Attributes:
        name: of the shard, unique in its split.
        plan: where its plan is.
        plan_file, row_group: its rows in the plan.
        table: the file of transcripts with its texts, under `plan`; None if the items have references.
        min_confidence: rows of the table below it count as having no text.
        sources: options for reading the audio.
    """

    name: str
    plan: Storage
    plan_file: str
    row_group: int
    sources: StorageOptions
    table: str | None = None
    min_confidence: float = 0.0

    def items(self) -> Iterator[tuple[ReadItem, str | None, bool]]:
        """(item, its text, whether a text was left out for low confidence), read on demand."""
        rows = read_shard(self.plan, self.plan_file, self.row_group)
        if self.table is None:
            for item in read_items(rows, self.sources):
                yield item, item.reference, False
            return
        texts, doubtful = self._transcripts()
        for item in read_items(rows, self.sources):
            yield item, texts.get(item.id), item.id in doubtful

    def _transcripts(self) -> tuple[dict[str, str], set[str]]:
        """Texts by id, and the ids whose text has too low a confidence."""
        content = io.BytesIO(self.plan.read_bytes(self.table))
        rows = pq.read_table(content, columns=["id", "status", "text", "confidence"]).to_pylist()
        heard = [row for row in rows if row["status"] == "ok"]
        kept = {row["id"]: row["text"] for row in heard if row["confidence"] >= self.min_confidence}
        return kept, {row["id"] for row in heard} - kept.keys()


def labelled_shards(
    urls: Sequence[str],
    plans: Storage,
    storage: StorageOptions,
    min_confidence: float,
    allow_local_paths: bool = False,
    allow_http: bool = False,
) -> list[LabelledShard]:
    """The shards of several inputs, in the order of the inputs.

    Args:
        plans: where the plans of the inputs are kept, one folder for each.

    Raises:
        ConfigError: an input cannot be read, or is not the one that was planned here earlier.
    """
    shards = []
    for number, url in enumerate(urls):
        source = Storage(url, storage)
        if not _has_suffix(url) and source.exists(JOB_FILE) and source.list_names(TABLE_FOLDER):
            shards += _transcript_shards(number, source, min_confidence)
            continue
        options = InputOptions(url, allow_local_paths=allow_local_paths, allow_http=allow_http, storage=storage)
        shards += _input_shards(number, options, Storage(f"{plans.url}/{number}", storage))
    return shards


def _has_suffix(url: str) -> bool:
    """Whether it looks like a manifest, a tar or a glob, not a folder: some storages fail on a path below a file."""
    return "." in url.rpartition("/")[2] or "*" in url


def _transcript_shards(number: int, source: Storage, min_confidence: float) -> list[LabelledShard]:
    fingerprint = recorded_fingerprint(source)
    rows = read_plan(source, list_generations(source)).to_pylist()
    committed = find_committed(source, fingerprint, {row["shard"] for row in rows})
    file_of = {shard: name for name, shards in committed.files.items() for shard in shards}
    return [
        LabelledShard(
            f"{number}-{row['shard']}",
            source,
            row["plan_file"],
            row["row_group"],
            source.options,
            f"{TABLE_FOLDER}/{file_of[row['shard']]}",
            min_confidence,
        )
        for row in rows
        if row["shard"] in file_of
    ]


def _input_shards(number: int, options: InputOptions, plan: Storage) -> list[LabelledShard]:
    generations = list_generations(plan)
    source = {"input": scrub(options.url)}
    if generations and generations[0].options != source:
        raise ConfigError(
            f"{plan.url} was planned from {json.dumps(generations[0].options)}, this run reads {json.dumps(source)}; "
            "use another --output"
        )
    with scan_input(options) as scan:
        planning = PlanOptions(SHARD_AUDIO_S, storage=scan.storage)
        with plan_shards(scan.batches(), planning) as planned:  # even if there is a plan: this collects signed URLs
            if not planned.shards:
                raise ConfigError(f"{source['input']}: no item there")
            generations = generations or [write_plan(plan, planned, source)]
    return [
        LabelledShard(f"{number}-{row['shard']}", plan, row["plan_file"], row["row_group"], scan.storage)
        for row in read_plan(plan, generations).to_pylist()
    ]
