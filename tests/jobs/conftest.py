"""Fixtures of the job tests."""

from pathlib import Path

import pytest
from job_layouts import prompt_records, write_layouts

from jobs.storage.files import Storage


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path) -> Storage:
    """An empty writable place, once on local disk and once on the S3 server."""
    if request.param == "local":
        return Storage(str(tmp_path / "storage"))
    server = request.getfixturevalue("s3_server")
    return Storage(f"s3://{server.bucket()}/storage", server.options)


@pytest.fixture(scope="session")
def layouts(tmp_path_factory) -> dict[str, Path]:
    """Twelve bundled prompts in the four layouts."""
    return write_layouts(prompt_records(12), tmp_path_factory.mktemp("layouts"))
