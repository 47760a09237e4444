"""The job from end to end: real Ray, real audio, local disk and a real S3 server."""

import dataclasses
import json
import shutil
from pathlib import Path

import jiwer
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import soundfile
from job_layouts import PROMPTS, TINY_EN, job_config, part_bytes, prompt_records, read_table
from job_samples import SHARED_SPEECH, audio_bytes

from jobs import transcribe
from jobs.command_line import JobStoppedError
from jobs.storage.files import Storage
from jobs.table.schema import TRANSCRIPT_SCHEMA
from jobs.transcribe import main, run
from parakeet_core import ConfigError, Transcriber, decode_audio
from parakeet_core.quantised import processor_multiplies_bytes

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """Stem of a prompt -> its text, from the core alone in this process."""
    names = [record["audio_filepath"] for record in prompt_records()]
    transcripts = Transcriber.load(TINY_EN).transcribe([PROMPTS / name for name in names])
    return {Path(name).stem: transcript.text for name, transcript in zip(names, transcripts, strict=True)}


@pytest.fixture(scope="module")
def finished(layouts, tmp_path_factory) -> Path:
    """The output of one job over the manifest, for tests that only read it."""
    output = tmp_path_factory.mktemp("finished") / "out"
    receipt = run(job_config(layouts["manifest"], output, shard_audio_s=20))
    assert receipt.exit_code == 0
    return output


def texts_by_stem(rows: list[dict]) -> dict[str, str]:
    return {Path(row["member"] or row["source"]).stem: row["text"] for row in rows}


@pytest.mark.parametrize("layout", ["files", "manifest", "webdataset", "parquet"])
@pytest.mark.parametrize("place", ["local", "s3"])
def test_every_layout_gives_the_same_texts(layout, place, layouts, expected, tmp_path, request, monkeypatch):
    source, output = str(layouts[layout]), str(tmp_path / "out")
    if place == "s3":
        server = request.getfixturevalue("s3_server")
        for name, value in (
            ("ACCESS_KEY_ID", server.key),
            ("SECRET_ACCESS_KEY", server.secret),
            ("REGION", "us-east-1"),
        ):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint_url)
        bucket = server.bucket()
        folder = layouts[layout].parent if layout == "manifest" else layouts[layout]
        shutil.copytree(folder, server.folder / bucket / "in")
        source = f"s3://{bucket}/in" + ("/items.jsonl" if layout == "manifest" else "")
        output = f"s3://{bucket}/out"
    receipt = run(job_config(source, output, shard_audio_s=20))
    assert (receipt.items_in, receipt.errors, receipt.exit_code) == (12, 0, 0)
    assert receipt.items_in == receipt.ok + receipt.empty + receipt.errors
    storage = job_config(source, output).storage()
    rows = read_parts(Storage(output, storage))
    assert len({row["id"] for row in rows}) == 12
    by_path = {
        stem: text
        for stem, text in expected.items()
        if stem in {Path(r["audio_filepath"]).stem for r in prompt_records(12)}
    }
    if layout == "parquet":  # ids are row numbers there; the reference tells which prompt a row is
        assert sorted(row["text"] for row in rows) == sorted(by_path.values())
    else:
        assert texts_by_stem(rows) == by_path
    if layout != "files":
        assert receipt.wer is not None
        assert {row["reference"] for row in rows} == {record["text"] for record in prompt_records(12)}


def read_parts(output: Storage) -> list[dict]:
    parts = [output.path(f"transcripts/{name}") for name in output.list_names("transcripts")]
    return ds.dataset(parts, format="parquet", filesystem=output.fs).to_table().to_pylist()


def test_table_holds_what_the_schema_says(finished):
    table = ds.dataset(finished / "transcripts", format="parquet").to_table()
    assert table.schema.remove_metadata().equals(TRANSCRIPT_SCHEMA)
    assert {path.suffix for path in (finished / "transcripts").iterdir()} == {".parquet"}
    durations = {record["audio_filepath"]: record["duration"] for record in prompt_records(12)}
    for row in table.to_pylist():
        assert row["status"] == "ok"
        assert row["duration_s"] == pytest.approx(durations[row["id"]], abs=0.01)
        assert " ".join(word["word"] for word in row["words"]) == " ".join(row["text"].split())
        ends = [word["end_s"] for word in row["words"]]
        starts = [word["start_s"] for word in row["words"]]
        assert starts == sorted(starts)
        assert all(start < end for start, end in zip(starts, ends, strict=True))
        assert ends[-1] <= row["duration_s"] + 0.08
        assert 0 < row["confidence"] <= 1
        assert -80 < row["rms_dbfs"] < 0
        assert json.loads(row["extra"])["prompt"]


def test_levels_are_those_of_the_waveform(finished):
    row = next(row for row in read_table(finished) if row["id"].endswith(".flac"))
    waveform, _ = soundfile.read(PROMPTS / row["id"])
    assert row["rms_dbfs"] == pytest.approx(10 * np.log10((waveform**2).mean()), abs=0.02)


def test_parts_name_model_and_options(finished):
    schema = ds.dataset(finished / "transcripts", format="parquet").schema
    metadata = {key.decode(): value.decode() for key, value in schema.metadata.items()}
    assert metadata["parakeet.schema_version"] == "1"
    assert len(metadata["parakeet.weights_sha256"]) == 64
    assert json.loads(metadata["parakeet.options"])["dtype"] == "float32"


def test_other_readers_open_it_as_one_table(finished, tmp_path):
    import datasets
    import duckdb
    import pandas
    import polars

    rows = read_table(finished)
    wanted = [(row["id"], row["text"]) for row in rows]
    pattern = f"{finished}/transcripts/*.parquet"
    assert duckdb.sql(f"select id, text from '{pattern}' order by id").fetchall() == wanted
    assert polars.read_parquet(pattern).sort("id").select("id", "text").rows() == wanted
    frame = pandas.read_parquet(finished / "transcripts").sort_values("id")
    assert list(zip(frame["id"], frame["text"], strict=True)) == wanted
    loaded = datasets.load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(tmp_path))
    assert sorted(zip(loaded["id"], loaded["text"], strict=True)) == wanted


def test_rerun_does_nothing_and_a_lost_part_comes_back_the_same(layouts, tmp_path, capsys):
    config = job_config(layouts["manifest"], tmp_path / "out", shard_audio_s=15)
    first = run(config)
    before = part_bytes(tmp_path / "out")
    assert len(before) == first.shards > 2
    again = run(config)
    assert "nothing to do" in capsys.readouterr().err
    assert (again.items_in, again.shards_this_run, again.exit_code) == (first.items_in, 0, 0)
    assert part_bytes(tmp_path / "out") == before
    lost = sorted(before)[1]
    (tmp_path / "out/transcripts" / lost).unlink()
    assert run(config).shards_this_run == 1
    assert part_bytes(tmp_path / "out") == before


def test_stages_apart_give_the_parts_of_stages_chained(layouts, tmp_path):
    run(job_config(layouts["files"], tmp_path / "chained"))
    run(job_config(layouts["files"], tmp_path / "apart", feature_actors=(1, 1), model_actors=(1, 1)))
    assert part_bytes(tmp_path / "apart") == part_bytes(tmp_path / "chained")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_features_by_the_model_actors(dtype, layouts, tmp_path):
    """From float32 samples, the same parts. Samples of 16-bit files travel unchanged as 16 bits, but their features are
    not rounded to float16 on the way."""
    chained = {"dtype": dtype, "features": "gpu"}
    run(job_config(layouts["files"], tmp_path / "sent", dtype=dtype))
    receipt = run(job_config(layouts["files"], tmp_path / "chained", **chained))
    run(job_config(layouts["files"], tmp_path / "apart", feature_actors=(1, 1), model_actors=(1, 1), **chained))
    assert receipt.errors == 0
    assert receipt.stage_seconds["features"] > 0
    assert part_bytes(tmp_path / "apart") == part_bytes(tmp_path / "chained")
    if dtype == "float32":
        assert part_bytes(tmp_path / "chained") == part_bytes(tmp_path / "sent")
    else:
        sent, chained = ([row["text"] for row in read_table(tmp_path / name)] for name in ("sent", "chained"))
        assert jiwer.wer(sent, chained) <= 0.1  # bfloat16 against float32 on all prompts: 0.002


@pytest.mark.skipif(not processor_multiplies_bytes(), reason="this processor has no VNNI or AMX")
def test_a_job_in_8_bit_integers(layouts, tmp_path):
    run(job_config(layouts["files"], tmp_path / "float32"))
    receipt = run(job_config(layouts["files"], tmp_path / "int8", dtype="int8"))
    assert (receipt.errors, receipt.dtype, receipt.complete) == (0, "int8", True)
    exact, eight_bit = ([row["text"] for row in read_table(tmp_path / name)] for name in ("float32", "int8"))
    assert jiwer.wer(exact, eight_bit) <= 0.1  # on all prompts 0.006
    with pytest.raises(ConfigError, match="dtype int8 is for CPUs"):
        run(job_config(layouts["files"], tmp_path / "cuda", dtype="int8", device="cuda"))
    assert not (tmp_path / "cuda/job.json").exists()


def test_a_worker_without_the_model_says_so(layouts, tmp_path, monkeypatch, capsys):
    """As on a node that does not share the path; here the model is removed after the driver has read it."""
    shutil.copytree(TINY_EN, tmp_path / "model")

    def claim_and_lose(*arguments):
        shutil.rmtree(tmp_path / "model")
        return claim(*arguments)

    claim = transcribe._claim
    monkeypatch.setattr(transcribe, "_claim", claim_and_lose)
    options = ["--model", str(tmp_path / "model"), "--input", str(layouts["manifest"])]
    assert main([*options, "--output", str(tmp_path / "out"), "--device", "cpu", "--model-actors", "1"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("stopped: a worker could not start")
    assert "no such file or directory on this node" in line


def test_grown_input_becomes_new_shards(layouts, tmp_path):
    source = tmp_path / "in"
    shutil.copytree(layouts["files"], source)
    config = job_config(source, tmp_path / "out")
    first = run(config)
    before = part_bytes(tmp_path / "out")
    (source / "late.wav").write_bytes(audio_bytes(2.0))
    second = run(config)
    assert (second.items_in, second.shards_this_run) == (first.items_in + 1, 1)
    after = part_bytes(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert "late.wav" in {row["id"] for row in read_table(tmp_path / "out")}


def bad_inputs(folder: Path) -> dict[str, str | None]:
    """A folder of audio as found in the wild; name -> the error kind its row must have, None for a good one."""
    folder.mkdir()
    good = audio_bytes(2.0)
    with_nan = np.full(16_000, 0.1, dtype=np.float32)
    with_nan[5] = np.nan
    soundfile.write(folder / "nan.wav", with_nan, 16_000, subtype="FLOAT")
    soundfile.write(folder / "eight.wav", np.full((96_000, 8), 0.01, dtype=np.float32), 96_000)
    contents = {
        "good.wav": good,
        "empty.wav": b"",
        "text.wav": b"this is not audio at all, " * 50,
        "truncated.wav": good[: len(good) // 2],
        "blip.wav": audio_bytes(0.005),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "forbidden.wav").symlink_to(folder / "nowhere.wav")
    return {
        "good.wav": None, "eight.wav": None, "blip.wav": None, "empty.wav": "empty_file", "text.wav": "not_audio",
        "truncated.wav": "truncated", "nan.wav": "non_finite", "forbidden.wav": "missing_object",
    }  # fmt: skip


def test_every_bad_item_has_its_row_and_the_job_goes_on(tmp_path):
    kinds = bad_inputs(tmp_path / "in")
    receipt = run(job_config(tmp_path / "in", tmp_path / "out", max_error_rate=0.5))
    rows = {row["id"]: row for row in read_table(tmp_path / "out")}
    assert {name: row["error_kind"] for name, row in rows.items()} == kinds
    assert rows["blip.wav"]["status"] == "empty"
    for row in rows.values():
        if row["error_kind"]:
            assert row["status"] == "error"
            assert row["text"] is None
            assert len(row["error_message"]) > 20
    assert (receipt.items_in, receipt.errors) == (8, 5)
    assert receipt.exit_code == 3
    assert receipt.errors_by_kind == {kind: 1 for kind in kinds.values() if kind}


def test_manifest_lines_that_are_no_items_have_rows_too(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.wav").write_bytes(audio_bytes(4.0, channels=2))
    lines = [
        '{"audio_filepath": "a.wav", "offset": 1.0, "duration": 2.0, "channel": 1, "speaker": "x"}',
        '{"audio_filepath": "a.wav", "offset": 1.0, "duration": 2.0, "channel": 0, "speaker": "x"}',
        "this is not json",
        '{"audio_filepath": "a.wav", "offset": -1.0, "duration": 2.0}',
        '{"audio_filepath": "a.wav", "offset": 3.0, "duration": 9.0}',
        '{"audio_filepath": "a.wav", "channel": 7}',
        '{"audio_filepath": "gone.wav"}',
    ]
    (source / "items.jsonl").write_text("\n".join(lines) + "\n")
    receipt = run(job_config(source / "items.jsonl", tmp_path / "out"))
    rows = read_table(tmp_path / "out")
    assert receipt.items_in == len(rows) == len(lines)
    kinds = sorted(row["error_kind"] for row in rows if row["error_kind"])
    assert kinds == ["bad_channel", "bad_record", "bad_segment", "bad_segment", "missing_object"]
    channels = {row["channel"] for row in rows if row["status"] != "error"}
    assert channels == {0, 1}
    assert all(json.loads(row["extra"]) == {"speaker": "x"} for row in rows if row["status"] != "error")
    assert all(row["duration_s"] == 2.0 for row in rows if row["status"] != "error")


def test_another_configuration_is_refused_with_both_fingerprints(finished, layouts):
    with pytest.raises(ConfigError, match=r"found [0-9a-f]{10} .* this run is [0-9a-f]{10} .* --new-version"):
        run(job_config(layouts["manifest"], finished, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input", "{tmp}/nothing"], "nothing"),
        (["--input", "{tmp}/empty.jsonl"], "there is no item in them"),
        (["--model", "{tmp}/nothing"], "no such"),
        (["--output", "/proc/cannot/write"], "cannot be used"),
        (["--max-error-rate", "2"], "expected a share"),
        (["--model-actors", "3:1"], "MIN <= MAX"),
        (["--shard-audio-s", "-1"], "more than 0"),
    ],
)
def test_refused_before_any_work_with_one_line_and_exit_2(options, message, layouts, tmp_path, capsys):
    arguments = {"--input": str(layouts["files"]), "--output": str(tmp_path / "out"), "--model": str(TINY_EN)}
    arguments |= {options[0]: options[1].format(tmp=tmp_path)}
    (tmp_path / "empty.jsonl").touch()
    assert main([part for pair in arguments.items() for part in pair]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out" / "transcripts").exists()


def test_files_of_another_origin_in_the_table_are_refused(layouts, tmp_path):
    (tmp_path / "out/transcripts").mkdir(parents=True)
    (tmp_path / "out/transcripts/other.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="other.parquet"):
        run(job_config(layouts["files"], tmp_path / "out"))


def test_dry_run_touches_nothing(layouts, tmp_path, capsys):
    arguments = ["--input", str(layouts["files"]), "--output", str(tmp_path / "out"), "--model", str(TINY_EN)]
    assert main([*arguments, "--dry-run", "--rtfx", "1000", "--gpu-hour-price", "3"]) == 0
    printed = capsys.readouterr().out
    assert "items     12" in printed
    assert "cost" in printed
    assert not (tmp_path / "out").exists()


def test_torn_tar_and_null_audio_have_their_rows(layouts, tmp_path):
    tars = tmp_path / "tars"
    tars.mkdir()
    whole = (layouts["webdataset"] / "a-000.tar").read_bytes()
    (tars / "torn.tar").write_bytes(whole[: int(len(whole) * 0.6)])
    run(job_config(tars, tmp_path / "torn", max_error_rate=1.0))
    rows = read_table(tmp_path / "torn")
    assert [row["error_kind"] for row in rows if row["status"] == "error"] == ["torn_archive"]
    assert sum(row["status"] == "ok" for row in rows) >= 2

    table = pa.Table.from_pylist(
        [{"audio": None, "text": "a"}, {"audio": {"bytes": audio_bytes(1.0), "path": "t.wav"}}]
    )
    (tmp_path / "parquet").mkdir()
    pq.write_table(table, tmp_path / "parquet/items.parquet")
    receipt = run(job_config(tmp_path / "parquet", tmp_path / "null"))
    assert (receipt.items_in, receipt.errors_by_kind) == (2, {"bad_record": 1})


def test_texts_are_those_of_the_reference_on_real_speech(tmp_path):
    """The job in float32 against generate on each clip alone, over the prompts and a spread of real speech."""
    import torch
    from transformers import ParakeetForCTC, ParakeetProcessor

    records = [record | {"audio_filepath": str(PROMPTS / record["audio_filepath"])} for record in prompt_records()]
    if SHARED_SPEECH.exists():
        for manifest, step in (("librispeech-dev-clean.jsonl", 60), ("ljspeech.jsonl", 10)):
            lines = (SHARED_SPEECH / manifest).read_text(encoding="utf-8").splitlines()[::step]
            for record in map(json.loads, lines):
                records.append(record | {"audio_filepath": str(SHARED_SPEECH / record["audio_filepath"])})
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    receipt = run(job_config(tmp_path / "items.jsonl", tmp_path / "out", dtype="float32"))
    assert receipt.errors == 0
    processor = ParakeetProcessor.from_pretrained(TINY_EN)
    reference = ParakeetForCTC.from_pretrained(TINY_EN, dtype=torch.float32).eval()
    rows = read_table(tmp_path / "out")
    assert len(rows) == len(records)
    for row in rows:
        inputs = processor(decode_audio(row["source"]), sampling_rate=16_000, return_tensors="pt")
        wanted = processor.batch_decode(reference.generate(**inputs), skip_special_tokens=True)[0]
        assert row["text"] == wanted, row["id"]


def test_another_input_or_format_into_the_same_output_is_refused(layouts, tmp_path):
    run(job_config(layouts["files"], tmp_path / "out"))
    with pytest.raises(ConfigError, match="one per input"):
        run(job_config(layouts["parquet"], tmp_path / "out"))


def test_errors_that_may_pass_are_retried_on_request(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.wav").write_bytes(audio_bytes(1.0))
    lines = [{"audio_filepath": "a.wav", "duration": 1.0}, {"audio_filepath": "late.wav", "duration": 1.0}]
    (source / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = job_config(source / "items.jsonl", tmp_path / "out")
    assert run(config).errors_by_kind == {"missing_object": 1}
    (source / "late.wav").write_bytes(audio_bytes(1.0))
    assert run(config).errors == 1  # a plain rerun leaves committed rows alone
    receipt = run(dataclasses.replace(config, retry_errors=True))
    assert (receipt.items_in, receipt.errors, receipt.shards_this_run) == (2, 0, 1)
    assert len(read_table(tmp_path / "out")) == 2


def test_a_run_most_of_whose_items_are_errors_stops_early(tmp_path):
    lines = [{"audio_filepath": f"{number}.wav", "duration": 2.0} for number in range(3000)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = job_config(tmp_path / "items.jsonl", tmp_path / "out")
    with pytest.raises(JobStoppedError, match=r"of the first \d{4} items are errors, \d{4} of kind missing_object"):
        run(config)
    assert 1000 <= len(read_table(tmp_path / "out")) < 3000
    receipt = run(dataclasses.replace(config, max_error_rate=1.0))
    assert (receipt.items_in, receipt.errors, receipt.exit_code) == (3000, 3000, 0)


def test_a_run_killed_before_its_receipt_is_accounted_for_by_the_next(layouts, tmp_path):
    config = job_config(layouts["files"], tmp_path / "out")
    first = run(config)
    (tmp_path / "out/receipt.json").unlink()
    (tmp_path / "out/report.html").unlink()
    run(config)
    receipt = json.loads((tmp_path / "out/receipt.json").read_text())
    assert (receipt["complete"], receipt["items_in"]) == (True, first.items_in)
    assert (tmp_path / "out/report.html").exists()


def test_a_refused_run_leaves_no_mark_on_the_output(layouts, tmp_path):
    with pytest.raises(ConfigError, match="no GPU now"):
        run(job_config(layouts["files"], tmp_path / "out", device="cuda", model_actors=None))
    assert not (tmp_path / "out/job.json").exists()


def test_one_input_under_two_spellings_is_one_input(layouts, tmp_path, monkeypatch):
    config = job_config(layouts["files"], tmp_path / "out")
    run(config)
    monkeypatch.chdir(layouts["files"].parent)
    assert run(dataclasses.replace(config, input=f"./{layouts['files'].name}/")).shards_this_run == 0


def test_another_configuration_becomes_a_version_of_its_own_on_request(layouts, tmp_path):
    config = job_config(layouts["manifest"], tmp_path / "out")
    run(config)
    before = part_bytes(tmp_path / "out")
    other = dataclasses.replace(config, dtype="bfloat16", new_version=True)
    receipt = run(other)
    version = tmp_path / "out/versions" / receipt.fingerprint
    assert (receipt.items_in, receipt.exit_code, receipt.dtype) == (12, 0, "bfloat16")
    assert receipt.table == str(version / "transcripts")
    assert [row["id"] for row in read_table(version)] == [row["id"] for row in read_table(tmp_path / "out")]
    assert part_bytes(tmp_path / "out") == before  # still one table of one version
    assert run(other).shards_this_run == 0
    assert run(dataclasses.replace(config, new_version=True)).table == str(tmp_path / "out/transcripts")
    with pytest.raises(ConfigError, match="one per input"):
        run(dataclasses.replace(other, input=str(layouts["files"])))


def test_parts_of_another_plan_are_refused(layouts, tmp_path):
    """A plan folder that was removed and made again: its shards hold other items under the same numbers."""
    run(job_config(layouts["files"], tmp_path / "out"))
    shutil.rmtree(tmp_path / "out/plan")
    with pytest.raises(ConfigError, match="not parts of this table"):
        run(job_config(layouts["files"], tmp_path / "out", shard_audio_s=10))
