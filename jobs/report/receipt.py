"""What a run leaves on record: the receipt (OUTPUT/receipt.json), its summary in words, and the event log."""

import json
import time
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from jobs.report.progress import Tally, clock, hours
from jobs.storage.connections import scrub
from jobs.storage.files import Storage
from jobs.worker_end import EVENTS_FOLDER

RECEIPT_FILE = "receipt.json"
EVENTS_EVERY_S = 30.0  # between two files of the event log: object stores cannot append


@dataclass(frozen=True)
class Receipt:
    """The account of a job: every item is in one of `ok`, `empty`, `errors`, and every hour is done or lost.

    Attributes:
        items_in: items of the input as planned; if tars hide how many they hold, the rows of the table.
        items_pending: planned items without a row; 0 in a complete job.
        hours_in: hours_done + hours_lost; `hours_lost` as far as the input gives the length of its unreadable items.
        rtfx_end_to_end: seconds of audio committed by this run per second of its wall time.
        wall_s: of this run, including `preparation_s` for fetching the model, listing and planning.
        wer: over rows with a reference; None without references.
        stage_seconds: step -> seconds of this run, summed over actors.
        model_idle_share: share of the time from each model actor's first shard to its last, 0 to 1.
        shards, shards_done, shards_this_run: planned; committed; committed by this run.
        complete: every planned shard has its part.
        fingerprint: of model and dtype.
        verification: the fields of `jobs.verify.Verification`; None if none was asked for.
        accounted: the shards that the sums include, as `jobs.table.shard_names.pack_shards` writes them.
    """

    items_in: int
    items_pending: int
    ok: int
    empty: int
    errors: int
    error_rate: float
    errors_by_kind: dict[str, int]
    hours_in: float
    hours_done: float
    hours_lost: float
    hours_this_run: float
    rtfx_end_to_end: float
    wall_s: float
    preparation_s: float
    wer: float | None
    reference_words: int
    stage_seconds: dict[str, float]
    model_idle_share: float | None
    shards: int
    shards_done: int
    shards_this_run: int
    complete: bool
    max_error_rate: float
    model: str
    weights_sha256: str
    dtype: str
    device: str
    input: str
    table: str
    fingerprint: str
    accounted: dict[str, str]
    started_at: str
    finished_at: str
    version: str
    verification: dict | None = None

    @property
    def exit_code(self) -> int:
        """0: complete and within the error budget; 3: complete, over it; 1: stopped in the middle."""
        if not self.complete:
            return 1
        return 3 if self.error_rate > self.max_error_rate else 0

    def write(self, output: Storage) -> None:
        output.write_atomic(RECEIPT_FILE, json.dumps(asdict(self), indent=1).encode())


def add_to_receipt(output: Storage, **fields) -> None:
    """Set fields of the receipt on storage, whichever run wrote it."""
    record = json.loads(output.read_bytes(RECEIPT_FILE)) | fields
    output.write_atomic(RECEIPT_FILE, json.dumps(record, indent=1).encode())


def summarise(receipt: Receipt, resume_hint: str) -> str:
    """The receipt in words, for the end of a run."""
    r = receipt
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(r.errors_by_kind.items(), key=lambda kv: -kv[1]))
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in r.stage_seconds.items())
    lines = [
        f"items   {r.items_in:,} in = {r.ok:,} ok + {r.empty:,} empty + {r.errors:,} errors"
        + (f" ({kinds})" if kinds else "")
        + (f" + {r.items_pending:,} not yet" if r.items_pending else ""),
        f"hours   {r.hours_in:,.3f} in = {r.hours_done:,.3f} done + {r.hours_lost:,.3f} lost",
        f"speed   RTFx {r.rtfx_end_to_end:,.0f} end to end; {hours(r.hours_this_run * 3600)} in {clock(r.wall_s)}",
        f"stages  {stages} (summed over actors)"
        + (f"; model idle {r.model_idle_share:.0%}" if r.model_idle_share is not None else ""),
    ]
    if r.wer is not None:
        lines.append(f"WER     {r.wer:.1%} over {r.reference_words:,} reference words")
    lines += [
        f"table   {r.table}",
        f"open    duckdb -c \"select id, status, text, confidence from '{r.table}/*.parquet' limit 20\"",
    ]
    if not r.complete:
        lines.append(f"STOPPED before the end: {resume_hint}")
    elif r.exit_code == 3:
        lines.append(
            f"OVER THE ERROR BUDGET: {r.error_rate:.2%} of the items are errors, --max-error-rate allows "
            f"{r.max_error_rate:.2%}; error_kind and error_message in the table say why"
        )
    return "\n".join(lines)


class EventLog:
    """JSON lines about one run under OUTPUT/events/, in files that are written whole every EVENTS_EVERY_S.

    Events: `plan`, `start`, `shard` (committed), `retry` (a lost worker's shards), `not_compiled` (a worker's model),
    `end`. Workers that end themselves leave `worker_ended` in files of their own (`jobs.worker_end`).
    """

    def __init__(self, output: Storage):
        self.output = output
        self.run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
        self._lines: list[str] = []
        self._restarted: set[str] = set()
        self.not_compiled: dict[str, str] = {}  # worker -> why its model was not compiled
        self._files, self._flushed = 0, time.monotonic()

    def add(self, event: str, **values) -> None:
        record = {"at": datetime.now(UTC).isoformat(timespec="milliseconds"), "run": self.run, "event": event, **values}
        self._lines.append(scrub(json.dumps(record, default=str), self.output.options))
        if time.monotonic() - self._flushed > EVENTS_EVERY_S:
            self.flush()

    def add_shard(self, result: dict) -> None:
        """Add a committed shard, as `CommitShards` returns it; before the first of a restarted worker, add a retry."""
        for worker in ("feature_worker", "model_worker"):
            if result[f"{worker}_again"] and result[worker] not in self._restarted:
                self._restarted.add(result[worker])
                self.add("retry", reason="a worker was lost; its shards in hand are done again", worker=result[worker])
        worker, reason = result["model_worker"], result["not_compiled"]
        if reason and worker not in self.not_compiled:
            self.not_compiled[worker] = reason
            self.add("not_compiled", reason=reason, worker=worker)
        self.add("shard", **{name: value for name, value in result.items() if name != "not_compiled"})

    def flush(self) -> None:
        """Write what has not been written yet as the next file."""
        if self._lines:
            name = f"{EVENTS_FOLDER}/{self.run}-{self._files:05d}.jsonl"
            self.output.write_atomic(name, ("\n".join(self._lines) + "\n").encode())
            self._files += 1
        self._lines, self._flushed = [], time.monotonic()


def merge_tallies(*tallies: Tally) -> Tally:
    """The sums of several tallies."""
    merged = Tally()
    for tally in tallies:
        for name in ("shards", "rows", "ok", "empty", "errors", "audio_s", "lost_s", "word_errors", "reference_words"):
            setattr(merged, name, getattr(merged, name) + getattr(tally, name))
        for kind, count in tally.errors_by_kind.items():
            merged.errors_by_kind[kind] = merged.errors_by_kind.get(kind, 0) + count
        for stage, seconds in tally.stage_s.items():
            merged.stage_s[stage] += seconds
    return merged
