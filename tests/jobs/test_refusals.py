"""What a run refuses before Ray starts, in one line that says what to do, and what it accepts although it looks odd."""

import os
import pickle
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from job_layouts import TINY_EN, job_config
from job_samples import audio_bytes

from jobs import show
from jobs.compact import CompactConfig
from jobs.models import resolve_model
from jobs.plan import main as plan_main
from jobs.preparation import prepare
from jobs.ray_session import note_local_output
from jobs.storage.connections import DEFAULT_OPTIONS
from jobs.storage.files import Storage
from jobs.table.parts import TABLE_FOLDER, find_committed
from jobs.table.schema import TRANSCRIPT_SCHEMA
from parakeet_core import ConfigError


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    (folder / "a.wav").write_bytes(audio_bytes(0.5))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/a.jsonl").write_text('{"audio_filepath": "../clips/a.wav", "duration": 0.5}\n')
    return folder


@pytest.mark.parametrize(
    ("input_", "output"),
    [("clips", "clips/out"), ("clips", "clips"), ("clips/", "clips/x/.."), ("clips/**", "clips/out")]
    + [("link", "clips/out"), ("clips", "link/out"), ("*/*/*/*", "clips/out"), ("clips/*/*.parquet", "clips")],
)
def test_an_output_that_the_next_run_would_read_as_input(clips, input_, output):
    (clips.parent / "link").symlink_to(clips)
    with pytest.raises(ConfigError, match="give a folder beside it"):
        prepare(job_config(clips.parent / input_, os.path.normpath(clips.parent / output)))
    assert sorted(os.listdir(clips)) == ["a.wav"]


@pytest.mark.parametrize(
    ("input_", "output"),
    [("clips", "clips-out"), ("lists/a.jsonl", "lists/out"), ("clips/*.wav", "clips/out")]
    + [("*/*.wav", "clips/out"), ("*/*.wav", "out")],
)
def test_outputs_beside_the_input(clips, input_, output):
    assert prepare(job_config(clips.parent / input_, clips.parent / output)).shards.num_rows == 1


@pytest.mark.parametrize(
    ("option", "url"),
    [("input", "s3://"), ("input", "https://"), ("output", "s3:///"), ("output", "file://"), ("model", "s3://")],
)
def test_a_url_that_names_nothing(clips, option, url):
    """What a shell makes of s3://$BUCKET if BUCKET is not set."""
    config = replace(job_config(clips, clips.parent / "out"), **{option: url})
    with pytest.raises(ConfigError, match=f"{url} names no bucket and no folder"):
        prepare(config)
    assert sorted(os.listdir(clips.parent)) == ["clips", "lists"]


@pytest.mark.parametrize("endpoint", ["localhost:9000", "minio", "ftp://host", "http://"])
def test_an_endpoint_that_is_no_url(endpoint):
    with pytest.raises(ConfigError, match="expected a URL, as http://localhost:9000"):
        job_config("in", "out", s3_endpoint_url=endpoint)


@pytest.mark.parametrize("name", ["", "CPU", "memory", "object_store_memory"])
def test_resources_that_ray_takes_by_options_of_their_own(name):
    with pytest.raises(ConfigError, match="expected the name of a custom resource"):
        job_config("in", "out", model_resource=name)


def test_options_of_storage_are_checked_by_each_command():
    with pytest.raises(ConfigError, match="user or password") as refused:
        CompactConfig(output="out", s3_endpoint_url="user:secret@host")
    assert "secret" not in str(refused.value)


def test_what_file_browsers_and_writers_leave_in_a_table_is_not_taken_for_rows(tmp_path):
    output = Storage(str(tmp_path))
    for name in (".DS_Store", "_SUCCESS", ".nfs0001"):
        output.write_atomic(f"{TABLE_FOLDER}/{name}", b"x")
    assert not find_committed(output, "f" * 8, set()).files
    output.write_atomic(f"{TABLE_FOLDER}/notes.txt", b"x")
    with pytest.raises(ConfigError, match="1 files are not parts of this table \\(notes.txt\\)"):
        find_committed(output, "f" * 8, set())


@pytest.mark.parametrize("name", ["model", "models/mine"])  # the second could be an id of the Hugging Face hub
def test_relative_paths_hold_in_a_process_with_another_working_directory(name, tmp_path, monkeypatch):
    """Workers of a cluster that is already running have their own."""
    monkeypatch.chdir(tmp_path)
    output = Storage("out")
    output.write_atomic("x", b"y")
    (tmp_path / "models").mkdir()
    os.symlink(TINY_EN, name)
    packed = pickle.dumps((output, resolve_model(name, DEFAULT_OPTIONS)))
    monkeypatch.chdir("/")
    output, model = pickle.loads(packed)  # noqa: S301 - our own bytes
    assert output.read_bytes("x") == b"y"
    assert model.load("float32", "cpu").digest == model.digest


@pytest.mark.parametrize(
    ("url", "nodes", "noted"), [("/data/out", 2, True), ("/data/out", 1, False), ("s3://b/out", 2, False)]
)
def test_a_path_that_several_nodes_write_to(url, nodes, noted, capsys):
    note_local_output(Storage(url), nodes)
    assert ("must be one folder that all of them share" in capsys.readouterr().err) == noted


def test_exclusive_writes_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")  # as on FAT and on some network filesystems

    monkeypatch.setattr(os, "link", refuse)
    storage = Storage(str(tmp_path))
    assert storage.write_atomic("x", b"first", exclusive=True)
    assert not storage.write_atomic("x", b"second", exclusive=True)
    assert storage.read_bytes("x") == b"first"


def test_brackets_are_shown_as_they_are(tmp_path, capsys):
    rows = [
        {"id": "a[/b].wav", "source": "/a", "status": "ok", "text": "[bold]so[/bold]"},
        {"id": "b", "source": "/b", "status": "error", "error_message": "[m.jsonl, line 3] no audio"},
    ]
    table = pa.Table.from_pylist(rows, schema=TRANSCRIPT_SCHEMA)
    (tmp_path / TABLE_FOLDER).mkdir()
    pq.write_table(table, tmp_path / TABLE_FOLDER / "part-0.parquet")
    assert show.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("a[/b].wav", "[bold]so[/bold]", "[[m.jsonl, line 3] no audio]"):
        assert text in printed


def test_a_rate_that_takes_longer_than_calendars(clips, capsys):
    assert plan_main(["--input", str(clips), "--rtfx", "1e-12"]) == 0
    assert "done about" not in capsys.readouterr().out
