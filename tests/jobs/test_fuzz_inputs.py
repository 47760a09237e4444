"""Damaged manifests, tars and Parquet files: rows that Arrow takes, one per item, or a refusal, within limits."""

import gzip
import io
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz_sandbox import damaged_bytes, damaged_tree
from hypothesis import strategies as st
from job_samples import audio_bytes, jsonl, tar_bytes

from jobs.inputs.plan_rows import PLAN_SCHEMA
from jobs.inputs.scan import InputOptions, scan_input
from jobs.reading.items import read_items
from jobs.stages import ITEM_FIELDS
from jobs.storage.files import Storage
from parakeet_core.errors import InputError

RECORDS = [
    {"audio_filepath": "a.wav", "duration": 0.2, "text": "please hold", "speaker": {"id": 7, "tags": ["x", None]}},
    {"audio_filepath": "a.wav", "offset": 0.1, "duration": 0.1, "channel": 0, "id": "segment"},
    {"audio_filepath": "missing/é.wav", "lang": "en"},
]


def read_folder(name: str, content: bytes) -> int:
    """Do everything that planning and reading do with one input file; returns the number of items."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.wav").write_bytes(audio_bytes(0.2))
        Path(folder, name).write_bytes(content)
        storage = Storage(folder)
        chosen = {"jsonl": "manifest", "gz": "manifest", "tar": "webdataset", "parquet": "parquet"}
        options = InputOptions(f"{folder}/{name}", format=chosen[name.rpartition(".")[2]], storage=storage.options)
        with scan_input(options) as scan:
            rows = pa.Table.from_batches(scan.batches(), PLAN_SCHEMA)
        items = list(read_items(rows, storage.options))
    for field in ITEM_FIELDS[:8]:  # what an item carries
        pa.array([getattr(item, field.name) for item in items], field.type)
    for item in items:
        assert isinstance(item.payload, bytes | InputError), item
        if isinstance(item.payload, InputError):
            item.payload.message.encode()
            assert len(item.payload.message) < 20_000
        if item.extra is not None:
            json.loads(item.extra, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    if not name.endswith((".jsonl", ".gz")):  # for manifests, planning makes ids unique
        assert len({item.id for item in items}) == len(items)
    return len(items)


def manifests() -> st.SearchStrategy[bytes]:
    lines = damaged_tree(RECORDS).map(lambda records: "\n".join(json.dumps(record) for record in records).encode())
    return st.one_of(lines, damaged_bytes([jsonl(*RECORDS)]))


def tars() -> list[bytes]:
    members = {"a.wav": audio_bytes(0.1), "a.json": b'{"text": "please hold"}', "b" * 150 + ".flac": b"q" * 600}
    members |= {"c.wav": audio_bytes(0.1), "c.txt": b"thank you"}
    plain = tar_bytes(members)
    return [plain, gzip.compress(plain, mtime=0)]


def parquets() -> list[bytes]:
    files = []
    for compression in ("none", "zstd"):
        rows = [
            {"audio": {"bytes": audio_bytes(0.02), "path": f"{n}.wav"}, "text": f"number {n}", "score": n / 7}
            for n in range(20)
        ]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=12, compression=compression)
        files.append(buffer.getvalue())
    return files


TARGETS = {  # name -> strategy of the arguments of `read_folder`, built when it is needed
    "manifest": lambda: st.tuples(st.just("items.jsonl"), manifests()),
    "manifest.gz": lambda: st.tuples(
        st.just("items.jsonl.gz"), damaged_bytes([gzip.compress(jsonl(*RECORDS), mtime=0)])
    ),
    "tar": lambda: st.tuples(st.just("items.tar"), damaged_bytes(tars())),
    "parquet": lambda: st.tuples(st.just("items.parquet"), damaged_bytes(parquets())),
}


def test_what_is_not_damaged_is_read():
    assert read_folder("items.jsonl", jsonl(*RECORDS)) == 3
    assert {read_folder("items.tar", content) for content in tars()} == {3}
    assert {read_folder("items.parquet", content) for content in parquets()} == {20}


@pytest.mark.parametrize("target", list(TARGETS))
def test_damage_gives_rows_or_a_refusal(sandbox, target):
    assert sandbox.fuzz(read_folder, TARGETS[target]())["result"]


@pytest.mark.slow
@pytest.mark.parametrize("target", list(TARGETS))
def test_damage_for_minutes(sandbox, target):
    print(sandbox.fuzz_long(read_folder, TARGETS[target]()))
