"""A sample of the table, transcribed again the slow way: each item alone, in float32. Changes nothing in the table.

It shows what half precision, batches and padding have cost on this very input, and whether a worker computed something
wrong. It reads only the items that it samples (in a tar, also those before them).
"""

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice

import jiwer
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from jobs.models import ModelReference
from jobs.planning.store import read_shard
from jobs.reading.items import ReadItem, SourceFile, read_items
from jobs.storage.connections import StorageOptions
from jobs.storage.files import Storage
from jobs.table.parts import TABLE_FOLDER
from jobs.table.schema import normalise_words
from parakeet_core.audio import load_audio
from parakeet_core.engine import Engine
from parakeet_core.errors import InputError

SEED = 20261122  # the same items in every run, so that two runs can be compared
FIRST_OF_CONTAINER = 32  # an item deep inside a tar would cost reading everything before it
LISTED = 20  # ids that the receipt names


@dataclass(frozen=True)
class Sample:
    """Items of one shard to do again: how many, and which file holds their rows."""

    shard: str
    plan_file: str
    row_group: int
    file: str
    items: int


@dataclass(frozen=True)
class Verification:
    """The result, as the receipt holds it.

    Attributes:
        asked: items that were to be sampled. items: those that were compared; error rows are not.
        mismatches: items whose text differs.
        wer: of the table's texts against those of float32, over all compared items; None without words.
        differing: ids of some of these items.
        failed: items that could not be read again.
    """

    asked: int
    items: int
    mismatches: int
    wer: float | None
    differing: tuple[str, ...]
    failed: int

    def describe(self) -> str:
        """One line for the end of a run."""
        if not self.items:
            return "no item could be compared"
        wer = "" if self.wer is None else f", WER {self.wer:.2%} against it"
        failed = f"; {self.failed} could not be read again" if self.failed else ""
        return f"{self.mismatches} of {self.items} items differ from each alone in float32{wer}{failed}"


def choose_samples(shards: pa.Table, files: dict[str, frozenset[str]], items: int) -> list[Sample]:
    """Samples spread evenly over the audio of the committed shards.

    Args:
        shards: of `jobs.planning.store.SHARD_SCHEMA`.
        files: of the table, name -> shards (`jobs.table.parts.Committed`).
    """
    file_of = {shard: name for name, held in files.items() for shard in held}
    rows = [row for row in shards.to_pylist() if row["shard"] in file_of]
    ends = list(accumulate(row["audio_s"] for row in rows))
    if not rows or not ends[-1]:
        return []
    if all(row["items"] for row in rows):  # none is a tar: draw no more places than there are items
        items = min(items, sum(row["items"] for row in rows))
    rng = random.Random(SEED)
    places = [(number + rng.random()) / items * ends[-1] for number in range(items)]
    wanted = Counter(min(bisect_right(ends, place), len(rows) - 1) for place in places)
    taken, left = Counter(), 0
    for index in [*range(len(rows)), *range(len(rows))]:  # what a short shard lacks, others supply
        left += wanted.pop(index, 0)
        known = rows[index]["items"]  # 0 for tars, whose number of items is not known
        room = known - taken[index] if known else left
        taken[index] += min(left, room)
        left -= min(left, room)
    return [
        Sample(rows[i]["shard"], rows[i]["plan_file"], rows[i]["row_group"], file_of[rows[i]["shard"]], count)
        for i, count in sorted(taken.items())
        if count
    ]


def verify_table(
    output: Storage,
    shards: pa.Table,
    files: dict[str, frozenset[str]],
    sources: StorageOptions,
    model: ModelReference,
    device: str,
    items: int,
) -> Verification:
    """Do a sample again on one worker of the running Ray session, and compare.

    Args:
        sources: how to reach the audio.
        items: how many; all if there are fewer.
    """
    samples = choose_samples(shards, files, items)
    # No memory is asked for: Ray would wait for ever for an amount that no node has.
    worker = ray.remote(num_gpus=1, num_cpus=0)(_repeat) if device == "cuda" else ray.remote(num_cpus=1)(_repeat)
    return summarise(ray.get(worker.remote(output, samples, sources, model, device)), items)


def summarise(pairs: list[tuple[str, str, str | None]], asked: int) -> Verification:
    """The result from (id, text in the table, text in float32 or None) of each sampled item."""
    compared = [(id_, text, again) for id_, text, again in pairs if again is not None]
    differing = [id_ for id_, text, again in compared if text != again]
    wer = _corpus_wer([(normalise_words(again), normalise_words(text)) for _, text, again in compared])
    failed = len(pairs) - len(compared)
    return Verification(asked, len(compared), len(differing), wer, tuple(differing[:LISTED]), failed)


def _corpus_wer(words: list[tuple[str, str]]) -> float | None:
    """Word errors over reference words, of (reference, text); all words against an empty reference are errors."""
    spoken = [pair for pair in words if pair[0]]
    if not spoken:
        return None
    found = jiwer.process_words([reference for reference, _ in spoken], [text for _, text in spoken])
    errors = found.substitutions + found.deletions + found.insertions
    errors += sum(len(text.split()) for reference, text in words if not reference)
    return errors / sum(len(reference.split()) for reference, _ in spoken)


def _repeat(
    output: Storage, samples: list[Sample], sources: StorageOptions, model: ModelReference, device: str
) -> list[tuple[str, str, str | None]]:
    """(id, text in the table, text of the item alone in float32 or None if it cannot be read) of each sampled item."""
    checkpoint = model.load("float32", device)
    engine = Engine(checkpoint)
    pairs = []
    for sample in samples:
        for item, text in _sampled_items(output, sample, sources):
            try:
                features, _ = checkpoint.frontend([_decode(item, model)])
                (result,) = engine.recognise([features[0]])
                if isinstance(result, InputError):
                    raise result
                pairs.append((item.id, text, checkpoint.tokenizer.decode(result.ids.tolist())))
            except InputError:
                pairs.append((item.id, text, None))
    return pairs


def _sampled_items(output: Storage, sample: Sample, sources: StorageOptions) -> Iterator[tuple[ReadItem, str]]:
    """Items of a shard that have a text in the table, with that text."""
    rng = random.Random(f"{SEED} {sample.shard}")
    rows = read_shard(output, sample.plan_file, sample.row_group)
    order = rng.sample(range(rows.num_rows), rows.num_rows)
    left = sample.items
    for index in order:
        if not left:
            return
        row = rows.slice(index, 1)
        found = list(islice(read_items(row, sources), FIRST_OF_CONTAINER))
        texts = _texts(output, sample.file, [item.id for item in found])
        for item in rng.sample(found, len(found)):
            if left and texts.get(item.id) is not None:
                left -= 1
                yield item, texts[item.id]


def _texts(output: Storage, file: str, ids: list[str]) -> dict[str, str | None]:
    """id -> text, of rows of one file of the table."""
    with output.open(f"{TABLE_FOLDER}/{file}") as opened:
        table = pq.read_table(opened, columns=["id", "text"], filters=pc.field("id").isin(ids))
    return dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))


def _decode(item: ReadItem, model: ModelReference):
    if isinstance(item.payload, InputError):
        raise item.payload
    try:
        audio = load_audio(
            item.payload,
            model.config.frontend.sample_rate_hz,
            offset_s=item.offset_s or 0.0,
            duration_s=item.duration_s,
            channel="mix" if item.channel is None else item.channel,
        )
        return audio.waveform
    finally:
        if isinstance(item.payload, SourceFile):
            item.payload.close()
            item.payload.raise_error()
