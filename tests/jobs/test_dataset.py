"""`transcribe_dataset`: transcripts for rows of a Ray Dataset that the job did not read."""

import pytest
import ray.data
from job_layouts import PROMPTS, TINY_EN, prompt_records

from jobs.dataset import transcribe_dataset
from parakeet_core import Transcriber

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_rows_keep_their_columns_and_get_transcripts():
    records = prompt_records(6)
    paths = [PROMPTS / record["audio_filepath"] for record in records]
    rows = [
        {"key": index, "audio": {"bytes": path.read_bytes(), "path": path.name}} for index, path in enumerate(paths)
    ]
    rows.append({"key": 6, "audio": {"bytes": b"not audio, whatever it is called", "path": "x.wav"}})
    dataset = transcribe_dataset(ray.data.from_items(rows), str(TINY_EN), actors=(1, 1), batch_rows=4)
    found = {row["key"]: row for row in dataset.take_all()}
    assert sorted(found) == list(range(7))
    expected = Transcriber.load(TINY_EN).transcribe(paths)
    for index, transcript in enumerate(expected):
        assert found[index]["text"] == transcript.text
        assert [word["word"] for word in found[index]["words"]] == [word.word for word in transcript.words]
    assert (found[6]["status"], found[6]["error_kind"], found[6]["text"]) == ("error", "not_audio", None)
