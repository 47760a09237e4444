"""The metrics of a run: JSON lines in a file that is always rewritten whole, so that it agrees with the checkpoints.

{"step": 20, "epoch": 0, "loss": 3.1, "learning_rate": 3e-05, "gradient_norm": 2.2, "rtfx": 41.0, ...}
{"step": 200, "validation_wer": 0.31, "validation_cer": 0.12, "validation_loss": 0.9, "best": true, ...}
"""

import json
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import jiwer

from jobs.storage.files import Storage
from jobs.table.schema import normalise_words

METRICS_FILE = "metrics.jsonl"
WRITE_EVERY_S = 10.0  # the whole file each time: some kilobytes for thousands of steps


@dataclass
class ErrorCounts:
    """Errors of hypotheses against references, to be summed over items and workers."""

    word_errors: float = 0.0
    words: float = 0.0
    char_errors: float = 0.0
    chars: float = 0.0
    loss: float = 0.0
    items: float = 0.0

    def add(self, reference: str, hypothesis: str) -> None:
        """Count one item, in lower case and without punctuation; the reference must contain words."""
        reference, hypothesis = normalise_words(reference), normalise_words(hypothesis)
        by_word, by_char = jiwer.process_words(reference, hypothesis), jiwer.process_characters(reference, hypothesis)
        self.word_errors += by_word.substitutions + by_word.deletions + by_word.insertions
        self.char_errors += by_char.substitutions + by_char.deletions + by_char.insertions
        self.words += len(reference.split())
        self.chars += len(reference)
        self.items += 1

    def values(self) -> tuple[float, ...]:
        return astuple(self)

    @property
    def wer(self) -> float:
        return self.word_errors / max(self.words, 1)

    @property
    def cer(self) -> float:
        return self.char_errors / max(self.chars, 1)


class MetricsLog:
    """The lines of a run, kept by one worker.

    Args:
        last_step: lines of later steps are dropped, because a resumed run writes them again.
    """

    def __init__(self, output: Storage, last_step: int):
        self.output = output
        self.lines = [line for line in read_metrics(output) if line["step"] <= last_step]
        self._written = time.monotonic()

    def add(self, **values) -> None:
        self.lines.append(values)
        if time.monotonic() - self._written > WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        content = "".join(f"{json.dumps(line)}\n" for line in self.lines)
        self.output.write_atomic(METRICS_FILE, content.encode())
        self._written = time.monotonic()


def read_metrics(output: Storage) -> list[dict]:
    """All lines; none if there is no file yet."""
    if not output.exists(METRICS_FILE):
        return []
    return [json.loads(line) for line in output.read_bytes(METRICS_FILE).decode().splitlines()]


def measurements(lines: Sequence[dict]) -> list[dict]:
    """The lines with error rates."""
    return [line for line in lines if "validation_wer" in line]


def describe(line: dict) -> str:
    """One line of metrics as text for people."""
    if "validation_wer" in line:
        best = ", the lowest so far: exported" if line["best"] else ""
        return (
            f"step {line['step']}: WER {line['validation_wer']:.2%}, CER {line['validation_cer']:.2%}, "
            f"loss {line['validation_loss']:.3f} on {line['items']:.0f} validation utterances{best}"
        )
    return (
        f"step {line['step']} of {line['total_steps']}, epoch {line['epoch']}: loss {line['loss']:.3f}, "
        f"gradient {line['gradient_norm']:.2f}, rate {line['learning_rate']:.2e}, RTFx {line['rtfx']:.0f}"
        + (f", {line['skipped']} steps skipped for gradients that are not finite" if line["skipped"] else "")
    )
