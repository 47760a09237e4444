"""What a running and a finished job report: lines, sums, exit status, event files without credentials."""

import io
import json
import re

import pytest

from jobs.report.progress import ProgressDisplay, clock, hours
from jobs.report.receipt import EventLog, Receipt, merge_tallies, summarise
from jobs.storage.connections import StorageOptions
from jobs.storage.files import Storage
from jobs.table.schema import PartFacts

FACTS = PartFacts(
    rows=10, ok=8, empty=1, errors=1, audio_s=90.0, lost_s=10.0, word_errors=5, reference_words=50,
    errors_by_kind={"truncated": 1},
)  # fmt: skip
CLOCK = {
    "storage_s": 0.1,
    "decode_s": 0.2,
    "features_s": 0.3,
    "model_s": 4.0,
    "write_s": 0.1,
    "feature_worker": "a:1",
    "model_worker": "a:1",
    "feature_worker_again": False,
    "model_worker_again": False,
    "not_compiled": "",
}


def make_receipt(**changes) -> Receipt:
    values = {
        "items_in": 10, "items_pending": 0, "ok": 8, "empty": 1, "errors": 1, "error_rate": 0.1,
        "errors_by_kind": {"truncated": 1},
        "hours_in": 1.0, "hours_done": 0.9, "hours_lost": 0.1, "hours_this_run": 0.9, "rtfx_end_to_end": 100.0,
        "wall_s": 32.4, "preparation_s": 2.0, "wer": 0.1, "reference_words": 50, "stage_seconds": {"model": 4.0},
        "model_idle_share": 0.2,
        "shards": 2, "shards_done": 2, "shards_this_run": 2, "complete": True, "max_error_rate": 0.01, "model": "m",
        "weights_sha256": "0", "dtype": "float32", "device": "cpu", "input": "in", "table": "out/transcripts",
        "fingerprint": "0", "accounted": {}, "started_at": "", "finished_at": "", "version": "0",
    }  # fmt: skip
    return Receipt(**values | changes)


def test_line_accounts_for_earlier_runs_and_names_the_bottleneck():
    display = ProgressDisplay(total_s=400.0, done_s=200.0, stream=io.StringIO())
    with display:
        display.update(FACTS, CLOCK)
        line = display.line()
    assert line.startswith("300 s of about 0.11 h")
    assert "ok 8 empty 1 errors 1" in line
    assert "bottleneck model" in line
    assert re.search(r"left \d:\d\d:\d\d", line)


def test_model_is_idle_while_its_workers_are_there_only(monkeypatch):
    """One is there for 100 s; one is lost after 20 s, and its replacement comes at 60 s: 100 s of work in 160 s."""
    now = [1000.0]
    monkeypatch.setattr("jobs.report.progress.time.monotonic", lambda: now[0])
    display = ProgressDisplay(1e6, 0.0, io.StringIO())
    for at_s, worker in ((20, "a:1"), (20, "b:1"), (80, "b:2"), (100, "a:1"), (100, "b:2")):
        now[0] = 1000.0 + at_s
        display.update(FACTS, CLOCK | {"model_worker": worker, "model_s": 20.0})
    assert display.model_idle_share() == pytest.approx(1 - 100 / (100 + 20 + 40), abs=0.001)


def test_tallies_add_up():
    first = ProgressDisplay(1.0, 0.0, io.StringIO())
    first.update(FACTS, CLOCK)
    first.update(FACTS, CLOCK)
    total = merge_tallies(first.tally, first.tally)
    assert (total.shards, total.rows, total.errors_by_kind, total.stage_s["model"]) == (4, 40, {"truncated": 4}, 16.0)


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"error_rate": 0.0, "errors": 0}, 0, "open    duckdb"),
        ({}, 3, "OVER THE ERROR BUDGET: 10.00%"),
        ({"complete": False, "items_in": 15, "items_pending": 5}, 1, "STOPPED before the end: run it again"),
    ],
)
def test_exit_status_and_summary(changes, status, said):
    receipt = make_receipt(**changes)
    assert receipt.exit_code == status
    summary = summarise(receipt, "run it again")
    assert said in summary
    assert f"items   {receipt.items_in} in = 8 ok + 1 empty + {receipt.errors} errors" in summary
    assert ("+ 5 not yet" in summary) == (receipt.items_pending == 5)


def test_events_are_whole_json_lines_without_credentials(tmp_path):
    log = EventLog(Storage(str(tmp_path), StorageOptions(key="CANARYKEY123", secret="CANARYSECRET456")))
    log.add("start", note="key CANARYKEY123 and CANARYSECRET456 at https://user:pw@host/x?sig=1")
    log.flush()
    log.add("end")
    log.flush()
    files = sorted((tmp_path / "events").iterdir())
    text = "".join(file.read_text() for file in files)
    assert [json.loads(line)["event"] for line in text.splitlines()] == ["start", "end"]
    assert not re.search("CANARY|user:pw|sig=1", text)


def test_a_worker_that_was_started_again_is_one_retry(tmp_path):
    log = EventLog(Storage(str(tmp_path)))
    for again in (False, True, True):
        log.add_shard(CLOCK | {"feature_worker_again": again, "model_worker_again": again})
    log.flush()
    (file,) = (tmp_path / "events").iterdir()
    events = [json.loads(line)["event"] for line in file.read_text().splitlines()]
    assert events == ["shard", "retry", "shard", "shard"]


def test_durations_in_words():
    assert (hours(41.0), hours(9720.0), clock(3723.0), clock(None)) == ("41 s", "2.70 h", "1:02:03", "unknown")
