"""`python -m jobs.show OUTPUT`: the first rows of a finished table, for people."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import pyarrow as pa
import pyarrow.dataset as ds
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.command_line import exit_status
from jobs.report.markup import visible
from jobs.storage.connections import storage_errors
from jobs.storage.files import Storage
from jobs.table.parts import TABLE_FOLDER
from parakeet_core.errors import ConfigError, ErrorKind, InputError

COLUMNS = ["id", "status", "duration_s", "text", "reference", "wer", "confidence", "error_message"]


@dataclass(frozen=True)
class ShowConfig:
    """Show the first rows of a transcript table."""

    output: Annotated[str, tyro.conf.Positional]
    """The --output of the job: a path or URL."""
    limit: int = 50
    """Rows to show."""

    def __post_init__(self):
        if self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: expected 1 or more")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    config = tyro.cli(ShowConfig, args=arguments, prog="python -m jobs.show")
    rows = first_rows(Storage(config.output), config.limit)
    table = Table("id", "s", "text", "reference", "WER", "conf.", show_lines=False)
    for row in rows.sort_by("id").to_pylist():
        text = row["text"] if row["status"] != "error" else f"[{row['error_message']}]"
        cells = (row["id"], _cell(row["duration_s"], "{:.1f}"), text, row["reference"] or "",
                 _cell(row["wer"], "{:.0%}"), _cell(row["confidence"], "{:.2f}"))  # fmt: skip
        table.add_row(*(Text(visible(cell)) for cell in cells))  # plain strings: brackets would be markup
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def first_rows(output: Storage, limit: int) -> pa.Table:
    """The first rows of a table, `COLUMNS`.

    Raises:
        ConfigError: there is no table.
        InputError: a part cannot be read.
    """
    names = [name for name in output.list_names(TABLE_FOLDER) if name.endswith(".parquet")]
    parts = [output.path(f"{TABLE_FOLDER}/{name}") for name in names]
    if not parts:
        raise ConfigError(f"{output.url}/{TABLE_FOLDER}: no parts; has the job run?")
    try:
        with storage_errors(output.source(TABLE_FOLDER), output.options):
            return ds.dataset(parts, format="parquet", filesystem=output.fs).head(limit, columns=COLUMNS)
    except pa.ArrowException as error:
        where = output.source(TABLE_FOLDER)
        raise InputError(ErrorKind.STORAGE, f"{where}: a part is not of this table, or not whole ({error})") from error


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


if __name__ == "__main__":
    sys.exit(main())
