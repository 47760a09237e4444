"""The transcription job: `python -m jobs.transcribe --input URL --output URL --model URL_OR_ID`.

Exit status: 0 every item has its row and errors are within the budget; 3 complete, but over the budget; 2 refused
before any work; 1 stopped in the middle (the same command resumes).
"""

import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import ray
import tyro

import parakeet_core
from jobs.config import TranscribeConfig
from jobs.inputs import InputScan, scan_input
from jobs.listing import resolve_input
from jobs.metrics import JobMetrics
from jobs.models import ModelReference, resolve_model
from jobs.parts import (
    TABLE_FOLDER,
    JobIdentity,
    check_output,
    claim_output,
    committed_shards,
    read_part_facts,
    recorded_dtype,
)
from jobs.pipeline import LOST_WORKER_RETRIES, plan_resources, run_shards
from jobs.plan import dry_run
from jobs.plan_store import list_generations, planned_digests, read_plan, write_plan
from jobs.planning import plan_shards
from jobs.progress import ProgressDisplay, Tally, hours
from jobs.ray_session import ray_session
from jobs.report import EventLog, Receipt, merge_tallies, receipt_is_complete, summarise
from jobs.report_html import write_report
from jobs.schema import PartFacts
from jobs.storage import Storage, scrub
from parakeet_core.checkpoint import DTYPES
from parakeet_core.errors import RETRYABLE_KINDS, ConfigError, InputError, ParakeetError

EXIT_STOPPED, EXIT_REFUSED = 1, 2
RESUME_HINT = "run the same command again to resume; committed parts are kept and not computed again"


class JobStoppedError(ParakeetError):
    """The job ended before its last shard; what is committed stays."""


@dataclass
class Run:
    """One run of the job over one output.

    Attributes:
        planned_items: of the whole input; None where tars hide how many there are.
        before: sums over the parts that earlier runs committed.
        now: sums over the parts of this run.
    """

    config: TranscribeConfig
    output: Storage
    model: ModelReference
    shards: pa.Table  # plan_store.SHARD_SCHEMA, all that are planned
    identity: JobIdentity | None = None
    planned_items: int | None = None
    device: str = "none"
    before: Tally = field(default_factory=Tally)
    now: Tally = field(default_factory=Tally)
    model_idle_share: float | None = None
    throughput: list[tuple[float, float]] = field(default_factory=list)
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    clock_start: float = field(default_factory=time.monotonic)

    @property
    def fingerprint(self) -> str:
        return self.identity.fingerprint

    def receipt(self) -> Receipt:
        total = merge_tallies(self.before, self.now)
        wall_s = time.monotonic() - self.clock_start
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
            wer=total.word_errors / total.reference_words if total.reference_words else None,
            reference_words=total.reference_words,
            stage_seconds={stage: round(seconds, 3) for stage, seconds in self.now.stage_s.items()},
            model_idle_share=self.model_idle_share,
            shards=self.shards.num_rows,
            shards_this_run=self.now.shards,
            complete=total.shards == self.shards.num_rows and total.rows == (self.planned_items or total.rows),
            max_error_rate=self.config.max_error_rate,
            model=self.identity.model,
            weights_sha256=self.model.digest,
            dtype=self.identity.dtype,
            device=self.device,
            input=scrub(self.config.input),
            table=self.output.source(TABLE_FOLDER),
            started_at=self.started_at.isoformat(timespec="seconds"),
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
            version=parakeet_core.__version__,
        )


def run(config: TranscribeConfig) -> Receipt:
    """Transcribe an input into a table, or finish what an earlier run began. The Python API of the job.

    Returns:
        The receipt; its `exit_code` is the job's.

    Raises:
        ConfigError, CheckpointError: refused before any work.
        JobStoppedError: stopped in the middle; calling again resumes.
    """
    state, todo = _prepare(config)
    if todo is not None and not todo.num_rows:
        return _nothing_to_do(state)
    with ray_session(config.ray_address) as cluster:
        _settle(state, cluster)
        todo = _missing_shards(state) if todo is None else todo
        return _transcribe(state, todo, cluster) if todo.num_rows else _nothing_to_do(state)


def _prepare(config: TranscribeConfig) -> tuple[Run, pa.Table | None]:
    """Check what can be checked without Ray, and plan. The shards to do, or None if they depend on the cluster."""
    model = resolve_model(config.model, config.storage())
    try:
        output = Storage(config.output, config.storage())
        dtype = config.dtype if config.dtype != "auto" else recorded_dtype(output)
        if dtype is not None:
            check_output(output, _identity(model, dtype))
        state = Run(config, output, model, _plan(config, output))
        generations = list_generations(output)
        if all(generation.exact for generation in generations):
            state.planned_items = sum(generation.items for generation in generations)
        if dtype is None:
            return state, None
        state.identity = _identity(model, dtype)
        return state, _missing_shards(state)
    except InputError as error:
        raise ConfigError(f"input or output cannot be used: {error.message}") from error


def _identity(model: ModelReference, dtype: str) -> JobIdentity:
    return JobIdentity(weights_sha256=model.digest, dtype=dtype, model=scrub(model.name))


def _plan(config: TranscribeConfig, output: Storage) -> pa.Table:
    """The planned shards: those of earlier runs, and a new generation for what has come into the input since."""
    generations = list_generations(output)
    with scan_input(config.reading()) as scan:
        print(
            f"input   {scan.format}: {scan.reason}" + (f"; {scan.left_out}" if scan.left_out else ""), file=sys.stderr
        )
        source = {"input": _resolved_input(config), "format": scan.format}
        if generations and generations[0].options != source:
            raise ConfigError(
                f"{output.url} was planned from {generations[0].options}, this run reads {source}; "
                "the same audio would come under other ids: use another --output, one per input"
            )
        _plan_new_items(config, output, scan, source, len(generations))
    return read_plan(output)


def _plan_new_items(config: TranscribeConfig, output: Storage, scan: InputScan, source: dict, generation: int) -> None:
    """Plan the items that no earlier generation holds, as one more generation."""
    known = planned_digests(output) if generation else None
    with plan_shards(scan.batches(), config.planning(), known, generation) as plan:
        if plan.shards:
            written = write_plan(output, plan, source)
            if (written.fingerprint, written.options) != (plan.fingerprint, source):
                raise ConfigError(f"{output.url}: another run planned this output at the same moment; run again")
            print(f"plan    {plan.shards} shards, about {hours(plan.audio_s)}", file=sys.stderr)
        elif not generation:
            raise ConfigError(f"{source['input']}: nothing to transcribe")


def _resolved_input(config: TranscribeConfig) -> str:
    """The input in one spelling, whatever the working directory and the slashes."""
    storage, pattern, name = resolve_input(config.input, config.storage())
    return scrub("/".join(part for part in (storage.source(""), pattern, name) if part))


def _missing_shards(state: Run) -> pa.Table:
    """Shards to do: without a part, or with errors to retry; counts all others into `state.before`."""
    done = committed_shards(state.output, state.fingerprint)
    planned = set(state.shards["shard"].to_pylist())
    facts = read_part_facts(state.output, done & planned, state.fingerprint)
    if state.config.retry_errors:
        facts = {shard: part for shard, part in facts.items() if RETRYABLE_KINDS.isdisjoint(part.errors_by_kind)}
    for part in facts.values():
        state.before.add(part)
    return state.shards.filter(pc.invert(pc.is_in(state.shards["shard"], pa.array(sorted(facts), pa.string()))))


def _settle(state: Run, cluster: dict[str, float]) -> None:
    """Fix device and dtype by what the cluster has."""
    config = state.config
    state.device = config.device if config.device != "auto" else ("cuda" if cluster.get("GPU") else "cpu")
    if state.identity is None:
        state.identity = _identity(state.model, "bfloat16" if state.device == "cuda" else "float32")


def _nothing_to_do(state: Run) -> Receipt:
    """Account for an output whose shards are all committed, by a run that may have been killed before its receipt."""
    print("nothing to do: all planned shards are committed", file=sys.stderr)
    if not receipt_is_complete(state.output, state.shards.num_rows):
        _close(state, EventLog(state.output))
    return _finish(state)


def _transcribe(state: Run, todo: pa.Table, cluster: dict[str, float]) -> Receipt:
    config, dtype = state.config, state.identity.dtype
    longest_s = pc.max(todo["audio_s"]).as_py()
    weight_bytes = state.model.parameters * DTYPES[dtype].itemsize
    resources = plan_resources(config, state.device, cluster, todo.num_rows, longest_s, weight_bytes)
    try:
        claim_output(state.output, state.identity)  # only now: a refused run leaves no mark
    except InputError as error:
        raise ConfigError(f"the output cannot be used: {error.message}") from error
    print(
        f"run     {todo.num_rows} of {state.shards.num_rows} shards on {state.device} in {dtype}, "
        f"{resources.describe()}",
        file=sys.stderr,
    )
    events = EventLog(state.output)
    total_s = pc.sum(state.shards["audio_s"]).as_py()
    events.add("plan", shards=state.shards.num_rows, items=state.planned_items, audio_s=round(total_s, 3))
    events.add(
        "start",
        fingerprint=state.fingerprint,
        shards=todo.num_rows,
        resources=vars(resources),
        retry_errors=config.retry_errors,
    )
    metrics = JobMetrics(todo.num_rows)
    display = ProgressDisplay(total_s, state.before.audio_s + state.before.lost_s)
    state.now, state.throughput = display.tally, display.throughput
    try:
        with display:
            for result in run_shards(
                todo,
                state.output,
                config.storage(),
                state.model,
                dtype,
                resources,
                state.fingerprint,
                _provenance(state),
            ):
                facts = PartFacts(**json.loads(result["facts"]))
                display.update(facts, result)
                metrics.update(facts, result, display.model_idle_share())
                events.add_shard(result)
    except ray.exceptions.RayActorError as error:
        raise JobStoppedError(
            f"workers were lost more than {LOST_WORKER_RETRIES} times on one shard, by nodes that went, too little "
            f"memory, or an item that ends its decoder ({root_cause(error)}); {RESUME_HINT}"
        ) from error
    except (ray.exceptions.RayError, InputError) as error:
        raise JobStoppedError(f"{scrub(root_cause(error), state.output.options)}; {RESUME_HINT}") from error
    finally:
        state.model_idle_share = display.model_idle_share()
        _close(state, events)
    return _finish(state)


def root_cause(error: BaseException) -> str:
    """What went wrong at the bottom of a chain of wrapped exceptions, in one line."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray hands some causes over as a printed traceback only, whose last line says what was raised.
    return (
        lines[-1]
        if isinstance(error, ray.exceptions.RayError)
        else f"{type(error).__name__}: {lines[0] if lines else ''}"
    )


def _provenance(state: Run) -> dict[str, str]:
    """What each part says about its origin; the same for every run of one job."""
    options = {"input": scrub(state.config.input), "format": state.config.format, "dtype": state.identity.dtype}
    return {
        "model": state.identity.model,
        "weights_sha256": state.model.digest,
        "options": json.dumps(options, sort_keys=True),
        "code_version": parakeet_core.__version__,
        "fingerprint": state.fingerprint,
    }


def _close(state: Run, events: EventLog) -> None:
    """Leave receipt, page and events beside the table, however the run ended."""
    receipt = state.receipt()
    receipt.write(state.output)
    write_report(state.output, vars(receipt), state.throughput)
    events.add("end", complete=receipt.complete, items=receipt.items_in, errors=receipt.errors, wall_s=receipt.wall_s)
    events.flush()


def _finish(state: Run) -> Receipt:
    receipt = state.receipt()
    print(summarise(receipt, RESUME_HINT))
    return receipt


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    try:
        config = tyro.cli(TranscribeConfig, args=arguments, prog="python -m jobs.transcribe")
        if config.dry_run:
            output = Storage(config.output, config.storage())
            return dry_run(config, planned_digests(output))
        signal.signal(signal.SIGTERM, _stop)
        return run(config).exit_code
    except (JobStoppedError, InputError) as error:  # an InputError here: the output's storage failed
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
