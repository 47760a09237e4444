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
from jobs.inputs import scan_input
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
from jobs.pipeline import plan_resources, run_shards
from jobs.plan import dry_run
from jobs.plan_store import list_generations, planned_digests, read_plan, write_plan
from jobs.planning import plan_shards
from jobs.progress import ProgressDisplay, Tally, hours
from jobs.ray_session import ray_session
from jobs.report import EventLog, Receipt, merge_tallies, summarise
from jobs.report_html import write_report
from jobs.schema import PartFacts
from jobs.storage import Storage, scrub
from parakeet_core.checkpoint import DTYPES
from parakeet_core.errors import ConfigError, InputError, ParakeetError

EXIT_STOPPED, EXIT_REFUSED = 1, 2
RESUME_HINT = "run the same command again to resume; committed parts are kept and not computed again"


class JobStoppedError(ParakeetError):
    """The job ended before its last shard; what is committed stays."""


@dataclass
class Run:
    """One run of the job over one output.

    Attributes:
        before: sums over the parts that earlier runs committed.
        now: sums over the parts of this run.
    """

    config: TranscribeConfig
    output: Storage
    model: ModelReference
    shards: pa.Table  # plan_store.SHARD_SCHEMA, all that are planned
    identity: JobIdentity | None = None
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
            items_in=total.rows,
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
            complete=total.shards == self.shards.num_rows,
            max_error_rate=self.config.max_error_rate,
            model=self.model.name,
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
        print("nothing to do: all planned shards are committed", file=sys.stderr)
        return _finish(state)
    with ray_session(config.ray_address) as cluster:
        todo = _claim(state, todo, cluster)
        return _transcribe(state, todo, cluster)


def _prepare(config: TranscribeConfig) -> tuple[Run, pa.Table | None]:
    """Check what can be checked without Ray, and plan. The shards to do, or None if they depend on the cluster."""
    model = resolve_model(config.model, config.storage())
    try:
        output = Storage(config.output, config.storage())
        dtype = config.dtype if config.dtype != "auto" else recorded_dtype(output)
        if dtype is not None:
            check_output(output, _identity(model, dtype))
        state = Run(config, output, model, _plan(config, output))
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
    scan = scan_input(config.reading())
    print(f"input   {scan.format}: {scan.reason}" + (f"; {scan.left_out}" if scan.left_out else ""), file=sys.stderr)
    source = {"input": scrub(config.input), "format": scan.format}
    if generations and generations[0].options != source:
        raise ConfigError(
            f"{output.url} was planned from {generations[0].options}, this run reads {source}; "
            "the same audio would come under other ids: use another --output, one per input"
        )
    known = planned_digests(output) if generations else None
    with plan_shards(scan.batches(), config.planning(), known, len(generations)) as plan:
        if plan.shards:
            write_plan(output, plan, source)
            print(f"plan    {plan.shards} shards, about {hours(plan.audio_s)}", file=sys.stderr)
        elif not generations:
            raise ConfigError(f"{source['input']}: nothing to transcribe")
    return read_plan(output)


def _missing_shards(state: Run) -> pa.Table:
    """Shards without a part; counts what is there into `state.before`."""
    done = committed_shards(state.output, state.fingerprint)
    planned = set(state.shards["shard"].to_pylist())
    facts = read_part_facts(state.output, done & planned, state.fingerprint)
    for part in facts.values():
        state.before.add(part)
    return state.shards.filter(pc.invert(pc.is_in(state.shards["shard"], pa.array(sorted(facts), pa.string()))))


def _claim(state: Run, todo: pa.Table | None, cluster: dict[str, float]) -> pa.Table:
    """Fix device and dtype by what the cluster has, and claim the output for them; the shards to do."""
    config = state.config
    state.device = config.device if config.device != "auto" else ("cuda" if cluster.get("GPU") else "cpu")
    if state.identity is None:
        state.identity = _identity(state.model, "bfloat16" if state.device == "cuda" else "float32")
    try:
        claim_output(state.output, state.identity)
        return _missing_shards(state) if todo is None else todo
    except InputError as error:
        raise ConfigError(f"the output cannot be used: {error.message}") from error


def _transcribe(state: Run, todo: pa.Table, cluster: dict[str, float]) -> Receipt:
    config, dtype = state.config, state.identity.dtype
    longest_s = pc.max(todo["audio_s"]).as_py()
    weight_bytes = state.model.parameters * DTYPES[dtype].itemsize
    resources = plan_resources(config, state.device, cluster, todo.num_rows, longest_s, weight_bytes)
    print(
        f"run     {todo.num_rows} of {state.shards.num_rows} shards on {state.device} in {dtype}, "
        f"{resources.describe()}",
        file=sys.stderr,
    )
    events = EventLog(state.output)
    events.add("start", fingerprint=state.fingerprint, shards=todo.num_rows, resources=vars(resources))
    total_s = pc.sum(state.shards["audio_s"]).as_py()
    pools = {"features": (resources.feature_pool or resources.model_pool)[1], "model": resources.model_pool[1]}
    display = ProgressDisplay(total_s, state.before.audio_s + state.before.lost_s, pools)
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
                display.update(PartFacts(**json.loads(result["facts"])), result)
                events.add("shard", **result)
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
            return dry_run(config)
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
