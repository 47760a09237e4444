"""The training job in one process, where Ray cannot be imported: the same run, and it resumes one begun with Ray."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_samples import make_task, prompt_manifest, small_checkpoint, train, training_config

from jobs.finetune_alone import main
from jobs.training.checkpoint import read_progress
from jobs.training.loop import TrainingRun

REPO = Path(__file__).resolve().parents[2]
WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from jobs.finetune_alone import main
sys.exit(main(sys.argv[1:]))
"""
OPTIONS = {"max_steps": 6, "batch_audio_s": 9.0, "validate_steps": 3, "dropout": 0.1}


@pytest.fixture
def manifests(tmp_path) -> tuple[str, str]:
    return prompt_manifest(tmp_path / "train.jsonl", 0, 8), prompt_manifest(tmp_path / "val.jsonl", 8, 12)


def arguments(manifests: tuple[str, str], output: Path, **options) -> list[str]:
    train_on, validation = manifests
    given = ["--train", train_on, "--validation", validation, "--output", str(output)]
    given += ["--model", small_checkpoint(Path(train_on).parent), "--device", "cpu", "--cpus-per-worker", "1"]
    for name, value in (OPTIONS | options).items():
        given += [f"--{name.replace('_', '-')}", str(value)]
    return given


class StopAfterCheckpoint(TrainingRun):
    def _checkpoint(self) -> None:
        super()._checkpoint()
        raise KeyboardInterrupt


def test_ends_as_the_worker_of_a_ray_job(manifests, tmp_path):
    """Begun by a worker's loop and resumed without Ray, it equals a run that was never stopped."""
    undisturbed = train(training_config(*manifests, tmp_path / "a", **OPTIONS))
    task = make_task(training_config(*manifests, tmp_path / "b", **OPTIONS, checkpoint_steps=2))
    with pytest.raises(KeyboardInterrupt):
        StopAfterCheckpoint(task, 0, 1, torch.device("cpu")).run()
    command = [sys.executable, "-c", WITHOUT_RAY, *arguments(manifests, tmp_path / "b")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resume     after step 2" in done.stderr
    assert "step 6: WER" in done.stderr
    assert read_progress(task.output) == undisturbed.progress
    exported = [tmp_path / run / "model" / "model.safetensors" for run in ("a", "b")]
    assert exported[0].read_bytes() == exported[1].read_bytes()
    assert (tmp_path / "b" / "report.html").exists()


def test_refuses_what_one_process_cannot_do(manifests, tmp_path, capsys):
    assert main(arguments(manifests, tmp_path / "out", workers=2)) == 2
    assert "--workers 2: one process is one worker" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_item_that_does_not_decode_is_counted(manifests, tmp_path, capsys):
    broken = tmp_path / "broken.flac"
    broken.write_bytes(b"fLaC" + bytes(3000))
    with open(manifests[0], "a", encoding="utf-8") as manifest:
        manifest.write(f'\n{{"audio_filepath": "{broken}", "duration": 2.0, "text": "hello"}}')
    assert main(arguments(manifests, tmp_path / "out", max_steps=1)) == 0
    assert "8 of 9 items, 0.01 h; left out: 1 unreadable" in capsys.readouterr().err
