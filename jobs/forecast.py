"""What a large run will take, before anyone pays for it: `python -m jobs.forecast --hours 100000 --rtfx 2000 --gpus 8`.

From hours, lengths, speeds, losses and prices it computes shards, parts, storage requests, listing time, driver memory,
GPU idle time, work lost with spot nodes, wall time and cost. It opens no storage and starts no Ray. Shards are counted
by the rules of `jobs.planning.shards`; the run is a discrete-event simulation (`jobs.fleet`).
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tyro

from jobs.command_line import exit_status
from jobs.fleet import Fleet, FleetRun, simulate_run
from jobs.planning.item_digests import ITEMS_PER_FILE
from jobs.planning.shards import AUTO_MAX_S, AUTO_MIN_S, AUTO_SHARDS, SHARD_BYTES, SHARD_ITEMS
from jobs.planning.sizing import SAMPLE_PER_KIND, SAMPLED_CONTAINERS
from jobs.planning.store import SHARDS_PER_FILE
from jobs.report.progress import clock
from jobs.report.receipt import EVENTS_EVERY_S
from jobs.report.stats import MAX_PARTS
from jobs.sources.reader import STREAM_BLOCK_BYTES
from parakeet_core.errors import ConfigError

PAGE_KEYS = 1000  # names in one answer to a list request
PAGE_S = 0.15  # seconds for such an answer on S3; 0.1 to 0.3 are usual
PLAN_ROWS_PER_S = 15_000  # planned and stored, on one core: tests/jobs/plan_synthetic.py
DRIVER_BYTES = 400e6  # with Ray, before any plan: tests/bench/bench_job.py
PLAN_ROW_BYTES = 120  # of driver memory at its peak: tests/jobs/plan_synthetic.py
SHARD_DRIVER_BYTES = 14_000  # of driver memory: Ray Data's bookkeeping for one block, measured with 500 and 4,000
SHARD_S = 0.015  # of Ray's scheduling, for one block's way through the pipeline
TABLE_BYTES_PER_S = 107  # of parts for each second of speech: 2.6 words a second with times and confidences
READS_PER_FILE = 2  # requests for a file of which a piece is read: one for its size, one for the piece
COMPACTED_BYTES = 256 << 20  # of a file, once parts are merged
PRICES = {"gpu_hour_price", "cpu_hour_price", "price_per_1000_gets", "price_per_1000_puts"}
MAY_BE_0 = PRICES | {"losses_per_hour", "start_s", "seed"}  # all other options must be above 0


@dataclass(frozen=True, kw_only=True)
class ForecastConfig:
    """Forecast a run of the transcription job."""

    hours: float
    """Hours of audio."""
    item_s: float = 10.0
    """Mean length of an item in seconds."""
    bytes_per_s: float = 17_000.0
    """Bytes per second of the stored audio; 17,000 is FLAC of 16 kHz speech."""
    tar_mb: float | None = None
    """MB of each WebDataset tar that items are packed in; default is one file per item."""
    shard_audio_s: float | None = None
    """Seconds of audio per shard, as for the job."""
    gpus: int = 8
    """Number of GPUs, each with one model actor and a node of its own."""
    rtfx: float
    """Seconds of audio that one GPU processes per second."""
    feature_actors: int | None = None
    """Number of CPU actors; default is as many as keep the GPUs busy."""
    feature_rtfx: float = 600.0
    """Seconds of audio that one CPU actor processes per second."""
    losses_per_hour: float = 0.05
    """Expected losses of one GPU node per hour, as spot nodes have them."""
    start_s: float = 300.0
    """Seconds from requesting a GPU node to a loaded model."""
    gpu_hour_price: float = 0.0
    """Price of one hour of a GPU node, in any currency."""
    cpu_hour_price: float = 0.0
    """Price of one CPU hour."""
    price_per_1000_gets: float = 0.0004
    """Price of 1000 read requests to storage; the default is that of S3 in USD."""
    price_per_1000_puts: float = 0.005
    """Price of 1000 write or list requests to storage; the default is that of S3 in USD."""
    seed: int = 0
    """Seed for the random times of the losses."""

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is None or (math.isfinite(value) and (value > 0 or (value == 0 and name in MAY_BE_0))):
                continue
            expected = "0 or more" if name in MAY_BE_0 else "more than 0"
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected a finite number, {expected}")
        if not round(self.audio_s / self.item_s):
            raise ConfigError(f"--hours {self.hours:g}: less than one item of {self.item_s:g} s (--item-s)")

    @property
    def audio_s(self) -> float:
        return self.hours * 3600

    def fleet(self) -> Fleet:
        features = self.feature_actors or math.ceil(self.gpus * self.rtfx / self.feature_rtfx)
        rates = {"model_rtfx": self.rtfx, "feature_rtfx": self.feature_rtfx, "losses_per_hour": self.losses_per_hour}
        return Fleet(self.gpus, features=features, shard_s=SHARD_S, start_s=self.start_s, seed=self.seed, **rates)


@dataclass(frozen=True)
class PlanForecast:
    """The plan, and its demands on storage and the driver. Files are what the listing shows: items, or tars."""

    items: int
    files: int
    shard_audio_s: np.ndarray  # float64 [shards]
    table_bytes: float
    input_bytes: float

    @property
    def shards(self) -> int:
        return len(self.shard_audio_s)

    @property
    def driver_bytes(self) -> float:
        """Peak memory of the driver: planning comes before the run, and its memory is freed."""
        return DRIVER_BYTES + max(self.files * PLAN_ROW_BYTES, self.shards * SHARD_DRIVER_BYTES)

    @property
    def listing_s(self) -> float:
        return math.ceil(self.files / PAGE_KEYS) * PAGE_S

    @property
    def planning_s(self) -> float:
        return self.files / PLAN_ROWS_PER_S


def forecast_plan(config: ForecastConfig) -> PlanForecast:
    """Cut items of one length by the rules of `jobs.planning.shards`."""
    items = round(config.audio_s / config.item_s)
    per_file = 1 if config.tar_mb is None else max(1, round(config.tar_mb * 1e6 / config.bytes_per_s / config.item_s))
    files = math.ceil(items / per_file)
    limit_s = config.shard_audio_s or float(np.clip(items * config.item_s / AUTO_SHARDS, AUTO_MIN_S, AUTO_MAX_S))
    file_s = per_file * config.item_s
    fits = (limit_s / file_s, SHARD_ITEMS / per_file, SHARD_BYTES / (file_s * config.bytes_per_s))
    per_shard = max(1, math.floor(min(fits))) * per_file
    audio_s = np.full(math.ceil(items / per_shard), per_shard * config.item_s)
    audio_s[-1] = (items - per_shard * (len(audio_s) - 1)) * config.item_s
    total_s = items * config.item_s
    return PlanForecast(items, files, audio_s, total_s * TABLE_BYTES_PER_S, total_s * config.bytes_per_s)


def count_requests(plan: PlanForecast, config: ForecastConfig, wall_s: float) -> dict[str, int]:
    """Requests of one undisturbed run, by purpose; a few dozen more are the same for every run.

    Keys begin with the kind that S3 charges for: `get`, `put` or `list`.
    """
    reads = 1 if config.tar_mb is None else 1 + math.ceil(config.tar_mb * 1e6 / STREAM_BLOCK_BYTES)
    samples = min(plan.files, SAMPLE_PER_KIND if config.tar_mb is None else SAMPLED_CONTAINERS)
    return {
        "get headers": samples * READS_PER_FILE,
        "get audio": plan.files * reads,
        "get plan rows": plan.shards * READS_PER_FILE,
        "get report": min(plan.shards, MAX_PARTS) * READS_PER_FILE,
        "put parts": plan.shards,
        "put plan": math.ceil(plan.shards / SHARDS_PER_FILE) + math.ceil(plan.files / ITEMS_PER_FILE) + 2,
        "put events": math.ceil(wall_s / EVENTS_EVERY_S),
        "list input": math.ceil(plan.files / PAGE_KEYS),
        "list parts": math.ceil(plan.shards / PAGE_KEYS),
    }


def describe(config: ForecastConfig, plan: PlanForecast, run: FleetRun) -> list[str]:
    """The forecast as text, one fact per line."""
    before_s = plan.listing_s + plan.planning_s
    fleet, requests = config.fleet(), count_requests(plan, config, run.wall_s)
    prices = {kind: config.price_per_1000_puts for kind in ("put", "list")} | {"get": config.price_per_1000_gets}
    request_cost = sum(count * prices[name.split()[0]] / 1000 for name, count in requests.items())
    gpu_cost, cpu_cost = run.model_hours * config.gpu_hour_price, run.feature_hours * config.cpu_hour_price
    what = "files" if config.tar_mb is None else "tars"
    compacted = math.ceil(plan.table_bytes / COMPACTED_BYTES)
    lines = [
        f"input     {config.hours:,.0f} h, {plan.items:,} items in {plan.files:,} {what}, "
        f"{plan.input_bytes / 1e12:,.2f} TB",
        f"shards    {plan.shards:,} of {plan.shard_audio_s[0]:,.0f} s, one part each: {plan.table_bytes / 1e9:,.1f} GB "
        f"({compacted:,} files once compacted)",
        f"driver    {plan.driver_bytes / 2**30:,.1f} GiB at its peak; a resumed run lists its parts in "
        f"{math.ceil(plan.shards / PAGE_KEYS) * PAGE_S:,.0f} s",
        "requests  " + ", ".join(f"{count:,} {name}" for name, count in requests.items()),
        f"fleet     {fleet.models} GPUs, {fleet.features} feature actors; model idle {run.idle_share:.1%}",
        f"losses    {run.losses} nodes; {run.lost_s:,.1f} s of GPU work done again, "
        f"{clock(run.losses * fleet.start_s)} of new starts",
        f"time      {clock(plan.listing_s)} of listing, {clock(plan.planning_s)} of planning, {clock(run.wall_s)} of "
        f"work: {clock(before_s + run.wall_s)}",
        f"paid      {run.model_hours:,.1f} GPU hours, {run.feature_hours:,.1f} CPU hours",
        f"cost      {gpu_cost + cpu_cost + request_cost:,.2f} = {gpu_cost:,.2f} GPU + {cpu_cost:,.2f} CPU + "
        f"{request_cost:,.2f} requests",
    ]
    return lines + [f"advice    {text}" for text in advice(config, plan, run)]


def advice(config: ForecastConfig, plan: PlanForecast, run: FleetRun) -> list[str]:
    """What would make the run cheaper or possible."""
    found = []
    if config.tar_mb is None and plan.listing_s + plan.planning_s > 0.25 * run.wall_s:
        found.append("listing single files takes long beside the work: pack them into tars (--tar-mb 500)")
    if run.idle_share > 0.1:
        found.append("GPUs wait: more --feature-actors, or fewer GPUs, or shorter shards at the end")
    if plan.shards > 100_000:
        found.append("over 100,000 shards in one run of Ray: make them longer, or give the input in several pieces")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    config = tyro.cli(ForecastConfig, args=arguments, prog="python -m jobs.forecast")
    plan = forecast_plan(config)
    print("\n".join(describe(config, plan, simulate_run(plan.shard_audio_s, config.fleet()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
