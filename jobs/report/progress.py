"""What a running job reports: a live display on a terminal, plain lines in a job's log. Knows nothing of Ray."""

import sys
import time
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.text import Text

from jobs.blocks import STAGES
from jobs.table.schema import PartFacts

LINE_EVERY_S = 10.0  # between two lines in a log, at first
LINE_SLOWDOWN = 1.1  # each pause is longer by this factor, up to the limit: a job of ten hours prints some 120 lines
LINE_AT_MOST_EVERY_S = 300.0
RECENT_S = 60.0  # window of "RTFx now"
STEPS_OF = {"feature": ("storage", "decode", "features"), "model": ("model",)}  # what each pool of actors does


@dataclass
class Tally:
    """Sums over committed shards.

    Attributes:
        errors_by_kind: error_kind -> rows.
        stage_s: step -> seconds, summed over actors.
    """

    shards: int = 0
    rows: int = 0
    ok: int = 0
    empty: int = 0
    errors: int = 0
    audio_s: float = 0.0
    lost_s: float = 0.0
    word_errors: float = 0.0
    reference_words: int = 0
    errors_by_kind: dict[str, int] = field(default_factory=dict)
    stage_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def add(self, facts: PartFacts, shards: int = 1) -> None:
        """Add the counts of one file of the table, which holds `shards` shards."""
        self.shards += shards
        for name in ("rows", "ok", "empty", "errors", "audio_s", "lost_s", "word_errors", "reference_words"):
            setattr(self, name, getattr(self, name) + getattr(facts, name))
        for kind, count in facts.errors_by_kind.items():
            self.errors_by_kind[kind] = self.errors_by_kind.get(kind, 0) + count

    def add_clock(self, result: dict) -> None:
        """Add the stage seconds of one committed shard, as `CommitShards` returns them."""
        for stage in STAGES:
            self.stage_s[stage] += result[f"{stage}_s"]


class ProgressDisplay:
    """Shows the progress of a run. Use as a context manager; call `update` after each committed shard.

    Args:
        total_s: seconds of audio of the whole job, as planned.
        done_s: of these, committed by earlier runs.
    """

    def __init__(self, total_s: float, done_s: float, stream=None):
        self.total_s, self.before_s = total_s, done_s
        # For each process, in seconds since the start: when it began its first shard, and when its last was committed.
        self._workers: dict[str, dict[str, tuple[float, float]]] = {stage: {} for stage in STEPS_OF}
        self.tally = Tally()
        self.started = time.monotonic()
        self.throughput: list[tuple[float, float]] = [(0.0, 0.0)]  # seconds since start, seconds of audio committed
        self._stream = stream or sys.stderr
        self._live = None
        if self._stream.isatty():
            self._live = Live(console=Console(file=self._stream), refresh_per_second=4, get_renderable=self._render)
        self._pause_s, self._next_line = LINE_EVERY_S, self.started + LINE_EVERY_S

    def __enter__(self) -> "ProgressDisplay":
        if self._live:
            self._live.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._live.__exit__(*exception)

    def update(self, facts: PartFacts, result: dict) -> None:
        """Count one committed shard; prints a line when one is due."""
        self.tally.add(facts)
        self.tally.add_clock(result)
        now = time.monotonic()
        for stage, workers in self._workers.items():
            name, at_s = result[f"{stage}_worker"], now - self.started
            own_s = sum(result[f"{step}_s"] for step in STEPS_OF[stage])
            began_s, _ = workers.get(name, (max(at_s - own_s, 0.0), 0.0))
            workers[name] = began_s, at_s
        self.throughput.append((now - self.started, self.tally.audio_s))
        if self._live is None and now >= self._next_line:
            print(self.line(), file=self._stream, flush=True)
            self._pause_s = min(self._pause_s * LINE_SLOWDOWN, LINE_AT_MOST_EVERY_S)
            self._next_line = now + self._pause_s

    def line(self) -> str:
        """One line: hours, RTFx, time left, counts, bottleneck."""
        tally, elapsed_s = self.tally, max(time.monotonic() - self.started, 1e-9)
        accounted_s = self.before_s + tally.audio_s + tally.lost_s
        overall = tally.audio_s / elapsed_s
        left_s = max(self.total_s - accounted_s, 0.0) / overall if overall else None
        return (
            f"{hours(accounted_s)} of about {hours(self.total_s)} | "
            f"RTFx {self._recent_rtfx():.0f} now, {overall:.0f} overall | left {clock(left_s)} | "
            f"ok {tally.ok} empty {tally.empty} errors {tally.errors} | {self._bottleneck()}"
        )

    def model_idle_share(self) -> float | None:
        """Share of the time from a model actor's first shard to its last in which it did not run the model.

        Actors that start late or end early, as on spot nodes, count for the time that they are there.
        """
        return round(max(0.0, 1 - self._busy("model")), 3) if self.tally.shards else None

    def _busy(self, stage: str) -> float:
        """Share of their time so far that the workers of a stage spent in its steps."""
        worker_s = sum(until_s - began_s for began_s, until_s in self._workers[stage].values())
        return sum(self.tally.stage_s[step] for step in STEPS_OF[stage]) / worker_s if worker_s else 0.0

    def _recent_rtfx(self) -> float:
        now_s, now_audio = time.monotonic() - self.started, self.tally.audio_s
        since_s, since_audio = next(
            (point for point in self.throughput if point[0] >= now_s - RECENT_S), (now_s, now_audio)
        )
        return (now_audio - since_audio) / (now_s - since_s) if now_s - since_s > 1e-3 else 0.0

    def _bottleneck(self) -> str:
        """The busier of the two pools, and how idle the model is."""
        if not self.tally.shards:
            return "starting"
        model = self._busy("model")
        slowest = "model" if model >= self._busy("feature") else max(STEPS_OF["feature"], key=self.tally.stage_s.get)
        return f"bottleneck {slowest}, model idle {max(0.0, 1 - model):.0%}"

    def _render(self) -> Text:
        return Text(self.line())


def hours(seconds: float) -> str:
    """`2.70 h`; below six minutes `41 s`."""
    return f"{seconds / 3600:,.2f} h" if seconds >= 360 else f"{seconds:.0f} s"


def clock(seconds: float | None) -> str:
    """`1:02:03`, or `unknown`."""
    if seconds is None:
        return "unknown"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"
