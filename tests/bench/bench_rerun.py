"""A rerun over an output that is done, with many parts on a real S3 server: seconds and requests.

    python tests/bench/bench_rerun.py [--parts 100000] [--footers]

The plan is the real one of a manifest with one item per shard. The parts are one valid part under all names: a rerun
reads no more than their names. With --footers a run first finds no receipt and reads the footer of each part, by two
requests; else the receipt is made straight from the folder that the server shows.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/jobs")]

from fault_proxy import FaultProxy  # noqa: E402
from job_layouts import TINY_EN  # noqa: E402
from s3_server import serve_s3  # noqa: E402

from jobs.config import TranscribeConfig  # noqa: E402
from jobs.models import resolve_model  # noqa: E402
from jobs.planning.store import list_generations, read_plan  # noqa: E402
from jobs.preparation import Run, identify, prepare  # noqa: E402
from jobs.storage.files import Storage  # noqa: E402
from jobs.table.ownership import claim_output  # noqa: E402
from jobs.table.parts import commit_part, part_name  # noqa: E402
from jobs.table.schema import TRANSCRIPT_SCHEMA, file_metadata, part_facts  # noqa: E402
from jobs.transcribe import run  # noqa: E402

MAX_LINKS = 50_000  # of one file; ext4 takes 65,000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=100_000)
    parser.add_argument("--footers", action="store_true")
    options = parser.parse_args()
    print(f"{options.parts:,} parts, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        bucket = Path(folder, "bucket")
        bucket.mkdir()
        write_manifest(bucket / "items.jsonl", options.parts)
        with server_of(folder) as (proxy, config):
            timed("plan", proxy, lambda: prepare(config))
            fill(config, bucket / "out", receipt=not options.footers)
        with server_of(folder) as (proxy, config):
            first = ("without a receipt, so every footer",) if options.footers else ()
            for name in (*first, "rerun", "rerun"):
                timed(name, proxy, lambda: run(config))


@contextmanager
def server_of(folder: str) -> Iterator[tuple[FaultProxy, TranscribeConfig]]:
    """A server over the folder, and the job on it."""
    with serve_s3(Path(folder), cached="1h", digests=False) as server, FaultProxy(server.endpoint_url) as proxy:
        os.environ |= server.variables(proxy.endpoint_url)
        options = {"model": str(TINY_EN), "device": "cpu", "dtype": "float32", "shard_audio_s": 10.0}
        yield proxy, TranscribeConfig(input="s3://bucket/items.jsonl", output="s3://bucket/out", **options)


def write_manifest(path: Path, items: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for number in range(items):
            file.write(
                json.dumps({"audio_filepath": f"speaker-{number % 997}/{number:09d}.flac", "duration": 9.0}) + "\n"
            )


def fill(config: TranscribeConfig, folder: Path, receipt: bool) -> None:
    """Put a part under the name of every planned shard, straight into the folder that the server shows."""
    output = Storage(str(folder))
    generations = list_generations(output)
    model = resolve_model(config.model, config.storage())
    identity = identify(model, "float32")
    claim_output(output, identity, generations)
    row = dict.fromkeys(TRANSCRIPT_SCHEMA.names) | {
        "id": "x",
        "source": "x",
        "duration_s": 9.0,
        "status": "empty",
        "text": "",
    }
    table = TRANSCRIPT_SCHEMA.empty_table().from_pylist([row], schema=TRANSCRIPT_SCHEMA)
    shards = read_plan(output, generations)
    names = [part_name(shard, identity.fingerprint) for shard in shards["shard"].to_pylist()]
    commit_part(output, names[0], table, file_metadata({}, part_facts(table), {"shard": "x"}))
    for number, name in enumerate(names[1:], 1):
        if number % MAX_LINKS:
            os.link(output.path(names[number - number % MAX_LINKS]), output.path(name))
        else:
            shutil.copy(output.path(names[0]), output.path(name))
    if receipt:
        state = Run(config, output, model, generations, shards, config.storage(), identity)
        state.account()
        state.write_receipt()


def timed(name: str, proxy: FaultProxy, call: Callable[[], object]) -> None:
    proxy.seen.clear()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    kinds = Counter("LIST" if request.is_listing else request.method for request in proxy.seen)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    print(f"{name}: {seconds:.1f} s, {sum(kinds.values()):,} requests ({counts})", flush=True)


if __name__ == "__main__":
    main()
