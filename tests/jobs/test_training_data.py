"""Training data: texts of every layout, pseudo-labels from a transcript table, and labels that cannot be used."""

import json
from pathlib import Path

import numpy as np
import pytest
from job_layouts import PROMPTS, TINY_EN, job_config, prompt_records, read_table
from job_samples import audio_bytes, jsonl
from training_samples import PLAIN, make_task, prepare, prompt_manifest, train, training_config

from jobs.finetune import share_nodes
from jobs.storage.files import Storage
from jobs.training.data import PreparedAudio
from jobs.training.labels import ctc_frames, label_utterances, lacks_pieces, plain_text
from jobs.training.metrics import ErrorCounts, read_metrics
from jobs.training.setup import architecture
from jobs.transcribe import run
from parakeet_core import ConfigError, decode_audio
from parakeet_core.tokenizer import TokenizerJson, load_tokenizer
from parakeet_core.tokenizer_training import train_tokenizer


@pytest.mark.parametrize("layout", ["manifest", "webdataset", "parquet"])
def test_every_layout_with_texts_gives_the_same_audio_and_texts(layout, layouts, tmp_path):
    validation = prompt_manifest(tmp_path / "val.jsonl", 30, 32)
    task = make_task(training_config(str(layouts[layout]), validation, tmp_path / "out"))
    assert sorted(task.train.texts) == sorted(record["text"] for record in prompt_records(12))
    audio = task.data("train")
    names = {record["text"]: record["audio_filepath"] for record in prompt_records(12)}
    for text, file, row, frames in zip(
        task.train.texts, task.train.files, task.train.rows, task.train.frames, strict=True
    ):
        expected = decode_audio(PROMPTS / names[text])
        np.testing.assert_allclose(audio.waveform(file, row), expected, rtol=0, atol=0.5 / 32768 + 1e-7)
        assert frames == len(expected) // 160


def test_audio_alone_is_refused(layouts, tmp_path):
    validation = prompt_manifest(tmp_path / "val.jsonl", 30, 32)
    with pytest.raises(ConfigError, match="--train: none of 12 items can be used .*12 no_text"):
        make_task(training_config(str(layouts["files"]), validation, tmp_path / "out"))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("layout", ["manifest", "webdataset", "parquet"])
def test_pseudo_labels_of_a_transcript_table(layout, layouts, tmp_path):
    """With a finished table as input, its texts are used, not the references, and only of confident rows."""
    table = tmp_path / "table"
    assert run(job_config(layouts[layout], table, shard_audio_s=20)).exit_code == 0
    rows = read_table(table)
    confidences = sorted(row["confidence"] for row in rows)
    threshold = (confidences[5] + confidences[6]) / 2
    validation = prompt_manifest(tmp_path / "val.jsonl", 30, 32)
    config = training_config(str(table), validation, tmp_path / "out", min_confidence=threshold)
    task = make_task(config)
    kept = {row["id"]: row["text"] for row in rows if row["confidence"] >= threshold}
    assert len(kept) == 6
    assert dict(zip(task.train.ids, task.train.texts, strict=True)) == kept
    index = prepare(config, "train")
    assert index["rejection"].to_pylist().count("low_confidence") == 6


def bad_labels(folder: Path) -> str:
    """Prompts that can be used, and one item of each kind that cannot."""
    (folder / "tone.wav").write_bytes(audio_bytes(2.0))
    (folder / "long.wav").write_bytes(audio_bytes(40.0))
    (folder / "short.wav").write_bytes(audio_bytes(0.1))
    (folder / "broken.wav").write_bytes(b"RIFF, but no more")
    good = sorted(prompt_records(), key=lambda record: record["duration"])[:4]
    items = {
        "empty": ("tone.wav", ""),
        "blank": ("tone.wav", " \t"),
        "null": ("tone.wav", None),
        "punctuation": ("tone.wav", "?!"),
        "longer": ("tone.wav", "far more than can be said in two seconds " * 3),
        "repeats": ("tone.wav", "b b b b b b b b b b b b b b b"),
        "unknown": ("tone.wav", "größer"),
        "too long": ("long.wav", "a text"),
        "too short": ("short.wav", "a"),
        "broken": ("broken.wav", "a text"),
        "missing": ("nowhere.wav", "a text"),
    }
    lines = [{"id": name, "audio_filepath": file, "text": text} for name, (file, text) in items.items()]
    lines += [record | {"audio_filepath": str(PROMPTS / record["audio_filepath"])} for record in good]
    (folder / "bad.jsonl").write_bytes(jsonl(*lines))
    return str(folder / "bad.jsonl")


def test_bad_labels_are_counted_and_training_stays_finite(tmp_path):
    validation = prompt_manifest(tmp_path / "val.jsonl", 30, 32)
    config = training_config(bad_labels(tmp_path), validation, tmp_path / "out", max_steps=3, log_steps=1)
    index = prepare(config, "train")
    task = make_task(config)
    _, report = label_utterances(index, task.tokenizer, task.model, True, config.min_audio_s, 1.1)
    assert report.rejected == {
        "more_tokens_than_frames": 2,
        "no_text": 4,
        "too_long": 1,
        "too_short": 1,
        "unknown_characters": 1,
        "unreadable": 2,
    }
    assert (report.items, report.used) == (15, 4)
    assert len(task.train) == 4
    assert {(name, reason) for name, reason, _ in report.examples} >= {
        ("unknown", "unknown_characters"),
        ("longer", "more_tokens_than_frames"),
        ("broken", "unreadable"),
    }
    losses = [line["loss"] for line in read_metrics(train(config).task.output) if "loss" in line]
    assert len(losses) == 3
    assert np.isfinite(losses).all()


def test_audio_without_a_frame_is_left_out_of_validation_too(tmp_path):
    (tmp_path / "click.wav").write_bytes(audio_bytes(0.005))
    (tmp_path / "val.jsonl").write_bytes(
        Path(prompt_manifest(tmp_path / "prompts.jsonl", 30, 32)).read_bytes()
        + b"\n"
        + jsonl({"audio_filepath": str(tmp_path / "click.wav"), "text": "yes", "duration": 0.005})
    )
    train_set = prompt_manifest(tmp_path / "train.jsonl", 0, 3)
    run = train(training_config(train_set, str(tmp_path / "val.jsonl"), tmp_path / "out", max_steps=1))
    assert len(run.task.validation) == 2


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        ([(8, 0)], {}, ("cpu", 1, 8)),
        ([(4, 0), (4, 0)], {}, ("cpu", 1, 4)),  # a worker fits on one node
        ([(4, 0), (4, 0)], {"workers": 3}, ("cpu", 3, 2)),
        ([(4, 0), (4, 0)], {"workers": 2, "cpus_per_worker": 1}, ("cpu", 2, 1)),
        ([(4, 1), (64, 0)], {}, ("cuda", 1, 4)),
        ([(96, 8)], {}, ("cuda", 8, 8)),
        ([(8, 2), (4, 2)], {}, ("cuda", 4, 2)),
        ([(8, 2), (4, 2)], {"workers": 2}, ("cuda", 2, 4)),
    ],
)
def test_every_worker_has_a_place_on_one_node(nodes, options, expected, tmp_path, capsys):
    config = training_config(
        str(tmp_path / "a"), "b", tmp_path, **{"device": "auto", "workers": None, "cpus_per_worker": None} | options
    )
    assert share_nodes(config, [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in nodes]) == expected
    assert capsys.readouterr().err == ""


def test_workers_without_a_place_are_told_of(tmp_path, capsys):
    """An autoscaler may add nodes, so the job waits, but says what for."""
    config = training_config(str(tmp_path / "a"), "b", tmp_path, device="cuda", workers=4)
    share_nodes(config, [{"CPU": 8.0, "GPU": 1.0}])
    assert "places for 1 of 4 workers" in capsys.readouterr().err


@pytest.mark.parametrize("replaced", [("<unk>", "[UNK]"), ('"unk_token": "<unk>"', '"unk_token": null')], ids=str)
def test_unknown_characters_whatever_the_tokenizer_does_with_them(replaced):
    """It may have any name for them, or omit them."""
    content = (TINY_EN / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = TokenizerJson(content.replace(*replaced))
    assert lacks_pieces("größer", tokenizer.encode("größer"), tokenizer)
    assert not lacks_pieces("please hold", tokenizer.encode("please hold"), tokenizer)


@pytest.mark.parametrize(("given", "used"), [(0.0, 0.0), (0.05, 0.05), (0.5, 0.2)])
def test_dropout_is_that_of_all_rates(given, used, tmp_path):
    """The rates of positions and layers, which a model may leave at 0, are only lowered, never raised."""
    rates = {"hidden_size": 32, "num_attention_heads": 4, "layerdrop": 0.2, "dropout_positions": 0.2, "dropout": 0.1}
    (tmp_path / "config.json").write_text(json.dumps({"encoder_config": rates}))
    options = {"model_config": str(tmp_path / "config.json"), "vocab_size": 9, "dropout": given}
    encoder, _ = architecture(training_config("a", "b", tmp_path / "out", **options), None)
    assert (encoder.dropout, encoder.activation_dropout, encoder.attention_dropout) == (given, given, given)
    assert (encoder.dropout_positions, encoder.layerdrop) == (used, used)


def test_repeats_need_a_blank_between():
    assert [ctc_frames(ids) for ids in ([], [3], [3, 4, 3], [3, 3, 4, 4, 4])] == [0, 1, 3, 8]


def test_an_impossible_label_that_slips_through_gives_no_gradient_that_is_not_finite(tmp_path):
    """Validation texts are not filtered by length: their loss counts as zero."""
    train_set = prompt_manifest(tmp_path / "train.jsonl", 0, 2)
    validation = prompt_manifest(tmp_path / "val.jsonl", 2, 4, text="nobody says this so quickly " * 9)
    lines = read_metrics(train(training_config(train_set, validation, tmp_path / "out", max_steps=1)).task.output)
    assert [line["validation_loss"] for line in lines if "validation_wer" in line] == [0, 0]


def test_text_form(tmp_path):
    carried = load_tokenizer(TINY_EN / "tokenizer.json")
    cased = train_tokenizer(["The Cat sat. On a mat!"] * 5, 15)
    assert plain_text("auto", carried)
    assert not plain_text("auto", cased)
    assert plain_text("plain", cased)
    assert not plain_text("raw", carried)


def test_what_was_planned_stays(tmp_path):
    """Items added to an input later do not change the data of a resumed run."""
    validation = prompt_manifest(tmp_path / "val.jsonl", 30, 32)
    manifest = Path(prompt_manifest(tmp_path / "train.jsonl", 0, 3))
    config = training_config(str(manifest), validation, tmp_path / "out")
    before = make_task(config).train
    prompt_manifest(manifest, 0, 5)
    assert make_task(config).train.ids == before.ids


def test_prepared_audio_of_an_object_store(s3_server, tmp_path, monkeypatch):
    monkeypatch.setenv("PARAKEET_CACHE", str(tmp_path / "cache"))
    storage = Storage(f"s3://{s3_server.bucket()}/data", s3_server.options)
    validation = prompt_manifest(tmp_path / "val.jsonl", 30, 32)
    task = make_task(training_config(prompt_manifest(tmp_path / "train.jsonl", 0, 3), validation, tmp_path / "out"))
    local = task.data("train")
    for name in local.folder.list_names():
        storage.write_atomic(name, local.folder.read_bytes(name))
    remote = PreparedAudio(storage)
    for file, row in zip(task.train.files, task.train.rows, strict=True):
        np.testing.assert_array_equal(remote.waveform(file, row), local.waveform(file, row))
    file, row = task.train.files[0], task.train.rows[0]
    content = local.folder.read_bytes(file)
    samples = local._files[file]["audio"][row].as_buffer().to_pybytes()
    storage.write_atomic(file, content.replace(samples, bytes(len(samples))))  # silence of the same size
    assert not PreparedAudio(storage).waveform(file, row).any()


def test_error_counts():
    counts = ErrorCounts()
    counts.add("The cat's mat.", "the cats mat")
    counts.add("one two", "")
    assert (counts.word_errors, counts.words, counts.items) == (3, 5, 2)
    assert (counts.char_errors, counts.chars) == (1 + 7, 13 + 7)
    assert counts.wer == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "either --model"),
        ({"model_config": "config.json"}, "either --model"),
        ({"model": None, "model_config": "config.json"}, "needs --vocab-size"),
        ({"validation": ("a",)}, "both hold a"),
        ({"train": ()}, "--train is empty"),
        ({"batch_audio_s": 0.0}, "--batch-audio-s 0.0: expected more than 0"),
        ({"speed_factors": (0.0, 1.0)}, "--speed-factors"),
        ({"dropout": 2.0}, "--dropout 2.0: expected 0 to 1"),
        ({"seed": -1}, "--seed -1: expected 0 or more"),
        ({"seed": 1 << 63}, "a seed under 2"),
        ({"weight_decay": -0.1}, "--weight-decay -0.1: expected 0 or more"),
        ({"freq_width": -1}, "--freq-width -1: expected 0 or more"),
        ({"epochs": float("inf")}, "--epochs inf"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_options_are_checked(options, message):
    from jobs.training.config import FinetuneConfig

    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**{"train": ("a",), "validation": ("b",), "model": "m", "output": "o"} | options)


def test_seed_and_new_vocabulary_from_random_weights(tmp_path):
    """From a config.json: a tokenizer from the training texts, a head of its size, weights determined by the seed."""
    train_set, validation = (
        prompt_manifest(tmp_path / "train.jsonl", 0, 20),
        prompt_manifest(tmp_path / "val.jsonl", 20, 22),
    )
    encoder = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps({"encoder_config": encoder | {"subsampling_conv_channels": 8}}))
    options = {"model_config": str(config_file), "vocab_size": 60, "max_steps": 1} | PLAIN
    first, again, other = (
        train(training_config(train_set, validation, tmp_path / str(number), **options, seed=seed))
        for number, seed in enumerate((1, 1, 2))
    )
    assert first.task.model.vocab_size == 61
    weights = [run.model.encoder.layers[0].feed_forward1.linear1.weight for run in (first, again, other)]
    assert (weights[0] == weights[1]).all()
    assert (weights[0] != weights[2]).any()
