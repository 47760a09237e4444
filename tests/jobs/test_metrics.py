"""The metrics of a real job, as its node serves them to Prometheus, against the receipt and the dashboard's table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from job_layouts import PROMPTS
from job_samples import audio_bytes
from test_cluster_access import METRICS, WORKER_LABELS

REPEATS = 4  # of the 44 prompts: some seconds of work, so that several exports fall within the run
TELEMETRY_LABELS = {"otel_scope_name", "otel_scope_version", "otel_scope_schema_url"}


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("metrics")
    source = folder / "in"
    source.mkdir()
    for path in PROMPTS.iterdir():
        for repeat in range(REPEATS if path.suffix in (".flac", ".wav", ".opus", ".mp3") else 0):
            (source / f"{repeat}-{path.name}").symlink_to(path)
    (source / "text.wav").write_bytes(b"this is not audio at all, " * 50)
    (source / "short.wav").write_bytes(audio_bytes(0.005))
    command = [sys.executable, str(Path(__file__).with_name("metrics_run.py")), str(source), str(folder / "out")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def by_label(seen: dict, name: str, label: str) -> dict[str, float]:
    return {one["labels"][label]: one["value"] for one in seen["after"] if one["name"] == name}


def total(seen: dict, name: str) -> float:
    return sum(one["value"] for one in seen["after"] if one["name"] == name)


def test_names_kinds_and_labels_are_those_that_the_dashboard_asks_for(seen):
    found: dict[str, tuple[str, set]] = {}
    for one in seen["after"]:
        name = one["name"].removeprefix("ray_")
        base = name.rpartition("_")[0] if one["kind"] == "histogram" else name
        labels = found.setdefault(base, (one["kind"], set()))[1]
        labels |= one["labels"].keys() - WORKER_LABELS - TELEMETRY_LABELS
    assert found == METRICS


def test_totals_are_those_of_the_receipt(seen):
    receipt = seen["receipt"]
    assert (receipt["errors"], receipt["complete"]) == (1, True)
    items = {"ok": receipt["ok"], "empty": receipt["empty"], "error": receipt["errors"]}
    assert by_label(seen, "ray_parakeet_items_total", "status") == items
    assert by_label(seen, "ray_parakeet_errors_total", "kind") == receipt["errors_by_kind"]
    assert total(seen, "ray_parakeet_audio_seconds_total") == pytest.approx(receipt["hours_done"] * 3600)
    assert by_label(seen, "ray_parakeet_stage_seconds_total", "stage") == pytest.approx(
        receipt["stage_seconds"], abs=0.002
    )
    for name in ("ray_parakeet_shards_total", "ray_parakeet_shard_seconds_count"):
        assert total(seen, name) == receipt["shards"]
    assert total(seen, "ray_parakeet_queue_shards") == 0
    assert total(seen, "ray_parakeet_model_idle_ratio") == pytest.approx(receipt["model_idle_share"], abs=0.01)


def test_they_can_be_scraped_while_the_job_runs(seen):
    assert any(0 < shards < seen["receipt"]["shards"] for shards in seen["during"]), seen["during"]
    assert seen["during"] == sorted(seen["during"])
