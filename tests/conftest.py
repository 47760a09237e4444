"""Paths that tests share, and settings that make their numbers the same on any machine.

`shared` stands beside a developer's checkout and is not part of the project: tests that need it are skipped where it is
absent. What is under `tests/data` is always there.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch
from fuzz_sandbox import Sandbox
from s3_server import serve_s3

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / "tests" / "data"
SHARED = REPO.parent / "shared"

# The same examples in every run, so that a failure is never a matter of luck; no deadline, because machines differ.
hypothesis.settings.register_profile("project", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("project")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(
        1
    )  # small models: with two threads on two busy cores the parity tests took five times as long


@pytest.fixture(scope="module")
def sandbox():
    """A process for damaged input; see `fuzz_sandbox.py`."""
    sandbox = Sandbox()
    yield sandbox
    sandbox.close()


@dataclass(frozen=True)
class Clip:
    """A recording with its transcript."""

    path: Path
    duration_s: float
    text: str


def read_clips(manifest: Path) -> list[Clip]:
    """The clips of a JSON lines manifest, whose paths are relative to its folder."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    return [Clip(manifest.parent / row["audio_filepath"], row["duration"], row["text"]) for row in rows]


def shared(*parts: str) -> Path:
    """A path under the shared folder; skips the test where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {path.relative_to(SHARED.parent)} beside the checkout")
    return path


@pytest.fixture(scope="session")
def tiny_en() -> Path:
    """The small trained checkpoint that is bundled with the project."""
    return DATA / "tiny-en"


@pytest.fixture(scope="session")
def prompts() -> list[Clip]:
    """The 44 recorded prompts that are bundled with the project."""
    return read_clips(DATA / "prompts" / "prompts.jsonl")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Checkpoints and expectations stored from the reference."""
    return shared("golden")


@pytest.fixture(scope="session")
def librispeech() -> list[Clip]:
    return read_clips(shared("speech", "librispeech-dev-clean.jsonl"))


@pytest.fixture(scope="session")
def ljspeech() -> list[Clip]:
    return read_clips(shared("speech", "ljspeech.jsonl"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A real S3 server for all tests."""
    with serve_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray for all job tests that do not break it; `jobs.transcribe.run` uses the session it finds."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 << 20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    yield
    ray.shutdown()
