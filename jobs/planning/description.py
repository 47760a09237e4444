"""What a plan means before it runs: items, hours, lengths, padding, shards, warnings, and what it will cost.

Reads only the plan's numbers; writes nothing. Knows nothing of Ray or of the model.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np

from jobs.inputs.scan import InputScan
from jobs.planning.shards import Plan
from parakeet_core.batching import plan_batches

MAX_WALL_H = 1e6  # above this, no date is given: calendars end
FRAMES_PER_S = 100  # log-mel frames, hop 10 ms
BUDGET_FRAMES = 60_000  # 10 min of audio per batch: about what fills a GPU; only the padding share depends on it
PADDING_SHARDS = 64  # evenly spaced shards whose batches are laid out; the share changes by under 1 % with more
SMALL_FILE_BYTES = 100_000  # below this, waiting for a request (20-100 ms) takes longer than the transfer
LENGTH_EDGES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 300.0, 3600.0, np.inf)


@dataclass(frozen=True)
class PlanReport:
    """The dry run's answer. Hours are of audio unless named otherwise.

    Args:
        items, exact: items known; not exact if tars hold more.
        hours: measured or estimated, see `hours_basis`.
        lengths: (from seconds, to seconds, items) per bin; containers are counted at their mean length.
        padding_share: share of padding in all frames the model would see; None without items.
        gpu_hours, cost, ends: None unless the speed (and the price) is given.
    """

    format: str
    reason: str
    left_out: str
    items: int
    exact: bool
    hours: float
    hours_basis: str
    lengths: tuple[tuple[float, float, int], ...]
    padding_share: float | None
    shards: int
    shard_audio_s: float
    longest_shard_s: float
    rejected: int
    duplicates: int
    already_planned: int
    median_bytes: float | None
    warnings: tuple[str, ...]
    gpu_hours: float | None = None
    cost: float | None = None
    ends: datetime | None = None

    def lines(self) -> list[str]:
        """The report as text, one fact per line."""
        at_least = "" if self.exact else "at least "
        found = [
            f"input     {self.format}: {self.reason}",
            f"items     {at_least}{self.items:,} ({self.rejected:,} rejected, {self.duplicates:,} renamed, "
            f"{self.already_planned:,} planned before)",
            f"audio     {self.hours:,.2f} h, {self.hours_basis}",
            f"shards    {self.shards:,} of up to {self.shard_audio_s:,.0f} s, longest {self.longest_shard_s:,.0f} s",
        ]
        if self.left_out:
            found.insert(1, f"          {self.left_out}")
        if self.padding_share is not None:
            found.append(f"padding   {self.padding_share:.1%} of the frames, with sorted batches")
        most = max((count for _, _, count in self.lengths), default=0)
        for low, high, count in self.lengths:
            if count:
                label = f"{low:g}-{high:g} s" if np.isfinite(high) else f"over {low:g} s"
                found.append(f"length    {label:>12}  {count:>12,}  {'#' * max(1, round(30 * count / most))}")
        if self.gpu_hours is not None:
            done = f", done about {self.ends:%Y-%m-%d %H:%M}" if self.ends is not None else ""
            found.append(f"GPU       {self.gpu_hours:,.2f} hours{done}")
        if self.cost is not None:
            found.append(f"cost      {self.cost:,.2f}")
        return found + [f"warning   {warning}" for warning in self.warnings]


def describe_plan(
    plan: Plan,
    scan: InputScan,
    rtfx: float | None = None,
    gpu_price_per_hour: float | None = None,
    gpus: int = 1,
    now: datetime | None = None,
) -> PlanReport:
    """Describe a plan that is not stored.

    Args:
        rtfx: end-to-end seconds of audio per second and GPU, measured or stated.
        gpu_price_per_hour: in any currency.
    """
    rows = np.flatnonzero((plan.shard_of >= 0) & ~plan.facts.rejected)
    counts = np.maximum(plan.facts.items[rows], 1)
    lengths_s = plan.facts.audio_s[rows].astype(np.float64) / counts
    sizes = plan.facts.size_bytes[rows][~plan.facts.container[rows]]
    sizes = sizes[sizes >= 0]
    median = float(np.median(sizes)) if len(sizes) else None
    hours = plan.audio_s / 3600
    gpu_hours = hours / rtfx if rtfx else None
    wall_h = gpu_hours / max(gpus, 1) if gpu_hours is not None else None
    histogram, _ = np.histogram(lengths_s, bins=LENGTH_EDGES_S, weights=counts)
    return PlanReport(
        format=scan.format,
        reason=scan.reason,
        left_out=scan.left_out,
        items=plan.items,
        exact=plan.exact,
        hours=hours,
        hours_basis=_hours_basis(plan),
        lengths=tuple(zip(LENGTH_EDGES_S[:-1], LENGTH_EDGES_S[1:], histogram.astype(int).tolist(), strict=True)),
        padding_share=expected_padding(plan),
        shards=plan.shards,
        shard_audio_s=plan.shard_audio_s,
        longest_shard_s=float(plan.shard_audio.max(initial=0)),
        rejected=plan.rejected,
        duplicates=plan.duplicates,
        already_planned=plan.already_planned,
        median_bytes=median,
        warnings=tuple(_warnings(plan, median)),
        gpu_hours=gpu_hours,
        cost=gpu_hours * gpu_price_per_hour if gpu_hours is not None and gpu_price_per_hour is not None else None,
        ends=(now or datetime.now()) + timedelta(hours=wall_h) if wall_h is not None and wall_h < MAX_WALL_H else None,
    )


def expected_padding(plan: Plan) -> float | None:
    """Share of padding among the frames of sorted batches, over evenly spaced shards."""
    if not plan.shards:
        return None
    chosen = np.unique(np.linspace(0, plan.shards - 1, min(plan.shards, PADDING_SHARDS)).astype(np.int32))
    wanted = np.zeros(plan.shards, bool)
    wanted[chosen] = True
    rows = np.flatnonzero((plan.shard_of >= 0) & ~plan.facts.rejected & ~plan.facts.container)
    rows = rows[wanted[plan.shard_of[rows]]]
    frames = np.maximum(plan.facts.audio_s[rows].astype(np.float64) * FRAMES_PER_S, 1).astype(np.int64)
    order = np.argsort(plan.shard_of[rows], kind="stable")
    real = padded = 0.0
    for shard in np.split(frames[order], np.flatnonzero(np.diff(plan.shard_of[rows][order])) + 1):
        lens = shard.tolist()
        real += sum(lens)
        padded += sum(batch.frames * len(batch.indices) for batch in plan_batches(lens, BUDGET_FRAMES))
    return 1 - real / padded if padded else None


def _hours_basis(plan: Plan) -> str:
    if not plan.rates:
        return "as the input states it"
    parts = []
    for rate in plan.rates:
        unit = f"{rate.bytes_per_s:,.0f} bytes/s" if rate.bytes_per_s else f"{rate.item_s:.1f} s per item"
        basis = f"{rate.measured} headers" if rate.measured else "nominal, no header read"
        parts.append(f"{rate.kind} {unit} ({basis})")
    return "estimated from sizes: " + ", ".join(parts)


def rewritten_warning(row_groups: int) -> str:
    return (
        f"{row_groups:,} row groups are left out: their Parquet files were planned with other ones, and a file written "
        "again under its name is not transcribed again; give it another name"
    )


def _warnings(plan: Plan, median_bytes: float | None) -> list[str]:
    found = []
    if median_bytes is not None and median_bytes < SMALL_FILE_BYTES:
        found.append(
            f"small files: half are under {median_bytes / 1000:,.0f} kB, so requests take longer than transfers; "
            "packed into WebDataset tars of 100 MB to 1 GB they are read faster and cost fewer requests"
        )
    if plan.shards and plan.shard_audio[0] > 2 * plan.shard_audio_s:
        found.append(
            f"the longest shard holds {plan.shard_audio[0]:,.0f} s, over twice the limit: one large container or file "
            "cannot be divided and may hold the end of the job"
        )
    if plan.rewritten:
        found.append(rewritten_warning(plan.rewritten))
    if plan.duplicates:
        found.append(f"{plan.duplicates:,} items have an id that occurred before; they get ~2, ~3, ... behind it")
    return found
