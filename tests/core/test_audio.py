"""Decoding of sound files: formats, sources, channels, resampling, segments, memory."""

import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import soxr
from audio_samples import SPEECH, CountingFile, catch, encode, list_formats, make_sound
from hypothesis import given, settings
from hypothesis import strategies as st

from parakeet_core import audio
from parakeet_core.audio import SEGMENT_TOLERANCE_S, decode_audio, load_audio, probe_audio
from parakeet_core.errors import ErrorKind

LOSSY = [("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")]
needs_speech = pytest.mark.skipif(not SPEECH.is_dir(), reason=f"{SPEECH} is not there")


@pytest.mark.parametrize(("container", "codec"), list_formats())
def test_every_format_of_libsndfile(container, codec):
    sound = make_sound(0.5)
    data = encode(sound, container=container, codec=codec)
    info = probe_audio(data)
    loaded = load_audio(data, sample_rate_hz=info.sample_rate_hz)
    assert (info.channels, loaded.info, loaded.waveform.dtype) == (1, info, np.float32)
    assert len(loaded.waveform) == info.frames
    assert loaded.duration_s == info.frames / info.sample_rate_hz
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        assert (info.sample_rate_hz, info.container, info.codec) == (file.samplerate, file.format, file.subtype)
        if not file.seekable():  # soundfile.read() refuses these
            np.testing.assert_array_equal(loaded.waveform, file.read(file.frames, dtype="float32"))
        elif codec not in ("DWVW_16", "DWVW_24"):  # soundfile fails at their end
            np.testing.assert_array_equal(loaded.waveform, soundfile.read(io.BytesIO(data), dtype="float32")[0])
    assert np.corrcoef(loaded.waveform[: len(sound)], sound)[0, 1] > 0.9


def test_content_decides_not_the_name(tmp_path):
    sound = make_sound(0.3)
    for name, container, codec in (("a.wav", *LOSSY[0]), ("a.mp3", "FLAC", "PCM_16"), ("a.au", "WAV", "PCM_16")):
        path = tmp_path / name
        path.write_bytes(encode(sound, container=container, codec=codec))
        assert probe_audio(path).container == container
    (tmp_path / "notes.au").write_text("not a sound at all\n" * 100)  # libsndfile would take it for headerless u-law
    error = catch(lambda: decode_audio(tmp_path / "notes.au"))
    assert error.kind is ErrorKind.NOT_AUDIO
    assert "notes.au" in error.message


def test_every_kind_of_source(tmp_path):
    for container, codec in (("WAV", "PCM_16"), ("FLAC", "PCM_16"), *LOSSY):
        data = encode(make_sound(0.7), container=container, codec=codec)
        expected = decode_audio(data)
        path = tmp_path / "sound"
        path.write_bytes(data)
        moved = io.BytesIO(data)
        moved.seek(100)
        sources = [bytearray(data), memoryview(data), str(path), path, moved, CountingFile(data, longest_read=1000)]
        for source in sources:
            np.testing.assert_array_equal(decode_audio(source), expected)
        assert not moved.closed
        with open(path, "rb", buffering=0) as unbuffered:
            np.testing.assert_array_equal(decode_audio(unbuffered), expected)


def test_wrong_sources_are_the_callers_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        decode_audio(tmp_path / "absent.wav")
    with pytest.raises(TypeError, match="expected bytes"):
        decode_audio(np.zeros(3))
    with pytest.raises(TypeError, match="binary mode"):
        decode_audio(io.StringIO("RIFF" * 100))
    with pytest.raises(ValueError, match="sample_rate_hz"):
        decode_audio(encode(make_sound(0.1)), sample_rate_hz=0)


@pytest.mark.parametrize(("container", "codec"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), *LOSSY])
def test_a_storage_error_is_not_called_damage(container, codec):
    data = encode(make_sound(8), container=container, codec=codec)
    for fails_at in (2, len(data) // 2, len(data) - 3):
        with pytest.raises(ConnectionResetError):
            decode_audio(CountingFile(data, fails_at=fails_at))


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_channels(channels):
    sound = make_sound(0.5, channels=channels).reshape(-1, channels)
    data = encode(sound, codec="FLOAT")
    np.testing.assert_allclose(decode_audio(data), sound.mean(axis=1), atol=1e-7)
    np.testing.assert_array_equal(decode_audio(data, channel="first"), sound[:, 0])
    for index in range(channels):
        np.testing.assert_array_equal(decode_audio(data, channel=index), sound[:, index])
    for wrong in (channels, -1, True, "left", 0.0, None):
        error = catch(lambda wrong=wrong: decode_audio(data, channel=wrong))
        assert error.kind is ErrorKind.BAD_CHANNEL
        assert f"0 to {channels - 1}" in error.message


def test_channels_are_mixed_before_resampling():
    sound = make_sound(1.0, 44100, channels=2)
    mixed = soxr.resample(sound.mean(axis=1), 44100, 16000)
    np.testing.assert_allclose(decode_audio(encode(sound, 44100, codec="FLOAT")), mixed, atol=1e-6)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 32000, 44100, 44101, 48000, 96000, 192000])
def test_resampling_equals_one_shot(rate):
    sizes = (1, 2, 3, 100, 1601, audio.BLOCK_SAMPLES - 1, audio.BLOCK_SAMPLES, audio.BLOCK_SAMPLES + 1, 150_001)
    sound = make_sound(150_001 / rate, rate)
    for size in sizes:
        waveform = decode_audio(encode(sound[:size], rate, codec="FLOAT"))
        np.testing.assert_array_equal(waveform, soxr.resample(sound[:size], rate, 16000))
        assert len(waveform) == (2 * size * 16000 + rate) // (2 * rate)  # rounded, half up


@pytest.mark.parametrize(("container", "codec"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), *LOSSY])
@pytest.mark.parametrize("rate", [16000, 48000])
def test_block_size_does_not_matter(container, codec, rate, monkeypatch):
    data = encode(make_sound(1.5, rate, channels=2), rate, container, codec)
    expected = decode_audio(data)
    for block in (999, 4096, 30_000):
        monkeypatch.setattr(audio, "BLOCK_SAMPLES", block)
        monkeypatch.setattr(audio, "DIRECT_SAMPLES", block)
        np.testing.assert_array_equal(decode_audio(data), expected)


@pytest.mark.parametrize(("container", "codec"), list_formats())
def test_segments_are_slices_of_the_whole(container, codec):
    data = encode(make_sound(1.5), container=container, codec=codec)
    rate, total = probe_audio(data).sample_rate_hz, probe_audio(data).frames
    whole = decode_audio(data, sample_rate_hz=rate)
    # mpg123 adds in another order after a seek; Opus converges to 1e-40.
    tolerance = {"MP3": 3e-7, "OGG": 1e-30}.get(container, 0.0)
    for first, last in ((0, 1), (0, 160), (1, 1600), (total // 3, total // 2), (total - 501, total - 1), (5, total)):
        segment = decode_audio(data, rate, offset_s=first / rate, duration_s=(last - first) / rate)
        np.testing.assert_allclose(segment, whole[first:last], rtol=0, atol=tolerance)
    rest = decode_audio(data, rate, offset_s=0.5)
    np.testing.assert_allclose(rest, whole[(rate + 1) // 2 :], rtol=0, atol=tolerance)


@pytest.mark.parametrize(("container", "codec"), LOSSY)
def test_segments_of_long_lossy_files(container, codec):
    options = {"bitrate_mode": "VARIABLE"} if container == "MP3" else {}
    data = encode(make_sound(20), 16000, container, codec, **options)
    whole = decode_audio(data)
    for first in np.random.default_rng(1).integers(0, 19 * 16000, 25):
        segment = decode_audio(data, offset_s=first / 16000, duration_s=0.5)
        np.testing.assert_allclose(segment, whole[first : first + 8000], rtol=0, atol=3e-7)


def test_segments_are_resampled_by_themselves():
    sound = make_sound(4, 22050)
    data = encode(sound, 22050, codec="FLOAT")
    for offset_s, duration_s in ((0.0, 1.0), (0.7, 1.3), (1.2345, 0.02), (3.5, 0.5)):
        first, count = round(offset_s * 22050), round(duration_s * 22050)
        expected = soxr.resample(sound[first : first + count], 22050, 16000)
        np.testing.assert_array_equal(decode_audio(data, offset_s=offset_s, duration_s=duration_s), expected)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([8000, 16000, 22050, 44100]), st.floats(0, 2), st.floats(0, 2))
def test_lengths_are_as_documented(rate, offset_s, duration_s):
    data = encode(make_sound(4, rate), rate)
    loaded = load_audio(data, offset_s=offset_s, duration_s=duration_s)
    frames = int(np.floor(duration_s * rate + 0.5))
    assert loaded.duration_s == frames / rate
    assert len(loaded.waveform) == (2 * frames * 16000 + rate) // (2 * rate)


def test_the_end_of_a_segment_has_a_tolerance():
    data = encode(make_sound(2))
    whole = decode_audio(data)
    for excess_s in (0.0, 0.001, SEGMENT_TOLERANCE_S):
        np.testing.assert_array_equal(decode_audio(data, offset_s=1.0, duration_s=1.0 + excess_s), whole[16000:])
    wrong = [(1.0, 1.001 + SEGMENT_TOLERANCE_S), (2.0, None), (2.0, 0.1), (2.1, None), (9.0, 1.0)]
    wrong += [(-0.1, None), (0.0, -0.1), (float("nan"), None), (0.0, float("inf")), (1e300, None), (0.0, 1e300)]
    for offset_s, duration_s in wrong:
        error = catch(lambda o=offset_s, d=duration_s: decode_audio(data, offset_s=o, duration_s=d))
        assert error.kind is ErrorKind.BAD_SEGMENT
        assert "manifest" in error.message
    assert decode_audio(data, offset_s=1.0, duration_s=0.0).shape == (0,)


def test_too_long():
    data = encode(make_sound(3, 8000), 8000)
    assert catch(lambda: load_audio(data, max_duration_s=2.9)).kind is ErrorKind.TOO_LONG
    assert len(load_audio(data, max_duration_s=3.0).waveform) == 48000
    assert len(load_audio(data, duration_s=2.0, max_duration_s=2.0).waveform) == 32000
    assert len(load_audio(data, max_duration_s=None).waveform) == 48000


@pytest.mark.parametrize(("container", "codec"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), LOSSY[0]])
def test_segments_and_probes_read_only_what_they_need(container, codec):
    data = encode(make_sound(60), container=container, codec=codec)
    file = CountingFile(data)
    probe_audio(file)
    assert file.bytes_read < 50_000
    file = CountingFile(data)
    decode_audio(file, offset_s=20.0, duration_s=1.0)
    assert file.bytes_read < 0.6 * len(data)  # mpg123 walks the frames up to that point


@needs_speech
def test_real_clips_match_soundfile_and_their_manifest():
    seen = set()
    for name in ("librispeech-dev-clean.jsonl", "ljspeech.jsonl"):
        lines = (SPEECH / name).read_text().splitlines()
        for line in lines[::50] + lines[7::60]:  # every 50th LibriSpeech clip is an mp3 named .wav
            record = json.loads(line)
            path = SPEECH / record["audio_filepath"]
            samples, rate = soundfile.read(path, dtype="float32")
            expected = samples if rate == 16000 else soxr.resample(samples, rate, 16000)
            loaded = load_audio(path.read_bytes())
            np.testing.assert_array_equal(loaded.waveform, expected)
            assert abs(loaded.duration_s - record["duration"]) < 0.001
            np.testing.assert_array_equal(decode_audio(path, 16000, 0.0, record["duration"] + 0.001), expected)
            seen.add((path.suffix, loaded.info.container))
    assert {(".wav", "MP3"), (".mp3", "MP3"), (".flac", "FLAC")} <= seen


def test_threads_do_not_disturb_each_other():
    items = [encode(make_sound(1, seed=seed), 16000, *LOSSY[seed % 3]) for seed in range(24)]
    expected = [decode_audio(item) for item in items]
    with ThreadPoolExecutor(4) as pool:
        for waveform, reference in zip(pool.map(decode_audio, items), expected, strict=True):
            np.testing.assert_array_equal(waveform, reference)


LONG_FILE = """
import resource, struct, sys
from parakeet_core.audio import load_audio
frames = 1200 * 48000
with open(sys.argv[1], "wb") as file:  # a sparse file: its 230 MB of zeros take no disk
    size = 4 * frames
    file.write(struct.pack("<4sI8s", b"RIFF", 36 + size, b"WAVEfmt "))
    file.write(struct.pack("<IHHIIHH4sI", 16, 1, 2, 48000, 192000, 4, 16, b"data", size))
    file.truncate(44 + size)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loaded = load_audio(sys.argv[1])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(len(loaded.waveform), loaded.duration_s, peak * 1024)
"""


def test_memory_of_a_long_file(tmp_path):
    path = tmp_path / "long.wav"
    run = subprocess.run([sys.executable, "-c", LONG_FILE, str(path)], capture_output=True, text=True, check=True)
    os.remove(path)
    samples, duration_s, peak = (float(value) for value in run.stdout.split())
    assert (samples, duration_s) == (1200 * 16000, 1200.0)
    # The result is 77 MB, grown by a quarter at a time; 20 minutes at the file's own rate would be 461 MB.
    assert peak < 1.25 * 4 * samples + 32 * 2**20
