"""How a worker ends itself when only a new process can continue: Ray starts one in its place and gives it the shards.

It leaves the cause under OUTPUT/events/, because the output of a killed process is only in the logs of its node.
"""

import json
import logging
import os
import signal
from datetime import UTC, datetime

from jobs.blocks import worker_name
from jobs.storage.connections import OWN_ERRORS, scrub
from jobs.storage.files import Storage

EVENTS_FOLDER = "events"
log = logging.getLogger(__name__)


def end_worker(output: Storage, cause: str) -> None:
    """End this process at once, by SIGKILL: Ray would take a voluntary exit to be what the actor wants."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    record = {"at": now, "event": "worker_ended", "worker": worker_name(), "cause": cause}
    log.error("this worker ends, and another takes its shards: %s", cause)
    try:
        name = f"{EVENTS_FOLDER}/worker-{worker_name().replace(':', '-')}.jsonl"
        output.write_atomic(name, (scrub(json.dumps(record), output.options) + "\n").encode())
    except OWN_ERRORS as error:
        log.error("the cause could not be written: %s", error)
    os.kill(os.getpid(), signal.SIGKILL)
