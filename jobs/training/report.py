"""OUTPUT/report.html of a training run: error rates, loss and learning rate over its steps."""

import json
import math
from collections.abc import Sequence

from jobs.report.charts import TICKS_ACROSS, line_chart, ticks_up_to
from jobs.report.frame import render_page
from jobs.report.markup import Html, element, figure, number, numbers_table, percent
from jobs.storage.files import Storage
from jobs.training.metrics import measurements, read_metrics
from jobs.training.setup import LABELS_FILE, RUN_FILE

REPORT_FILE = "report.html"
NUMBERS_SHOWN = 50  # rows of a table; evenly spaced ones for a long run


def write_training_report(output: Storage) -> None:
    """Write the page from what is in the output of a run, however far the run came. Raises InputError."""
    lines = read_metrics(output)
    labels, run = (json.loads(output.read_bytes(name)) for name in (LABELS_FILE, RUN_FILE))
    output.write_atomic(REPORT_FILE, render_training_report(lines, labels, run).encode("utf-8", "replace"))


def render_training_report(lines: Sequence[dict], labels: dict, run: dict) -> Html:
    """The page.

    Args:
        lines: of the metrics.
        labels: `LabelReport` of each split, as dicts.
        run: the record of the run's options.
    """
    steps = [line for line in lines if "loss" in line]
    measured = measurements(lines)
    best = min(measured, key=lambda line: line["validation_wer"], default=None)
    said = "not measured yet" if best is None else f"WER {percent(best['validation_wer'])} after step {best['step']:,}"
    header = element("header", element("h1", "Training report"), element("p", said, class_="soft"))
    main = element(
        "main",
        _curve("Word error rate", "on the validation set", measured, "validation_wer", 100, "%"),
        _curve("Character error rate", "on the validation set", measured, "validation_cer", 100, "%"),
        _curve("Training loss", "CTC loss per token, mean over the utterances", steps, "loss"),
        _curve("Validation loss", "the same on the validation set", measured, "validation_loss"),
        _curve("Learning rate", "times one million", steps, "learning_rate", 1e6),
        _labels_section(labels),
        _options_section(run),
    )
    return render_page("Training report", header, main)


def _curve(title: str, caption: str, lines: Sequence[dict], key: str, scale: float = 1.0, unit: str = "") -> Html | str:
    """A curve over the steps, and its numbers; nothing for a run that has none yet."""
    lines = [line for line in lines if math.isfinite(line[key])]
    steps, values = [line["step"] for line in lines], [line[key] * scale for line in lines]
    if not steps or steps[-1] == 0 or max(values) <= 0:
        return ""
    ticks = [
        (100 * tick / steps[-1], f"{tick:,.0f}")
        for tick in ticks_up_to(steps[-1], TICKS_ACROSS - 1)
        if tick <= steps[-1]
    ]
    every = -(-len(steps) // NUMBERS_SHOWN)
    rows = [(number(step), f"{value:.4g}") for step, value in zip(steps[::-every], values[::-every], strict=True)]
    described = f"From {values[0]:.4g}{unit} after step {steps[0]} to {values[-1]:.4g}{unit} after step {steps[-1]}."
    return figure(
        title,
        caption,
        line_chart(title, described, steps, values, ticks),
        numbers_table(("step", f"{title.lower()} {unit}".strip()), rows, f"{title} by step"),
    )


def _labels_section(labels: dict) -> Html:
    rows = []
    for split, report in labels.items():
        rows.append((split, "used", number(report["used"])))
        rows += [(split, reason.replace("_", " "), number(count)) for reason, count in report["rejected"].items()]
    return element(
        "section", element("h2", "Data"), numbers_table(("split", "items", "count"), rows, "Items used and left out")
    )


def _options_section(run: dict) -> Html:
    rows = [(name.replace("_", " "), json.dumps(value)) for name, value in run["options"].items()]
    return element("section", element("h2", "Options"), numbers_table(("option", "value"), rows, "Options of the run"))
