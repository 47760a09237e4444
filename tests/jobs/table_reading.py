"""A table as a plain reader sees it that lists a folder and opens what it has found. Nothing of ours in between."""

import pyarrow.dataset as ds

from jobs.storage.files import Storage


def read_by_glob(output: Storage, folder: str) -> list[dict]:
    """All rows of OUTPUT/folder/*.parquet, by pyarrow's dataset reader, ordered by id."""
    paths = sorted(path for path in output.fs.glob(f"{output.path(folder)}/*.parquet"))
    rows = ds.dataset(paths, format="parquet", filesystem=output.fs).to_table().to_pylist()
    return sorted(rows, key=lambda row: row["id"])
