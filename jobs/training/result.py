"""What a training run prints: its metrics while it runs, and its result at the end. Knows nothing of Ray."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jobs.storage.files import Storage
from jobs.training.checkpoint import Progress, read_progress
from jobs.training.labels import LabelReport
from jobs.training.loop import MODEL_FOLDER
from jobs.training.metrics import METRICS_FILE, describe, measurements, read_metrics
from jobs.training.report import REPORT_FILE
from parakeet_core.errors import InputError

RESUME_HINT = "run the same command again to resume from the last checkpoint"
FOLLOW_EVERY_S = 2.0  # one small read of the metrics


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a run.

    Attributes:
        model: where the best model is.
        wer_before: WER on the validation set before training.
        best_wer, best_step: WER of the best model on the same set, and the step after which it was measured.
        skipped_steps: number of steps whose gradient was not finite.
    """

    model: str
    steps: int
    wer_before: float
    best_wer: float
    best_step: int
    skipped_steps: int
    train: LabelReport
    validation: LabelReport


@contextmanager
def following(output: Storage, before: Progress | None) -> Iterator[None]:
    """Print lines of metrics as they appear in the output, where the workers write them."""
    ended = threading.Event()
    # Compared as whole lines, because two may have been written at the same moment.
    seen = {json.dumps(line) for line in read_metrics(output)} if before is not None else set()

    def follow() -> None:
        while True:
            last = ended.wait(FOLLOW_EVERY_S)
            try:
                for line in read_metrics(output):
                    if (text := json.dumps(line)) not in seen:
                        seen.add(text)
                        print(describe(line), file=sys.stderr, flush=True)
            except (InputError, ValueError) as error:  # the display may miss a line; training goes on
                print(f"{METRICS_FILE} cannot be read now: {error}", file=sys.stderr)
            if last:
                return

    thread = threading.Thread(target=follow, name="follow-metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def read_result(output: Storage, reports: dict[str, LabelReport]) -> FinetuneResult:
    """The result of a run, from what is in its output."""
    progress = read_progress(output)
    return FinetuneResult(
        model=output.source(MODEL_FOLDER),
        steps=progress.step,
        wer_before=measurements(read_metrics(output))[0]["validation_wer"],
        best_wer=progress.best_wer,
        best_step=progress.best_step,
        skipped_steps=progress.skipped,
        **reports,
    )


def summarise(result: FinetuneResult, output: str) -> str:
    lines = [
        f"steps      {result.steps:,}"
        + (f", {result.skipped_steps} skipped: their gradient was not finite" if result.skipped_steps else ""),
        f"WER        {result.best_wer:.2%} on the validation set, after step {result.best_step:,}; "
        f"{result.wer_before:.2%} before training",
        f"model      {result.model}",
        f"report     {output.rstrip('/')}/{REPORT_FILE}",
    ]
    return "\n".join(lines)
