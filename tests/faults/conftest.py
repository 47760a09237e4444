"""What several test files about kills share: one input, and its table from an undisturbed run."""

from pathlib import Path

import pyarrow.dataset as ds
import pytest
from job_process import run_job, write_manifest

REPEATS = 4  # of 44 prompts: 13 minutes of audio, some 6 s of work on two cores
OPTIONS = ("--shard-audio-s", "30")  # some 27 shards


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("in") / "items.jsonl"
    write_manifest(path, REPEATS)
    return path


@pytest.fixture(scope="session")
def options() -> tuple[str, ...]:
    """Options of every run over `source`."""
    return OPTIONS


@pytest.fixture(scope="session")
def undisturbed(source, options, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    status, printed = run_job(source, output, *options)
    assert status == 0, printed
    assert ds.dataset(output / "transcripts").count_rows() == REPEATS * 44
    return output
