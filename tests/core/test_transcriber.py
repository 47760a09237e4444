"""The Python API on recorded prompts: order, kinds of input, errors in place, batch sizes, streaming."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from small_models import small_model, write_hf, write_nemo

from parakeet_core import CheckpointError, ErrorKind, InputError, Transcriber, decode_audio
from parakeet_core import transcriber as module

RATE_HZ = 16_000


@pytest.fixture(scope="module")
def transcriber(tiny_en):
    return Transcriber.load(tiny_en)


@pytest.fixture(scope="module")
def clips(prompts):
    """Eight prompts, not in order of length."""
    return prompts[::6][:8]


@pytest.fixture(scope="module")
def expected(transcriber, clips):
    """Each clip alone."""
    return [transcriber.transcribe([clip.path])[0] for clip in clips]


def test_what_a_transcript_holds(expected, clips, transcriber):
    for transcript, clip in zip(expected, clips, strict=True):
        assert transcript.error is None
        assert transcript.text
        assert transcript.duration_s == pytest.approx(clip.duration_s, abs=0.02)
        assert transcript.text == transcriber.checkpoint.tokenizer.decode(transcript.token_ids)
        assert [word.word for word in transcript.words] == transcript.text.split()
        assert 0 < transcript.confidence <= 1
        assert 0 < transcript.blank_ratio < 1
        starts = [word.start_s for word in transcript.words]
        assert starts == sorted(starts)
        assert all(0 <= word.start_s < word.end_s <= transcript.duration_s + 0.08 for word in transcript.words)


@pytest.mark.parametrize("batch_audio_s", [None, 0, 0.01, 3, 20, 1000])
def test_any_batch_size_gives_the_same(transcriber, clips, expected, batch_audio_s):
    found = transcriber.transcribe([clip.path for clip in clips], batch_audio_s=batch_audio_s)
    assert [transcript.text for transcript in found] == [transcript.text for transcript in expected]
    for ours, alone in zip(found, expected, strict=True):
        assert ours.token_ids == alone.token_ids
        assert ours.words == [
            type(word)(word.word, word.start_s, word.end_s, pytest.approx(word.confidence, abs=1e-4))
            for word in alone.words
        ]
        assert ours.confidence == pytest.approx(alone.confidence, abs=1e-4)


def test_order_is_kept(transcriber, clips, expected):
    for order in ([7, 0, 3, 1, 2, 6, 5, 4], [4, 4, 0, 4]):
        found = transcriber.transcribe([clips[index].path for index in order])
        assert [transcript.text for transcript in found] == [expected[index].text for index in order]


def test_every_kind_of_input(transcriber, clips, expected):
    path, text = clips[0].path, expected[0].text
    waveform = decode_audio(path)
    int16 = np.round(waveform * 32767).astype(np.int16)
    items = [
        path,
        str(path),
        path.read_bytes(),
        waveform,
        waveform.astype(np.float64),
        torch.from_numpy(waveform),
        torch.from_numpy(waveform).double().requires_grad_(),
        np.repeat(waveform, 2)[::2],  # not contiguous
        waveform[::-1].copy()[::-1],  # negative strides
    ]
    assert [transcript.text for transcript in transcriber.transcribe(items)] == [text] * len(items)
    integers = [int16, torch.from_numpy(int16), int16.astype(np.int32) << 16]
    assert len({transcript.text for transcript in transcriber.transcribe(integers)}) == 1
    scaled = transcriber.transcribe([int16 / np.float32(32768)])[0]
    assert transcriber.transcribe([int16])[0] == scaled


def test_errors_stand_in_place(transcriber, clips, expected, tmp_path):
    (tmp_path / "empty.wav").write_bytes(b"")
    nan = decode_audio(clips[0].path).copy()
    nan[100] = np.nan
    loud = np.where(np.isnan(nan), np.float32(1e25), nan)
    items = [
        clips[0].path,
        tmp_path / "empty.wav",
        b"this is no audio at all, however long one looks",
        clips[1].path,
        nan,
        loud,
        np.zeros((2, 16000), np.float32),
        np.zeros(16000, np.uint8),
        np.zeros(16000, np.complex64),
        np.zeros(16000, bool),
        tmp_path / "missing.wav",
        tmp_path,
        clips[2].path,
    ]
    found = transcriber.transcribe(items)
    kinds = [None if transcript.error is None else transcript.error.kind for transcript in found]
    assert kinds == [
        None,
        ErrorKind.EMPTY_FILE,
        ErrorKind.NOT_AUDIO,
        None,
        ErrorKind.NON_FINITE,
        ErrorKind.NON_FINITE,
        *[ErrorKind.BAD_RECORD] * 4,
        ErrorKind.MISSING_OBJECT,
        ErrorKind.STORAGE,
        None,
    ]
    assert [found[index].text for index in (0, 3, 12)] == [transcript.text for transcript in expected[:3]]
    for transcript in found:
        if transcript.error is not None:
            assert isinstance(transcript.error, InputError)
            assert transcript.error.message
            assert (transcript.text, transcript.token_ids, transcript.words) == ("", [], [])
            assert transcript.confidence is None


def test_nothing_to_hear(transcriber):
    """Silence, one sample and no sample at all give transcripts without text, not errors."""
    found = transcriber.transcribe([np.zeros(length, np.float32) for length in (0, 1, 159, 160, RATE_HZ)])
    assert [transcript.error for transcript in found] == [None] * 5
    assert [transcript.text for transcript in found[:3]] == ["", "", ""]
    assert [transcript.duration_s for transcript in found] == [0, 1 / RATE_HZ, 159 / RATE_HZ, 0.01, 1.0]


def test_no_items(transcriber):
    assert transcriber.transcribe([]) == []


def test_stream_comes_window_by_window(transcriber, clips, expected, monkeypatch):
    """What has been decoded is yielded before more is read, so that memory does not grow with the list."""
    monkeypatch.setattr(module, "WINDOW_AUDIO_S", 6.0)
    read = []

    def source():
        for clip in itertools.islice(itertools.cycle(clips), 24):
            read.append(clip.duration_s)
            yield clip.path

    texts = []
    for transcript in transcriber.transcribe_stream(source()):
        texts.append(transcript.text)
        assert sum(read[: len(texts) - 1]) + 6.0 + max(read) >= sum(read)  # never more than a window ahead
    assert texts == [transcript.text for transcript in expected] * 3


def test_other_sample_rates_and_channels(transcriber, clips, expected):
    """A stereo file at the same rate, both channels alike, is the same audio."""
    waveform = decode_audio(clips[0].path)
    stereo = io.BytesIO()
    soundfile.write(stereo, np.stack([waveform, waveform], 1), RATE_HZ, format="WAV", subtype="FLOAT")
    assert transcriber.transcribe([stereo.getvalue()])[0].text == expected[0].text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_hears_nearly_the_same(tiny_en, clips, expected, dtype):
    found = Transcriber.load(tiny_en, dtype=dtype).transcribe([clip.path for clip in clips])
    same = sum(ours.text == alone.text for ours, alone in zip(found, expected, strict=True))
    assert same >= 6
    assert all(transcript.error is None for transcript in found)


def test_both_checkpoint_forms_say_the_same(tmp_path, clips):
    model = small_model(seed=9)
    paths = [write_hf(tmp_path / "hf", model), write_nemo(tmp_path / "m.nemo", model)]
    from_hf, from_nemo = (Transcriber.load(path).transcribe([clip.path for clip in clips]) for path in paths)
    assert [transcript.token_ids for transcript in from_hf] == [transcript.token_ids for transcript in from_nemo]
    assert any(transcript.token_ids for transcript in from_hf)


def test_unusable_checkpoint_is_one_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        Transcriber.load(Path(tmp_path / "nothing"))
