"""jobs/reading, jobs/sources: plan rows -> one item each, with bytes or with the error that becomes its row."""

import contextlib
import gzip
import http.server
import io
import json
import os
import re
import socket
import tarfile
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from fault_proxy import DENIED, FaultProxy
from hypothesis import given, settings
from hypothesis import strategies as st
from job_samples import audio_bytes, jsonl, tar_bytes

import jobs.sources.reader
from jobs.inputs.plan_rows import PLAN_SCHEMA, plan_batch
from jobs.inputs.scan import InputOptions, scan_input
from jobs.reading.containers import read_row_group, read_tar
from jobs.reading.items import ReadItem, ReadLimits, SourceFile, _fetch_ahead, read_items
from jobs.sources.guarded_http import fetch_http
from jobs.sources.reader import SourceReader
from jobs.storage.files import Storage
from parakeet_core.audio import load_audio
from parakeet_core.errors import CredentialsError, ErrorKind, InputError


def read(storage: Storage, name: str = "", **options) -> list[ReadItem]:
    url = f"{storage.url}/{name}" if name else storage.url
    scan = scan_input(InputOptions(url, storage=storage.options, **options))
    return list(read_items(pa.Table.from_batches(scan.batches(), PLAN_SCHEMA), storage.options))


def kinds(items: list[ReadItem]) -> dict[str, str]:
    return {i.id: str(i.payload.kind) if isinstance(i.payload, InputError) else type(i.payload).__name__ for i in items}


def test_files_come_with_their_bytes_in_row_order(storage):
    contents = {f"{n:03d}.wav": audio_bytes(0.01 * n) for n in range(60)}
    for name, data in contents.items():
        storage.write_atomic(name, data)
    scan = scan_input(InputOptions(storage.url, storage=storage.options))
    rows = pa.Table.from_batches(scan.batches(), PLAN_SCHEMA).sort_by("id")
    for limits in (ReadLimits(), ReadLimits(threads=2, bytes_ahead=1)):
        items = list(read_items(rows, storage.options, limits))
        assert [item.id for item in items] == sorted(contents)
        assert {item.id: item.payload for item in items} == contents


def test_segments_share_one_fetch(storage):
    data = audio_bytes(3.0)
    storage.write_atomic("a.wav", data)
    records = [{"audio_filepath": "a.wav", "offset": n / 10, "duration": 0.1} for n in range(20)]
    storage.write_atomic("m.jsonl", jsonl(*records))
    items = read(storage, "m.jsonl")
    assert [item.offset_s for item in items] == [n / 10 for n in range(20)]
    assert all(item.payload is items[0].payload for item in items)
    assert items[0].payload == data


def test_segments_of_a_large_source_are_read_by_seeking(storage, monkeypatch):
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000 * 300).astype(np.float32)
    soundfile.write(buffer := io.BytesIO(), noise, 16_000, format="WAV", subtype="PCM_16")
    storage.write_atomic("long.wav", buffer.getvalue())
    records = [{"audio_filepath": "long.wav", "offset": start, "duration": 1.0} for start in (10.0, 250.0)]
    storage.write_atomic("m.jsonl", jsonl(*records, {"audio_filepath": "long.wav", "offset": 400.0, "duration": 1.0}))
    monkeypatch.setattr(jobs.sources.reader, "WHOLE_BYTES", 1 << 20)
    items = read(storage, "m.jsonl")
    assert [type(item.payload) for item in items] == [SourceFile] * 3
    for item in items[:2]:
        waveform = load_audio(item.payload, offset_s=item.offset_s, duration_s=item.duration_s).waveform
        start = int(item.offset_s * 16_000)
        assert np.abs(waveform - noise[start : start + 16_000]).max() < 1e-4
    with pytest.raises(InputError) as caught:
        load_audio(items[2].payload, offset_s=400.0, duration_s=1.0)
    assert caught.value.kind == ErrorKind.BAD_SEGMENT


def test_a_source_file_remembers_the_failure_that_a_decoder_cannot_pass_on(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    file = SourceFile(str(path), Storage(str(tmp_path)).options)
    os.close(file._file.fileno())  # a real failing read
    with pytest.raises(InputError) as caught:
        file.read(3)
    assert caught.value.kind == ErrorKind.STORAGE
    with pytest.raises(InputError):
        file.raise_error()
    file._file.close = lambda: None  # its descriptor is already closed


def test_missing_empty_and_rejected_files_are_items(storage):
    storage.write_atomic("empty.wav", b"")
    storage.write_atomic("text.wav", b"this is text")
    lines = [
        {"audio_filepath": "empty.wav"},
        {"audio_filepath": "none.wav"},
        "not json",
        {"audio_filepath": "text.wav"},
    ]
    storage.write_atomic("m.jsonl", jsonl(*lines))
    items = read(storage, "m.jsonl")
    found = {name.partition("-")[0]: kind for name, kind in kinds(items).items()}
    assert found == {
        "empty.wav": "bytes",
        "none.wav": "missing_object",
        "m.jsonl#bad": "bad_record",
        "text.wav": "bytes",
    }


def test_what_is_not_a_regular_file_is_a_bad_record_and_is_not_opened(tmp_path):
    (tmp_path / "a.wav").write_bytes(audio_bytes(0.1))
    (tmp_path / "link.wav").symlink_to("a.wav")
    (tmp_path / "self.wav").symlink_to("self.wav")
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.wav"))
        names = ["a.wav", "link.wav", "self.wav", "folder.wav", "pipe.wav", "socket.wav", "/dev/zero", "none.wav"]
        (tmp_path / "m.jsonl").write_bytes(jsonl(*({"audio_filepath": name} for name in names)))
        items = {item.id: item for item in read(Storage(str(tmp_path)), "m.jsonl")}
    bad = dict.fromkeys(["folder.wav", "pipe.wav", "socket.wav", "/dev/zero"], "bad_record")
    good = {"a.wav": "bytes", "link.wav": "bytes"}
    assert kinds(list(items.values())) == good | bad | {"self.wav": "storage", "none.wav": "missing_object"}
    assert items["/dev/zero"].payload.message.startswith("/dev/zero: this is a device; expected a regular file")
    reader = SourceReader()
    for name in bad:
        path = os.path.join(tmp_path, name)
        for opening in (reader.open, reader.stream, lambda path: reader.fetch_or_open(path, 1 << 40)):
            with pytest.raises(InputError) as caught:
                opening(path)
            assert caught.value.kind == ErrorKind.BAD_RECORD


def test_containers_that_are_pipes_are_one_error(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    assert kinds(read(Storage(str(tmp_path)))) == {"x.tar#rest": "bad_record"}


def test_urls_that_no_storage_can_open_are_items(s3_server):
    """Also in containers, and where planning has not refused them. A worker may lack a package that the driver has:
    installing it is the remedy, so this is an error of kind `storage`, which `--retry-errors` tries again."""
    names = ["s3://bucketonly", "s3://", "nosuch://bucket/a.wav"]
    for layout in ("file", "tar", "parquet"):
        columns = {"id": [f"{n}#0" for n in names], "source": names, "row_group": [0] * 3, "items": [1] * 3}
        rows = pa.Table.from_batches([plan_batch(layout, columns | {"size_bytes": [1 << 40] * 3})])
        items = list(read_items(rows, s3_server.options))
        assert len(items) == 3
        assert [kind for _, kind in sorted(kinds(items).items())] == ["storage", "bad_record", "bad_record"]
        assert all(item.source in item.payload.message for item in items)


def test_forbidden_file_is_an_item(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"1")
    (tmp_path / "a.wav").chmod(0)
    if os.access(tmp_path / "a.wav", os.R_OK):
        pytest.skip("this user may read everything")
    assert kinds(read(Storage(str(tmp_path)))) == {"a.wav": "forbidden"}


@pytest.mark.parametrize("size_bytes", [1, None])  # requested by GET, or first by HEAD, whose answer gives no reason
@pytest.mark.parametrize("layout", ["file", "tar", "parquet"])
def test_credentials_that_are_not_taken_stop_the_reading_and_become_no_items(layout, size_bytes, s3_server):
    storage = Storage(f"s3://{s3_server.bucket()}", s3_server.options)
    storage.write_atomic("a", b"1")
    columns = {"id": ["a#0"], "source": [storage.source("a")], "row_group": [0], "items": [1]}
    rows = pa.Table.from_batches([plan_batch(layout, columns | {"size_bytes": [size_bytes]})])
    wrong = type(storage.options)(s3_server.endpoint_url, "us-east-1", s3_server.key, "wrong-secret")
    with pytest.raises(CredentialsError, match="a: the storage refuses access .*give valid ones"):
        list(read_items(rows, wrong))
    with FaultProxy(s3_server.endpoint_url) as proxy:
        proxy.plan = lambda _: "expired_token"
        expired = type(storage.options)(proxy.endpoint_url, "us-east-1", s3_server.key, s3_server.secret)
        with pytest.raises(CredentialsError, match="ExpiredToken"):
            list(read_items(rows, expired))


def test_credentials_that_expire_under_a_decoder_are_no_truncated_audio(s3_server):
    """C code that reads a file sees its end, whatever went wrong."""
    storage = Storage(f"s3://{s3_server.bucket()}", s3_server.options)
    storage.write_atomic("a.wav", audio_bytes(120.0))  # blocks of 1 MiB
    with FaultProxy(s3_server.endpoint_url) as proxy:
        options = type(storage.options)(proxy.endpoint_url, "us-east-1", s3_server.key, s3_server.secret)
        file = SourceReader(options).open(storage.source("a.wav"))
        file.read(1)
        proxy.plan = lambda _: "expired_token"
        with pytest.raises((CredentialsError, InputError)):
            load_audio(file)
        with pytest.raises(CredentialsError, match="ExpiredToken"):
            file.raise_error()


@pytest.mark.parametrize("fault", [DENIED, "bad_signature"])
@pytest.mark.parametrize("size_bytes", [1, None])
def test_one_object_that_is_refused_is_an_item(fault, size_bytes, s3_server):
    storage = Storage(f"s3://{s3_server.bucket()}", s3_server.options)
    names = ["a.wav", "b.wav"]
    for name in names:
        storage.write_atomic(name, b"1")
    columns = {"id": names, "source": [storage.source(name) for name in names], "size_bytes": [size_bytes] * 2}
    with FaultProxy(s3_server.endpoint_url) as proxy:
        proxy.plan = lambda request: fault if request.path.endswith("/a.wav") else None
        options = type(storage.options)(proxy.endpoint_url, "us-east-1", s3_server.key, s3_server.secret)
        items = list(read_items(pa.Table.from_batches([plan_batch("file", columns)]), options))
    assert kinds(items) == {"a.wav": "forbidden", "b.wav": "bytes"}


def test_a_consumer_that_stops_early_stops_the_fetching(storage):
    for n in range(100):
        storage.write_atomic(f"{n:03d}.wav", b"x" * 1000)
    scan = scan_input(InputOptions(storage.url, storage=storage.options))
    items = read_items(pa.Table.from_batches(scan.batches()), storage.options)
    next(items)
    items.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("fetch") and t.is_alive() and t.join(5)]


def test_sources_of_unknown_size_are_held_to_the_limit_by_their_real_length():
    class Counting(SourceReader):
        fetched = 0

        def fetch_or_open(self, source, size_bytes):
            with lock:
                self.fetched += 1
            return payload

    lock, reader, payload, sources = threading.Lock(), Counting(), bytes(12 << 20), 24
    groups = [[{"source": f"s3://b/{n}", "size_bytes": None, "error_kind": None}] for n in range(sources)]
    limits = ReadLimits(threads=2, bytes_ahead=32 << 20)
    ahead = []
    for taken, _ in enumerate(_fetch_ahead(groups, reader, limits), 1):
        time.sleep(0.02)  # a slow consumer: all that may be fetched is fetched
        ahead.append((reader.fetched - taken) * len(payload))
    assert reader.fetched == sources
    assert 0 < max(ahead) <= limits.bytes_ahead + limits.threads * len(payload)


@pytest.mark.parametrize("bytes_ahead", [1, 100_000, 1 << 30])
def test_tars_are_read_ahead_within_a_limit_and_stop_with_the_consumer(tmp_path, bytes_ahead):
    members = {f"{n:03d}.wav": audio_bytes(0.5) for n in range(60)}
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(tar_bytes(members))
    scan = scan_input(InputOptions(str(tmp_path)))
    rows = pa.Table.from_batches(scan.batches()).sort_by("id")
    limits = ReadLimits(bytes_ahead=bytes_ahead)
    whole = list(read_items(rows, limits=limits))
    assert [item.id for item in whole] == [f"{tar}/{n:03d}" for tar in ("a.tar", "b.tar") for n in range(60)]
    items = read_items(rows, limits=limits)
    next(items)
    items.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("fetch") and t.is_alive() and t.join(5)]


TAR = {
    "sub/a.wav": audio_bytes(0.1),
    "sub/a.txt": b" hello \n",
    "sub/a.json": b'{"speaker": 1, "text": "not this"}',
    "sub/b.flac": audio_bytes(0.2, "FLAC"),
    "sub/b.json": b'{"transcription": "from json"}',
    "c.left.wav": audio_bytes(0.1),
    "c.right.wav": audio_bytes(0.1),
    "d.txt": b"no audio here",
    "../../etc/e.wav": audio_bytes(0.1),
    "f.wav": b"",
    "g.json": b"{broken",
    "g.wav": audio_bytes(0.1),
    "b.wav": audio_bytes(0.1),
}


def test_each_audio_of_a_key_has_its_own_text(tmp_path):
    wav = audio_bytes(0.1)
    members = {"a.left.wav": wav, "a.left.txt": b"left", "a.right.wav": wav, "a.right.txt": b"right", "a.mid.wav": wav}
    members |= {"b.wav": wav, "b.txt": b"spoken", "b.normalized.txt": b"other", "b.json": b"{}", "b.old.json": b"[]"}
    members |= {"c.left.wav": wav, "c.right.wav": wav, "c.txt": b"both", "d.wav": wav, "d.en.txt": b"the only one"}
    members |= {"./2024.05.x.wav": wav, "./2024.05.x.txt": b"x", "./2024.05.y.wav": wav, "./2024.05.y.txt": b"y"}
    (tmp_path / "t.tar").write_bytes(tar_bytes(members))
    items = {item.member: item for item in read(Storage(str(tmp_path)))}
    assert {name: item.reference for name, item in items.items()} == {
        "a.left.wav": "left", "a.right.wav": "right", "a.mid.wav": None, "b.wav": "spoken", "c.left.wav": "both",
        "c.right.wav": "both", "d.wav": "the only one", "./2024.05.x.wav": "x", "./2024.05.y.wav": "y",
    }  # fmt: skip
    assert items["b.wav"].extra == "{}"


def test_many_members_of_one_key_cost_no_more_than_others(tmp_path):
    seconds = []
    for name in ("2024.05.{}.wav", "2024-05-{}.wav"):
        (tmp_path / "x.tar").write_bytes(tar_bytes({name.format(n): b"x" for n in range(8000)}))
        started = time.perf_counter()
        items = list(read_tar("x.tar", str(tmp_path / "x.tar"), SourceReader()))
        seconds.append(time.perf_counter() - started)
        assert len({item.id for item in items}) == 8000
    assert items[7999].id == "x.tar/2024-05-7999"
    assert seconds[0] < 3 * seconds[1]


def test_texts_of_a_tar_are_valid_utf8_and_valid_json(tmp_path):
    record = b'{"text": "hi \\ud83d", "k\\ud83d": "\\ud83d\\ude00", "snr": NaN, "a": [-Infinity, 1e999, 1.5]}'
    (tmp_path / "x.tar").write_bytes(tar_bytes({"a.wav": audio_bytes(0.1), "a.json": record}))
    item = read(Storage(str(tmp_path)))[0]
    assert pa.array([item.reference], pa.string()).to_pylist() == ["hi ?"]
    extra = json.loads(pa.array([item.extra], pa.string())[0].as_py(), parse_constant=pytest.fail)
    assert extra == {"text": "hi ?", "k?": "\U0001f600", "snr": None, "a": [None, None, 1.5]}


def test_attributes_that_a_mac_has_put_beside_the_files_are_no_items(tmp_path):
    attributes = b"\0\5\x16\7" + bytes(100)
    members = {"./._d": attributes, "d/._a.wav": attributes, "d/a.wav": audio_bytes(0.1)}
    members |= {"d/._a.txt": attributes, "d/a.txt": b"hello"}
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    assert [(item.id, item.reference) for item in read(Storage(str(tmp_path)))] == [("x.tar/d/a", "hello")]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    members = {"a.wav": audio_bytes(0.1), "a.txt": "\ufeffhello".encode()}
    members |= {"b.wav": audio_bytes(0.1), "b.json": '\ufeff{"text": "hi"}'.encode()}
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    assert [(item.reference, item.extra) for item in read(Storage(str(tmp_path)))] == [
        ("hello", None),
        ("hi", '{"text": "hi"}'),
    ]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_without_audio_says_so_in_one_row(storage, mode):
    inner = tar_bytes({"a.wav": audio_bytes(0.1)})
    storage.write_atomic("t/nested.tar", tar_bytes({"inner.tar": inner, "b.txt": b"x", "b.json": b"{}"}, mode))
    storage.write_atomic("t/empty.tar", tar_bytes({}, mode))
    (item,) = read(storage, "t")  # a tar without members holds no item
    assert kinds([item]) == {"nested.tar#rest": "bad_record"}
    assert "3 members, none of them audio, e.g. 'inner.tar'; expected" in item.payload.message


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tar_members_become_items(storage, mode):
    name = "x.tar" if mode == "w" else "x.tar.gz"
    storage.write_atomic(name, tar_bytes(TAR, mode))
    items = read(storage)
    found = {item.id.removeprefix(f"{name}/"): (item.member, item.reference, item.extra) for item in items}
    assert found == {
        "sub/a": ("sub/a.wav", "hello", '{"speaker": 1, "text": "not this"}'),
        "sub/b": ("sub/b.flac", "from json", '{"transcription": "from json"}'),
        "c": ("c.left.wav", None, None),
        "c~2": ("c.right.wav", None, None),
        "../../etc/e": ("../../etc/e.wav", None, None),
        "f": ("f.wav", None, None),
        "g": ("g.wav", None, '{"json": "{broken"}'),
        "b": ("b.wav", None, None),
    }
    assert all(item.payload == TAR[item.member] for item in items)
    assert {item.source for item in items} == {storage.source(name)}


def test_every_cut_of_a_tar_gives_its_whole_members_and_one_error(tmp_path):
    members = {f"{n}.wav": audio_bytes(0.01) for n in range(4)}
    members["3.wav"] = members["3.wav"][:44] + bytes(1000)  # ends in zeros, as silence does
    whole = tar_bytes(members)
    end = whole.rindex(bytes(1024))  # at or before the end mark
    member_bytes = 512 + -(-len(members["0.wav"]) // 512) * 512
    marks = [n * member_bytes + shift for n in range(4) for shift in (-1, 0, 1, 511, 512, 600)]
    for cut in [mark for mark in marks if 0 < mark < end]:
        (tmp_path / "x.tar").write_bytes(whole[:cut])
        items = read(Storage(str(tmp_path)))
        good = [item for item in items if isinstance(item.payload, bytes)]
        assert [item.payload for item in good] == list(members.values())[: len(good)]
        assert len(good) >= cut // member_bytes - (cut % member_bytes < 0)
        assert kinds(items[len(good) :]) == {"x.tar#rest": "torn_archive"}, cut


def test_torn_gzip_and_damaged_header_are_one_error_each(tmp_path):
    rng = np.random.default_rng(1)
    members = {f"{n}.wav": rng.bytes(5000) for n in range(20)}
    packed = tar_bytes(members, "w:gz")
    (tmp_path / "cut.tar.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "crc.tar.gz").write_bytes(packed[:-8] + b"12345678")
    damaged = bytearray(tar_bytes(members))
    damaged[5 * 5632 + 100 : 5 * 5632 + 200] = b"?" * 100  # inside the header of the sixth member
    (tmp_path / "header.tar").write_bytes(damaged)
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_bytes(b"this is not a tar" * 100)
    items = read(Storage(str(tmp_path)))
    errors = {item.id: item.payload.kind for item in items if isinstance(item.payload, InputError)}
    names = ("cut.tar.gz", "crc.tar.gz", "header.tar", "zero.tar", "text.tar")
    assert errors == {f"{name}#rest": "torn_archive" for name in names}
    good = {name: sum(i.id.startswith(name) and isinstance(i.payload, bytes) for i in items) for name in names}
    assert good["header.tar"] == 5
    assert 5 <= good["cut.tar.gz"] < 20
    assert good["crc.tar.gz"] == 20


@pytest.mark.parametrize("first", [True, False])
def test_a_damaged_sparse_header_is_a_tear(tmp_path, first):
    sparse = tarfile.TarInfo("s.wav")
    sparse.pax_headers = {"GNU.sparse.map": "x", "GNU.sparse.size": "1"}
    whole = tar_bytes({"a.wav": audio_bytes(0.1)}).rstrip(b"\0")
    whole += bytes(-len(whole) % 512)
    (tmp_path / "x.tar").write_bytes((b"" if first else whole) + sparse.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    good = {} if first else {"x.tar/a": "bytes"}
    assert kinds(read(Storage(str(tmp_path)))) == good | {"x.tar#rest": "torn_archive"}


def test_links_and_devices_in_a_tar_are_never_followed(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in {"s.wav": tarfile.SYMTYPE, "h.wav": tarfile.LNKTYPE, "d.wav": tarfile.CHRTYPE}.items():
            header = tarfile.TarInfo(name)
            header.type, header.linkname = kind, "/etc/passwd"
            archive.addfile(header)
    (tmp_path / "x.tar").write_bytes(buffer.getvalue())
    assert kinds(read(Storage(str(tmp_path)))) == dict.fromkeys(["x.tar/s", "x.tar/h", "x.tar/d"], "bad_record")


def hostile_tar(**fields) -> bytes:
    """One audio member with 10 bytes after a header that claims something else."""
    header = tarfile.TarInfo("a.wav")
    for name, value in fields.items():
        setattr(header, name, value)
    return header.tobuf(tarfile.GNU_FORMAT) + b"0123456789"


@pytest.mark.parametrize(
    "data",
    [
        hostile_tar(size=1 << 62),
        hostile_tar(size=1 << 62, name="a.dat"),
        hostile_tar(size=1 << 62, type=tarfile.XHDTYPE),
        hostile_tar(size=1 << 62, type=tarfile.GNUTYPE_LONGNAME),
        hostile_tar(size=(1 << 34) - 1024, name="a.dat"),
    ],
)
def test_claimed_sizes_cost_neither_time_nor_memory(tmp_path, data):
    (tmp_path / "x.tar").write_bytes(data)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(data))
    start = time.monotonic()
    items = read(Storage(str(tmp_path)))
    assert [i.payload.kind for i in items if i.id.endswith("#rest")] == ["torn_archive", "torn_archive"]
    assert len(items) <= 4
    assert time.monotonic() - start < 2  # 0.03 s when run alone; skipping 4 EiB took for ever


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_damage_to_a_tar_ends_in_items_and_at_most_one_error(tmp_path_factory, data):
    raw = bytearray(tar_bytes({"a.wav": b"q" * 700, "a.json": b"{}", "b" * 120 + ".wav": b"q" * 100}))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    for start in range(0, len(raw), 512):  # valid checksums, so that damage is met after the first check
        if raw[start + 257 : start + 262] == b"ustar":
            raw[start + 148 : start + 156] = b" " * 8
            raw[start + 148 : start + 156] = b"%06o\0 " % sum(raw[start : start + 512])
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    (folder / "x.tar").write_bytes(raw)
    items = read(Storage(str(folder)))
    assert len({item.id for item in items}) == len(items)
    assert sum(item.id.endswith("#rest") for item in items) <= 1


def test_missing_tar_is_one_error(storage):
    batch = plan_batch("tar", {"id": ["gone.tar"], "source": [storage.source("gone.tar")]})
    assert kinds(list(read_items(pa.Table.from_batches([batch]), storage.options))) == {
        "gone.tar#rest": "missing_object"
    }


def test_a_gzip_bomb_costs_one_row_and_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.reading.containers.MAX_MEMBER_BYTES", 1 << 20)
    with gzip.open(tmp_path / "x.tar.gz", "wb", compresslevel=1) as file:
        file.write(tar_bytes({"a.wav": bytes(64 << 20), "b.wav": audio_bytes(0.1)}))
    assert kinds(read(Storage(str(tmp_path)))) == {"x.tar.gz/a": "too_long", "x.tar.gz/b": "bytes"}


def parquet_bytes(rows: int, group: int) -> bytes:
    audio = [{"bytes": audio_bytes(0.01 * (n + 1)), "path": f"{n}.wav"} for n in range(rows)]
    audio[1] = None
    audio[2] = {"bytes": None, "path": "/etc/passwd"}
    sink = pa.BufferOutputStream()
    table = pa.table({"audio": audio, "sentence": [f"t{n}" for n in range(rows)], "n": list(range(rows))})
    table = table.append_column("accent", pa.array(["x"] * rows).dictionary_encode())
    pq.write_table(table, sink, row_group_size=group)
    return sink.getvalue().to_pybytes()


def test_parquet_rows_become_items(storage):
    storage.write_atomic("d/t.parquet", parquet_bytes(40, 25))
    items = read(storage, "d")
    assert [item.id for item in items] == [f"t.parquet#{n}" for n in range(40)]
    assert kinds(items)["t.parquet#1"] == "bad_record"
    assert kinds(items)["t.parquet#2"] == "bad_record"
    assert items[3].payload == audio_bytes(0.04)
    assert (items[30].reference, items[30].member) == ("t30", "30.wav")
    assert json.loads(items[30].extra) == {"n": 30, "accent": "x"}


def test_damaged_parquet_pages_give_an_error_for_each_missing_row(tmp_path):
    data = bytearray(parquet_bytes(40, 40))
    middle = len(data) // 2
    data[middle : middle + 4000] = bytes(4000)
    (tmp_path / "t.parquet").write_bytes(data)
    items = read(Storage(str(tmp_path)))
    assert [item.id for item in items] == [f"t.parquet#{n}" for n in range(40)]
    assert "torn_archive" in kinds(items).values()


def test_a_row_group_that_grew_after_planning_gives_the_planned_items(tmp_path):
    (tmp_path / "t.parquet").write_bytes(parquet_bytes(40, 40))
    items = list(read_row_group("t.parquet#100", str(tmp_path / "t.parquet"), 0, 25, SourceReader()))
    assert [item.id for item in items] == [f"t.parquet#{100 + n}" for n in range(25)]


def test_parquet_values_that_json_or_python_cannot_hold(tmp_path):
    audio = [{"bytes": audio_bytes(0.1), "path": None}] * 2
    pq.write_table(pa.table({"audio": audio, "snr": [float("nan"), 1.5]}), tmp_path / "nan.parquet")
    broken = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers())
    pq.write_table(pa.table({"audio": audio, "text": broken}), tmp_path / "text.parquet")
    items = {item.id: item for item in read(Storage(str(tmp_path)))}
    assert [items[f"nan.parquet#{n}"].extra for n in (0, 1)] == ['{"snr": null}', '{"snr": 1.5}']
    assert {items[f"text.parquet#{n}"].payload.kind for n in (0, 1)} == {"torn_archive"}


def test_urls_are_encoded_and_what_is_not_a_url_is_a_bad_record(monkeypatch):
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"audio")

    monkeypatch.setattr("jobs.sources.guarded_http.is_public", lambda _address: True)  # the server is on the loopback
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://rebound.example:{server.server_port}/\u00fc b%20c.wav?q=\u00e9&r=1"
        assert fetch_through_name(url) == b"audio"
    assert seen == ["/%C3%BC%20b%20c.wav?q=%C3%A9&r=1"]
    for url in ("http://a..com/x.wav", f"http://{'a' * 64}.com/x.wav", "http://example.com:port/x.wav"):
        with pytest.raises(InputError) as caught:
            fetch_http(url)
        assert caught.value.kind == ErrorKind.BAD_RECORD, url


def test_signed_urls_open_their_audio_and_what_is_cut_short_is_fetched_again(tmp_path, monkeypatch):
    """A busy server, then one that stops in the middle of the body, then the whole: the right bytes or none."""
    audio, seen = audio_bytes(0.5), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(503 if len(seen) == 1 else 200)
            self.send_header("Content-Length", str(len(audio)))
            self.end_headers()
            self.wfile.write(audio[: 10 * (len(seen) - 1)] if len(seen) < 3 else audio)

    monkeypatch.setattr("jobs.sources.guarded_http.is_public", lambda _address: True)  # the server is on the loopback
    monkeypatch.setattr("socket.getaddrinfo", resolve_rebound(socket.getaddrinfo))
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://rebound.example:{server.server_port}/x.wav?file=7&X-Amz-Signature=canary"
        (tmp_path / "m.jsonl").write_bytes(jsonl({"audio_filepath": url, "duration": 0.5}))
        scan = scan_input(InputOptions(str(tmp_path / "m.jsonl"), allow_http=True))
        rows = pa.Table.from_batches(scan.batches(), PLAN_SCHEMA)
        (item,) = read_items(rows, scan.storage)
        server.shutdown()
    assert item.payload == audio
    assert seen == ["/x.wav?file=7&X-Amz-Signature=canary"] * 3
    assert item.id == item.source
    assert re.fullmatch(r"http://rebound\.example:\d+/x\.wav\?\*\*\*[0-9a-f]{12}", item.id)


def test_a_body_that_never_ends_is_given_up(monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)

    monkeypatch.setattr("jobs.sources.guarded_http.is_public", lambda _address: True)  # the server is on the loopback
    monkeypatch.setattr("jobs.sources.guarded_http.HTTP_TIMEOUT_S", 1)  # longer than any pause between two bytes
    monkeypatch.setattr("jobs.sources.guarded_http.SLOW_AFTER_S", 0.5, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        started = time.monotonic()
        with pytest.raises(InputError) as caught:
            fetch_through_name(f"http://rebound.example:{server.server_port}/x.wav", patience_s=0)
    assert time.monotonic() - started < 4
    assert caught.value.kind == ErrorKind.STORAGE
    assert "expected 2000 a second" in caught.value.message


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_comes_whole_or_is_too_long(chunked, monkeypatch):
    body = np.random.default_rng(0).bytes(3_000_001)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # the connection stays open after the body

        def do_GET(self):
            self.send_response(200)
            self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(len(body)))))
            self.end_headers()
            with contextlib.suppress(OSError):
                for start in range(0, len(body), 700_000):
                    piece = body[start : start + 700_000]
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                self.wfile.write(b"0\r\n\r\n" if chunked else b"")
            self.close_connection = True

    monkeypatch.setattr("jobs.sources.guarded_http.is_public", lambda _address: True)  # the server is on the loopback
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://rebound.example:{server.server_port}/x.wav"
        assert fetch_through_name(url) == body
        monkeypatch.setattr("jobs.sources.guarded_http.MAX_BODY_BYTES", len(body))
        assert fetch_through_name(url) == body
        monkeypatch.setattr("jobs.sources.guarded_http.MAX_BODY_BYTES", len(body) - 1)
        with pytest.raises(InputError) as caught:
            fetch_through_name(url)
        server.shutdown()
    assert caught.value.kind == ErrorKind.TOO_LONG


def test_a_redirect_to_ftp_is_not_followed(monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", f"ftp://127.0.0.1:{behind.getsockname()[1]}/x.wav")
            self.end_headers()

    monkeypatch.setattr("jobs.sources.guarded_http.is_public", lambda _address: True)  # the server is on the loopback
    with (
        http.server.HTTPServer(("127.0.0.1", 0), Handler) as server,
        socket.create_server(("127.0.0.1", 0)) as behind,
    ):
        threading.Thread(target=server.handle_request, daemon=True).start()
        monkeypatch.setattr("jobs.sources.guarded_http.HTTP_TIMEOUT_S", 2)
        with pytest.raises(InputError):
            fetch_through_name(f"http://rebound.example:{server.server_port}/x.wav")
        behind.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody has connected
            behind.accept()


def test_a_public_name_that_leads_to_a_private_address_is_refused():
    """The check is on the connected socket: a server on the loopback stands for the private host."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(InputError) as caught:
            # A public name that resolves to 127.0.0.1: nothing in the text of the URL shows it.
            fetch_through_name(f"http://rebound.example:{server.server_port}/secret")
    assert caught.value.kind == ErrorKind.BAD_RECORD
    assert seen == []


def resolve_rebound(original):
    """A resolver that resolves `rebound.example` to the loopback."""

    def resolve(host, *arguments, **named):
        return original("127.0.0.1" if host == "rebound.example" else host, *arguments, **named)

    return resolve


def fetch_through_name(url: str, **options) -> bytes:
    original = socket.getaddrinfo
    socket.getaddrinfo = resolve_rebound(original)
    try:
        return fetch_http(url, **options)
    finally:
        socket.getaddrinfo = original
