"""The sections of the report that show rows: histograms, errors, the least confident items, odd speech rates."""

import math
from collections.abc import Sequence

from jobs.report.charts import histogram_chart
from jobs.report.histogram import Bars, Histogram
from jobs.report.markup import Html, clip, element, figure, foreign, join, number, numbers_table, percent, span, table
from jobs.report.stats import LEAST_CONFIDENT, Row, TableStats

DURATION_WIDTHS_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)
CONFIDENCE_WIDTHS = (0.005, 0.01, 0.02, 0.025, 0.05)
RATE_WIDTHS = (0.25, 0.5, 1, 2, 5)
MOST_BARS = 40
TAIL = 0.005  # share of the values that one grey column at the end of a histogram may stand for
FAR_OUT = 3.0  # times the distance between the quartiles, beyond either of them (Tukey 1977: "far out")
FENCES_FROM = 20  # items: the quartiles of fewer say little
RATE_STEP = 0.25  # characters per second: fences are moved outwards to a border of `stats.RATE_EDGES`
HINT = "Often music, silence, another language or a wrong segment. A number in bold is far from the rest."
TEXT_START = 120  # characters of a text in the speech-rate tables


def histogram_section(stats: TableStats) -> Html:
    return join(
        element("h2", "What is in the table"),
        element("div", duration_figure(stats.durations), confidence_figure(stats.confidences), class_="pair"),
        element("div", rate_figure(stats.rates), class_="below"),
    )


def duration_figure(durations: Histogram) -> Html:
    if not durations.total:
        return figure("Duration of items, seconds", "No item was transcribed.")
    top = min(durations.quantile(1 - TAIL), float(durations.edges[-1]))
    bars = durations.bars(0.0, top, DURATION_WIDTHS_S, MOST_BARS)
    median = durations.quantile(0.5)
    caption = (
        f"Mean {span(durations.mean)}, median {span(median)}; shortest {span(durations.minimum)}, "
        f"longest {span(durations.maximum)}. Transcribed items only."
    )
    marks = [(median, f"median {span(median)}")]
    return histogram_figure("Duration of items, seconds", caption, bars, "s", marks)


def confidence_figure(confidences: Histogram) -> Html:
    if not confidences.total:
        return figure("Confidence", "No item has a text.")
    start = max(0.0, math.floor(confidences.quantile(TAIL) * 10) / 10)
    bars = confidences.bars(min(start, 0.9), 1.0, CONFIDENCE_WIDTHS, MOST_BARS)
    median = confidences.quantile(0.5)
    caption = (
        f"Mean {number(confidences.mean, 3)}; one item in twenty is below {number(confidences.quantile(0.05), 3)}. "
        "Mean posterior of the emitted tokens: good for ranking, not a probability of being right."
    )
    return histogram_figure("Confidence", caption, bars, "", [(median, f"median {number(median, 3)}")])


def rate_figure(rates: Histogram) -> Html:
    """Characters per second: items with text but no speech, or speech but no text, stand out here."""
    if not rates.total:
        return figure("Characters per second", "No item has a text.")
    slow, fast = far_out_fences(rates)
    median, end = rates.quantile(0.5), float(rates.edges[-1])
    marks = [(median, f"median {number(median, 1)}")]
    caption = f"Mean {number(rates.mean, 1)}."
    if slow > 0:
        caption += f" {number(rates.count_below(slow))} items have less than {slow:g}, far from the rest."
        marks.append((slow, f"< {slow:g}"))
    if fast < end:
        caption += f" {number(rates.total - rates.count_below(fast))} items have {fast:g} or more, far from the rest."
        marks.append((fast, f"≥ {fast:g}"))
    top = max(rates.quantile(1 - TAIL), fast if fast < end else 0.0)
    bars = rates.bars(0.0, min(top, end), RATE_WIDTHS, MOST_BARS)
    return histogram_figure("Characters per second", caption, bars, "characters per second", marks, (slow, fast))


def histogram_figure(
    title: str,
    caption: str,
    bars: Bars,
    unit: str,
    marks: Sequence[tuple[float, str]],
    usual: tuple[float, float] = (-math.inf, math.inf),
) -> Html:
    """A histogram with its numbers; arguments as for `histogram_chart`."""
    rows = [(f"below {bars.edges[0]:g}", number(bars.below))] if bars.below else []
    edges = zip(bars.edges, bars.edges[1:], bars.counts, strict=False)
    rows += [(f"{low:g} to {high:g}", number(count)) for low, high, count in edges]
    rows += [(f"{bars.edges[-1]:g} and more", number(bars.above))] if bars.above else []
    if bars.below or bars.above:
        caption += " The bar at the end stands for all beyond it."
    chart = histogram_chart(title, caption, bars, unit, marks, usual)
    plot = element("div", chart, class_="plot-area")
    return figure(title, caption, plot, numbers_table((title, "items"), rows, title))


def error_section(receipt: dict, stats: TableStats) -> Html:
    """Errors by kind, the most frequent first, each with one example."""
    heading = element("h2", "Errors by kind")
    kinds = sorted(receipt["errors_by_kind"].items(), key=lambda kind: (-kind[1], kind[0]))
    if not kinds:
        return join(heading, element("p", "No item failed.", class_="card"))
    rows = []
    for kind, count in kinds:
        example = stats.examples.get(kind)
        message = foreign(example.message) if example else element("span", "none in the parts read", class_="soft")
        where = element("span", foreign(example.id), class_="id") if example else "–"
        rows.append((kind, number(count), percent(count / receipt["errors"]), where, message))
    head = ("kind", "items", "of errors", "example", "message")
    return join(heading, element("div", table(head, rows, (1, 2), "Errors by kind"), class_="sheet"))


def confidence_section(stats: TableStats) -> Html:
    heading = element("h2", f"The {LEAST_CONFIDENT} least confident items")
    if not stats.least_confident:
        return join(heading, element("p", "No item has a text.", class_="card"))
    rows = [
        (number(row.confidence, 3), span(row.duration_s), item_id(row), foreign(row.text))
        for row in stats.least_confident
    ]
    head = ("confidence", "duration", "id", "text")
    return join(heading, element("div", table(head, rows, (0, 1), "The least confident items"), class_="sheet"))


def item_id(row: Row) -> Html:
    return element("span", foreign(row.id), class_="id")


def far_out_fences(rates: Histogram) -> tuple[float, float]:
    """Borders beyond which a value is far from the rest; those of the histogram if it holds too few values to tell."""
    end = float(rates.edges[-1])
    if rates.total < FENCES_FROM:
        return 0.0, end
    low, high = rates.quantile(0.25), rates.quantile(0.75)
    reach = FAR_OUT * (high - low)
    slow = math.floor((low - reach) / RATE_STEP) * RATE_STEP
    fast = (math.floor((high + reach) / RATE_STEP) + 1) * RATE_STEP
    return max(slow, 0.0), min(fast, end)


def rate_section(stats: TableStats) -> Html:
    """The items at both ends of the speech rates."""
    heading = element("h2", "Fastest and slowest speech")
    if not stats.rates.total:
        return join(heading, element("p", "No item has a text.", class_="card"))
    slow, fast = far_out_fences(stats.rates)
    median = stats.rates.quantile(0.5)
    fastest = [row for row in stats.fastest if row.chars_per_s > median]
    slowest = [row for row in stats.slowest if row.chars_per_s < median]
    if not fastest and not slowest:
        return join(heading, element("p", "All items have the same speech rate.", class_="card"))
    return join(
        heading,
        element("p", HINT, class_="soft"),
        rate_table("Fastest", fastest, slow, fast),
        rate_table("Slowest", slowest, slow, fast),
    )


def rate_table(title: str, rows: list[Row], slow: float, fast: float) -> Html:
    if not rows:
        return Html()

    def rate(row: Row) -> Html:
        usual = slow <= row.chars_per_s < fast
        return element("span", number(row.chars_per_s, 1), class_=None if usual else "odd")

    shown = [(rate(row), span(row.duration_s), item_id(row), foreign(clip(row.text, TEXT_START))) for row in rows]
    head = ("chars/s", "duration", "id", "text")
    return join(
        element("h3", title, class_="over-sheet"), element("div", table(head, shown, (0, 1), title), class_="sheet")
    )
