"""Items that really crash their process, hang it or exhaust its memory: each costs its row, and the job some time.

What they do to the processes of the job is in `tests/poison/sitecustomize.py`; the job runs as it always does.
"""

import json
import time
from pathlib import Path

import pyarrow.dataset as ds
import pytest
import soundfile
from job_process import PROMPTS, REPO, run_job, write_manifest

EXIT_OVER_BUDGET = 3
MESSAGES = {
    "crash": "crashed with signal SIGSEGV",
    "crash at open": "crashed with signal SIGSEGV",
    "hang": "ran longer than 12 s",  # for a file of 32 kB: 10 s, and 1 s for each 20 kB
    "eat": "needed more than 4 GiB of memory",
}
REPEATS = 2  # of 44 prompts
OPTIONS = ("--shard-audio-s", "60", "--model-actors", "1:2")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The bundled prompts, and among them one file per deed, without a length: so planning opens it as well."""
    folder = tmp_path_factory.mktemp("in")
    write_manifest(folder / "items.jsonl", REPEATS)
    lines = (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()
    for number, deed in enumerate(MESSAGES):
        path = folder / f"poison-{number}.wav"
        with soundfile.SoundFile(path, "w", 16000, 1, "PCM_16") as file:
            file.title = f"poison: {deed}"
            file.write(soundfile.read(PROMPTS / "conf-noempty.flac", frames=16000)[0])
        lines.insert(20 * number, json.dumps({"id": deed, "audio_filepath": str(path)}))
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "items.jsonl"


def run(source: Path, output: Path, *options: str, **variables: str) -> tuple[int, str, float]:
    started = time.monotonic()
    path = f"{REPO / 'tests/poison'}:{REPO}"
    status, printed = run_job(source, output, *OPTIONS, *options, variables={"PYTHONPATH": path} | variables)
    return status, printed, time.monotonic() - started


def rows_by_id(output: Path) -> dict[str, dict]:
    rows = ds.dataset(output / "transcripts").to_table().to_pylist()
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows) == REPEATS * 44 + len(MESSAGES)
    return found


def test_each_poisoned_item_costs_its_row_only(source, tmp_path):
    status, printed, undisturbed_s = run(source, tmp_path / "harmless", POISON="harmless")
    assert status == EXIT_OVER_BUDGET, printed
    expected = rows_by_id(tmp_path / "harmless")
    assert {expected[deed]["error_kind"] for deed in MESSAGES} == {"not_audio", "truncated"}

    status, printed, wall_s = run(source, tmp_path / "out")
    assert status == EXIT_OVER_BUDGET, printed
    found = rows_by_id(tmp_path / "out")
    for deed, message in MESSAGES.items():
        assert found[deed]["error_kind"] == "decoder_crash"
        assert message in found[deed]["error_message"]
    assert {id_: row for id_, row in found.items() if id_ not in MESSAGES} == {
        id_: row for id_, row in expected.items() if id_ not in MESSAGES
    }
    print(f"undisturbed {undisturbed_s:.1f} s, poisoned {wall_s:.1f} s")
    # A hang costs its limit three times: in a worker, in a process that had other items, and in a new one. Each deed
    # may cost a worker, and starting one takes less time than an undisturbed job.
    assert wall_s - undisturbed_s < 3 * 12 + len(MESSAGES) * undisturbed_s

    status, printed, _ = run(source, tmp_path / "out", "--max-error-rate", "0.1")
    assert status == 0, printed
    assert "nothing to do" in printed
