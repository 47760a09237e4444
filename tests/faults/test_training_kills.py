"""The training job is killed in the middle and run again: its parameters must be those of an undisturbed run."""

import signal
from pathlib import Path

import torch
from job_process import JobProcess
from safetensors.torch import load_file
from training_samples import prompt_manifest, small_checkpoint, train, training_config

OPTIONS = {"max_steps": 30, "batch_audio_s": 9.0, "validate_steps": 12, "checkpoint_steps": 5, "dropout": 0.1}


class TrainingProcess(JobProcess):
    """`python -m jobs.finetune` over two manifests."""

    def command(self, source: Path, output: Path) -> list[str]:
        arguments = ["--train", f"{source}/train.jsonl", "--validation", f"{source}/val.jsonl"]
        arguments += ["--model", small_checkpoint(source), "--output", str(output)]
        arguments += ["--device", "cpu", "--workers", "1", "--cpus-per-worker", "1"]
        for name, value in OPTIONS.items():
            arguments += [f"--{name.replace('_', '-')}", str(value)]
        return ["jobs.finetune", *arguments]


def checkpoints(output: Path) -> int:
    return len(list((output / "checkpoints").glob("step-*.json")))


def test_killed_job_resumes_to_the_same_parameters(tmp_path):
    """kill -9 of the driver and of every process of Ray."""
    output = tmp_path / "out"
    prompt_manifest(tmp_path / "train.jsonl", 0, 8)
    prompt_manifest(tmp_path / "val.jsonl", 8, 12)
    job = TrainingProcess(tmp_path, output)
    job.wait_until(lambda: checkpoints(output) > 0, "a checkpoint")
    job.kill_all()
    assert job.finish()[0] == -signal.SIGKILL
    before = last_step(output)
    assert before < OPTIONS["max_steps"], "the run was over before it was killed"
    status, printed = TrainingProcess(tmp_path, output).finish()
    assert status == 0, printed
    assert f"resume     after step {before}" in printed
    undisturbed = train(
        training_config(str(tmp_path / "train.jsonl"), str(tmp_path / "val.jsonl"), tmp_path / "undisturbed", **OPTIONS)
    )
    found = load_file(output / "checkpoints" / f"step-{OPTIONS['max_steps']:08d}-00.safetensors")
    for name, tensor in undisturbed.model.state_dict().items():
        torch.testing.assert_close(found[f"model.{name}"], tensor, rtol=0, atol=0, msg=name)
    exported = [path / "model" / "model.safetensors" for path in (output, tmp_path / "undisturbed")]
    assert exported[0].read_bytes() == exported[1].read_bytes()
    assert "WER" in (output / "report.html").read_text(encoding="utf-8")


def last_step(output: Path) -> int:
    return max(int(path.stem.removeprefix("step-")) for path in (output / "checkpoints").glob("step-*.json"))
