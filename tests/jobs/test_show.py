"""`python -m jobs.show`: rows for people, whatever their strings hold, and one line where there are none."""

import pytest
from report_samples import error_row, ok_row, write_parts

from jobs.show import main
from jobs.storage.files import Storage


@pytest.fixture
def output(tmp_path) -> Storage:
    return Storage(str(tmp_path / "out"))


def test_rows_are_shown_and_nothing_in_them_is_obeyed(output, capsys):
    hostile = "[red]x[/red] \x1b]0;title\x07 \x1b[2J end"
    write_parts(output, [ok_row(0, text=hostile), error_row(1, message="why [not]"), ok_row(2)])
    output.write_atomic("transcripts/_SUCCESS", b"")
    assert main([output.url, "--limit", "2"]) == 0
    shown = capsys.readouterr().out
    assert "[red]x[/red]" in shown
    assert "[why [not]]" in shown
    assert "clip-00002.wav" not in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


def test_what_cannot_be_shown_is_said_in_one_line(output, capsys):
    assert main([output.url]) == 2
    assert "has the job run?" in capsys.readouterr().err
    write_parts(output, [ok_row(0)])
    assert main([output.url, "--limit", "-1"]) == 2
    output.write_atomic("transcripts/part-0000-000001-0123456789.parquet", b"PAR1 torn")
    assert main([output.url]) == 1
    assert "part-0000-000001" in capsys.readouterr().err
