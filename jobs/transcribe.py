"""The transcription job: `python -m jobs.transcribe --input URL --output URL --model URL_OR_ID`.

Exit status: 0 every item has its row and errors are within the budget; 3 complete, but over the budget; 2 refused
before any work; 1 stopped in the middle, or Ray did not start (the same command resumes).
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import pyarrow as pa
import pyarrow.compute as pc
import ray
import tyro

import parakeet_core
from jobs.command_line import JobStoppedError, exit_status, interrupt_on_sigterm
from jobs.config import TranscribeConfig
from jobs.metrics import JobMetrics
from jobs.pipeline import LOST_WORKER_RETRIES, run_shards
from jobs.plan import dry_run
from jobs.planning.generations import list_generations
from jobs.planning.item_digests import planned_items
from jobs.preparation import Run, identify, prepare
from jobs.ray_session import alive_nodes, note_local_output, ray_session, root_cause, starts_alone
from jobs.report.page import write_report
from jobs.report.progress import ProgressDisplay, Tally
from jobs.report.receipt import EventLog, Receipt, add_to_receipt, summarise
from jobs.resources import Resources, measure_work, plan_resources
from jobs.resume import find_undoubled
from jobs.storage.connections import OWN_ERRORS, scrub
from jobs.storage.files import Storage
from jobs.table.ownership import claim_output
from jobs.table.parts import find_committed
from jobs.table.schema import PartFacts
from jobs.verify import verify_table
from jobs.worker_end import EVENTS_FOLDER
from parakeet_core.checkpoint import INT8
from parakeet_core.errors import ConfigError

HOPELESS_ITEMS, HOPELESS_SHARE = 1_000, 0.5  # so many errors in so many items point to one cause, not to the items
RESUME_HINT = "run the same command again to resume; committed parts are kept and not computed again"


def run(config: TranscribeConfig) -> Receipt:
    """Transcribe an input into a table, or finish what an earlier run began. The Python API of the job.

    Returns:
        The receipt; its `exit_code` is the job's.

    Raises:
        ConfigError, CheckpointError: refused before any work.
        WorkerError: Ray is not available; nothing has been computed, and calling again may help.
        JobStoppedError: stopped in the middle; calling again resumes.
    """
    state = prepare(config)
    if state.identity is not None and not state.missing_shards().num_rows and not config.verify:
        return _nothing_to_do(state)
    grows = not starts_alone(config.ray_address)
    with ray_session(config.ray_address) as cluster:
        _settle(state, cluster)
        todo = state.missing_shards()
        receipt = _transcribe(state, todo, grows) if todo.num_rows else _nothing_to_do(state)
        return _verify(state, receipt) if config.verify else receipt


def _settle(state: Run, cluster: dict[str, float]) -> None:
    """Choose device and dtype by what the cluster has."""
    config = state.config
    state.device = config.device if config.device != "auto" else ("cuda" if cluster.get("GPU") else "cpu")
    if state.identity is None:
        state.identity = identify(state.model, "bfloat16" if state.device == "cuda" else "float32")
        state.account()
    if state.device == "cuda" and state.identity.dtype == INT8:
        raise ConfigError("dtype int8 is for CPUs; use --device cpu, or --dtype bfloat16 for another output")


def _nothing_to_do(state: Run) -> Receipt:
    """Account for an output whose shards are all committed; the run may have been killed before its receipt."""
    print("nothing to do: all planned shards are committed", file=sys.stderr)
    if not state.closed:
        _close(state, EventLog(state.output))
    return _finish(state)


def _transcribe(state: Run, todo: pa.Table, grows: bool) -> Receipt:
    """Run the remaining shards, and account for them however the run ends."""
    note_local_output(state.output, len(alive_nodes()))
    resources = _claim(state, todo, grows)
    total_s = pc.sum(state.shards["audio_s"]).as_py()
    events = _begin(state, todo, resources, total_s)
    display = ProgressDisplay(total_s, state.before.audio_s + state.before.lost_s)
    state.now, state.throughput = display.tally, display.throughput
    page = True
    try:
        with _stops_named(state):
            _commit_shards(state, todo, resources, display, events)
            find_undoubled(state.output, state.fingerprint, state.planned_shards)
    except KeyboardInterrupt:
        page = False  # `ray job stop` leaves 3 s, and the page reads hundreds of parts
        raise
    finally:
        state.model_idle_share = display.model_idle_share()
        _close_if_possible(state, events, page)
    return _finish(state)


def _claim(state: Run, todo: pa.Table, grows: bool) -> Resources:
    """Share the cluster among the actors, and mark the output as this job's."""
    try:
        work = measure_work(state.output, todo, state.model, state.config.features, state.identity.dtype)
        resources = plan_resources(state.config, state.device, alive_nodes(), work, grows)
        claim_output(state.output, state.identity, state.generations)  # only now: a refused run leaves no mark
        state.output.remove_dead_temporaries()
    except OWN_ERRORS as error:
        raise ConfigError(f"the output cannot be used: {error}") from error
    return resources


def _begin(state: Run, todo: pa.Table, resources: Resources, total_s: float) -> EventLog:
    """Say what this run is about to do: on stderr, in the receipt and in the event log."""
    print(
        f"run     {todo.num_rows} of {state.shards.num_rows} shards on {state.device} in {state.identity.dtype}, "
        f"{resources.describe()}",
        file=sys.stderr,
    )
    state.write_receipt()  # that of an earlier run is no longer true
    events = EventLog(state.output)
    events.add("plan", shards=state.shards.num_rows, items=state.planned_items, audio_s=round(total_s, 3))
    events.add(
        "start",
        fingerprint=state.fingerprint,
        shards=todo.num_rows,
        resources=vars(resources),
        retry_errors=state.config.retry_errors,
    )
    return events


def _commit_shards(
    state: Run, todo: pa.Table, resources: Resources, display: ProgressDisplay, events: EventLog
) -> None:
    """Run the pipeline; every shard is counted when its part is committed."""
    metrics = JobMetrics(todo.num_rows)
    dtype, origin = state.identity.dtype, _provenance(state)
    with display:
        for result in run_shards(
            todo, state.output, state.sources, state.model, dtype, resources, state.fingerprint, origin
        ):
            facts = PartFacts(**json.loads(result["facts"]))
            display.update(facts, result)
            state.commit(result["shard"])
            metrics.update(facts, result, display.model_idle_share())
            events.add_shard(result)
            _stop_if_hopeless(state.config.max_error_rate, display.tally)


def _stop_if_hopeless(max_error_rate: float, tally: Tally) -> None:
    """Raise JobStoppedError if most items of this run are errors: better within minutes than the next morning."""
    share = tally.errors / max(tally.rows, 1)
    if tally.rows < HOPELESS_ITEMS or share <= max(HOPELESS_SHARE, max_error_rate):
        return
    kind, count = max(tally.errors_by_kind.items(), key=lambda pair: pair[1])
    raise JobStoppedError(
        f"{tally.errors} of the first {tally.rows} items are errors, {count} of kind {kind} (the table's error_message "
        "says why); mend the cause and run the same command again with --retry-errors, or with --max-error-rate 1 if "
        "that is as it should be"
    )


@contextmanager
def _stops_named(state: Run) -> Iterator[None]:
    """Turn any error that stops a run in the middle into a one-line `JobStoppedError`."""
    try:
        yield
    except ray.exceptions.RayActorError as error:
        if "creation task" in str(error):  # Ray's words for an exception in the actor's constructor
            cause = scrub(root_cause(error), state.output.options)
            raise JobStoppedError(f"a worker could not start: {cause}; {RESUME_HINT}") from error
        raise JobStoppedError(
            f"workers were lost more than {LOST_WORKER_RETRIES} times on one shard, by nodes that went, too little "
            f"memory, or a GPU that fails ({EVENTS_FOLDER}/worker-*.jsonl then say how; {root_cause(error)}); "
            f"{RESUME_HINT}"
        ) from error
    except (ray.exceptions.RayError, *OWN_ERRORS) as error:
        raise JobStoppedError(f"{scrub(root_cause(error), state.output.options)}; {RESUME_HINT}") from error
    except ConfigError as error:  # parts of another driver, or merged ones, that got past all checks
        raise JobStoppedError(f"the table is not whole: {error}") from error


def _verify(state: Run, receipt: Receipt) -> Receipt:
    """Transcribe a sample of the table again, and add the result to the receipt."""
    try:
        files = find_committed(state.output, state.fingerprint, state.planned_shards).files
        where = state.output, state.shards, files, state.sources
        found = verify_table(*where, state.model, state.device, state.config.verify)
        add_to_receipt(state.output, verification=asdict(found))
    except (ray.exceptions.RayError, *OWN_ERRORS) as error:
        cause = scrub(root_cause(error), state.output.options)
        raise JobStoppedError(f"the table is there, but could not be verified: {cause}; {RESUME_HINT}") from error
    print(f"verify  {found.describe()}")
    return replace(receipt, verification=asdict(found))


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


def _close(state: Run, events: EventLog, page: bool = True) -> None:
    """Leave receipt, events and page beside the table, however the run ended."""
    state.output.remove_dead_temporaries()  # of actors that were killed
    receipt = state.write_receipt()
    events.add("end", complete=receipt.complete, items=receipt.items_in, errors=receipt.errors, wall_s=receipt.wall_s)
    events.flush()
    for reason, workers in sorted(Counter(events.not_compiled.values()).items()):
        print(f"note    the model of {workers} workers ran uncompiled, and slower: {reason:.300}", file=sys.stderr)
    if page:
        write_report(state.output, vars(receipt), state.throughput)


def _close_if_possible(state: Run, events: EventLog, page: bool) -> None:
    """`_close`; but if the run has already failed and storage now fails too, the first failure is reported."""
    failed = sys.exc_info()[0] is not None
    try:
        _close(state, events, page)
    except OWN_ERRORS as error:
        if not failed:
            raise
        print(f"note    receipt and report were not written: {error}", file=sys.stderr)


def _finish(state: Run) -> Receipt:
    receipt = state.receipt()
    print(summarise(receipt, RESUME_HINT))
    return receipt


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: _main(arguments), RESUME_HINT)


def _main(arguments: Sequence[str] | None) -> int:
    config = tyro.cli(TranscribeConfig, args=arguments, prog="python -m jobs.transcribe")
    if config.dry_run:
        output = Storage(config.output, config.storage())
        return dry_run(config, planned_items(output, list_generations(output)))
    interrupt_on_sigterm(f"SIGTERM: the shards in hand are dropped; {RESUME_HINT}")
    return run(config).exit_code


if __name__ == "__main__":
    sys.exit(main())
