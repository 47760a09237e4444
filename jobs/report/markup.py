"""HTML from untrusted text: escaping, tables, numbers as people read them. Knows nothing of reports."""

import html
from collections.abc import Sequence

# Neither HTML nor a terminal nor a reader's eye has a use for control characters other than tab and newline.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\ufffd")


class Html(str):
    """Markup that is ready for a page. Every other string is escaped on its way there."""


def visible(text: str) -> str:
    """`text` with a sign in place of each control character, which a terminal would obey."""
    return text.translate(_CONTROLS)


def safe(value: object) -> Html:
    """`value` as markup: escaped, unless it is `Html` already."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(visible(str(value))))


def foreign(text: str) -> Html:
    """Text from the data: escaped, and isolated, so that its writing direction does not affect the page around it."""
    return Html(f"<bdi>{safe(text)}</bdi>")


def join(*pieces: object) -> Html:
    """Pieces one after another, escaped unless they are `Html`."""
    return Html("".join(safe(piece) for piece in pieces))


def element(tag: str, *children: object, **attributes: object) -> Html:
    """One element. Attribute names are written as Python allows: `class_`, `aria_label`."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{safe(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{written}>{join(*children)}</{tag}>")


def table(
    head: Sequence[str], rows: Sequence[Sequence[object]], numeric: Sequence[int] = (), caption: str = ""
) -> Html:
    """A table whose cells carry their column's name, from which the style sheet makes cards on a narrow screen.

    The roles repeat what the tags say, because browsers ignore the tags of a table that is displayed as anything else.

    Args:
        numeric: columns that hold numbers, aligned at the right.
        caption: what the table shows, for screen readers.
    """

    def cell(column: int, value: object) -> Html:
        return element(
            "td", value, role="cell", data_label=head[column], class_="number" if column in numeric else None
        )

    names = [
        element("th", name, role="columnheader", scope="col", class_="number" if column in numeric else None)
        for column, name in enumerate(head)
    ]
    body = [element("tr", *(cell(n, value) for n, value in enumerate(row)), role="row") for row in rows]
    return element(
        "table",
        element("caption", caption, class_="unseen") if caption else "",
        element("thead", element("tr", *names, role="row"), role="rowgroup"),
        element("tbody", *body, role="rowgroup"),
        role="table",
    )


def details(summary: str, *content: object) -> Html:
    """Content behind a line that opens it."""
    return element("details", element("summary", summary), *content)


def figure(title: str, caption: str, *content: object) -> Html:
    """A chart, or a text in its place, under a title and a caption."""
    return element(
        "figure",
        element("figcaption", element("h3", title), element("p", caption) if caption else ""),
        *content,
    )


def numbers_table(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str) -> Html:
    """The exact numbers of a chart, folded away."""
    return details(
        "Numbers", element("div", table(head, rows, range(1, len(head)), caption), class_="scroll", tabindex=0)
    )


def clip(text: str, limit: int) -> str:
    """At most `limit` characters, the last of them an ellipsis if some are left out."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def number(value: float | None, digits: int = 0) -> str:
    """`1,234.5`; a dash if it is not known."""
    return "–" if value is None else f"{value:,.{digits}f}"


def rounded(value: float, digits: int = 0) -> str:
    """`1,234.5`; from ten millions on `12.3 million`, `4.57 billion`."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if value >= max(size, 1e7):
            return f"{value / size:,.3g} {name}" if value < 1000 * size else f"{value / size:,.0f} {name}"
    return number(value, digits)


def short(value: float) -> str:
    """A number for an axis: `0.5`, `950`, `12k`, `1.5M`."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def percent(share: float) -> str:
    """`12.3%`; a share above zero that rounds to nothing is `<0.1%`."""
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def span(seconds: float | None) -> str:
    """A length of time: `0.84 s`, `41 s`, `12 min 05 s`, `3 h 07 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{min(seconds, 59.9):.1f} s"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour:,} h {minute:02d} min" if hour else f"{minute} min {second:02d} s"
