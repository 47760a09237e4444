"""A rerun on a real S3 server, request by request: what is committed is neither read nor computed again."""

import shutil

import pyarrow.parquet as pq
import pytest
from fault_proxy import FaultProxy
from job_layouts import job_config
from job_samples import audio_bytes

from jobs.preparation import prepare
from jobs.transcribe import run

pytestmark = pytest.mark.usefixtures("ray_cluster")
AUDIO = (".flac", ".wav", ".mp3")


def test_committed_shards_are_neither_read_nor_computed_again(layouts, s3_server, monkeypatch):
    bucket = s3_server.bucket()
    folder = s3_server.folder / bucket
    shutil.copytree(layouts["files"], folder / "in")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        config = job_config(
            f"s3://{bucket}/in", f"s3://{bucket}/out", shard_audio_s=10, s3_endpoint_url=proxy.endpoint_url
        )

        def asked(method: str) -> list[str]:
            """Paths of the last run's requests, except listings."""
            requests = [request for request in proxy.seen if request.method == method and not request.is_listing]
            return [request.path.removeprefix(f"/{bucket}/") for request in requests]

        first = run(config)
        assert first.shards_this_run == first.shards > 3
        proxy.seen.clear()
        again = run(config)
        assert (again.shards_this_run, again.ok, again.hours_done) == (0, first.ok, first.hours_done)
        assert asked("PUT") == []
        assert not [path for path in asked("GET") if path.endswith(AUDIO) or "/transcripts/" in path]
        assert len(proxy.seen) < 40, proxy.seen

        lost = sorted((folder / "out/transcripts").iterdir())[1]
        sources = {row["source"] for row in pq.read_table(lost).to_pylist()}
        content = lost.read_bytes()
        lost.unlink()
        proxy.seen.clear()
        assert run(config).shards_this_run == 1
        assert lost.read_bytes() == content
        assert {f"s3://{bucket}/{path}" for path in asked("GET") if path.endswith(AUDIO)} == sources
        assert [path for path in asked("PUT") if "/transcripts/" in path] == [f"out/transcripts/{lost.name}"]


def test_footers_are_read_only_of_parts_that_the_receipt_does_not_hold(layouts, s3_server, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.secret)
    bucket = s3_server.bucket()
    out = s3_server.folder / bucket / "out"
    shutil.copytree(layouts["files"], tmp_path / "in")
    with FaultProxy(s3_server.endpoint_url) as proxy:
        config = job_config(tmp_path / "in", f"s3://{bucket}/out", shard_audio_s=10, s3_endpoint_url=proxy.endpoint_url)
        run(config)
        receipt, parts = (out / "receipt.json").read_bytes(), {path.name for path in (out / "transcripts").iterdir()}
        (tmp_path / "in/late.wav").write_bytes(audio_bytes(1.0))
        grown = run(config)
        (out / "receipt.json").write_bytes(receipt)  # as if that run had been killed before it wrote its own
        late = {path.name for path in (out / "transcripts").iterdir()} - parts
        proxy.seen.clear()
        state = prepare(config)
        paths = [request.path for request in proxy.seen if request.method == "GET" and not request.is_listing]
        opened = {path.rsplit("/", 1)[1] for path in paths if "/transcripts/" in path}
        assert opened == late
        found = state.receipt()
        assert (found.complete, found.ok, found.empty) == (True, grown.ok, grown.empty)
        assert found.hours_done == pytest.approx(grown.hours_done)
