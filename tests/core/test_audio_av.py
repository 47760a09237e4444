"""Decoding by PyAV: the formats that libsndfile lacks, and what happens without the extra."""

import io
import sys
from functools import cache

import numpy as np
import pytest
from audio_samples import CountingFile, catch, encode, encode_av, make_sound
from hypothesis import given, settings
from hypothesis import strategies as st

from parakeet_core.audio import decode_audio, load_audio, probe_audio
from parakeet_core.audio_headers import _ogg_checksum
from parakeet_core.errors import ErrorKind, InputError

av = pytest.importorskip("av", reason="the extra parakeet-batch[av] is not installed")

# container and codec for FFmpeg; rate, channels; what probe_audio says; delay that the container does not undo
FORMATS = {
    "m4a": ("ipod", "aac", 16000, 1, ("MP4", "AAC"), 0),
    "m4a stereo": ("ipod", "aac", 44100, 2, ("MP4", "AAC"), 0),
    "webm": ("webm", "libopus", 48000, 1, ("MATROSKA", "OPUS"), 0),
    "webm stereo": ("webm", "libopus", 48000, 2, ("MATROSKA", "OPUS"), 0),
    "mkv pcm": ("matroska", "pcm_s16le", 16000, 1, ("MATROSKA", "PCM_S16LE"), 0),
    "mkv flac": ("matroska", "flac", 16000, 2, ("MATROSKA", "FLAC"), 0),
    "mov pcm": ("mov", "pcm_s16le", 16000, 1, ("MP4", "PCM_S16LE"), 0),
    "ogg flac": ("ogg", "flac", 16000, 1, ("OGG", "FLAC"), 0),
    "adts": ("adts", "aac", 16000, 1, ("ADTS", "AAC"), 1024),
}


@cache
def make_item(name: str, seconds: float = 8.0) -> tuple[bytes, np.ndarray]:
    """Return an encoded item and the mono sound in it."""
    container, codec, rate, channels, _, _ = FORMATS[name]
    sound = make_sound(seconds, rate, channels)
    return encode_av(sound, rate, container, codec), sound.reshape(len(sound), channels).mean(axis=1)


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    _, _, rate, channels, names, delay = FORMATS[name]
    data, sound = make_item(name)
    info = probe_audio(data)
    assert (info.sample_rate_hz, info.channels, (info.container, info.codec), info.frames) == (
        rate,
        channels,
        names,
        None,
    )
    assert info.duration_s is None or abs(info.duration_s - 8) < 0.07  # Matroska counts the delay of the encoder
    loaded = load_audio(data, sample_rate_hz=rate)
    assert loaded.info == info
    assert 0 <= len(loaded.waveform) - delay - len(sound) <= 2048  # padding to whole codec frames
    assert np.corrcoef(loaded.waveform[delay : delay + len(sound)], sound)[0, 1] > 0.95
    if "pcm" in names[1].lower() or names[1] == "FLAC":
        np.testing.assert_allclose(loaded.waveform, sound, atol=2 / 32768)
    assert len(decode_audio(data, 8000)) == (2 * len(loaded.waveform) * 8000 + rate) // (2 * rate)


@pytest.mark.parametrize("name", FORMATS)
def test_segments(name):
    _, codec, rate, _, _, _ = FORMATS[name]
    data, _ = make_item(name)
    whole = decode_audio(data, rate)
    slack = rate // 1000 if codec == "libopus" else 0  # Matroska's time stamps are in ms; Opus frames may begin between
    for offset_s in (0.0, 0.3, 2.5, 6.12, 7.0):
        segment = decode_audio(data, rate, offset_s=offset_s, duration_s=0.8)
        first = round(offset_s * rate)
        assert len(segment) == round(0.8 * rate)
        shifts = range(-min(slack, first), slack + 1)
        parts = [whole[first + shift : first + shift + len(segment)] for shift in shifts]
        if codec == "aac":  # its decoder generates noise, which differs after a seek
            likeness = [np.corrcoef(segment[3:-3], np.roll(parts[0], lag)[3:-3])[0, 1] for lag in range(-3, 4)]
            assert max(likeness) == likeness[3] > 0.95
        else:
            assert min(np.abs(segment - part).max() for part in parts) < 1e-4
    for wrong in ((7.5, 2.0), (9.0, None), (20.0, 1.0), (1e300, 1.0)):
        error = catch(lambda w=wrong: decode_audio(data, rate, offset_s=w[0], duration_s=w[1]))
        assert error.kind is ErrorKind.BAD_SEGMENT
    assert len(decode_audio(data, rate, offset_s=7.0, duration_s=1.2)) >= rate  # the tolerance at the end


def test_segments_read_only_what_they_need():
    for name in ("m4a", "mkv pcm"):
        data, _ = make_item(name, seconds=30.0)
        file = CountingFile(data)
        decode_audio(file, offset_s=20.0, duration_s=1.0)
        assert file.bytes_read < 0.6 * len(data)


def test_channels():
    data, _ = make_item("mkv flac")
    left, right = decode_audio(data, channel="first"), decode_audio(data, channel=1)
    np.testing.assert_allclose(decode_audio(data), (left + right) / 2, atol=1e-7)
    assert catch(lambda: decode_audio(data, channel=2)).kind is ErrorKind.BAD_CHANNEL


def test_eight_channels_in_planes():
    sound = make_sound(2, 48000, 8)
    data = encode_av(sound, 48000, "ipod", "aac")
    for channel in (0, 5, 7):
        waveform = decode_audio(data, 48000, channel=channel)
        assert np.corrcoef(waveform[: len(sound)], sound[:, channel])[0, 1] > 0.95
    mixed = np.mean([decode_audio(data, 48000, channel=channel) for channel in range(8)], axis=0)
    np.testing.assert_allclose(decode_audio(data, 48000), mixed, atol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_cut_files(name):
    data, _ = make_item(name)
    for share in (0.5, 0.95):
        error = catch(lambda share=share: decode_audio(data[: int(share * len(data))]))
        assert error.kind is ErrorKind.TRUNCATED
    if name.startswith(("webm", "mkv")):  # streams: what is there can be used
        cut = data[: len(data) // 2]
        np.testing.assert_array_equal(decode_audio(cut, duration_s=2), decode_audio(data, duration_s=2))
        assert catch(lambda: decode_audio(cut, offset_s=2, duration_s=5)).kind is ErrorKind.TRUNCATED


def test_aac_behind_an_id3_tag():
    """As in files of radio recorders and in segments of HTTP live streams."""
    data, _ = make_item("adts")
    tagged = b"ID3\x04\0\0\0\0\0\x3f" + bytes(63) + data
    assert probe_audio(tagged).container == "ADTS"
    np.testing.assert_array_equal(decode_audio(tagged), decode_audio(data))


def test_ogg_streams_joined_end_to_end():
    for codec in ("VORBIS", "OPUS"):
        first, second = (encode(make_sound(s, seed=s), 16000, "OGG", codec) for s in (3, 2))
        joined = load_audio(first + second)
        assert joined.info.container == "OGG"
        assert 5.0 <= joined.duration_s < 5.05  # libsndfile reads only the first 3 s of it
        assert np.corrcoef(joined.waveform[:48000], decode_audio(first))[0, 1] > 0.99
        assert np.corrcoef(joined.waveform[-32000:], decode_audio(second))[0, 1] > 0.99


def with_serial(ogg: bytes, serial: bytes) -> bytes:
    """Give the stream of an Ogg file another serial number."""
    pages, at = [], 0
    while at < len(ogg):
        size = 27 + ogg[at + 26] + sum(ogg[at + 27 : at + 27 + ogg[at + 26]])
        page = ogg[at : at + 14] + serial + ogg[at + 18 : at + 22] + bytes(4) + ogg[at + 26 : at + size]
        pages.append(page[:22] + _ogg_checksum(page).to_bytes(4, "little") + page[26:])
        at += size
    return b"".join(pages)


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_ogg_streams_of_one_serial_number_joined(codec, tmp_path):
    long, short = (with_serial(encode(make_sound(s, seed=s), 16000, "OGG", codec), b"same") for s in (9, 2))
    other = with_serial(short, b"else")
    for streams, seconds in (([long, short], 11), ([short, long], 11), ([short, short], 4), ([short, other, short], 6)):
        path = tmp_path / "joined"
        path.write_bytes(b"".join(streams))
        for source in (path.read_bytes(), path):
            assert seconds <= load_audio(source).duration_s < seconds + 0.1
    assert probe_audio(long).container == "OGG"
    assert probe_audio(long).frames == 9 * 16000  # a single stream is read by libsndfile


def test_a_storage_error_is_not_called_damage():
    for name in ("m4a", "webm"):
        data, _ = make_item(name)
        for fails_at in (10, len(data) // 2, len(data) - 10):
            with pytest.raises(ConnectionResetError):
                decode_audio(CountingFile(data, fails_at=fails_at))


def test_too_long():
    data, _ = make_item("m4a")
    assert catch(lambda: load_audio(data, max_duration_s=5)).kind is ErrorKind.TOO_LONG
    assert len(load_audio(data, duration_s=5, max_duration_s=5).waveform) == 80_000


def test_no_audio_inside():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(3):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        output.mux(stream.encode(None))
    error = catch(lambda: decode_audio(buffer.getvalue()))
    assert error.kind is ErrorKind.NOT_AUDIO
    assert "none of them audio" in error.message
    for junk in (b"\0\0\0\x10ftypM4A " + bytes(2000), b"\x1aE\xdf\xa3" + bytes(100), b"\xff\xf1" * 100):
        assert catch(lambda j=junk: decode_audio(j)).kind in (ErrorKind.NOT_AUDIO, ErrorKind.TRUNCATED)


def test_without_the_extra(monkeypatch):
    chained = encode(make_sound(1), 16000, "OGG", "OPUS") + encode(make_sound(1), 16000, "OGG", "OPUS")
    items = [chained, *(make_item(name)[0] for name in ("m4a", "webm", "adts", "ogg flac"))]
    monkeypatch.setitem(sys.modules, "av", None)  # `import av` now fails as if it were not installed
    for data in items:
        for call in (decode_audio, probe_audio):
            error = catch(lambda d=data, c=call: c(d))
            assert error.kind is ErrorKind.DECODER_MISSING
            assert "pip install 'parakeet-batch[av]'" in error.message
    assert len(decode_audio(encode(make_sound(1)))) == 16000  # other formats still work


SEEDS = [make_item(name, seconds=0.5)[0] for name in FORMATS]


@settings(max_examples=120, deadline=10_000)
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 1500), st.binary(max_size=4)), min_size=1, max_size=4))
def test_junk_gives_a_waveform_or_an_input_error(data, changes):
    damaged = bytearray(data)
    for at, change in changes:
        damaged[at : at + 4] = change
    try:
        waveform = decode_audio(bytes(damaged))
    except InputError:
        return
    assert np.isfinite(waveform).all()
