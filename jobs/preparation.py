"""What is settled before Ray starts: model, output, plan, and which shards are left to do; and the account of a run.

Knows nothing of Ray: a run that finds nothing to do, or is refused, ends here in seconds.
"""

import os
import re
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.utils import glob_translate

import parakeet_core
from jobs.config import TranscribeConfig
from jobs.inputs.listing import resolve_input
from jobs.inputs.scan import InputScan, scan_input
from jobs.models import ModelReference, resolve_model
from jobs.planning.description import rewritten_warning
from jobs.planning.generations import RACE, Generation, list_generations
from jobs.planning.item_digests import planned_items
from jobs.planning.shards import plan_shards
from jobs.planning.store import read_plan, write_plan
from jobs.report.progress import Tally, hours
from jobs.report.receipt import Receipt, merge_tallies
from jobs.resume import account_earlier
from jobs.storage.connections import OWN_ERRORS, StorageOptions, scrub
from jobs.storage.files import Storage
from jobs.table.ownership import JobIdentity, as_begun, check_output, recorded_dtype, version_of
from jobs.table.parts import TABLE_FOLDER
from jobs.table.shard_names import pack_shards
from parakeet_core.errors import ConfigError

RECEIPT_EVERY_S = 60.0  # so after a kill, only the parts of a minute have to be looked up again


@dataclass
class Run:
    """One run of the job over one output.

    Attributes:
        generations, shards: everything that is planned.
        committed: shards that are done, by whichever run.
        before: sums over the parts that earlier runs committed.
        now: sums over the parts of this run.
        closed: an earlier run has left a receipt that says all this.
    """

    config: TranscribeConfig
    output: Storage
    model: ModelReference
    generations: list[Generation]
    shards: pa.Table  # planning.store.SHARD_SCHEMA
    sources: StorageOptions  # how to reach the audio
    identity: JobIdentity | None = None
    device: str = "none"
    committed: set[str] = field(default_factory=set)
    before: Tally = field(default_factory=Tally)
    now: Tally = field(default_factory=Tally)
    closed: bool = False
    model_idle_share: float | None = None
    throughput: list[tuple[float, float]] = field(default_factory=list)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    preparation_s: float = 0.0  # from the start of the command: fetching the model, listing, planning
    clock_start: float = field(default_factory=time.monotonic)  # when that was finished
    receipt_at: float = field(default_factory=time.monotonic)

    @property
    def fingerprint(self) -> str:
        return self.identity.fingerprint

    @property
    def planned_items(self) -> int | None:
        """Items of the whole input; None if tars hide how many there are."""
        exact = all(generation.exact for generation in self.generations)
        return sum(generation.items for generation in self.generations) if exact else None

    @property
    def planned_shards(self) -> set[str]:
        """Names of all shards, done or not."""
        return set(self.shards["shard"].to_pylist())

    def missing_shards(self) -> pa.Table:
        """Shards to do, longest first, so that no long one is left for the end of the job."""
        done = pa.array(sorted(self.committed), pa.string())
        todo = self.shards.filter(pc.invert(pc.is_in(self.shards["shard"], done)))
        return todo.sort_by([("audio_s", "descending"), ("shard", "ascending")])

    def account(self) -> None:
        """Look up what earlier runs have committed."""
        earlier = account_earlier(self.output, self.fingerprint, self.planned_shards, self.config.retry_errors)
        self.committed, self.before, self.closed = earlier.shards, earlier.tally, earlier.closed

    def commit(self, shard: str) -> None:
        """Note a committed shard; every `RECEIPT_EVERY_S` also on storage."""
        self.committed.add(shard)
        if time.monotonic() - self.receipt_at > RECEIPT_EVERY_S:
            self.write_receipt()

    def write_receipt(self) -> Receipt:
        receipt = self.receipt()
        receipt.write(self.output)
        self.receipt_at = time.monotonic()
        return receipt

    def receipt(self) -> Receipt:
        total = merge_tallies(self.before, self.now)
        wall_s = self.preparation_s + time.monotonic() - self.clock_start
        return Receipt(
            items_in=self.planned_items or total.rows,
            items_pending=max((self.planned_items or 0) - total.rows, 0),
            ok=total.ok,
            empty=total.empty,
            errors=total.errors,
            error_rate=total.errors / total.rows if total.rows else 0.0,
            errors_by_kind=total.errors_by_kind,
            hours_in=(total.audio_s + total.lost_s) / 3600,
            hours_done=total.audio_s / 3600,
            hours_lost=total.lost_s / 3600,
            hours_this_run=self.now.audio_s / 3600,
            rtfx_end_to_end=round(self.now.audio_s / wall_s, 2),
            wall_s=round(wall_s, 3),
            preparation_s=round(self.preparation_s, 3),
            wer=total.word_errors / total.reference_words if total.reference_words else None,
            reference_words=total.reference_words,
            stage_seconds={stage: round(seconds, 3) for stage, seconds in self.now.stage_s.items()},
            model_idle_share=self.model_idle_share,
            shards=self.shards.num_rows,
            shards_done=total.shards,
            shards_this_run=self.now.shards,
            complete=total.shards == self.shards.num_rows and total.rows == (self.planned_items or total.rows),
            max_error_rate=self.config.max_error_rate,
            model=self.identity.model,
            weights_sha256=self.model.digest,
            dtype=self.identity.dtype,
            device=self.device,
            input=scrub(self.config.input),
            table=self.output.source(TABLE_FOLDER),
            fingerprint=self.fingerprint,
            accounted=pack_shards(self.committed),
            started_at=self.started_at.isoformat(timespec="seconds"),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            version=parakeet_core.__version__,
        )


def prepare(config: TranscribeConfig) -> Run:
    """Check what can be checked without Ray, and plan. The identity stays None if the dtype depends on the cluster.

    Raises:
        ConfigError, CheckpointError: the run is refused.
    """
    started_at, begun = datetime.now(UTC), time.monotonic()
    model = resolve_model(config.model, config.storage())
    try:
        root = output = Storage(config.output, config.storage())
        dtype = config.dtype if config.dtype != "auto" else recorded_dtype(output)
        identity = None
        if dtype is not None:
            find = version_of if config.new_version else as_begun
            output, identity = find(root, identify(model, dtype))
            check_output(output, identity)
        generations, sources = _plan(config, output, list_generations(root))
        shards = read_plan(output, generations)
        state = Run(
            *(config, output, model, generations, shards, sources, identity),
            started_at=started_at,
            preparation_s=time.monotonic() - begun,
        )
        if identity is not None:
            state.account()
        return state
    except OWN_ERRORS as error:
        raise ConfigError(f"input or output cannot be used: {error}") from error


def identify(model: ModelReference, dtype: str) -> JobIdentity:
    return JobIdentity(weights_sha256=model.digest, dtype=dtype, model=scrub(model.name), files=model.files)


def _plan(
    config: TranscribeConfig, output: Storage, first_version: list[Generation]
) -> tuple[list[Generation], StorageOptions]:
    """The plan: generations of earlier runs, and a new one for what the input has gained since; how to reach it.

    Args:
        first_version: the plan under --output itself; all versions share its input.
    """
    place = resolve_input(config.input, config.storage())
    _check_apart(config, *place)
    generations = list_generations(output)
    with scan_input(config.reading()) as scan:
        print(
            f"input   {scan.format}: {scan.reason}" + (f"; {scan.left_out}" if scan.left_out else ""), file=sys.stderr
        )
        source = {"input": _spelt(*place), "format": scan.format}
        for planned in first_version[:1] + generations[:1]:
            if planned.options != source:
                raise ConfigError(
                    f"{scrub(config.output)} was planned from {planned.options}, this run reads {source}; "
                    "the same audio would come under other ids: use another --output, one per input"
                )
        return generations + _plan_new_items(config, output, scan, source, generations), scan.storage


def _plan_new_items(
    config: TranscribeConfig, output: Storage, scan: InputScan, source: dict, generations: list[Generation]
) -> list[Generation]:
    """Plan the items that no earlier generation holds; returns one more generation, or none."""
    known = planned_items(output, generations)
    with plan_shards(scan.batches(), config.planning(scan.storage), known, len(generations)) as plan:
        if plan.rewritten:
            print(f"note    {rewritten_warning(plan.rewritten)}", file=sys.stderr)
        if plan.shards:
            written = write_plan(output, plan, source)
            if (written.fingerprint, written.options) != (plan.fingerprint, source):
                raise ConfigError(f"{output.url}: {RACE}")
            print(f"plan    {plan.shards} shards, about {hours(plan.audio_s)}", file=sys.stderr)
            return [written]
        if not generations:
            raise scan.no_items(config.input)
        return []


def _check_apart(config: TranscribeConfig, storage: Storage, pattern: str | None, name: str | None) -> None:
    """Refuse an output that the next run would find in its input, here given as `resolve_input` returns it."""
    folder, output = _real_path(storage), _real_path(Storage(config.output, config.storage()))
    if name is not None or not f"{output}/".startswith(f"{folder}/"):
        return
    part = f"{output}/{TABLE_FOLDER}/part-0.parquet".removeprefix(f"{folder}/")
    if pattern is None or "**" in pattern or re.match(glob_translate(pattern), part):
        raise ConfigError(
            f"--output {scrub(config.output)} lies in --input {scrub(config.input)}: the next run would read its files "
            "as input; give a folder beside it"
        )


def _real_path(storage: Storage) -> str:
    """Where a folder is, whatever links lead there."""
    return (os.path.realpath(storage.root) if storage.is_local else storage.source("")).rstrip("/")


def _spelt(storage: Storage, pattern: str | None, name: str | None) -> str:
    """What `resolve_input` makes of the input, in one spelling, whatever the working directory and the slashes."""
    spelt = glob_translate(pattern) if pattern else name  # as the plans of existing outputs have it
    return scrub("/".join(part for part in (storage.source(""), spelt) if part))
