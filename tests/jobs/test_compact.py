"""Merging of parts: same rows before and after, nothing to do the second time, and a job resumes on the result."""

import dataclasses
import json
import os
import random
import shutil
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fault_proxy import DENIED, FaultProxy, no_fault
from job_layouts import job_config, prompt_records, write_layouts
from job_samples import audio_bytes
from table_reading import read_by_glob

from jobs.command_line import JobStoppedError
from jobs.compact import CompactConfig, compact, main
from jobs.storage.files import Storage
from jobs.storage.local_files import try_lock
from jobs.table import merging
from jobs.table.folder_swap import recover_folder, swap_folder
from jobs.table.merging import merge_parts
from jobs.table.parts import find_committed
from jobs.table.schema import TRANSCRIPT_SCHEMA
from jobs.transcribe import run
from parakeet_core.errors import ConfigError, InputError

FIRST_LETTERS = "aZ\u00e4\uffff\U0001f600"  # UTF-16 would order the last two the other way
TARGET_MB = 0.02  # parts here are 5 to 10 KB: the result is several files


@pytest.fixture(scope="module")
def table(tmp_path_factory, ray_cluster) -> tuple[Path, Path]:
    """(input, finished output) of a real job with many parts; to be copied, not changed."""
    folder = tmp_path_factory.mktemp("compact")
    source = write_layouts(prompt_records(24), folder)["manifest"]
    assert run(job_config(source, folder / "out", shard_audio_s=5)).exit_code == 0
    assert len(list((folder / "out/transcripts").iterdir())) > 12
    return source, folder / "out"


@pytest.fixture(params=["local", "s3"])
def output(request, table, tmp_path, monkeypatch) -> Storage:
    """A copy of the output, on local disk and on the S3 server, reached with the usual AWS variables."""
    if request.param == "local":
        shutil.copytree(table[1], tmp_path / "out")
        return Storage(str(tmp_path / "out"))
    server = request.getfixturevalue("s3_server")
    for name, value in server.variables().items():
        monkeypatch.setenv(name, value)
    bucket = server.bucket()
    shutil.copytree(table[1], server.folder / bucket / "out")
    return Storage(f"s3://{bucket}/out", server.options)


def test_a_copy_holds_the_same_rows_and_the_table_is_untouched(output):
    before, names = read_by_glob(output, "transcripts"), output.list_names("transcripts")
    done = compact(CompactConfig(output=output.url, target_mb=TARGET_MB))
    assert 1 < done.merged <= done.files < len(names)
    folder = done.folder.removeprefix(output.source("")).strip("/")
    assert read_by_glob(output, folder) == before
    assert read_by_glob(output, "transcripts") == before
    assert output.list_names("transcripts") == names
    record = json.loads(output.read_bytes(f"{folder}.json"))
    assert (record["files"], record["rows"]) == (output.list_names(folder), len(before))
    assert compact(CompactConfig(output=output.url, target_mb=TARGET_MB)).merged == 0


def test_replaced_parts_are_the_same_table_and_the_job_has_nothing_to_do(output, table, capsys):
    before, names = read_by_glob(output, "transcripts"), output.list_names("transcripts")
    done = compact(CompactConfig(output=output.url, target_mb=TARGET_MB, replace=True))
    after = output.list_names("transcripts")
    assert 1 < done.files == len(after) < len(names)
    assert read_by_glob(output, "transcripts") == before
    assert compact(CompactConfig(output=output.url, target_mb=TARGET_MB, replace=True)).merged == 0
    assert output.list_names("transcripts") == after
    receipt = run(job_config(table[0], output.url, shard_audio_s=5))
    assert "nothing to do" in capsys.readouterr().err
    assert (receipt.exit_code, receipt.items_in, receipt.shards_this_run) == (0, 24, 0)
    output.delete("receipt.json")  # the counts are in the merged files, too
    again = run(job_config(table[0], output.url, shard_audio_s=5))
    assert (again.items_in, again.shards, again.ok, again.complete) == (24, receipt.shards, receipt.ok, True)
    assert again.hours_done == pytest.approx(receipt.hours_done)


def test_who_may_not_remove_parts_is_refused_or_told(table, s3_server, monkeypatch, capsys):
    bucket = s3_server.bucket()
    shutil.copytree(table[1], s3_server.folder / bucket / "out")
    with FaultProxy(s3_server.endpoint_url) as proxy:
        for name, value in s3_server.variables(proxy.endpoint_url).items():
            monkeypatch.setenv(name, value)
        output = Storage(f"s3://{bucket}/out")
        before, names = read_by_glob(output, "transcripts"), output.list_names("transcripts")
        command = ["--output", output.url, "--target-mb", str(TARGET_MB), "--replace"]
        proxy.plan = lambda request: DENIED if request.is_delete else None
        assert main(command) == 2
        assert "AccessDenied" in capsys.readouterr().err
        assert output.list_names("transcripts") == names
        proxy.plan = lambda request: DENIED if request.is_delete and request.method == "POST" else None
        assert main(command) == 1
        assert len(output.list_names("transcripts")) == len(names) + 1  # one merged file, and no other
        proxy.plan = no_fault
        assert main(command) == 0
        assert read_by_glob(output, "transcripts") == before


def test_a_run_whose_parts_are_merged_under_it_says_that_rows_stand_twice(table, s3_server, monkeypatch):
    bucket = s3_server.bucket()
    out, merged = (s3_server.folder / bucket / name for name in ("out", "merged"))
    for copy in (out, merged):
        shutil.copytree(table[1], copy)
    compact(CompactConfig(output=str(merged), replace=True))
    min((out / "transcripts").iterdir()).unlink()
    (out / "receipt.json").unlink()

    def merge(request):
        """Another run did the missing shard first, and its table is merged before this run puts its part."""
        if request.method == "PUT" and "/transcripts/part-" in request.path:
            shutil.rmtree(out / "transcripts")
            shutil.copytree(merged / "transcripts", out / "transcripts")

    with FaultProxy(s3_server.endpoint_url) as proxy:
        for name, value in s3_server.variables(proxy.endpoint_url).items():
            monkeypatch.setenv(name, value)
        config = job_config(table[0], f"s3://{bucket}/out", shard_audio_s=5)
        proxy.plan = merge
        with pytest.raises(JobStoppedError, match="jobs.compact --replace"):
            run(config)
        proxy.plan = no_fault
        output = Storage(f"s3://{bucket}/out")
        compact(CompactConfig(output=output.url, replace=True))
        assert len(read_by_glob(output, "transcripts")) == run(config).items_in == 24


def test_merged_files_are_ordered_and_say_what_they_hold(table, tmp_path):
    shutil.copytree(table[1], tmp_path / "out")
    compact(CompactConfig(output=str(tmp_path / "out"), replace=True))
    (path,) = (tmp_path / "out/transcripts").iterdir()
    merged, part = pq.ParquetFile(path), pq.ParquetFile(next((table[1] / "transcripts").iterdir()))
    ids = merged.read(columns=["id"])["id"].to_pylist()
    assert ids == sorted(ids)
    column = merged.metadata.row_group(0).column(0)
    assert (column.statistics.min, column.statistics.max) == (ids[0], ids[-1])
    assert merged.schema_arrow.remove_metadata().equals(TRANSCRIPT_SCHEMA)
    own = {b"parakeet.shard", b"parakeet.shards", b"parakeet.facts"}
    of_part = {key: value for key, value in part.schema_arrow.metadata.items() if key not in own}
    of_merged = {key: value for key, value in merged.schema_arrow.metadata.items() if key not in own}
    assert of_merged == of_part
    assert json.loads(merged.schema_arrow.metadata[b"parakeet.facts"])["rows"] == 24
    found = duckdb.sql(f"select count(distinct id), sum(len(words)) from '{path}'").fetchall()
    parts = duckdb.sql(f"select count(*), sum(len(words)) from '{table[1]}/transcripts/*.parquet'").fetchall()
    assert found == parts


def test_input_that_grows_after_merging_is_done_and_merged_in_its_turn(table, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    shutil.copytree(table[0].parent, source)
    config = job_config(source / "items.jsonl", output, shard_audio_s=5)
    run(config)
    compact(CompactConfig(output=str(output), replace=True))
    (source / "late.wav").write_bytes(audio_bytes(2.0))
    with (source / "items.jsonl").open("a") as file:
        file.write(json.dumps({"audio_filepath": "late.wav", "duration": 2.0}) + "\n")
    receipt = run(config)
    assert (receipt.items_in, receipt.shards_this_run, receipt.exit_code) == (25, 1, 0)
    assert compact(CompactConfig(output=str(output), replace=True)).files == 1
    assert len(read_by_glob(Storage(str(output)), "transcripts")) == 25


def test_parts_with_errors_that_may_pass_stay_apart_and_can_be_retried(tmp_path, ray_cluster):
    source = tmp_path / "in"
    source.mkdir()
    names = [f"{number}.wav" for number in range(4)] + ["late.wav"]
    for name in names[:-1]:
        (source / name).write_bytes(audio_bytes(1.0))
    lines = [json.dumps({"audio_filepath": name, "duration": 1.0}) for name in names]
    (source / "items.jsonl").write_text("\n".join(lines) + "\n")
    config = job_config(source / "items.jsonl", tmp_path / "out", shard_audio_s=1.5, max_error_rate=0.5)
    assert run(config).errors == 1
    assert compact(CompactConfig(output=str(tmp_path / "out"), replace=True)).files == 2
    (source / "late.wav").write_bytes(audio_bytes(1.0))
    receipt = run(dataclasses.replace(config, retry_errors=True))
    assert (receipt.errors, receipt.shards_this_run) == (0, 1)
    assert compact(CompactConfig(output=str(tmp_path / "out"), replace=True)).files == 1
    assert len(read_by_glob(Storage(str(tmp_path / "out")), "transcripts")) == 5


def test_what_comes_while_folders_change_places_and_what_others_put_there_is_kept(tmp_path):
    table, beside = tmp_path / "transcripts", tmp_path / "beside"
    merged, untouched, again, new = "merged-0-0.parquet", *(f"part-0000-00000{n}-a-0.parquet" for n in (2, 3, 4))
    gone = "part-0000-000001-a-0.parquet"
    table.mkdir()
    beside.mkdir()
    for name in (gone, untouched, again):
        (table / name).write_bytes(b"old")
    (beside / merged).write_bytes(b"merged")
    assert swap_folder(str(table), str(beside), [untouched, again])
    (beside / new).write_bytes(b"new")  # as by a writer that had opened the folder before
    replaced = beside / "replaced"
    replaced.write_bytes(b"retried")
    os.utime(replaced, ns=(1 << 62, 1 << 62))
    replaced.rename(beside / again)
    (beside / "_delta_log").mkdir()  # from other programs
    (beside / "_delta_log/0.json").write_bytes(b"{}")
    recover_folder(str(table), str(beside), {f"0000-00000{n}-a" for n in (1, 2, 3)})
    assert (table / "_delta_log/0.json").read_bytes() == b"{}"
    assert {path.name: path.read_bytes() for path in table.iterdir() if path.is_file()} == {
        merged: b"merged", untouched: b"old", again: b"retried", new: b"new"
    }  # fmt: skip


def test_an_unfinished_table_and_a_torn_part_are_refused(table, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(table[1], output)
    receipt = json.loads((output / "receipt.json").read_text())
    (output / "receipt.json").write_text(json.dumps(receipt | {"complete": False}))
    assert main(["--output", str(output)]) == 2
    assert "run the job to its end first" in capsys.readouterr().err
    (output / "receipt.json").write_text(json.dumps(receipt))
    victim = sorted((output / "transcripts").iterdir())[0]
    content = victim.read_bytes()
    victim.write_bytes(content[:4] + bytes(64) + content[68:])
    with pytest.raises(InputError, match=victim.name):
        compact(CompactConfig(output=str(output), replace=True))
    assert len(list((output / "transcripts").iterdir())) == receipt["shards"]
    with pytest.raises(ConfigError, match="target-mb"):
        CompactConfig(output=str(output), target_mb=0)


def test_row_groups_are_gathered_in_order_whatever_the_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "ROW_GROUP_ROWS", 70)
    rng = random.Random(5)
    tables = []
    for number in range(20):
        ids = [f"{rng.choice(FIRST_LETTERS)}{rng.randrange(10**9)}" for _ in range(number * 3)]
        rows = [{"id": id_, "source": "s", "status": "ok", "text": id_[::-1]} for id_ in ids]
        tables.append(pa.Table.from_pylist(rows, schema=TRANSCRIPT_SCHEMA))
        pq.write_table(tables[-1], tmp_path / f"{number}.parquet")
    names = [f"{number}.parquet" for number in range(20)]
    assert merge_parts(Storage(str(tmp_path)), names, {b"k": b"v"}, tmp_path / "merged.parquet") == 570
    merged = pq.ParquetFile(tmp_path / "merged.parquet")
    assert merged.read().replace_schema_metadata(None).equals(pa.concat_tables(tables).sort_by("id"))
    sizes = [merged.metadata.row_group(group).num_rows for group in range(merged.num_row_groups)]
    assert sizes == [70] * 8 + [10]


def test_committed_shards_are_those_of_parts_and_merged_files(table, tmp_path):
    shutil.copytree(table[1], tmp_path / "out")
    output, receipt = Storage(str(tmp_path / "out")), json.loads((table[1] / "receipt.json").read_text())
    planned = {part.name[5:25] for part in (table[1] / "transcripts").iterdir()}
    compact(CompactConfig(output=output.url, target_mb=TARGET_MB, replace=True))
    committed = find_committed(output, receipt["fingerprint"], planned)
    assert (committed.shards, committed.doubled) == (planned, set())
    gone = {part.name for part in (table[1] / "transcripts").iterdir()} - set(output.list_names("transcripts"))
    back = table[1] / "transcripts" / min(gone)
    shutil.copy(back, tmp_path / "out/transcripts")
    assert find_committed(output, receipt["fingerprint"], planned).doubled == {back.name[5:25]}
    with pytest.raises(ConfigError, match="jobs.compact --replace"):
        run(job_config(table[0], output.url, shard_audio_s=5))
    assert main(["--output", output.url]) == 2
    compact(CompactConfig(output=output.url, target_mb=TARGET_MB, replace=True))
    assert find_committed(output, receipt["fingerprint"], planned).doubled == set()


def test_two_replacements_of_one_folder_do_not_run_at_once(table, tmp_path, capsys):
    shutil.copytree(table[1], tmp_path / "out")
    output, command = Storage(str(tmp_path / "out")), ["--output", str(tmp_path / "out"), "--replace"]
    names = output.list_names("transcripts")
    with try_lock(output.path("job.json")) as alone:
        assert alone
        assert main(command) == 2
        assert "another --replace is at work" in capsys.readouterr().err
        assert output.list_names("transcripts") == names
        assert main(command[:-1]) == 0  # a copy can be made meanwhile
    assert main(command) == 0
    assert len(output.list_names("transcripts")) == 1


def test_rows_that_stand_twice_are_mended_though_the_job_was_killed_since(table, tmp_path, capsys):
    shutil.copytree(table[1], tmp_path / "out")
    output = Storage(str(tmp_path / "out"))
    compact(CompactConfig(output=output.url, target_mb=TARGET_MB, replace=True))
    gone = {part.name for part in (table[1] / "transcripts").iterdir()} - set(output.list_names("transcripts"))
    shutil.copy(table[1] / "transcripts" / min(gone), tmp_path / "out/transcripts")
    receipt = json.loads(output.read_bytes("receipt.json"))
    output.write_atomic("receipt.json", json.dumps(receipt | {"complete": False}).encode())
    config = job_config(table[0], output.url, shard_audio_s=5)
    with pytest.raises(ConfigError, match="jobs.compact --replace"):
        run(config)
    assert main(["--output", output.url, "--replace"]) == 2
    assert "run the job to its end first" in capsys.readouterr().err
    receipt = run(config)
    assert (receipt.complete, receipt.items_in, len(read_by_glob(output, "transcripts"))) == (True, 24, 24)
    assert main(["--output", output.url, "--replace"]) == 0
