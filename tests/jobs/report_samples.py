"""Tables to report about, the receipts of jobs that wrote them, and a parser of the page that stands for a reader."""

import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa

from jobs.storage.files import Storage
from jobs.table.parts import commit_part
from jobs.table.schema import TRANSCRIPT_SCHEMA
from parakeet_core.errors import ErrorKind

VOID = {"meta", "br", "hr", "img", "link", "input"}  # elements without an end tag
ERROR_MESSAGE = "a.wav: found 3c 21 <b>, expected audio; upload it again"


class Page(HTMLParser):
    """A page as lists: tables by caption, code, ids, tags, attributes, visible text. Fails on tags that do not pair."""

    def __init__(self, source: str):
        super().__init__()
        self.source, self.open = source, []
        self.tables: dict[str, list[list[str]]] = {}
        self.codes, self.ids, self.text, self.attributes, self.tags = [], [], [], [], set()
        self._rows, self._caption = [], ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows, self._caption = [], ""
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag == "code":
            self.codes.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self._caption] = self._rows[1:]

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self._rows[-1][-1] += data
        elif "caption" in self.open:
            self._caption += data
        elif "code" in self.open:
            self.codes[-1] += data

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


def ok_row(n: int, **values) -> dict:
    text = values.pop("text", f"text number {n}")
    row = {"id": f"clip-{n:05d}.wav", "source": f"clip-{n:05d}.wav", "status": "ok", "text": text, "duration_s": 4.0}
    words = [{"word": word, "start_s": 0.0, "end_s": 0.1, "confidence": 0.5} for word in text.split()]
    return row | {"confidence": 0.9, "chars_per_s": 12.0, "words": words} | values


def error_row(n: int, kind: ErrorKind = ErrorKind.NOT_AUDIO, message: str = ERROR_MESSAGE, **values) -> dict:
    row = {"id": f"bad-{n:05d}.wav", "source": f"bad-{n:05d}.wav", "status": "error"}
    return row | {"error_kind": kind, "error_message": message} | values


def plausible_rows(count: int, seed: int = 1) -> list[dict]:
    """Mostly ok, some empty, some errors; numbers with as many digits as the job writes."""
    random = np.random.default_rng(seed)
    rows = []
    for n in range(1000 * seed, 1000 * seed + count):
        duration_s = round(float(random.gamma(3.0, 3.0)) + 0.4, 6)
        dice = random.random()
        if dice < 0.03:
            rows.append(error_row(n, list(ErrorKind)[n % 4], f"{n}: message", duration_s=duration_s))
        elif dice < 0.06:
            rows.append(ok_row(n, status="empty", text="", duration_s=duration_s, confidence=None, chars_per_s=0.0))
        else:
            confidence = round(float(np.clip(1 - random.gamma(1.5, 0.03), 0, 1)), 4)
            rate = round(float(random.normal(14, 2)) if dice < 0.97 else float(random.uniform(0.1, 60)), 3)
            rows.append(ok_row(n, duration_s=duration_s, confidence=confidence, chars_per_s=rate))
    return rows


def write_parts(output: Storage, *parts: list[dict]) -> list[dict]:
    for n, rows in enumerate(parts):
        table = pa.Table.from_pylist(rows, TRANSCRIPT_SCHEMA)
        commit_part(output, f"transcripts/part-0000-{n:06d}-0123456789.parquet", table, {})
    return [row for rows in parts for row in rows]


def receipt_of(output: Storage, rows: list[dict], **values) -> dict:
    """The receipt that the job would have written about these rows."""
    by_status = {status: [row for row in rows if row["status"] == status] for status in ("ok", "empty", "error")}
    kinds = [str(row["error_kind"]) for row in by_status["error"]]
    done_s = sum(row["duration_s"] for row in by_status["ok"] + by_status["empty"])
    lost_s = sum(row.get("duration_s") or 0.0 for row in by_status["error"])
    receipt = {
        "items_in": len(rows), "items_pending": 0,
        "ok": len(by_status["ok"]), "empty": len(by_status["empty"]), "errors": len(kinds),
        "error_rate": len(kinds) / len(rows) if rows else 0.0,
        "errors_by_kind": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "hours_in": (done_s + lost_s) / 3600, "hours_done": done_s / 3600, "hours_lost": lost_s / 3600,
        "hours_this_run": done_s / 3600, "rtfx_end_to_end": done_s / 20, "wall_s": 20.0,
        "wer": 0.0512, "reference_words": 12_345,
        "stage_seconds": {"storage": 1.25, "decode": 2.5, "features": 5.0, "model": 10.0, "write": 0.25},
        "model_idle_share": 0.25, "shards": 2, "shards_this_run": 2, "complete": True,
        "model": "tiny-en", "weights_sha256": "ab" * 32, "dtype": "float32", "device": "cpu",
        "input": "in/", "table": output.source("transcripts"),
        "started_at": "2026-03-02T08:11:04+00:00", "finished_at": "2026-03-02T08:11:24+00:00",
    }  # fmt: skip
    return receipt | values
