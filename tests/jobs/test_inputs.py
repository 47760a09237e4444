"""jobs/inputs and jobs/sources/rules.py: listing -> layout -> plan rows."""

import base64
import contextlib
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_samples import SHARED_SPEECH, audio_bytes, jsonl, tar_bytes

from jobs.inputs.listing import _walk_local, list_files, resolve_input
from jobs.inputs.manifest import MAX_LINE_BYTES, parse_line
from jobs.inputs.scan import InputOptions, scan_input
from jobs.sources.rules import SourceRules, check_host
from jobs.storage.files import Storage
from parakeet_core.errors import ConfigError, InputError

REPOSITORY = Path(__file__).resolve().parents[2]
REMOTE = SourceRules(remote=True)
LOCAL = SourceRules(remote=False)


def rows_of(storage: Storage, name: str = "", **options) -> list[dict]:
    url = f"{storage.url}/{name}" if name else storage.url
    scan = scan_input(InputOptions(url, storage=storage.options, **options))
    return [row for batch in scan.batches() for row in batch.to_pylist()]


def test_folder_of_files(storage):
    for name in ("b/2.FLAC", "a/1.wav", "3.mp3", "notes.txt", "a/none", ".hidden.wav", "_tmp/4.wav", "a/.git/5.wav"):
        storage.write_atomic(name, b"12345")
    scan = scan_input(InputOptions(storage.url, storage=storage.options))
    rows = sorted((row for batch in scan.batches() for row in batch.to_pylist()), key=lambda row: row["id"])
    assert [row["id"] for row in rows] == ["3.mp3", "a/1.wav", "b/2.FLAC"]
    assert {row["size_bytes"] for row in rows} == {5}
    assert rows[1]["source"] == storage.source("a/1.wav")
    assert scan.format == "files"
    assert (scan.counts.other, scan.counts.hidden) == (2, 3)
    assert "1 .txt" in scan.left_out
    assert "3 hidden" in scan.left_out


def test_layout_is_found_from_the_listing(storage):
    storage.write_atomic("tars/x-0.tar", tar_bytes({"k.wav": audio_bytes()}))
    storage.write_atomic("tars/x-1.tar.gz", tar_bytes({"k.wav": audio_bytes()}, "w:gz"))
    storage.write_atomic("tars/README.md", b"hello")
    storage.write_atomic("manifests/train.jsonl", jsonl({"audio_filepath": "a.wav"}))
    storage.write_atomic("m.json", jsonl({"audio_filepath": "a.wav"}))
    for folder, expected in {
        "tars": "webdataset",
        "manifests": "manifest",
        "manifests/train.jsonl": "manifest",
        "m.json": "manifest",
    }.items():
        scan = scan_input(InputOptions(f"{storage.url}/{folder}", storage=storage.options))
        assert scan.format == expected
        assert scan.reason
    rows = rows_of(storage, "tars")
    assert sorted(row["id"] for row in rows) == ["x-0.tar", "x-1.tar.gz"]
    assert {row["layout"] for row in rows} == {"tar"}
    assert {row["items"] for row in rows} == {None}


def test_json_files_beside_manifests_are_read_only_when_asked_for(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(jsonl({"audio_filepath": "a.wav"}))
    (tmp_path / "dev.json").write_bytes(jsonl({"audio_filepath": "b.wav"}))
    storage = Storage(str(tmp_path))
    assert [row["id"] for row in rows_of(storage)] == ["a.wav"]
    assert "1 .json" in scan_input(InputOptions(storage.url)).left_out
    assert [row["id"] for row in rows_of(storage, format="manifest")] == ["b.wav", "a.wav"]
    assert scan_input(InputOptions(storage.url, format="manifest")).left_out == ""


def test_a_mix_is_refused_with_counts_and_the_option(storage):
    storage.write_atomic("a.wav", b"1")
    storage.write_atomic("a.jsonl", jsonl({"audio_filepath": "a.wav"}))
    with pytest.raises(ConfigError, match=r"1 audio files, 1 JSONL manifests.*--format files\|manifest"):
        rows_of(storage)
    assert [row["id"] for row in rows_of(storage, format="files")] == ["a.wav"]
    assert [row["id"] for row in rows_of(storage, format="manifest")] == ["a.wav"]


@pytest.mark.parametrize("case", ["nothing known", "missing", "unknown file", "wrong format", "bad option"])
def test_unusable_inputs_stop_before_any_work(storage, case):
    storage.write_atomic("x/readme.txt", b"1")
    url, options = {
        "nothing known": ("x", {}),
        "missing": ("none", {}),
        "unknown file": ("x/readme.txt", {}),
        "wrong format": ("x", {"format": "parquet"}),
        "bad option": ("x", {"format": "nemo"}),
    }[case]
    with pytest.raises(ConfigError):
        rows_of(storage, url, **options)


def test_a_named_file_is_read_though_its_name_is_hidden(storage):
    storage.write_atomic("m/_m.jsonl", jsonl({"audio_filepath": "a.wav"}))
    storage.write_atomic("m/.a.wav", b"1")
    assert [row["id"] for row in rows_of(storage, "m/_m.jsonl")] == ["a.wav"]
    assert [row["id"] for row in rows_of(storage, "m/_m.jsonl", format="manifest")] == ["a.wav"]
    assert [row["id"] for row in rows_of(storage, "m/.a.wav")] == [".a.wav"]
    with pytest.raises(ConfigError, match="2 hidden files"):
        rows_of(storage, "m")


def globbed(url: str) -> list[str]:
    """Sources of a local glob's files."""
    with scan_input(InputOptions(url, format="files")) as scan:
        return sorted(row["source"] for batch in scan.batches() for row in batch.to_pylist())


def test_a_glob_starts_where_it_says_and_not_in_the_working_directory(tmp_path, monkeypatch):
    inside = tmp_path / "br[1]"
    (inside / "sub").mkdir(parents=True)
    for path in (inside / "a.flac", inside / "sub/b.flac", tmp_path / "c.flac"):
        path.write_bytes(b"1")
    monkeypatch.chdir(inside)
    assert globbed("*.flac") == globbed("./*.flac") == [str(inside / "a.flac")]
    assert globbed("sub/*.flac") == globbed("s*/b.flac") == [str(inside / "sub/b.flac")]
    assert globbed("**/*.flac") == [str(inside / "a.flac"), str(inside / "sub/b.flac")]
    assert globbed("../*.flac") == globbed(f"file://{tmp_path}/?.flac") == [str(tmp_path / "c.flac")]
    with pytest.raises(ConfigError, match="cannot be listed.*no such object"):
        globbed("none.flac")  # the br[1] of the working directory is not part of a pattern
    root, pattern, name = resolve_input("/*.flac", Storage("/").options)
    assert (root.root, name) == ("/", None)
    assert not [n for batch in list_files(root, pattern) for n in batch["name"].to_pylist() if "/" in n]


def test_a_glob_enters_only_folders_that_can_hold_a_match(tmp_path):
    for name in ("a/x/1.wav", "a/y/2.wav", "b/x/3.wav", "a/x/deep/4.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "zz").symlink_to(tmp_path / "zz")  # a link to itself, which no pattern below asks for

    def entered(glob: str) -> list[str]:
        """Folders whose files were listed, whether they match or not."""
        return sorted({name.rpartition("/")[0] for name, _ in _walk_local(str(tmp_path), glob)} - {""})

    assert entered("*.wav") == []
    assert entered("a/*/*.wav") == ["a/x", "a/y"]
    assert entered("?/x/*.wav") == ["a/x", "b/x"]
    assert entered("a/**/*.wav") == ["a/x", "a/x/deep", "a/y"]
    assert entered("**") == ["a/x", "a/x/deep", "a/y", "b/x"]


@pytest.mark.parametrize("glob", ["a**.flac", "**a/b.flac", "a/***"])
def test_what_is_not_a_pattern_is_refused_in_one_line(storage, glob):
    storage.write_atomic("a.flac", b"1")
    with pytest.raises(ConfigError, match=r"not a pattern; `\*\*` stands for whole folders") as caught:
        rows_of(storage, glob)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_looked_at_stays_an_item(tmp_path):
    (tmp_path / "good.wav").write_bytes(b"123")
    (tmp_path / "self.wav").symlink_to("self.wav")
    (tmp_path / "gone.wav").symlink_to("nothing")
    os.mkfifo(tmp_path / "pipe.wav")
    sizes = {row["id"]: row["size_bytes"] for row in rows_of(Storage(str(tmp_path)))}
    assert sizes == {"good.wav": 3, "self.wav": 0, "gone.wav": 0, "pipe.wav": 0}


def test_pipes_among_manifests_and_parquet_files_do_not_hang_the_planning(tmp_path):
    os.mkfifo(tmp_path / "m.jsonl")
    with pytest.raises(ConfigError, match="this is a pipe"):
        rows_of(Storage(str(tmp_path)))
    (tmp_path / "m.jsonl").rename(tmp_path / "p.parquet")
    (row,) = rows_of(Storage(str(tmp_path)))
    assert (row["id"], row["error_kind"]) == ("p.parquet", "bad_record")


def test_manifest_lines_become_items(storage):
    records = [
        {"audio_filepath": "a.wav", "duration": 3.5, "text": "hello", "speaker": "s1"},
        {"audio_filepath": "sub/b.wav", "offset": 1.25, "duration": 2, "channel": 0},
        {"audio_filepath": "sub/b.wav", "offset": 1.25, "duration": 2, "channel": 1},
        {"audio_filepath": "c.wav", "offset": 0.0},
        {"audio_filepath": "../up.wav", "id": 17},
    ]
    storage.write_atomic("m/list.jsonl", jsonl(*records, "", "  "))
    rows = rows_of(storage, "m/list.jsonl")
    assert [row["id"] for row in rows] == ["a.wav", "sub/b.wav#1.25-2@0", "sub/b.wav#1.25-2@1", "c.wav#0-", "17"]
    assert [row["error_kind"] for row in rows] == [None] * 5
    assert rows[0] | {"source": ""} == {
        "id": "a.wav", "source": "", "layout": "file", "member": None, "row_group": None, "offset_s": None,
        "duration_s": None, "channel": None, "size_bytes": None, "audio_s": 3.5, "items": 1, "reference": "hello",
        "extra": '{"speaker": "s1"}', "error_kind": None, "error_message": None, "given_id": None,
    }  # fmt: skip
    assert (rows[1]["offset_s"], rows[1]["duration_s"], rows[1]["channel"]) == (1.25, 2.0, 0)
    assert rows[1]["source"] == storage.source("m/sub/b.wav")
    assert rows[4]["source"] == storage.source("up.wav")


BAD_LINES = {
    "not json": ("bad_record", "{not json"),
    "an array": ("bad_record", "[1]"),
    "no path": ("bad_record", '{"duration": 1}'),
    "path is a number": ("bad_record", '{"audio_filepath": 1}'),
    "empty path": ("bad_record", '{"audio_filepath": ""}'),
    "NUL": ("bad_record", '{"audio_filepath": "a\\u0000b"}'),
    "half a surrogate": ("bad_record", '{"audio_filepath": "a.wav", "text": "\\ud800"}'),
    "NaN": ("bad_record", '{"audio_filepath": "a.wav", "offset": NaN}'),
    "offset as text": ("bad_record", '{"audio_filepath": "a.wav", "offset": "1"}'),
    "offset true": ("bad_record", '{"audio_filepath": "a.wav", "offset": true}'),
    "negative offset": ("bad_segment", '{"audio_filepath": "a.wav", "offset": -0.5, "duration": 1}'),
    "infinite by digits": ("bad_segment", '{"audio_filepath": "a.wav", "offset": 1e999}'),
    "negative duration": ("bad_segment", '{"audio_filepath": "a.wav", "offset": 0, "duration": -1}'),
    "empty segment": ("bad_segment", '{"audio_filepath": "a.wav", "offset": 1, "duration": 0}'),
    "several channels": ("bad_record", '{"audio_filepath": "a.wav", "channel": [0, 1]}'),
    "negative channel": ("bad_channel", '{"audio_filepath": "a.wav", "channel": -1}'),
    "deep": ("bad_record", '{"audio_filepath": "a.wav", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "long": ("bad_record", '{"audio_filepath": "a.wav", "x": "' + "y" * MAX_LINE_BYTES + '"}'),
    "infinite by digits in another key": ("bad_record", '{"audio_filepath": "a.wav", "x": [{"snr": -1e999}]}'),
    "huge number": ("bad_record", '{"audio_filepath": "a.wav", "offset": ' + "9" * 5000 + "}"),
}


def test_bad_manifest_lines_are_rows_and_the_rest_goes_on(tmp_path):
    lines = [line for _, line in BAD_LINES.values()]
    raw = b"\n".join(
        [b'{"audio_filepath": "first.wav"}', *(x.encode() for x in lines), b"\xff\xfe", b'{"audio_filepath": "z.wav"}']
    )
    (tmp_path / "m.jsonl").write_bytes(raw)
    rows = rows_of(Storage(str(tmp_path)), "m.jsonl")
    assert rows[0]["id"] == "first.wav"
    assert rows[-1]["id"] == "z.wav"
    found = [row["error_kind"] for row in rows[1:-1]]
    assert dict(zip([*BAD_LINES, "bytes"], found, strict=True)) == {
        **{name: kind for name, (kind, _) in BAD_LINES.items()},
        "bytes": "bad_record",
    }
    assert all(row["id"].startswith("m.jsonl#bad-") for row in rows[1:-1])
    (tmp_path / "m.jsonl").write_bytes(b'{"audio_filepath": "earlier.wav"}\n' + raw)
    assert {row["id"] for row in rows_of(Storage(str(tmp_path)), "m.jsonl")} == {row["id"] for row in rows} | {
        "earlier.wav"
    }
    assert all(f"line {n}:" in row["error_message"] for n, row in enumerate(rows[1:-1], 2))
    assert all(len(row["error_message"]) < 400 for row in rows[1:-1])


@pytest.mark.parametrize(
    "line",
    [
        '{"audio_filepath": "https://user:%s@host/a.wav"',
        '{"audio_filepath": ["https://user:%s@host/a.wav"]}',
        '{"audio_filepath": "a.wav", "id": ["https://user:%s@host/a.wav"]}',
        '{"audio_filepath": "a.wav", "channel": "https://user:%s@host/a.wav"}',
        '{"audio_filepath": "https://host/caf\\u00e9?X-Amz-Signature=%s", ',
    ],
)
def test_secrets_in_a_bad_line_are_gone_before_it_is_cut_short(tmp_path, line):
    (tmp_path / "m.jsonl").write_text(line % ("canary" * 20) + "\n")
    (row,) = rows_of(Storage(str(tmp_path)))
    assert row["error_kind"] == "bad_record"
    assert "canary" not in str(row)


def test_long_lines_of_a_manifest_come_in_batches_that_memory_and_arrow_hold(tmp_path):
    record = {"audio_filepath": "a.wav", "note": "x" * 1_000_000}
    (tmp_path / "m.jsonl").write_bytes(jsonl(*[record | {"id": number} for number in range(150)]))
    with scan_input(InputOptions(str(tmp_path))) as scan:
        batches = list(scan.batches())
    assert sum(len(batch) for batch in batches) == 150
    assert max(batch.nbytes for batch in batches) < 70 << 20


def test_a_byte_order_mark_before_a_blank_line_is_no_item(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'\xef\xbb\xbf\r\n\r\n{"audio_filepath": "a.wav"}\r\n')
    assert [row["id"] for row in rows_of(Storage(str(tmp_path)))] == ["a.wav"]


def test_torn_gzip_manifest_gives_its_lines_and_one_error(tmp_path):
    whole = gzip.compress(jsonl(*({"audio_filepath": f"{n}-{hash(n * 7919)}.wav"} for n in range(5000))))
    (tmp_path / "m.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    rows = rows_of(Storage(str(tmp_path)), "m.jsonl.gz")
    assert len(rows) > 100
    assert [row["error_kind"] for row in rows[:-1]] == [None] * (len(rows) - 1)
    assert rows[-1]["error_kind"] == "torn_archive"


@pytest.mark.parametrize("brackets", ["[]", '{"k":', "[{"])
def test_no_depth_of_a_line_ends_the_scan(brackets):
    for depth in range(900, 1001):  # Python's recursion limit is 1000, and each function meets it at another depth
        opening, closing = brackets.partition("]")[0], {"[]": "]", '{"k":': "}", "[{": "}]"}[brackets]
        value = opening * depth + "1" + closing * depth
        for key in ("x", "audio_filepath", "offset", "duration", "channel", "id", "text"):
            with contextlib.suppress(InputError):
                parse_line(f'{{"audio_filepath": "a.wav", "{key}": {value}}}'.encode(), "/m", LOCAL)


REFUSED = [
    "/etc/passwd",
    "file:///etc/passwd",
    "../../../other-bucket/x.wav",
    "local:///etc/passwd",
    "memory://x",
    "ftp://host/x",
    "simplecache::file:///etc/passwd",
    "zip://x.wav::file:///a.zip",
    "x.wav::file:///etc/passwd",
    "http://169.254.169.254/latest/meta-data/",
    "https://example.org/a.wav",
    "s3://bucketonly",
    "s3://bucketonly//",
    "gs://",
    "s3:///key",
]


@pytest.mark.parametrize("path", REFUSED)
def test_remote_manifests_reach_neither_disk_nor_network(path):
    with pytest.raises(InputError) as caught:
        REMOTE.resolve(path, "s3://bucket/folder")
    assert caught.value.kind == "bad_record"


def test_what_manifests_may_name():
    assert REMOTE.resolve("a/b.wav", "s3://bucket/folder") == "s3://bucket/folder/a/b.wav"
    assert REMOTE.resolve("../b.wav", "s3://bucket/folder") == "s3://bucket/b.wav"
    assert REMOTE.resolve("s3://other/b.wav", "s3://bucket/folder") == "s3://other/b.wav"
    assert LOCAL.resolve("/data/b.wav", "/m") == "/data/b.wav"
    assert LOCAL.resolve("../b.wav", "/m/n") == "/m/b.wav"
    assert SourceRules(True, allow_local_paths=True).resolve("file:///d/b.wav", "s3://b") == "/d/b.wav"
    allowed = SourceRules(True, allow_http=True)
    assert allowed.resolve("https://example.org/a.wav", "s3://b") == "https://example.org/a.wav"
    with pytest.raises(InputError):
        allowed.resolve("http://169.254.169.254/", "s3://b")


@pytest.mark.parametrize(
    "host",
    ["169.254.169.254", "2852039166", "0xa9fea9fe", "169.16689662", "127.0.0.1", "localhost", "LOCALHOST.", "10.1.2.3"]
    + ["192.168.0.1", "[::1]", "[fe80::1]", "[fd00:ec2::254]", "[::ffff:169.254.169.254]", "0.0.0.0", "a.localhost"]
    + ["metadata.google.internal", "224.0.0.1", ""],
)
def test_private_hosts_are_refused_however_they_are_spelt(host):
    with pytest.raises(InputError):
        check_host(f"http://{host}:80/x")


def test_user_and_password_are_refused_and_not_repeated():
    with pytest.raises(InputError, match="signed URL") as caught:
        check_host("https://user:canary@example.org/x.wav")
    assert "canary" not in caught.value.message


def test_public_hosts_pass():
    check_host("https://example.org/x.wav")
    check_host("http://8.8.8.8/x.wav")


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_a_row_or_an_input_error(line):
    with contextlib.suppress(InputError):
        assert parse_line(line, "/m", LOCAL)["id"]


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {"audio_filepath": st.text() | _json},
        optional={k: _json for k in ("offset", "duration", "channel", "id", "text", "x")},
    )
)
@settings(max_examples=150, deadline=None)
def test_any_record_is_a_row_that_arrow_takes_or_an_input_error(record):
    for rules, folder in ((LOCAL, "/m"), (REMOTE, "s3://bucket/m")):
        try:
            row = parse_line(json.dumps(record).encode(), folder, rules)
        except InputError:
            continue
        pa.array([row["id"]], pa.string())
        pa.array([row["channel"]], pa.int32())
        if rules.remote:
            assert row["source"].startswith("s3://")


def hf_table(rows: int) -> pa.Table:
    audio = [{"bytes": audio_bytes(0.2), "path": f"{n}.wav"} for n in range(rows)]
    return pa.table({"audio": audio, "sentence": [f"text {n}" for n in range(rows)], "speaker": list(range(rows))})


def test_parquet_row_groups_become_rows(storage):
    sink = pa.BufferOutputStream()
    pq.write_table(hf_table(10), sink, row_group_size=4)
    storage.write_atomic("data/train.parquet", sink.getvalue().to_pybytes())
    storage.write_atomic("data/torn.parquet", sink.getvalue().to_pybytes()[:-100])
    none = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["x"]}), none)
    storage.write_atomic("data/other.parquet", none.getvalue().to_pybytes())
    rows = {row["id"]: row for row in rows_of(storage, "data")}
    assert set(rows) == {"train.parquet#0", "train.parquet#4", "train.parquet#8", "torn.parquet", "other.parquet"}
    assert [rows[f"train.parquet#{n}"]["items"] for n in (0, 4, 8)] == [4, 4, 2]
    assert [rows[f"train.parquet#{n}"]["row_group"] for n in (0, 4, 8)] == [0, 1, 2]
    assert rows["torn.parquet"]["error_kind"] == "torn_archive"
    assert rows["other.parquet"]["error_kind"] == "bad_record"
    assert "audio" in rows["other.parquet"]["error_message"]


def test_the_size_of_an_audio_column_is_known_whatever_its_name(tmp_path):
    sizes = []
    for name in ("audio", "clip.audio"):
        pq.write_table(hf_table(10).rename_columns({"audio": name}), tmp_path / "a.parquet")
        sizes += [row["size_bytes"] for row in rows_of(Storage(str(tmp_path)))]
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("plaintext_footer", [True, False])
@pytest.mark.parametrize("column", ["audio.bytes", "sentence"])
def test_an_encrypted_parquet_file_is_one_rejected_row(tmp_path, plaintext_footer, column):
    class Keys(encryption.KmsClient):
        def wrap_key(self, key_bytes, master_key_identifier):
            return base64.b64encode(key_bytes)

    chosen = encryption.EncryptionConfiguration(
        "footer", column_keys={"key": [column]}, plaintext_footer=plaintext_footer
    )
    factory = encryption.CryptoFactory(lambda _: Keys())
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), chosen)
    pq.write_table(hf_table(2), tmp_path / "a.parquet", encryption_properties=properties)
    pq.write_table(hf_table(2), tmp_path / "b.parquet")
    scan = "from jobs.inputs.scan import *; import sys\n"  # in a separate process, which it may end
    scan += "for batch in scan_input(InputOptions(sys.argv[1])).batches(): print(*batch['id'], *batch['error_message'])"
    done = subprocess.run([sys.executable, "-c", scan, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "encrypted" in done.stdout
    assert "b.parquet#0" in done.stdout
    assert "a.parquet#0" not in done.stdout


def test_any_damage_to_a_parquet_footer_is_one_rejected_row(storage):
    sink = pa.BufferOutputStream()
    pq.write_table(hf_table(3), sink)
    whole = sink.getvalue().to_pybytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    name = whole.index(b"speaker", footer)
    for number, (start, damage) in enumerate({footer: b"\xff" * 40, name: b"\xff" * 7}.items()):
        data = whole[:start] + damage + whole[start + len(damage) :]
        storage.write_atomic(f"data/{number}.parquet", data)
    storage.write_atomic("data/good.parquet", whole)
    rows = {row["id"]: row["error_kind"] for row in rows_of(storage, "data")}
    assert rows == {"0.parquet": "torn_archive", "1.parquet": "torn_archive", "good.parquet#0": None}


@pytest.mark.skipif(not SHARED_SPEECH.exists(), reason="shared/speech is not here")
def test_shared_speech_as_files_and_as_manifest_names_the_same_files():
    storage = Storage(str(SHARED_SPEECH))
    files = {row["source"] for row in rows_of(storage, "librispeech-dev-clean")}
    entries = rows_of(storage, "librispeech-dev-clean.jsonl")
    assert files == {row["source"] for row in entries}
    assert len(entries) == 1313
    assert all(row["reference"] and row["audio_s"] > 0 for row in entries)
