"""jobs/storage/files.py against local disk and a real S3 server."""

import errno
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
from fault_proxy import DENIED, FaultProxy
from fsspec.implementations.memory import MemoryFileSystem
from job_samples import audio_bytes
from moto.server import ThreadedMotoServer

from jobs.inputs.listing import list_files, resolve_input
from jobs.sources.reader import SourceReader
from jobs.storage.connections import StorageOptions, scrub
from jobs.storage.files import Storage
from jobs.storage.local_files import HIDDEN_PREFIX, _own_prefix
from parakeet_core.errors import ConfigError, CredentialsError, ErrorKind, InputError

REPOSITORY = Path(__file__).resolve().parents[2]


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_written_is_read_named_and_listed(storage):
    assert not storage.exists("a/x.bin")
    assert storage.list_names("a") == []
    storage.write_atomic("a/x.bin", b"one")
    storage.write_atomic("a/x.bin", b"two")
    storage.write_atomic("a/deep/y.bin", b"three")
    assert storage.exists("a/x.bin")
    assert storage.read_bytes("a/x.bin") == b"two"
    assert storage.list_names("a") == ["x.bin"]
    with storage.open("a/x.bin") as file:
        file.seek(1)
        assert file.read() == b"wo"
    storage.delete("a/x.bin")
    storage.delete("a/x.bin")
    assert storage.list_names("a") == []


def test_what_is_deleted_together_is_gone_and_nothing_else(storage):
    odd = Storage(f"{storage.url}/run[12]*?", storage.options)
    like = Storage(f"{storage.url}/run1xy", storage.options)
    names = [f"t/{number}" for number in range(5)]
    for name in names:
        odd.write_atomic(name, b"1")
        like.write_atomic(name, b"1")
    odd.delete_all([*names[:4], "t/none"])
    assert (odd.list_names("t"), like.list_names("t")) == (["4"], [str(number) for number in range(5)])
    odd.delete_all([])


def test_a_refusal_to_delete_is_told(s3_server):
    with FaultProxy(s3_server.endpoint_url) as proxy:
        options = replace(s3_server.options, endpoint_url=proxy.endpoint_url, patience_s=0)
        storage = Storage(f"s3://{s3_server.bucket()}/out", options)
        for name in ("a", "b"):
            storage.write_atomic(name, b"1")
        proxy.plan = lambda request: DENIED if request.is_delete else None
        for delete in (lambda: storage.delete_all(["a", "b"]), lambda: storage.delete("a")):
            with pytest.raises(InputError) as caught:
                delete()
            assert (caught.value.kind, storage.list_names()) == (ErrorKind.FORBIDDEN, ["a", "b"])


def test_a_file_object_is_written_whole(storage, tmp_path):
    path = tmp_path / "part"
    path.write_bytes(os.urandom(3 << 20))
    with path.open("rb") as file:
        storage.write_atomic("part.bin", file)
    assert storage.read_bytes("part.bin") == path.read_bytes()


def test_exclusive_write_keeps_the_first(storage):
    assert storage.write_atomic("x", b"first", exclusive=True)
    assert not storage.write_atomic("x", b"second", exclusive=True)
    assert storage.read_bytes("x") == b"first"
    assert storage.list_names() == ["x"]


def test_of_many_exclusive_writers_on_local_disk_one_succeeds(tmp_path):
    storage = Storage(str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda n: storage.write_atomic("x", bytes([n]), exclusive=True), range(32)))
    assert sum(done) == 1
    assert storage.read_bytes("x") == bytes([done.index(True)])
    assert files_in(tmp_path) == ["x"]


def test_readers_see_all_or_nothing_while_writers_replace(tmp_path):
    storage = Storage(str(tmp_path))
    bodies = {bytes([n]) * 300_000 for n in range(8)}
    writers = [threading.Thread(target=storage.write_atomic, args=("x", body)) for body in bodies]
    for writer in writers:
        writer.start()
    seen = [storage.read_bytes("x") for _ in range(50) if storage.exists("x")]
    for writer in writers:
        writer.join()
    assert set(seen) <= bodies
    assert storage.list_names() == ["x"]


def test_a_failed_write_leaves_nothing(tmp_path):
    class Failing:
        def read(self, _size):
            raise OSError(28, "No space left on device")

    storage = Storage(str(tmp_path))
    with pytest.raises(InputError, match="no space is left") as caught:
        storage.write_atomic("x", Failing())
    assert caught.value.kind == ErrorKind.STORAGE
    assert files_in(tmp_path) == []


def test_a_killed_writer_leaves_nothing_among_the_files_of_a_table(tmp_path):
    write = "import os, signal, sys; from jobs.storage.files import Storage\n"
    write += "class Dies:\n    def read(self, _size): os.kill(os.getpid(), signal.SIGKILL)\n"
    write += "Storage(sys.argv[1]).write_atomic('table/part', Dies())"
    killed = subprocess.run([sys.executable, "-c", write, str(tmp_path)], cwd=REPOSITORY, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path / "table") == []
    assert len(files_in(tmp_path)) == 1  # it was killed while it wrote
    Storage(str(tmp_path)).write_atomic("table/part", b"whole")
    assert os.listdir(tmp_path / "table") == ["part"]


def test_temporaries_of_dead_writers_go_and_those_of_living_ones_stay(tmp_path):
    """A writer alive in another process, one that was killed, and files of another machine, one new and one old."""
    write = "import sys, time; from jobs.storage.files import Storage\n"
    write += (
        "class Slow:\n    def read(self, _size): print('writing', flush=True); return sys.stdin.buffer.readline()\n"
    )
    write += "Storage(sys.argv[1]).write_atomic('table/' + sys.argv[2], Slow())"
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", write, str(tmp_path), name],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("dead", "alive")
    ]
    for writer in writers:
        assert writer.stdout.readline() == "writing\n"
    writers[0].kill()
    writers[0].wait()
    (tmp_path / f".tmp/{HIDDEN_PREFIX}elsewhere-young").write_bytes(b"half")
    (tmp_path / f".tmp/{HIDDEN_PREFIX}elsewhere-old").write_bytes(b"half")
    os.utime(tmp_path / f".tmp/{HIDDEN_PREFIX}elsewhere-old", (0, 0))
    assert len(files_in(tmp_path)) == 4
    assert Storage(str(tmp_path)).remove_dead_temporaries() == 2
    writers[1].communicate("whole\n", timeout=60)
    assert writers[1].returncode == 0
    assert files_in(tmp_path) == [f".tmp/{HIDDEN_PREFIX}elsewhere-young", "table/alive"]


def test_what_a_killed_writer_left_is_removed_where_only_who_writes_may_lock(tmp_path, monkeypatch):
    """As on NFS, whose client turns flock into an fcntl lock; see flock(2)."""

    def flock_of_nfs(file, operation: int) -> None:
        mode = fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE
        if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(file, operation)

    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    (tmp_path / ".tmp").mkdir()
    (tmp_path / f".tmp/{_own_prefix()}0123").write_bytes(b"half")
    storage = Storage(str(tmp_path))
    storage.write_atomic("table/part", b"whole")
    assert storage.remove_dead_temporaries() == 1
    assert files_in(tmp_path) == ["table/part"]


def test_half_written_files_are_not_listed(tmp_path):
    (tmp_path / f"{HIDDEN_PREFIX}0123").write_bytes(b"half")
    (tmp_path / "x").write_bytes(b"whole")
    assert Storage(str(tmp_path)).list_names() == ["x"]


def test_missing_objects_are_missing(storage):
    storage.write_atomic("x", b"1")
    with pytest.raises(InputError) as caught:
        storage.read_bytes("y")
    assert caught.value.kind == ErrorKind.MISSING_OBJECT
    assert "y" in caught.value.message


def test_a_wrong_key_is_no_objects_fault_and_is_not_named(s3_server):
    good = s3_server.options
    bucket = s3_server.bucket()
    secret = "canary-secret-0123456789"
    storage = Storage(f"s3://{bucket}", StorageOptions(good.endpoint_url, good.region, "canary-key-1", secret))
    with pytest.raises(CredentialsError) as caught:
        storage.read_bytes("x")
    for text in (str(caught.value), repr(storage), repr(storage.options)):
        assert "canary" not in text


def test_unreachable_endpoint_is_storage():
    # Port 1 of the loopback refuses at once; five attempts with backoff would take ten seconds, so there is one.
    options = StorageOptions("http://127.0.0.1:1", "us-east-1", "k" * 8, "s" * 8, patience_s=0)
    storage = Storage("s3://bucket/x", options)
    storage.fs.config_kwargs["retries"] = {"mode": "standard", "total_max_attempts": 1}
    with pytest.raises(InputError) as caught:
        storage.read_bytes("y")
    assert caught.value.kind == ErrorKind.STORAGE


class AnswerError(Exception):
    """Like those of gcsfs, with `code`, a number or text, or those of azure, with `status_code`."""

    def __init__(self, **answer):
        super().__init__("the server refuses https://host/x?sig=canary")
        vars(self).update(answer)


class NoAnswerError(Exception):
    """Like that of azure when the connection failed."""

    __module__ = "azure.core.exceptions"
    inner_exception = None


class CheckError(Exception):
    """Like that of gcsfs when the content does not match its digest."""

    __module__ = "gcsfs.retry"


class AnsweringFileSystem(MemoryFileSystem):
    """Objects in memory; the first requests for those in `failing` raise the errors listed there."""

    protocol = "answering"
    store, pseudo_dirs, failing, requests = {}, [""], {}, []

    def cat_file(self, path, **options):
        self.requests.append(path)
        if self.failing.get(path):
            raise self.failing[path].pop(0)
        return super().cat_file(path, **options)


@pytest.fixture
def answering():
    fsspec.register_implementation("answering", AnsweringFileSystem, clobber=True)
    AnsweringFileSystem.requests.clear()
    AnsweringFileSystem.failing.clear()
    return AnsweringFileSystem


@pytest.mark.parametrize(
    "error",
    [
        AnswerError(code=503),
        AnswerError(code="429"),
        AnswerError(status_code=500),
        AnswerError(status_code=206),  # the body broke off
        NoAnswerError("cannot connect"),
    ],
)
def test_what_may_pass_is_tried_again_whatever_the_store(answering, error):
    storage = Storage("answering://bucket", StorageOptions(patience_s=30))
    storage.write_atomic("x", b"there")
    answering.failing["bucket/x"] = [error]
    assert storage.read_bytes("x") == b"there"
    assert len(answering.requests) == 2


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AnswerError(code=404), ErrorKind.MISSING_OBJECT),
        (AnswerError(status_code=404), ErrorKind.MISSING_OBJECT),
        (AnswerError(code="403"), ErrorKind.FORBIDDEN),
        (AnswerError(status_code=401), ErrorKind.FORBIDDEN),
        (AnswerError(code=400), ErrorKind.STORAGE),
        (AnswerError(code=None), ErrorKind.STORAGE),
        (CheckError("digests differ"), ErrorKind.STORAGE),
    ],
)
def test_what_stays_is_the_items_error_whatever_the_store(answering, error, kind):
    answering.failing["bucket/x"] = [error]
    with pytest.raises(InputError) as caught:
        SourceReader(StorageOptions(patience_s=30)).fetch("answering://bucket/x")
    assert caught.value.kind == kind
    assert "canary" not in caught.value.message
    assert len(answering.requests) == 1


def test_a_defect_is_not_taken_for_the_stores(answering):
    answering.failing["bucket/x"] = [KeyError("defect")]
    with pytest.raises(KeyError):
        SourceReader().fetch("answering://bucket/x")


def test_endpoint_and_region_come_from_the_usual_variables():
    found = StorageOptions().for_s3({"AWS_ENDPOINT_URL": "http://a", "AWS_REGION": "eu-north-1"})
    assert found["endpoint_url"] == "http://a"
    assert found["client_kwargs"] == {"region_name": "eu-north-1"}
    assert StorageOptions("http://b").for_s3({"AWS_ENDPOINT_URL": "http://a"})["endpoint_url"] == "http://b"


def test_credentials_come_from_the_environment(s3_server, monkeypatch):
    bucket = s3_server.bucket()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.endpoint_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    Storage(f"s3://{bucket}").write_atomic("x", b"1")
    assert (s3_server.folder / bucket / "x").read_bytes() == b"1"


def test_scrub_removes_every_form_of_credential(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary/secret")
    text = "s3://user:pass@host/x https://h/x?X-Amz-Signature=abc canary/secret"
    cleaned = scrub(text, StorageOptions(token="sometoken"))
    for secret in ("user", "pass", "abc", "canary"):
        assert secret not in cleaned
    assert "sometoken" not in scrub("a sometoken b", StorageOptions(token="sometoken"))


def test_storage_travels_between_processes(storage):
    copy = pickle.loads(pickle.dumps(storage))  # noqa: S301 - our own bytes
    copy.write_atomic("x", b"1")
    assert storage.read_bytes("x") == b"1"


def test_unknown_scheme_is_a_config_error():
    with pytest.raises(ConfigError, match="nosuch"):
        Storage("nosuch://bucket/x")


def test_listing_pages_are_complete(s3_server):
    bucket = s3_server.bucket()
    folder = s3_server.folder / bucket / "in" / "deep"
    folder.mkdir(parents=True)
    for number in range(2_300):  # more than two pages of 1000
        (folder / f"{number:05d}.wav").write_bytes(b"x" * (number % 7))
    storage = Storage(f"s3://{bucket}/in", s3_server.options)
    listed = {n: s for batch in list_files(storage) for n, s in zip(*batch.to_pydict().values(), strict=True)}
    assert listed == {f"deep/{number:05d}.wav": number % 7 for number in range(2_300)}


def test_empty_ranges_of_a_listing_cost_one_request_each(s3_server):
    """As when the parts of early shards are merged: after each empty range come all the parts of the late ones."""
    bucket = s3_server.bucket()
    (s3_server.folder / bucket / "t").mkdir()
    names = [f"part-{number:05d}" for number in range(3_000, 6_000)]
    for name in names:
        (s3_server.folder / bucket / "t" / name).touch()
    with FaultProxy(s3_server.endpoint_url) as proxy:
        storage = Storage(f"s3://{bucket}", replace(s3_server.options, endpoint_url=proxy.endpoint_url))
        assert storage.list_names("t", [f"part-{number:05d}" for number in range(0, 3_000, 500)]) == names
        assert sum(request.is_listing for request in proxy.seen) == 6 + 3


def test_one_object_a_prefix_and_a_glob_are_told_apart(storage):
    for name in ("a/one.wav", "a/one.wav.txt", "a/b/two.wav", "a/b/two.flac"):
        storage.write_atomic(name, audio_bytes(0.1))
    cases = {
        "a": ["b/two.flac", "b/two.wav", "one.wav", "one.wav.txt"],
        "a/": ["b/two.flac", "b/two.wav", "one.wav", "one.wav.txt"],
        "a/one.wav": ["one.wav"],
        "a/*.wav": ["one.wav"],
        "a/**/*.wav": ["b/two.wav", "one.wav"],
        "*/b/two.*": ["a/b/two.flac", "a/b/two.wav"],
    }
    for url, expected in cases.items():
        found, pattern, name = resolve_input(f"{storage.url}/{url}", storage.options)
        assert sorted(n for b in list_files(found, pattern, name) for n in b["name"].to_pylist()) == expected, url
    with pytest.raises(InputError) as caught:
        resolve_input(f"{storage.url}/a/none", storage.options)
    assert caught.value.kind == ErrorKind.MISSING_OBJECT


def test_a_slash_tells_a_folder_from_an_object_of_its_name():
    """rclone's server keeps objects as files, and cannot hold both; so this uses moto's."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        options = StorageOptions("http://{}:{}".format(*server.get_host_and_port()), "us-east-1", "key", "secret")
        bucket = Storage("s3://moto-bucket", options)
        bucket.fs.call_s3("create_bucket", Bucket="moto-bucket")
        for name in ("speech", "speech/a.wav", "speech/a.tar"):
            bucket.write_atomic(name, b"1")
        cases = {"speech": "speech", "speech/": None, "speech/a.tar": "a.tar", "speech/a.tar/": "a.tar"}
        for url, expected in cases.items():
            found, _, name = resolve_input(f"s3://moto-bucket/{url}", options)
            assert (name, found.root) == (expected, "moto-bucket" if url == "speech" else "moto-bucket/speech")
    finally:
        server.stop()


def test_links_to_folders_are_followed_once(tmp_path):
    outside, inside = tmp_path / "outside", tmp_path / "in"
    outside.mkdir()
    (inside / "real").mkdir(parents=True)
    (outside / "a.wav").write_bytes(b"1")
    (inside / "real" / "b.wav").write_bytes(b"1")
    os.symlink(outside, inside / "link2")
    os.symlink(outside, inside / "link1")
    os.symlink(inside, inside / "real" / "cycle")
    os.symlink(inside, outside / "back")
    names = [name for batch in list_files(Storage(str(inside))) for name in batch["name"].to_pylist()]
    assert sorted(names) == ["link1/a.wav", "real/b.wav"]


def test_a_link_counts_where_its_folder_is_hidden_or_no_match_of_the_glob(tmp_path):
    for name in ("releases/v5/a.wav", "releases/v5/deep/b.wav", ".store/c.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    os.symlink("releases/v5", tmp_path / "latest")
    os.symlink("../..", tmp_path / "releases/v5/cycle")
    os.symlink(".store", tmp_path / "data")
    cases = {
        "*/*.wav": ["data/c.wav", "latest/a.wav"],
        "lat*/**/*.wav": ["latest/a.wav", "latest/deep/b.wav"],
        "*/*/*.wav": ["latest/deep/b.wav", "releases/v5/a.wav"],
        "**/*.wav": ["data/c.wav", "releases/v5/a.wav", "releases/v5/deep/b.wav"],
        None: ["data/c.wav", "releases/v5/a.wav", "releases/v5/deep/b.wav"],
    }
    for pattern, expected in cases.items():
        names = [name for batch in list_files(Storage(str(tmp_path)), pattern) for name in batch["name"].to_pylist()]
        assert sorted(name for name in names if not name.startswith(".store/")) == expected, pattern


@pytest.mark.parametrize("url", ["nosuch://a/b", "github://owner/repository", "hdfs://nowhere/a"])
def test_a_scheme_that_cannot_be_reached_by_a_url_alone_is_refused(url):
    with pytest.raises(ConfigError, match=r"no storage for the scheme '\w+'.*; use s3:// or a path"):
        Storage(url).exists("a")
