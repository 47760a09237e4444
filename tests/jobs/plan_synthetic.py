"""Plan a synthetic listing and print items, shards, seconds and the peak of resident memory as JSON.

    python tests/jobs/plan_synthetic.py ITEMS OUTPUT [--grow]

With --grow the listing is then planned again with 1 % more items, as a later run would.

Run as its own process, so that the peak is that of planning alone. Also shows that 10 million items fit in 2 GiB.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from jobs.inputs.listing import LISTING_SCHEMA
from jobs.inputs.scan import InputOptions, scan_input
from jobs.planning.generations import list_generations
from jobs.planning.item_digests import planned_items
from jobs.planning.shards import plan_shards
from jobs.planning.store import write_plan
from jobs.storage.files import Storage

BATCH = 16_384


def synthetic_listing(items: int, first: int = 0) -> Iterator[pa.RecordBatch]:
    """Names of 76 characters, as deep as real collections, and log-normal sizes around 300 kB."""
    for start in range(first, first + items, BATCH):
        numbers = np.arange(start, min(start + BATCH, first + items))
        names = [
            f"collection/language-en/speaker-{n % 20011:06d}/session-{n % 97:03d}/utterance-{n:012d}.flac"
            for n in numbers
        ]
        sizes = np.random.default_rng(start).lognormal(12, 0.7, len(numbers)).astype(np.int64)
        yield pa.record_batch([pa.array(names), pa.array(sizes)], schema=LISTING_SCHEMA)


def peak_mib() -> int:
    """Of this process alone: `ru_maxrss` would start at the resident set of the process that forked it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) // 1024


def main(items: int, output: str, growing: bool) -> None:
    base_mib, begin = peak_mib(), time.monotonic()
    # The folder is empty: the sampled files do not exist, so the nominal rate is used.
    scan = scan_input(InputOptions(tempfile.mkdtemp(), format="files"), synthetic_listing(items))
    listed = time.monotonic()
    storage = Storage(output)
    with plan_shards(scan.batches()) as plan:
        planned = time.monotonic()
        generation = write_plan(storage, plan)
    scan.close()
    stored = time.monotonic()
    facts = {
        "items": generation.items,
        "shards": generation.shards,
        "files": len(generation.files),
        "generations": len(list_generations(storage)),
        "list_s": round(listed - begin, 1),
        "plan_s": round(planned - listed, 1),
        "store_s": round(stored - planned, 1),
        "base_mib": base_mib,
        "peak_mib": peak_mib(),
    }
    del plan
    print(json.dumps(facts | (grow(storage, items) if growing else {})))


def grow(storage: Storage, items: int) -> dict:
    """Plan the same listing again with 1 % more items."""
    begin = time.monotonic()
    options = InputOptions(tempfile.mkdtemp(), format="files")
    known = planned_items(storage, list_generations(storage))
    with (
        scan_input(options, synthetic_listing(items + items // 100)) as scan,
        plan_shards(scan.batches(), planned=known, generation=1) as plan,
    ):
        return {"new_items": plan.items, "grow_s": round(time.monotonic() - begin, 1), "grow_peak_mib": peak_mib()}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], "--grow" in sys.argv)
