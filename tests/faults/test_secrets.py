"""Credentials and signed URLs in a real job that meets errors of many kinds: nothing that it writes contains them.

Searched: every file under the output (columns of Parquet files too, which are compressed), what the job prints, and all
files of its Ray session.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fault_proxy import FaultProxy, no_fault
from job_layouts import PROMPTS
from job_process import run_job

SIGNATURE, PASSWORD, TOKEN = "canary-signature-7c1f", "canary-password-93ab", "canary-token-55d0"
SESSION_TOKEN = "canary-session-20e8"
QUERY = f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Expires=60&X-Amz-Signature={SIGNATURE}"
HOST = "https://audio.invalid"  # a name that never resolves: the item is an error, and its message names the URL


def manifest_lines(good: list[str]) -> list[str]:
    """Lines of every outcome: read, unreadable for each reason, and no item at all; most hold a canary."""
    records = [{"audio_filepath": name} for name in good]
    records += [
        {"audio_filepath": "broken.flac", "page": f"{HOST}/page?lang=en&X-Amz-Signature={SIGNATURE}"},
        {"audio_filepath": "missing.flac"},
        {"audio_filepath": "fails.flac"},
        {"audio_filepath": f"{HOST}/signed.wav?{QUERY}"},
        {"audio_filepath": f"{HOST}/again.wav?{QUERY}", "id": f"{HOST}/again.wav?{QUERY}"},
        {"audio_filepath": f"{HOST}/get?file=1&token={TOKEN}"},
        {"audio_filepath": f"{HOST}/get?file=2&token={TOKEN}"},
        {"audio_filepath": f"https://user:{PASSWORD}@audio.invalid/x.wav"},
        {"audio_filepath": f"http://127.0.0.1/x.wav?{QUERY}"},
        {"audio_filepath": f"{HOST}/x.wav?{QUERY}", "offset": -1.0},
        {"audio_filepath": [f"{HOST}/x.wav?{QUERY}"]},
    ]
    torn = f'{{"audio_filepath": "{HOST}/x.wav?X-Amz-Signature={SIGNATURE}'
    return [*(json.dumps(record) for record in records), torn, torn[:60]]


def written(folder: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every file, Parquet also as its rows and metadata in plain text."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path), path.read_bytes()
            if path.suffix == ".parquet":
                table = pq.read_table(path)
                yield f"{path} (rows)", repr((table.schema.metadata, table.to_pylist())).encode()


@pytest.fixture
def ray_folder(monkeypatch):
    """Where the job's Ray keeps its session. Not under tmp_path: the path of a socket has 107 bytes at most."""
    folder = Path(tempfile.mkdtemp(prefix="ps-", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_no_secret_in_anything_that_is_written(s3_server, ray_folder, monkeypatch):
    bucket = s3_server.bucket()
    source, prompts = s3_server.folder / bucket / "in", sorted(PROMPTS.glob("*.flac"))[:6]
    source.mkdir()
    for path in prompts:
        shutil.copy(path, source)
    (source / "broken.flac").write_bytes(prompts[0].read_bytes()[:1000])
    shutil.copy(prompts[0], source / "fails.flac")
    lines = manifest_lines([path.name for path in prompts])
    (source / "items.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("AWS_SESSION_TOKEN", SESSION_TOKEN)
    printed = []
    with FaultProxy(s3_server.endpoint_url) as proxy:
        for name, value in s3_server.variables(proxy.endpoint_url).items():
            monkeypatch.setenv(name, value)
        job = f"s3://{bucket}/in/items.jsonl", f"s3://{bucket}/out", "--allow-http", "--storage-patience-s", "1"

        proxy.plan = lambda request: "expired_token" if "/transcripts/" in request.path else None
        status, output = run_job(*job)
        printed.append(output)
        assert status == 1
        assert "ExpiredToken" in output

        proxy.plan = lambda request: "internal_error" if request.path.endswith("/fails.flac") else None
        status, output = run_job(*job)
        printed.append(output)
        assert status == 3, output

        proxy.plan = no_fault
        with_user = proxy.endpoint_url.replace("://", f"://user:{PASSWORD}@")
        status, output = run_job(*job, "--s3-endpoint-url", with_user)
        printed.append(output)
        assert status == 2
        assert "credentials come from" in output

    out = s3_server.folder / bucket / "out"
    rows = [row for path in (out / "transcripts").iterdir() for row in pq.read_table(path).to_pylist()]
    assert len(rows) == len(lines)
    kinds = {row["error_kind"] for row in rows}
    assert kinds == {None, "truncated", "missing_object", "storage", "bad_record", "bad_segment"}
    assert {row["id"] for row in rows} >= {f"{HOST}/signed.wav?***", f"{HOST}/again.wav?***"}
    assert len({row["source"] for row in rows if row["source"].startswith(f"{HOST}/get")}) == 2
    pages = [json.loads(row["extra"])["page"] for row in rows if row["extra"]]
    assert pages == [f"{HOST}/page?lang=en&X-Amz-Signature=***"]
    assert {"job.json", "receipt.json", "report.html", "plan", "events"} <= {path.name for path in out.iterdir()}

    secrets = [SIGNATURE, PASSWORD, TOKEN, SESSION_TOKEN, s3_server.secret]
    places = [*written(out), *written(ray_folder), ("what was printed", "\n".join(printed).encode())]
    assert any("worker" in name for name, _ in places), "no log of a worker was searched"
    found = [(secret, name) for name, content in places for secret in secrets if secret.encode() in content]
    assert not found
