"""The training loop in this process: it learns, it resumes exactly, and how a batch is split does not matter."""

import dataclasses
import json
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from small_models import hf_config, small_config, write_json
from training_samples import PLAIN, make_task, prompt_manifest, small_checkpoint, train, training_config

from jobs.storage.files import Storage
from jobs.training.batches import Position, Step, TrainingBatches, epoch_batches
from jobs.training.checkpoint import list_checkpoints, load_checkpoint_into, read_progress, save_checkpoint
from jobs.training.loop import StepTally, TrainingRun, build_model
from jobs.training.metrics import measurements, read_metrics
from jobs.training.setup import RUN_FILE, claim_output
from parakeet_core import CheckpointError, ConfigError, Transcriber
from parakeet_core.training import LearningRate

CPU = torch.device("cpu")


@pytest.fixture
def manifests(tmp_path) -> tuple[str, str]:
    """Eight short prompts for training and four for validation."""
    return prompt_manifest(tmp_path / "train.jsonl", 0, 8), prompt_manifest(tmp_path / "val.jsonl", 8, 12)


def parameters(run: TrainingRun) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


class StopAfterCheckpoint(TrainingRun):
    """A worker that dies right after its first checkpoint."""

    def _checkpoint(self) -> None:
        super()._checkpoint()
        raise KeyboardInterrupt


def test_overfits_twenty_recordings_from_random_weights(tmp_path):
    """The exported model, loaded like any checkpoint, knows every clip of its training set by heart.

    With several batches per epoch: with only one, batch normalisation learns the padding too, and a letter stays wrong.
    """
    manifest = prompt_manifest(tmp_path / "train.jsonl", 0, 20)
    same = prompt_manifest(tmp_path / "same.jsonl", 0, 20)
    sizes = {"d_model": 96, "n_layers": 4, "d_ff": 256, "subsampling_channels": 32, "scale_input": False}
    write_json(tmp_path / "config.json", hf_config(small_config(**sizes)))
    options = PLAIN | {"model_config": str(tmp_path / "config.json"), "vocab_size": 128}
    options |= {"learning_rate": 3e-3, "warmup_steps": 20, "batch_audio_s": 30, "max_steps": 150}
    options |= {"validate_steps": 50, "log_steps": 10, "export_dtype": "float16"}
    run = train(training_config(manifest, same, tmp_path / "out", **options))
    assert run.progress.best_wer == 0
    transcriber = Transcriber.load(tmp_path / "out" / "model")
    validation = run.task.validation
    audio = run.task.data("validation")
    waveforms = [audio.waveform(file, row) for file, row in zip(validation.files, validation.rows, strict=True)]
    assert [transcript.text for transcript in transcriber.transcribe(waveforms)] == validation.texts
    lines = read_metrics(run.task.output)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.05 * losses[0]
    assert measurements(lines)[0]["validation_wer"] > 0.9  # before training


@pytest.mark.parametrize("place", ["local", "s3"])
def test_resumed_run_ends_with_the_same_parameters(place, manifests, tmp_path, request, monkeypatch):
    """With everything in training that is random, stopped between two measurements in the second epoch."""
    options = {"max_steps": 7, "batch_audio_s": 9, "validate_steps": 3, "log_steps": 2, "dropout": 0.1}
    undisturbed = train(training_config(*manifests, tmp_path / "a", **options))
    output = tmp_path / "b" if place == "local" else s3_output(request, monkeypatch, tmp_path)
    config = training_config(*manifests, output, **options, checkpoint_steps=4)
    task = make_task(config)
    with pytest.raises(KeyboardInterrupt):
        StopAfterCheckpoint(task, 0, 1, CPU).run()
    assert read_progress(task.output).step == 4
    torch.manual_seed(99)  # a new process may begin with any seed
    resumed = TrainingRun(task, 0, 1, CPU)
    resumed.run()
    expected = parameters(undisturbed)
    for name, tensor in parameters(resumed).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, msg=name)
    assert resumed.progress == undisturbed.progress
    before, after = (read_metrics(run.task.output) for run in (undisturbed, resumed))
    timeless = ("at", "rtfx")
    assert [{k: v for k, v in line.items() if k not in timeless} for line in after] == [
        {k: v for k, v in line.items() if k not in timeless} for line in before
    ]
    exported = [run.task.output.read_bytes("model/model.safetensors") for run in (undisturbed, resumed)]
    assert exported[0] == exported[1]


def s3_output(request, monkeypatch, tmp_path: Path) -> str:
    """An output on the S3 server, which the job finds through the usual variables."""
    server = request.getfixturevalue("s3_server")
    variables = {"ACCESS_KEY_ID": server.key, "SECRET_ACCESS_KEY": server.secret, "REGION": "us-east-1"}
    for name, value in (variables | {"ENDPOINT_URL": server.endpoint_url}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("PARAKEET_CACHE", str(tmp_path / "cache"))
    return f"s3://{server.bucket()}/run"


def test_a_finished_run_stays_as_it_is(manifests, tmp_path):
    config = training_config(*manifests, tmp_path / "out", max_steps=2, batch_audio_s=9)
    first = train(config)
    again = train(config)
    assert again.progress == first.progress
    assert [line["step"] for line in measurements(read_metrics(again.task.output))] == [0, 2]


def test_the_smallest_part_of_an_epoch_is_one_step(manifests, tmp_path):
    run = train(training_config(*manifests, tmp_path / "out", epochs=0.1))
    assert read_progress(run.task.output).step == 1


def test_speed_is_that_of_the_steps():
    """However long the measurements between them take."""
    tally, step = StepTally(), Step([], 1, 1.0, Position())
    time.sleep(0.1)
    tally.add(torch.zeros(()), step, 1.0)
    time.sleep(0.5)
    tally.leave_out_pause()
    tally.add(torch.zeros(()), step, 1.0)
    assert 0.1 <= tally.seconds < 0.5


def test_accumulated_passes_equal_one(manifests, tmp_path):
    """A step in one pass = in one pass per utterance, with fixed BatchNorm statistics, which passes do not share."""
    options = PLAIN | {"max_steps": 3, "batch_audio_s": 30, "warmup_steps": 1, "freeze_batch_norm": True}
    whole = train(training_config(*manifests, tmp_path / "a", **options, micro_batch_audio_s=300))
    cut = train(training_config(*manifests, tmp_path / "b", **options, micro_batch_audio_s=1))
    assert_close_parameters(parameters(cut), parameters(whole), build_model(whole.task).state_dict())


def assert_close_parameters(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> None:
    """Each tensor has moved from its start as expected, within one hundredth of the distance it moved.

    The order of float32 sums differs, and if an element's gradient is near zero, AdamW's division by a small root turns
    the difference into steps: single elements may differ, a whole tensor may not. A bias added to every key does not
    change the attention: its gradient is only rounding.
    """
    for name, tensor in found.items():
        if not name.endswith(("k_proj.bias", "num_batches_tracked")):
            moved = (expected[name] - start[name]).norm()
            assert (tensor - expected[name]).norm() <= 0.01 * moved + 1e-6, name


def test_two_workers_equal_one(manifests, tmp_path):
    """Two processes with gloo, each with half of every batch; the batches are those of one worker."""
    options = PLAIN | {"max_steps": 4, "batch_audio_s": 20, "warmup_steps": 1, "freeze_batch_norm": True}
    options |= {"validate_steps": 2}
    alone = train(training_config(*manifests, tmp_path / "one", **options))
    config = training_config(*manifests, tmp_path / "two", **options)
    make_task(config)  # prepared once, before both start
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_worker, (config, port), nprocs=2, start_method="spawn")
    found = read_checkpoint_weights(tmp_path / "two")
    assert_close_parameters(found, parameters(alone), build_model(alone.task).state_dict())
    one, two = (read_metrics(make_task(run).output) for run in (alone.config, config))
    for line, other in zip(measurements(one), measurements(two), strict=True):
        assert other["validation_loss"] == pytest.approx(line["validation_loss"], rel=1e-3)
        assert other["items"] == line["items"] == 4


def _worker(rank: int, config, port: int) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    TrainingRun(make_task(config), rank, 2, CPU).run()
    dist.destroy_process_group()


def read_checkpoint_weights(output: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(sorted((output / "checkpoints").glob("*.safetensors"))[-1])
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}


def test_batches_hold_every_utterance_once_and_cover_any_number_of_workers():
    frames = np.random.default_rng(0).integers(50, 2000, 503)
    seen = []
    for batch in epoch_batches(frames, 20_000, 1, 0):
        assert 15_000 <= frames[batch].sum() <= 26_000
        assert len(batch) == 1 or np.ptp(frames[batch]) < 600  # of 1950
        seen += batch.tolist()
    assert sorted(seen) == list(range(503))
    first, second = (np.concatenate(epoch_batches(frames, 20_000, 1, epoch)) for epoch in (0, 1))
    assert (first != second).any()
    np.testing.assert_array_equal(first, np.concatenate(epoch_batches(frames, 20_000, 1, 0)))


def test_workers_share_a_step(manifests, tmp_path):
    """Three workers together see what one sees, from any position on; one without utterances gets weight zero."""
    task = make_task(training_config(*manifests, tmp_path / "out", batch_audio_s=9, **PLAIN))
    run = TrainingRun(task, 0, 1, CPU)

    def steps(rank: int, world: int, position: Position, count: int) -> list:
        batches = TrainingBatches(**vars(run.batches) | {"rank": rank, "world": world})
        return [step for step, _ in zip(batches.steps(position), range(count), strict=False)]

    alone = steps(0, 1, Position(), 6)
    assert any(step.after.epoch == 1 for step in alone)
    for start, position in ((0, Position()), (3, alone[2].after)):
        shared = [steps(rank, 3, position, 6 - start) for rank in range(3)]
        for expected, parts in zip(alone[start:], zip(*shared, strict=True), strict=True):
            assert {part.items for part in parts} == {expected.items}
            own = [batch for part in parts if part.weight for batch in part.micro_batches]
            assert sorted(n for batch in own for n in batch.lens.tolist()) == sorted(
                n for batch in expected.micro_batches for n in batch.lens.tolist()
            )
            assert all(part.micro_batches for part in parts)


def test_a_pass_that_is_not_finite_leaves_nothing_in_the_model(manifests, tmp_path):
    run = TrainingRun(make_task(training_config(*manifests, tmp_path / "out", max_steps=2)), 0, 1, CPU)
    step = next(run.batches.steps(run.progress.position))
    before = parameters(run)
    step.micro_batches[0].features[0, 3] = float("nan")
    run._step(step)
    assert run.progress.skipped == 1
    for name, tensor in parameters(run).items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_early_stop_keeps_the_best_model(manifests, tmp_path):
    """A learning rate that ruins the model: an early measurement, perhaps the initial one, stays the best."""
    options = PLAIN | {"learning_rate": 0.05, "warmup_steps": 3, "batch_audio_s": 20, "clip_norm": 100.0}
    config = training_config(*manifests, tmp_path / "out", max_steps=40, validate_steps=1, patience=3, **options)
    run = train(config)
    progress = run.progress
    assert progress.step < 40
    assert progress.without_gain == 3
    assert progress.step == progress.best_step + 3
    lines = measurements(read_metrics(run.task.output))
    assert min(line["validation_wer"] for line in lines) == pytest.approx(progress.best_wer, abs=1e-6)
    exported = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert any(not torch.equal(tensor, parameters(run)[name]) for name, tensor in exported.items())


def test_other_options_are_refused_in_the_same_output(manifests, tmp_path):
    config = training_config(*manifests, tmp_path / "out", max_steps=2)
    make_task(config)
    with pytest.raises(ConfigError, match="learning_rate 0.0003 there, 0.1 here"):
        make_task(dataclasses.replace(config, learning_rate=0.1))
    make_task(dataclasses.replace(config, workers=3, checkpoint_steps=7))  # what does not decide the result may differ


def test_another_tokenizer_beside_the_same_weights_is_refused_in_the_same_output(manifests, tmp_path):
    config = training_config(*manifests, tmp_path / "out", max_steps=2, model=small_checkpoint(tmp_path / "start"))
    make_task(config)
    with open(f"{config.model}/tokenizer.json", "a") as file:
        file.write("\n")
    with pytest.raises(ConfigError, match="was begun with another tokenizer.json beside the same weights"):
        make_task(config)
    record = json.loads((tmp_path / "out/finetune.json").read_text())
    del record["files"]  # as in a run begun before they were recorded
    (tmp_path / "out/finetune.json").write_text(json.dumps(record))
    make_task(config)


def test_secrets_of_urls_are_not_written_down(manifests, tmp_path):
    """Nor does a new signature make it another run."""
    signed = "https://host/{}?X-Amz-Signature=canary{}"
    config = training_config(*manifests, tmp_path / "out")
    output = Storage(config.output, config.storage())
    for number in range(2):
        urls = {name: (signed.format(name, number), "sftp://me:canary@host/more") for name in ("train", "validation")}
        urls["validation"] = urls["validation"][:1]
        config = dataclasses.replace(config, **urls, model=signed.format("model.nemo", number))
        claim_output(output, config, SimpleNamespace(digest="0" * 64, files={}))
    assert b"canary" not in output.read_bytes(RUN_FILE)


def test_a_damaged_checkpoint_is_named(manifests, tmp_path):
    run = train(training_config(*manifests, tmp_path / "out", max_steps=2, checkpoint_steps=1, batch_audio_s=9))
    output = run.task.output
    assert list_checkpoints(output) == [1, 2]
    record = json.loads(output.read_bytes("checkpoints/step-00000002.json"))
    for damage in ({"progress": {}}, {"progress": record["progress"] | {"later": 1}}, {"files": [{}]}):
        write_json(tmp_path / "out" / "checkpoints" / "step-00000002.json", record | damage)
        with pytest.raises(CheckpointError, match="step-00000002.json: .*delete it to go on"):
            read_progress(output)
    write_json(tmp_path / "out" / "checkpoints" / "step-00000002.json", record)
    path = next((tmp_path / "out" / "checkpoints").glob("step-00000002-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(CheckpointError, match="step-00000002.json: .*delete it to go on"):
        load_checkpoint_into(output, run.model, run.optimiser)
    (tmp_path / "out" / "checkpoints" / "step-00000002.json").unlink()
    assert load_checkpoint_into(output, run.model, run.optimiser).step == 1
    save_checkpoint(output, run.progress, run.model, run.optimiser)  # deletes files that belong to no checkpoint
    names = output.list_names("checkpoints")
    assert names == [f"step-0000000{step}{end}" for step in (1, 2) for end in ("-00.safetensors", ".json")]


@pytest.mark.parametrize("schedule", ["cosine", "noam"])
def test_learning_rate(schedule):
    rate = LearningRate(2e-3, 100, 1000, schedule)
    assert [rate.at(step) for step in (0, 49, 99)] == pytest.approx([2e-5, 1e-3, 2e-3])
    assert rate.at(549) == pytest.approx(1e-3 if schedule == "cosine" else 2e-3 * (100 / 550) ** 0.5, rel=1e-2)
    assert all(rate.at(step + 1) <= rate.at(step) for step in range(99, 999))
    if schedule == "cosine":
        assert rate.at(1000) == pytest.approx(0, abs=1e-9)
