"""`python -m jobs.show OUTPUT`: the first rows of a finished table, for people."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import pyarrow.dataset as ds
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.command_line import exit_status
from jobs.storage.files import Storage
from jobs.table.parts import TABLE_FOLDER
from parakeet_core.errors import ConfigError

COLUMNS = ["id", "status", "duration_s", "text", "reference", "wer", "confidence", "error_message"]


@dataclass(frozen=True)
class ShowConfig:
    """Show the first rows of a transcript table."""

    output: Annotated[str, tyro.conf.Positional]
    """The --output of the job: a path or URL."""
    limit: int = 50
    """Rows to show."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    config = tyro.cli(ShowConfig, args=arguments, prog="python -m jobs.show")
    output = Storage(config.output)
    parts = [output.path(f"{TABLE_FOLDER}/{name}") for name in output.list_names(TABLE_FOLDER)]
    if not parts:
        raise ConfigError(f"{config.output}/{TABLE_FOLDER}: no parts; has the job run?")
    rows = ds.dataset(parts, format="parquet", filesystem=output.fs).head(config.limit, columns=COLUMNS)
    table = Table("id", "s", "text", "reference", "WER", "conf.", show_lines=False)
    for row in rows.sort_by("id").to_pylist():
        text = row["text"] if row["status"] != "error" else f"[{row['error_message']}]"
        cells = (row["id"], _cell(row["duration_s"], "{:.1f}"), text, row["reference"] or "",
                 _cell(row["wer"], "{:.0%}"), _cell(row["confidence"], "{:.2f}"))  # fmt: skip
        table.add_row(*map(Text, cells))  # as they are: brackets in a string would be taken for markup
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


if __name__ == "__main__":
    sys.exit(main())
