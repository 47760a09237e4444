"""Charts as inline SVG: numbers in, markup out. Knows nothing of tables and receipts.

Horizontal positions are percentages of the width and vertical ones are pixels: a chart fills its column and its text
keeps its size, on a phone as on a desktop. Colours come from the page's style sheet, by class. Every chart has a title
and a description for screen readers; the exact numbers belong in a table beside it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jobs.report.histogram import Bars
from jobs.report.markup import Html, element, join, number, percent, short, span

TOP = 24  # pixels above the plot, for the labels of marks
PLOT = 160  # pixels of the plot
AXIS = 22  # pixels below it
LEAST_BAR = 2  # pixels: one item among millions is still visible
STEPS_UP = 5  # lines of the height axis above zero
LABEL_MARGIN = 14  # percent: half of "median 14.2" on a phone
TICKS_ACROSS = 6  # more do not fit on a phone


@dataclass(frozen=True)
class Column:
    """One bar of a column chart; `note` is shown while the pointer is on it."""

    value: float
    note: str
    css: str = ""


@dataclass(frozen=True)
class Mark:
    """A vertical line with a label, `at` percent of the width."""

    at: float
    label: str


def ticks_up_to(top: float, at_most: int) -> list[float]:
    """Round numbers from 0 to at least `top`, in at most `at_most` + 1 steps."""
    step = 10 ** math.floor(math.log10(top / at_most))
    step = next(step * factor for factor in (1, 2, 5, 10) if step * factor * at_most >= top * (1 - 1e-9))
    return [step * n for n in range(math.ceil(top / step - 1e-9) + 1)]


def frame(title: str, description: str, height: int, *content: object, css: str = "plot") -> Html:
    """An SVG image of full width with its title and description."""
    key = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return element(
        "svg",
        element("title", title, id=f"{key}-title"),
        element("desc", description, id=f"{key}-text"),
        *content,
        class_=css,
        role="img",
        aria_labelledby=f"{key}-title {key}-text",
        width="100%",
        height=height,
    )


def height_axis(ticks: Sequence[float]) -> Html:
    """Horizontal lines with their values left of the plot."""
    lines = []
    for tick in ticks:
        y = TOP + PLOT * (1 - tick / ticks[-1])
        lines.append(element("line", x1="0", x2="100%", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        lines.append(element("text", short(tick), x="-8", y=f"{y + 4:.1f}", class_="tick end"))
    return join(*lines)


def width_axis(ticks: Sequence[tuple[float, str]]) -> Html:
    """Labels below the plot, at percentages of the width."""
    labels = [element("text", label, x=f"{at:.2f}%", y=TOP + PLOT + 17, class_="tick middle") for at, label in ticks]
    strokes = [
        element("line", x1=f"{at:.2f}%", x2=f"{at:.2f}%", y1=TOP + PLOT, y2=TOP + PLOT + 4, class_="axis")
        for at, _ in ticks
    ]
    base = element("line", x1="0", x2="100%", y1=TOP + PLOT, y2=TOP + PLOT, class_="axis")
    return join(base, *strokes, *labels)


def anchor(at: float) -> str:
    """The class that keeps the label of a mark at `at` percent inside the chart."""
    return "start" if at < LABEL_MARGIN else "end" if at > 100 - LABEL_MARGIN else "middle"


def mark_lines(marks: Sequence[Mark]) -> Html:
    """Dashed lines through the plot with their labels above."""
    drawn = []
    for mark in marks:
        at = min(max(mark.at, 0.0), 100.0)
        drawn.append(element("line", x1=f"{at:.2f}%", x2=f"{at:.2f}%", y1=TOP - 6, y2=TOP + PLOT, class_="mark"))
        drawn.append(element("text", mark.label, x=f"{at:.2f}%", y=TOP - 11, class_=f"mark-label {anchor(at)}"))
    return join(*drawn)


def column_chart(
    title: str,
    description: str,
    columns: Sequence[Column],
    ticks: Sequence[tuple[float, str]],
    marks: Sequence[Mark] = (),
    least_top: float = 0.0,
) -> Html:
    """Columns of equal width side by side, at least one of them above zero; the scale reaches `least_top` or higher."""
    heights = ticks_up_to(max(least_top, *(column.value for column in columns)), STEPS_UP)
    width = 100 / len(columns)
    drawn = []
    for place, column in enumerate(columns):
        pixels = max(PLOT * column.value / heights[-1], LEAST_BAR) if column.value > 0 else 0.0
        bar = {"x": f"{(place + 0.06) * width:.3f}%", "width": f"{0.88 * width:.3f}%"}
        drawn.append(
            element(
                "g",
                element("title", column.note),
                element("rect", x=f"{place * width:.3f}%", width=f"{width:.3f}%", y=TOP, height=PLOT, class_="hit"),
                element(
                    "rect",
                    **bar,
                    y=f"{TOP + PLOT - pixels:.2f}",
                    height=f"{pixels:.2f}",
                    class_=f"bar {column.css}".strip(),
                ),
            )
        )
    parts = (height_axis(heights), join(*drawn), width_axis(ticks), mark_lines(marks))
    return frame(title, description, TOP + PLOT + AXIS, *parts)


def histogram_chart(
    title: str,
    description: str,
    bars: Bars,
    unit: str,
    marks: Sequence[tuple[float, str]] = (),
    usual: tuple[float, float] = (-math.inf, math.inf),
) -> Html:
    """A histogram; the values outside its borders are one grey column at either end.

    Args:
        unit: of the values, for the notes of the columns.
        marks: (value, label).
        usual: columns wholly outside this range are drawn in a warning colour.
    """

    def css(low: float, high: float, otherwise: str = "") -> str:
        return "odd" if high <= usual[0] or low >= usual[1] else otherwise

    edges, counts = bars.edges, bars.counts
    columns = []
    if bars.below:
        note = f"below {edges[0]:g} {unit}: {number(bars.below)}"
        columns.append(Column(bars.below, note, css(-math.inf, edges[0], "rest")))
    first = len(columns)
    columns += [
        Column(count, f"{low:g} to {high:g} {unit}: {number(count)}", css(low, high))
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    if bars.above:
        note = f"{edges[-1]:g} {unit} and more: {number(bars.above)}"
        columns.append(Column(bars.above, note, css(edges[-1], math.inf, "rest")))

    def place(value: float) -> float:
        return 100 * (first + (value - edges[0]) / (edges[-1] - edges[0]) * len(counts)) / len(columns)

    every = math.ceil(len(counts) / TICKS_ACROSS)
    every = next(step for step in (1, 2, 4, 5, 10, 20, 25, 50, every) if step >= every)
    ticks = [(place(edge), f"{edge:g}") for edge in edges[::every]]
    return column_chart(
        title, description, columns, ticks, [Mark(place(value), label) for value, label in marks], STEPS_UP
    )


def time_ticks(total_s: float) -> list[tuple[float, str]]:
    """Places of round times in a run of `total_s` seconds, with their unit."""
    units = ((1, "s"), (60, "min"), (3600, "h"))
    unit_s, unit = next(((size, name) for size, name in units if total_s <= 120 * size), (86_400, "d"))
    times = ticks_up_to(total_s / unit_s, TICKS_ACROSS - 1)
    return [(100 * t * unit_s / total_s, f"{t:g} {unit}") for t in times if t * unit_s <= total_s * (1 + 1e-9)]


def line_chart(
    title: str,
    description: str,
    times_s: Sequence[float],
    values: Sequence[float],
    ticks: Sequence[tuple[float, str]] | None = None,
) -> Html:
    """A line with the area below it filled; at least one value is above zero.

    Args:
        times_s: ascending, the last above zero; or any other ascending quantity, with its own `ticks`.
        ticks: labels below the plot at percentages of the width; default round times from zero.
    """
    heights = ticks_up_to(max(values), STEPS_UP)
    points = [
        f"{100 * t / times_s[-1]:.3f},{100 * (1 - v / heights[-1]):.3f}" for t, v in zip(times_s, values, strict=True)
    ]
    # Polylines take no percentages: they are drawn in a picture of 100 x 100 that is stretched; their width is not.
    plot = element(
        "svg",
        element("polygon", points=" ".join(["0,100", *points, "100,100"]), class_="area"),
        element("polyline", points=" ".join(points), class_="line", vector_effect="non-scaling-stroke"),
        y=TOP,
        width="100%",
        height=PLOT,
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
    )
    axis = width_axis(time_ticks(times_s[-1]) if ticks is None else ticks)
    return frame(title, description, TOP + PLOT + AXIS, height_axis(heights), plot, axis)


def waterfall_chart(title: str, description: str, steps: Sequence[tuple[str, float, str]]) -> Html:
    """One row per step, each bar beginning where the one above ends.

    Args:
        steps: (name, seconds, css); at least one of them above zero.
    """
    total, row, before = sum(seconds for _, seconds, _ in steps), 48, 0.0
    drawn = []
    for place, (name, seconds, css) in enumerate(steps):
        y = place * row
        start, width = 100 * before / total, 100 * seconds / total
        drawn += [
            element("text", name, x="0", y=y + 13, class_="row-name"),
            element(
                "text", f"{span(seconds)} · {percent(seconds / total)}", x="100%", y=y + 13, class_="row-value end"
            ),
            element("rect", x="0", width="100%", y=y + 20, height=12, rx=3, class_="track"),
            element(
                "rect", x=f"{start:.2f}%", width=f"{width:.2f}%", y=y + 20, height=12, rx=3, class_=f"bar {css}".strip()
            ),
        ]
        before += seconds
    return frame(title, description, len(steps) * row - 6, *drawn, css="rows")


def share_bar(title: str, shares: Sequence[tuple[str, float, str]]) -> Html:
    """One bar cut into shares.

    Args:
        shares: (name, value, css); at least one of them above zero.
    """
    total, before, drawn = sum(value for _, value, _ in shares), 0.0, []
    for _, value, css in shares:
        place = {"x": f"{100 * before / total:.3f}%", "width": f"{100 * value / total:.3f}%"}
        if value:
            drawn.append(element("rect", **place, y=0, height=10, class_=f"share {css}"))
        before += value
    description = ", ".join(f"{name} {percent(value / total)}" for name, value, _ in shares)
    return frame(title, description, 10, *drawn, css="shares")
