"""The bundled prompts in the four layouts that the job reads, and the job run over them."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from jobs.config import TranscribeConfig

DATA = Path(__file__).resolve().parents[1] / "data"
PROMPTS, TINY_EN = DATA / "prompts", DATA / "tiny-en"


def prompt_records(count: int | None = None) -> list[dict]:
    """Manifest lines of the bundled prompts."""
    lines = (PROMPTS / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def write_layouts(records: list[dict], folder: Path) -> dict[str, Path]:
    """The records' audio as files, manifest, WebDataset tars (one gzipped) and Parquet with two row groups."""
    audio = {record["audio_filepath"]: (PROMPTS / record["audio_filepath"]).read_bytes() for record in records}
    files = folder / "files"
    files.mkdir(parents=True)
    for name, content in audio.items():
        (files / name).write_bytes(content)
    manifest = folder / "manifest"
    manifest.mkdir()
    for name, content in audio.items():
        (manifest / name).write_bytes(content)
    (manifest / "items.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    tars = folder / "webdataset"
    tars.mkdir()
    half = len(records) // 2
    write_tar(tars / "a-000.tar", "w", records[:half], audio)
    write_tar(tars / "a-001.tar.gz", "w:gz", records[half:], audio)
    parquet = folder / "parquet"
    parquet.mkdir()
    rows = [
        {"audio": {"bytes": audio[r["audio_filepath"]], "path": r["audio_filepath"]}, "text": r["text"]}
        for r in records
    ]
    pq.write_table(pa.Table.from_pylist(rows), parquet / "items.parquet", row_group_size=max(1, half))
    return {"files": files, "manifest": manifest / "items.jsonl", "webdataset": tars, "parquet": parquet}


def write_tar(path: Path, mode: str, records: list[dict], audio: dict[str, bytes]) -> None:
    with tarfile.open(path, mode) as archive:
        for record in records:
            name = record["audio_filepath"]
            for member, content in ((name, audio[name]), (f"{Path(name).stem}.txt", record["text"].encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def job_config(input_: object, output: object, **options) -> TranscribeConfig:
    """The job with the bundled model on the CPU and one actor: a second one takes seconds to start."""
    defaults = {"model": str(TINY_EN), "device": "cpu", "model_actors": (1, 1)}
    return TranscribeConfig(**defaults | options, input=str(input_), output=str(output))


def read_table(output: object) -> list[dict]:
    """All rows of a local output, by pyarrow's dataset reader, ordered by id."""
    rows = ds.dataset(f"{output}/transcripts", format="parquet").to_table().to_pylist()
    return sorted(rows, key=lambda row: row["id"])


def part_bytes(output: object) -> dict[str, bytes]:
    """Name -> content of the parts of a local output."""
    return {path.name: path.read_bytes() for path in sorted(Path(f"{output}/transcripts").iterdir())}
