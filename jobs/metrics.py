"""The job's Prometheus metrics, through ray.util.metrics: what cluster/grafana-dashboard.json shows.

The driver counts, from the results of committed shards, so a shard that was computed twice counts once. Ray serves the
numbers on the metrics port of the driver's node, with `ray_` in front of each name, every 10 s
(`metrics_report_interval_ms`) and when the driver ends. A scraper may miss the end; the receipt has the exact sums.
Ray counts buckets only: it computes the `_sum` of a histogram from the buckets' midpoints.
"""

from ray.util.metrics import Counter, Gauge, Histogram

from jobs.blocks import STAGES
from jobs.table.schema import PartFacts

SHARD_SECONDS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)  # 120-1800 s of audio, on a GPU or on a CPU


class JobMetrics:
    """Counters of one run. Needs a Ray session.

    Args:
        shards: number of shards to do in this run.
    """

    def __init__(self, shards: int):
        self._items = Counter("parakeet_items_total", "Rows of the table.", ("status",))
        self._errors = Counter("parakeet_errors_total", "Error rows.", ("kind",))
        self._audio = Counter("parakeet_audio_seconds_total", "Seconds of audio transcribed.", ("node",))
        self._stages = Counter("parakeet_stage_seconds_total", "Seconds in each step, of all actors.", ("stage",))
        self._shards = Counter("parakeet_shards_total", "Shards committed.")
        self._shard = Histogram("parakeet_shard_seconds", "Work on one shard.", boundaries=list(SHARD_SECONDS))
        self._idle = Gauge("parakeet_model_idle_ratio", "Share of their time in which model actors wait.")
        self._queue = Gauge("parakeet_queue_shards", "Shards of this run without a part.")
        self._left = shards
        self._queue.set(shards)

    def update(self, facts: PartFacts, result: dict, model_idle_share: float) -> None:
        """Count one committed shard; `result` is what `CommitShards` returns for it."""
        self._left -= 1
        self._queue.set(self._left)
        self._idle.set(model_idle_share)
        self._shards.inc()
        stages = {stage: result[f"{stage}_s"] for stage in STAGES}
        self._shard.observe(sum(stages.values()))
        _add(self._stages, "stage", stages)
        _add(self._items, "status", {"ok": facts.ok, "empty": facts.empty, "error": facts.errors})
        _add(self._errors, "kind", facts.errors_by_kind)
        _add(self._audio, "node", {result["model_worker"].rpartition(":")[0]: facts.audio_s})


def _add(counter: Counter, label: str, values: dict[str, float]) -> None:
    for value, count in values.items():
        if count:  # Ray refuses to count 0
            counter.inc(count, tags={label: value})
