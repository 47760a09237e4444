"""OUTPUT/report.html: what a run did and what its table holds, on one page that loads nothing and runs no script.

Ids, texts and messages come from untrusted data: `markup.py` escapes every string, and the page's content security
policy forbids scripts, other styles and all requests, should an escape ever be missing.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

import parakeet_core
from jobs.report.charts import Column, column_chart, line_chart, share_bar, time_ticks, waterfall_chart
from jobs.report.frame import render_page
from jobs.report.markup import Html, element, figure, foreign, join, number, numbers_table, percent, rounded, span
from jobs.report.rows import confidence_section, error_section, histogram_section, rate_section
from jobs.report.stats import TableStats, committed_over_time, gather_stats
from jobs.storage.files import Storage

REPORT_FILE = "report.html"
AUDIO_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
STAGE_NAMES = {
    "storage": "Storage wait",
    "decode": "Decode",
    "features": "Features",
    "model": "Model",
    "write": "Write",
}


def write_report(output: Storage, receipt: dict, throughput: Sequence[tuple[float, float]]) -> None:
    """Write OUTPUT/report.html, whole or not at all.

    Args:
        receipt: the fields of `jobs.report.receipt.Receipt`.
        throughput: (seconds since start, seconds of audio committed so far) of this run, ascending.

    Raises:
        InputError: the table's folder cannot be listed, or the page cannot be written.
    """
    page = render_report(receipt, gather_stats(output), throughput)
    # A path of undecodable bytes holds lone surrogates, which UTF-8 cannot encode.
    output.write_atomic(REPORT_FILE, page.encode("utf-8", "replace"))


def render_report(receipt: dict, stats: TableStats, throughput: Sequence[tuple[float, float]]) -> Html:
    """The page."""
    main = element(
        "main",
        notices(receipt, stats),
        headline(receipt),
        time_section(receipt, throughput),
        histogram_section(stats),
        error_section(receipt, stats),
        confidence_section(stats),
        rate_section(stats),
        open_section(receipt["table"]),
        provenance_section(receipt),
    )
    return render_page(f"Transcription report: {receipt['input']}", page_header(receipt), main)


def page_header(receipt: dict) -> Html:
    chip = element("span", "complete", class_="chip ok")
    budget = receipt.get("max_error_rate")
    if not receipt["complete"]:
        chip = element("span", "stopped before the end", class_="chip error")
    elif budget is not None and receipt["error_rate"] > budget:
        chip = element("span", f"complete, over the error budget of {percent(budget)}", class_="chip error")
    return element(
        "header",
        element("div", element("h1", "Transcription report"), chip, class_="heading"),
        element("div", foreign(receipt["input"]), class_="id"),
        element("div", f"{moment(receipt['started_at'])} to {moment(receipt['finished_at'])}", class_="soft"),
    )


def moment(iso: str) -> str:
    """`2026-03-02 08:11:04 UTC` for `2026-03-02T08:11:04+00:00`."""
    return iso.replace("T", " ").replace("+00:00", " UTC")


def notices(receipt: dict, stats: TableStats) -> Html:
    """What a reader must know before believing the numbers."""
    found = []
    if not receipt["complete"]:
        found.append(
            "The run stopped before its last shard. The same command resumes it; what is counted here is kept."
        )
    counted = receipt["ok"] + receipt["empty"] + receipt["errors"]
    if receipt["items_in"] != counted + receipt["items_pending"]:
        found.append("The receipt does not add up: items in is not ok + empty + errors + not yet.")
    for part, reason in stats.unreadable:
        found.append(join("A part could not be read: ", foreign(part), ": ", foreign(reason)))
    if stats.sampled:
        found.append(
            f"Histograms and lists are of {number(stats.parts_read)} of {number(stats.parts)} parts, evenly spaced "
            f"({number(stats.rows)} rows). The account and the error counts are of the whole table."
        )
    elif not stats.unreadable and stats.rows != counted:
        found.append(f"The parts hold {number(stats.rows)} rows, the receipt says {number(counted)}.")
    return join(*(element("p", text, class_="notice", role="note") for text in found))


def headline(receipt: dict) -> Html:
    """The four numbers, and the account that must add up."""
    r = receipt
    this_run = f"{number(r['shards_this_run'])} of {number(r['shards'])} shards in this run"
    wer, wer_note = "–", "the input has no references"
    if r["wer"] is not None:
        wer, wer_note = percent(r["wer"]), f"over {number(r['reference_words'])} reference words"
    cards = element(
        "div",
        card("Items", rounded(r["items_in"]), f"{percent(r['error_rate'])} errors"),
        card("Audio", audio(r["hours_in"]), this_run),
        card(
            "Speed, end to end",
            f"{number(r['rtfx_end_to_end'], 0 if r['rtfx_end_to_end'] >= 10 else 1)}×",
            f"RTFx; {audio(r['hours_this_run'])} in {span(r['wall_s'])}",
        ),
        card("Word error rate", wer, wer_note),
        class_="cards",
    )
    shares = [("ok", r["ok"], "ok"), ("empty", r["empty"], "empty"), ("errors", r["errors"], "error")]
    if r["items_pending"]:
        shares.append(("not yet", r["items_pending"], "idle"))
    legend = [element("li", f"{name} {number(count)}", class_=css) for name, count, css in shares]
    account = " + ".join(f"{number(count)} {name}" for name, count, _ in shares)
    balance = element(
        "div",
        element("p", f"{number(r['items_in'])} items in = {account}"),
        element(
            "p",
            f"{number(r['hours_in'], 3)} hours in = {number(r['hours_done'], 3)} done "
            f"+ {number(r['hours_lost'], 3)} lost",
        ),
        share_bar("Items by status", shares) if any(count for _, count, _ in shares) else "",
        element("ul", *legend, class_="legend"),
        class_="card balance",
    )
    return join(element("h2", "The account", class_="unseen"), cards, balance)


def card(label: str, value: str, note: str) -> Html:
    return element(
        "div",
        element("div", label, class_="label"),
        element("div", value, class_="value"),
        element("div", note, class_="note"),
        class_="card",
    )


def audio(hours: float) -> str:
    """Hours of audio; a length of time if under an hour."""
    return f"{rounded(hours, 2 if hours < 1000 else 0)} h" if hours >= 1 else span(hours * 3600)


def time_section(receipt: dict, throughput: Sequence[tuple[float, float]]) -> Html:
    return join(
        element("h2", "Where the time went"),
        stage_figure(receipt),
        element("div", *throughput_figures(receipt, throughput), class_="pair below"),
    )


def stage_figure(receipt: dict) -> Html:
    """Seconds per stage as a waterfall, with the share of their time that the model actors were idle."""
    stages = [(STAGE_NAMES.get(s, s), t, "" if s == "model" else "other") for s, t in receipt["stage_seconds"].items()]
    idle = receipt["model_idle_share"]
    if not any(seconds for _, seconds, _ in stages):
        return figure("Stages", "This run measured no work.")
    work = span(sum(seconds for _, seconds, _ in stages))
    caption = f"{work} of work in {span(receipt['wall_s'])}, summed over actors that work side by side."
    text = ", ".join(f"{name} {span(seconds)}" for name, seconds, _ in stages)
    chart = [waterfall_chart("Seconds per stage", text, stages)]
    if idle is not None:
        shares = [("busy", 1 - idle, "busy"), ("idle", idle, "idle")]
        names = [element("li", f"{name} {percent(share)}", class_=css) for name, share, css in shares]
        chart += [
            element("h4", "Time of the model actors"),
            share_bar("Time of the model actors", shares),
            element("ul", *names, class_="legend"),
        ]
    rows = [(name, number(seconds, 3)) for name, seconds, _ in stages]
    return figure("Stages", caption, join(*chart, numbers_table(("stage", "seconds"), rows, "Seconds per stage")))


def throughput_figures(receipt: dict, throughput: Sequence[tuple[float, float]]) -> list[Html]:
    """RTFx per interval, and the audio committed so far."""
    borders, audio_s = committed_over_time(throughput)
    if not borders.size:
        return [figure("Throughput", "This run committed no audio.")]
    rates = [float(rate) for rate in np.diff(audio_s) / np.diff(borders)]
    unit_s, unit = next(scale for scale in AUDIO_UNITS if audio_s[-1] >= scale[0] or scale[0] == 1)
    times = [f"{span(start)} to {span(stop)}" for start, stop in pairwise(borders)]
    columns = [Column(rate, f"{time}: RTFx {number(rate, 1)}") for time, rate in zip(times, rates, strict=True)]
    text = f"The whole run, start and end included: {number(receipt['rtfx_end_to_end'], 1)}."
    speed = column_chart("RTFx over time", text, columns, time_ticks(borders[-1]))
    rate_rows = [(time, number(rate, 1)) for time, rate in zip(times, rates, strict=True)]
    done = f"{audio(audio_s[-1] / 3600)} at the end."
    line = line_chart("Audio committed", done, borders, audio_s / unit_s)
    audio_rows = [(span(time), number(value / unit_s, 3)) for time, value in zip(borders, audio_s, strict=True)]
    return [
        figure(
            f"RTFx in intervals of {span(borders[1])}",
            text,
            element("div", speed, class_="plot-area"),
            numbers_table(("interval", "RTFx"), rate_rows, "RTFx over time"),
        ),
        figure(
            f"Audio committed by this run, {unit}",
            done,
            element("div", line, class_="plot-area"),
            numbers_table(("time", unit), audio_rows, "Audio committed"),
        ),
    ]


def open_section(location: str) -> Html:
    """One line for each of the usual readers: Python, quoted as Python and SQL require, so that it can be run."""
    files = f"{location.rstrip('/')}/*.parquet".replace("'", "''")
    query = f"SELECT id, status, text, confidence FROM '{files}' ORDER BY confidence LIMIT 20"
    ways = {
        "pyarrow": f"import pyarrow.dataset; table = pyarrow.dataset.dataset({location!r}).to_table()",
        "DuckDB": f"import duckdb; print(duckdb.sql({query!r}))",
        "pandas": f"import pandas; frame = pandas.read_parquet({location!r})",
    }
    lines = [
        join(element("h3", name), element("pre", element("code", code), tabindex=0)) for name, code in ways.items()
    ]
    if "://" in location:
        lines.append(element("p", "The reader needs the endpoint and the credentials of the job.", class_="soft"))
    return join(element("h2", "Open the table"), element("div", *lines, class_="card"))


def provenance_section(receipt: dict) -> Html:
    facts = {
        "Input": foreign(receipt["input"]),
        "Table": foreign(receipt["table"]),
        "Model": foreign(receipt["model"]),
        "Weights, sha256": element("span", receipt["weights_sha256"], class_="id"),
        "Precision, device": f"{receipt['dtype']} on {receipt['device']}",
        "Started": moment(receipt["started_at"]),
        "Finished": moment(receipt["finished_at"]),
        "Code version": f"parakeet-batch {parakeet_core.__version__}",
    }
    rows = [
        element("tr", element("th", name, scope="row", role="rowheader"), element("td", value, role="cell"), role="row")
        for name, value in facts.items()
    ]
    facts_table = element("table", element("tbody", *rows, role="rowgroup"), role="table", class_="facts")
    return join(element("h2", "Provenance"), element("div", facts_table, class_="sheet"))
