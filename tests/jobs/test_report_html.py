"""OUTPUT/report.html against real parts: the page is parsed, and its numbers are computed here a second time."""

import random
import re
import shutil
import statistics
import subprocess
import tracemalloc
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from report_samples import ERROR_MESSAGE, Page, error_row, ok_row, plausible_rows, receipt_of, write_parts

from jobs.report.page import write_report
from jobs.report.stats import MAX_PARTS, TEXT_SHOWN, committed_over_time, read_part
from jobs.storage.files import Storage
from parakeet_core.errors import ErrorKind

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "</td></table><script>document.title='owned'</script><img src=x onerror=alert(1)> & \"quoted\" \u202e \x07"
POINTS = [(0.0, 0.0), (4.0, 100.0), (8.0, 300.0), (16.0, 400.0)]


def report(output: Storage, rows: list[dict], points=POINTS, **values) -> Page:
    write_report(output, receipt_of(output, rows, **values), points)
    return Page(output.read_bytes("report.html").decode())


@pytest.fixture
def folder(tmp_path) -> Storage:
    return Storage(str(tmp_path))


def test_the_account_is_the_receipt(folder):
    rows = write_parts(folder, plausible_rows(300), plausible_rows(200, seed=2))
    page, receipt = report(folder, rows), receipt_of(folder, rows)
    account = "{items_in} items in = {ok} ok + {empty} empty + {errors} errors".format(**receipt)
    assert account in page.words
    hours = "{hours_in:.3f} hours in = {hours_done:.3f} done + {hours_lost:.3f} lost".format(**receipt)
    assert hours in page.words
    assert "5.1%" in page.words
    assert "over 12,345 reference words" in page.words
    assert page.tables["Seconds per stage"][3] == ["Model", "10.000"]
    assert "idle 25.0%" in page.words
    assert "does not add up" not in page.words
    assert "the receipt says" not in page.words


@pytest.mark.parametrize(
    ("title", "column", "statuses"),
    [
        ("Duration of items, seconds", "duration_s", ("ok", "empty")),
        ("Confidence", "confidence", ("ok",)),
        ("Characters per second", "chars_per_s", ("ok",)),
    ],
)
def test_histograms_count_what_is_in_the_table(folder, title, column, statuses):
    rows = write_parts(folder, plausible_rows(300), plausible_rows(200, seed=2))
    values = [row[column] for row in rows if row["status"] in statuses]
    counted = 0
    for label, count in report(folder, rows).tables[title]:
        numbers = [float(number) for number in re.findall(r"[\d.]+", label)]
        if label.startswith("below"):
            expected = sum(value < numbers[0] for value in values)
        elif label.endswith("and more"):
            expected = sum(value >= numbers[0] for value in values)
        else:
            low, high = numbers
            expected = sum(low <= value < high or value == high == 1.0 for value in values)
        assert int(count) == expected, label
        counted += int(count)
    assert counted == len(values)


def test_the_least_confident_and_the_fastest_and_slowest_are_listed_in_order(folder):
    rows = write_parts(folder, plausible_rows(300), plausible_rows(200, seed=2))
    page = report(folder, rows)
    ok = [row for row in rows if row["status"] == "ok"]
    least = sorted(ok, key=lambda row: row["confidence"])[:20]
    shown = page.tables["The least confident items"]
    assert [(row[2], row[3]) for row in shown] == [(row["id"], row["text"]) for row in least]
    assert [float(row[0]) for row in shown] == pytest.approx([row["confidence"] for row in least], abs=0.00051)
    fastest, slowest = (page.tables[name] for name in sorted(page.tables) if name.startswith(("Fastest", "Slowest")))
    rates = sorted(ok, key=lambda row: row["chars_per_s"])
    assert [row[2] for row in slowest] == [row["id"] for row in rates[:10]]
    assert [row[2] for row in fastest] == [row["id"] for row in rates[::-1][:10]]
    median = statistics.median(row["chars_per_s"] for row in ok)
    assert f"{float(re.search(r'median ([0-9.]+) ', page.words.split('Characters per second', 1)[1])[1]):.1f}" == (
        f"{median:.1f}"
    )


def test_far_out_rates_are_counted_by_tukeys_fences(folder):
    rates = [10.0 + n / 100 for n in range(400)] + [0.2, 0.4, 55.0]  # quartiles 11 and 13: fences near 5 and 19
    rows = write_parts(folder, [ok_row(n, chars_per_s=rate) for n, rate in enumerate(rates)])
    words = report(folder, rows).words
    assert re.search(r"\b2 items have less than (4\.\d+|5), far from the rest. 1 items have 19(\.\d+)? or more", words)


def test_errors_by_kind_have_a_count_and_an_example(folder):
    first = [error_row(0), error_row(1, message="second of its kind"), error_row(2, ErrorKind.TRUNCATED, "cut")]
    rows = write_parts(folder, first, [ok_row(3), error_row(4)])
    assert report(folder, rows).tables["Errors by kind"] == [
        ["not_audio", "3", "75.0%", "bad-00000.wav", ERROR_MESSAGE],
        ["truncated", "1", "25.0%", "bad-00002.wav", "cut"],
    ]


def test_throughput_is_the_slope_of_what_was_committed(folder):
    page = report(folder, write_parts(folder, [ok_row(0)]))
    # The three intervals of 16 / 3 s; between commits, audio counts as arriving evenly.
    at = [np.interp(16 / 3 * n, *zip(*POINTS, strict=True)) for n in range(4)]
    expected = [f"{(stop - start) / (16 / 3):,.1f}" for start, stop in pairwise(at)]
    assert [row[1] for row in page.tables["RTFx over time"]] == expected
    assert page.tables["Audio committed"][-1] == ["16.0 s", f"{400 / 60:.3f}"]


def test_many_commits_become_few_intervals_with_the_same_sum():
    points = [(n * 0.5, n * 7.0) for n in range(1, 100_000)]
    borders, audio_s = committed_over_time(points)
    assert len(borders) <= 60
    assert (borders[-1], audio_s[0], audio_s[-1]) == (*points[-1][:1], 0.0, points[-1][1])


def test_hostile_strings_stay_text(folder):
    hostile = ok_row(0, id=f"{HOSTILE}.wav", text=HOSTILE, confidence=0.01, chars_per_s=90.0)
    bad = error_row(1, message=HOSTILE, id=f"bad {HOSTILE}")
    rows = write_parts(folder, [hostile, bad, *(ok_row(n) for n in range(2, 9))])
    page = report(folder, rows, input=HOSTILE, model=HOSTILE, table=HOSTILE)
    visible = HOSTILE.replace("\x07", "\ufffd")
    assert page.tables["The least confident items"][0][2:] == [f"{visible}.wav", visible]
    assert page.tables["Errors by kind"][0][3:] == [f"bad {visible}", visible]
    assert not page.tags & {"script", "img", "link", "iframe", "object", "embed", "base", "form"}
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert "url(" not in page.source
    assert "@import" not in page.source
    assert "<script" not in page.source
    assert len(page.ids) == len(set(page.ids))


def test_the_policy_allows_the_style_sheet_and_nothing_else(folder):
    page = report(folder, write_parts(folder, [ok_row(0)]))
    policy = re.search(r'Policy" content="([^"]+)"', page.source)[1]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert page.source.index("Content-Security-Policy") < page.source.index("<style>")


def test_long_texts_are_clipped(folder):
    rows = write_parts(folder, [ok_row(0, text="word " * 30_000), error_row(1, message="m" * 50_000)])
    page = report(folder, rows)
    assert len(page.source) < 100_000
    text = page.tables["The least confident items"][0][3]
    assert len(text) == TEXT_SHOWN
    assert text.endswith("…")


def test_the_words_column_is_never_read(folder):
    rows = write_parts(folder, [ok_row(n) for n in range(50)])
    path = folder.path(f"transcripts/{folder.list_names('transcripts')[0]}")
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(n) for n in range(group.num_columns)]
    with open(path, "r+b") as file:
        for column in columns:
            if column.path_in_schema.startswith("words"):
                file.seek(min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset))
                file.write(b"\xff" * column.total_compressed_size)
    with pytest.raises((OSError, pa.ArrowException)):
        pq.read_table(path)
    page = report(folder, rows)
    assert "could not be read" not in page.words
    assert len(page.tables["The least confident items"]) == 20


def test_no_item_at_all(folder):
    page = report(folder, [], points=[], wer=None, reference_words=0, model_idle_share=None, rtfx_end_to_end=0.0,
                  stage_seconds=dict.fromkeys(("storage", "decode", "features", "model", "write"), 0.0))  # fmt: skip
    assert "0 items in = 0 ok + 0 empty + 0 errors" in page.words
    assert "No item was transcribed." in page.words
    assert "This run committed no audio." in page.words
    assert "This run measured no work." in page.words
    assert "the input has no references" in page.words


def test_everything_an_error(folder):
    page = report(folder, write_parts(folder, [error_row(n) for n in range(30)]), points=[(0.0, 0.0), (2.0, 0.0)])
    assert page.tables["Errors by kind"][0][:3] == ["not_audio", "30", "100.0%"]
    assert "No item was transcribed." in page.words
    assert "No item has a text." in page.words


def test_everything_empty(folder):
    row = {"status": "empty", "text": "", "confidence": None, "chars_per_s": 0.0, "words": []}
    page = report(folder, write_parts(folder, [ok_row(n) | row for n in range(3)]))
    assert sum(int(count) for _, count in page.tables["Duration of items, seconds"]) == 3
    assert "No item has a text." in page.words


def test_a_run_that_was_stopped_adds_up_with_what_is_left(folder):
    rows = write_parts(folder, plausible_rows(40))
    page = report(folder, rows, complete=False, items_in=100, items_pending=60)
    assert re.search(r"100 items in = \d+ ok \+ \d+ empty \+ \d+ errors \+ 60 not yet", page.words)
    assert "does not add up" not in page.words
    assert "the receipt says" not in page.words
    assert "not yet 60" in page.words
    assert "not yet 60.0%" in page.words


@pytest.mark.parametrize(
    "values", [{}, {"confidence": 1.0}, {"confidence": 0.0, "chars_per_s": 0.0}, {"duration_s": 90_000.0}]
)
def test_one_item(folder, values):
    row = ok_row(0, **values)
    page = report(folder, write_parts(folder, [row]), points=[(1.5, 4.0)])
    for title in ("Duration of items, seconds", "Confidence", "Characters per second"):
        assert sum(int(count) for _, count in page.tables[title]) == 1
    assert page.tables["The least confident items"][0][2] == row["id"]
    assert "All items have the same speech rate." in page.words
    assert "far from the rest" not in page.words


def test_numbers_that_are_missing_or_not_finite_are_left_out(folder):
    missing = {"duration_s": None, "confidence": None, "chars_per_s": None}
    nan = {"confidence": float("nan"), "chars_per_s": float("inf")}
    rows = [ok_row(0, **missing), ok_row(1, **nan), ok_row(2)]
    write_parts(folder, rows)
    page = report(folder, [row | {"duration_s": 4.0} for row in rows])
    assert [row[2] for row in page.tables["The least confident items"]] == [rows[2]["id"]]
    assert "nan" not in page.words.lower().split()


def test_huge_counts_are_readable(folder):
    huge = {"items_in": 12_345_678_901, "ok": 12_345_678_000, "empty": 900, "errors": 1, "error_rate": 8e-11,
            "hours_in": 34_567_890.5, "hours_done": 34_567_890.5, "hours_lost": 0.0, "hours_this_run": 34_567_890.5,
            "rtfx_end_to_end": 98_765.4, "wall_s": 1_260_000.0}  # fmt: skip
    page = report(folder, write_parts(folder, [ok_row(0)]), **huge)
    assert "12,345,678,901 items in = 12,345,678,000 ok + 900 empty + 1 errors" in page.words
    assert "12.3 billion" in page.words
    assert "34.6 million h in 350 h 00 min" in page.words
    assert "<0.1% errors" in page.words
    assert "The parts hold 1 rows, the receipt says 12,345,678,901." in page.words


def test_a_big_table_is_sampled_and_the_page_says_so(folder):
    parts = [[ok_row(n, duration_s=1.0 + n % 7)] for n in range(MAX_PARTS + 50)]
    page = report(folder, write_parts(folder, *parts))
    assert f"of {MAX_PARTS} of {MAX_PARTS + 50} parts, evenly spaced" in page.words
    assert sum(int(count) for _, count in page.tables["Duration of items, seconds"]) == MAX_PARTS


def test_a_large_file_is_read_row_group_by_row_group(folder):
    rows = [ok_row(n, text=random.Random(n).randbytes(1000).hex()) for n in range(2_000)]
    write_parts(folder, rows)
    name = folder.list_names("transcripts")[0]
    path = folder.path(f"transcripts/{name}")
    pq.write_table(pq.read_table(path).drop_columns(["words"]), path, row_group_size=100)
    tracemalloc.start()
    try:
        stats = read_part(folder, name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert stats.rows == len(rows)
    assert peak < folder.size(f"transcripts/{name}") / 2


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"PAR1" * 100])
def test_a_damaged_part_is_named_and_the_others_are_counted(folder, damage):
    rows = write_parts(folder, [ok_row(0)], [ok_row(1)], [ok_row(2)])
    name = f"transcripts/{folder.list_names('transcripts')[1]}"
    folder.write_atomic(name, damage(folder.read_bytes(name)))
    page = report(folder, rows)
    assert name.split("/")[1] in page.words
    assert sum(int(count) for _, count in page.tables["Confidence"]) == 2


def test_a_file_of_another_schema_is_named(folder):
    rows = write_parts(folder, [ok_row(0)])
    pq.write_table(pa.table({"id": ["x"], "text": ["y"]}), folder.path("transcripts/other.parquet"))
    assert "no column chars_per_s, confidence" in report(folder, rows).words


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"complete": False}, "stopped before the end"),
        ({"max_error_rate": 0.01}, "over the error budget of 1.0%"),
        ({"max_error_rate": 0.5}, "complete"),
        ({"items_in": 99}, "The receipt does not add up"),
    ],
)
def test_the_state_of_the_job_is_said_at_the_top(folder, values, expected):
    page = report(folder, write_parts(folder, [ok_row(n) for n in range(9)], [error_row(9)]), **values)
    assert expected in page.words.split("Where the time went")[0]


def test_the_lines_that_open_the_table_work(tmp_path):
    output = Storage(str(tmp_path / 'it\'s a 50% "folder"'))
    rows = write_parts(output, plausible_rows(40), plausible_rows(30, seed=2))
    codes = report(output, rows).codes
    assert len(codes) == 3
    for code, module in zip(codes, ("pyarrow", "duckdb", "pandas"), strict=True):
        assert code.startswith(f"import {module}")
        names = {}
        exec(code.replace("print(", "found = ("), names)  # noqa: S102 - the page's own lines are what is tested
        found = names.get("table", names.get("found", names.get("frame")))
        assert len(found) == (20 if module == "duckdb" else len(rows))


def test_the_report_of_a_table_on_s3(s3_server):
    output = Storage(f"s3://{s3_server.bucket()}/out", s3_server.options)
    rows = write_parts(output, plausible_rows(60), plausible_rows(60, seed=2))
    page = report(output, rows)
    assert len(page.tables["The least confident items"]) == 20
    assert "could not be read" not in page.words
    assert "endpoint" in page.words


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_renders_the_page_and_runs_nothing_of_it(folder, tmp_path):
    hostile = ok_row(999, id=HOSTILE, text=HOSTILE, confidence=0.01)
    rows = write_parts(folder, [hostile, *plausible_rows(200)])
    report(folder, rows)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --dump-dom"
    command = [
        CHROMIUM,
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"file://{folder.path('report.html')}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    dom = Page(done.stdout)
    assert len(dom.tables["The least confident items"]) == 20
    assert dom.source.count("<rect") > 100
    assert "script" not in dom.tags
    title = re.search("<title>(.*?)</title>", dom.source)[1]
    assert title == "Transcription report: in/"
