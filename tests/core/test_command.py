"""`python -m parakeet_core MODEL AUDIO...`: text, JSON lines, messages and exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parakeet_core import Transcriber
from parakeet_core.__main__ import main

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def expected(tiny_en, prompts):
    return Transcriber.load(tiny_en).transcribe([clip.path for clip in prompts[:3]])


@pytest.fixture
def paths(prompts):
    return [str(clip.path) for clip in prompts[:3]]


def test_text(tiny_en, paths, expected):
    """As a user calls it, in a separate process; only texts on standard output."""
    command = [sys.executable, "-m", "parakeet_core", str(tiny_en), *paths]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"{path}\t{transcript.text}" for path, transcript in zip(paths, expected, strict=True)
    ]
    assert done.stderr == ""


def test_json(tiny_en, paths, expected, capsys):
    assert main([str(tiny_en), "--json", *paths]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["audio"] for row in rows] == paths
    for row, transcript in zip(rows, expected, strict=True):
        assert row["text"] == transcript.text
        assert row["token_ids"] == transcript.token_ids
        assert row["error"] is None
        assert row["duration_s"] == transcript.duration_s
        assert row["confidence"] == pytest.approx(transcript.confidence, abs=1e-4)
        assert [word["word"] for word in row["words"]] == transcript.text.split()
        assert row["words"][0].keys() == {"word", "start_s", "end_s", "confidence"}


def test_failed_file_is_named_and_the_others_are_printed(tiny_en, paths, expected, tmp_path, capsys):
    (tmp_path / "bad.wav").write_bytes(b"RIFF no audio")
    missing = str(tmp_path / "missing.flac")
    assert main([str(tiny_en), paths[0], str(tmp_path / "bad.wav"), missing, paths[1]]) == 1
    captured = capsys.readouterr()
    texts = [line.split("\t") for line in captured.out.splitlines()]
    assert texts == [[paths[0], expected[0].text], [paths[1], expected[1].text]]
    messages = captured.err.splitlines()
    assert len(messages) == 2
    assert messages[0].startswith(f"{tmp_path / 'bad.wav'}: ")
    assert messages[1].startswith(f"{missing}: missing_object")


def test_failed_file_as_json(tiny_en, paths, tmp_path, capsys):
    (tmp_path / "empty.wav").write_bytes(b"")
    assert main([str(tiny_en), "--json", str(tmp_path / "empty.wav"), paths[0]]) == 1
    bad, good = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert bad["error"]["kind"] == "empty_file"
    assert bad["error"]["message"]
    assert bad["text"] == ""
    assert good["error"] is None


@pytest.mark.parametrize("options", [["--dtype", "float64"], ["--unknown"], []], ids=str)
def test_wrong_options_end_in_usage(tiny_en, options, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(tiny_en), *options])
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_unusable_model(tmp_path, paths, capsys):
    assert main([str(tmp_path / "nothing"), *paths]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no such checkpoint" in captured.err


def test_unusable_device(tiny_en, paths, capsys):
    assert main([str(tiny_en), "--device", "no-such-device", *paths]) == 2
    assert "no-such-device" in capsys.readouterr().err
