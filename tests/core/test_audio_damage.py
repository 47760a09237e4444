"""Sound files that are cut, damaged, absurd, streamed without sizes, or no sound at all."""

import contextlib
import io
import resource
import struct
import time
import tracemalloc

import numpy as np
import pytest
import soundfile
from audio_samples import catch, encode, list_formats, make_sound
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parakeet_core.audio import decode_audio, load_audio, probe_audio
from parakeet_core.errors import ErrorKind, InputError

# Containers in which nothing tells a cut file from a short one, or where libsndfile does not expose what does.
UNDECLARED = {"AVR", "SVX", "MAT4", "MAT5", "MPC2K", "PAF", "PVF", "IRCAM", "VOC", "WVE", "XI"}
COMMON = [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")]


@pytest.mark.parametrize(("container", "codec"), [each for each in list_formats() if each[0] not in UNDECLARED])
def test_cut_files(container, codec):
    data = encode(make_sound(4), container=container, codec=codec)
    for share in (0.5, 0.95):
        error = catch(lambda share=share: decode_audio(data[: int(share * len(data))]))
        if container == "HTK":  # recognised by its exact size, so a cut file is not recognised
            assert error.kind is ErrorKind.NOT_AUDIO
        else:
            assert error.kind is ErrorKind.TRUNCATED
            assert "again" in error.message


@pytest.mark.parametrize(
    ("container", "codec"), [("WAV", "PCM_16"), ("FLAC", "PCM_16"), ("AIFF", "PCM_16"), ("AU", "PCM_16")]
)
def test_one_frame_less(container, codec):
    data = encode(make_sound(1), container=container, codec=codec)
    assert catch(lambda: decode_audio(data[:-2])).kind is ErrorKind.TRUNCATED


@pytest.mark.parametrize(("container", "codec"), COMMON)
def test_segments_before_the_cut(container, codec):
    data = encode(make_sound(8), container=container, codec=codec)
    cut = data[: len(data) * 3 // 4]
    np.testing.assert_array_equal(
        decode_audio(cut, offset_s=1, duration_s=2), decode_audio(data, offset_s=1, duration_s=2)
    )
    for offset_s, duration_s in ((0, None), (7, None), (7, 0.5), (5, 3)):
        error = catch(lambda o=offset_s, d=duration_s: decode_audio(cut, offset_s=o, duration_s=d))
        assert error.kind is ErrorKind.TRUNCATED


def test_cut_in_the_header():
    for container, codec in COMMON:
        data = encode(make_sound(2), container=container, codec=codec)
        for size in range(1, 400, 7):
            kind = catch(lambda d=data[:size]: decode_audio(d)).kind
            expected = (
                {ErrorKind.TRUNCATED, ErrorKind.EMPTY_FILE}
                if size >= 12
                else {ErrorKind.TRUNCATED, ErrorKind.NOT_AUDIO}
            )
            assert kind in expected, (container, size)


def patch_wav(data: bytes, riff_size: int, data_size: int) -> bytes:
    assert data[36:40] == b"data"
    return data[:4] + struct.pack("<I", riff_size) + data[8:40] + struct.pack("<I", data_size) + data[44:]


@pytest.mark.parametrize(
    ("riff_size", "data_size"),
    [
        (0xFFFFFFFF, 0xFFFFFFFF),  # ffmpeg to a pipe
        (0x7FFFF024, 0x7FFFF000),  # sox to a pipe
        (0x80000024, 0x80000000),  # arecord
        (36, 0),  # written before the samples, never corrected
        (0, 0),
        (0xFFFFFFFF, 0),
        (8, 0),
    ],
)
def test_streamed_wav(riff_size, data_size, tmp_path):
    sound = make_sound(2)
    data = patch_wav(encode(sound), riff_size, data_size)
    expected = soundfile.read(io.BytesIO(encode(sound)), dtype="float32")[0]
    path = tmp_path / "streamed.wav"
    path.write_bytes(data)
    for source in (data, path):
        np.testing.assert_array_equal(decode_audio(source), expected)
        np.testing.assert_array_equal(decode_audio(source, offset_s=1, duration_s=0.5), expected[16000:24000])
    # With the chunk that ffmpeg writes before the samples.
    note = b"LIST" + struct.pack("<I", 26) + b"INFOISFT" + struct.pack("<I", 14) + b"Lavf60.16.100\0"
    np.testing.assert_array_equal(decode_audio(data[:36] + note + data[36:]), expected)


@pytest.mark.parametrize("data_size", ["wrapped", 0xFFFFFFFF, 0])
@pytest.mark.parametrize("tail", [b"", b"LIST\x04\0\0\0INFO"])
def test_wav_over_4_gib(data_size, tail, tmp_path):
    """Sizes have 32 bits: writers let them wrap, and libsndfile would read only the remainder."""
    end = (make_sound(1, 48000, 2) * 32767).astype("<i2")
    frames = 7 * 3600 * 48000
    path = tmp_path / "day.wav"
    wrapped = data_size == "wrapped"
    with open(path, "wb") as file:  # a sparse file: its 4.8 GB take no disk
        size = 4 * frames % 2**32 if wrapped else data_size
        header = (b"RIFF", (36 + size) % 2**32, b"WAVEfmt ", 16, 1, 2, 48000, 192000, 4, 16, b"data", size)
        file.write(struct.pack("<4sI8sIHHIIHH4sI", *header))
        file.seek(4 * frames - end.nbytes, io.SEEK_CUR)
        file.write(end.tobytes() + tail)
    info = probe_audio(path)
    assert info.frames == frames + (0 if wrapped else len(tail) // 4)
    segment = decode_audio(path, 48000, offset_s=7 * 3600 - 1, duration_s=1)
    np.testing.assert_array_equal(segment, end.astype(np.float32).mean(axis=1) / 32768)


@pytest.mark.parametrize(("container", "size_at"), [("AU", 8), ("AIFF", 42)])
def test_streamed_au_and_aiff(container, size_at):
    data = encode(make_sound(1), container=container)
    for size in (0xFFFFFFFF, 0x7F000008) if container == "AIFF" else (0xFFFFFFFF,):
        streamed = data[:size_at] + struct.pack(">I", size) + data[size_at + 4 :]
        np.testing.assert_array_equal(decode_audio(streamed), decode_audio(data))


@pytest.mark.parametrize(
    ("container", "chunk", "size_at", "size"),
    [
        ("RF64", b"ds64", 8, bytes(24)),  # ffmpeg -rf64 always
        ("RF64", b"ds64", 8, b"\xff" * 24),
        ("W64", b"data", 16, b"\xff" * 7 + b"\x7f"),  # ffmpeg
        ("CAF", b"data", 4, b"\xff" * 8),  # as its specification has it
    ],
)
def test_streamed_files_with_sizes_of_64_bits(container, chunk, size_at, size, tmp_path):
    data = encode(make_sound(2), container=container)
    at = data.index(chunk) + size_at
    streamed = data[:at] + size + data[at + len(size) :]
    path = tmp_path / "streamed"
    path.write_bytes(streamed)
    whole = decode_audio(data)
    for source in (streamed, path):
        assert probe_audio(source).frames == 32000
        np.testing.assert_array_equal(decode_audio(source), whole)
        np.testing.assert_array_equal(decode_audio(source, offset_s=1, duration_s=0.5), whole[16000:24000])
    assert catch(lambda: decode_audio(streamed[: len(data) - 64000])).kind is ErrorKind.EMPTY_FILE


def test_chunks_behind_the_samples_are_no_samples():
    data = encode(make_sound(1))
    note = b"LIST" + struct.pack("<I", 4) + b"INFO"
    assert len(decode_audio(data + note)) == 16000
    assert catch(lambda: decode_audio(patch_wav(data[:44], 48, 0) + note)).kind is ErrorKind.EMPTY_FILE


def flac_with(data: bytes, frames: int | None = None, rate: int | None = None) -> bytes:
    """Rewrite the frame count or the rate in the STREAMINFO of a flac file."""
    packed = int.from_bytes(data[18:26], "big")
    if frames is not None:
        packed = packed >> 36 << 36 | frames
    if rate is not None:
        packed = packed & ((1 << 44) - 1) | rate << 44
    return data[:18] + packed.to_bytes(8, "big") + data[26:]


def test_flac_of_unknown_length():
    data = encode(make_sound(3), container="FLAC")
    streamed = flac_with(data, frames=0)
    whole = decode_audio(data)
    assert probe_audio(streamed).frames is None
    np.testing.assert_array_equal(decode_audio(streamed), whole)
    np.testing.assert_array_equal(decode_audio(streamed, offset_s=1, duration_s=1), whole[16000:32000])
    np.testing.assert_array_equal(decode_audio(streamed, offset_s=2, duration_s=1.2), whole[32000:])
    for offset_s, duration_s in ((2, 1.3), (3.5, None), (5, 0.1)):
        error = catch(lambda o=offset_s, d=duration_s: decode_audio(streamed, offset_s=o, duration_s=d))
        assert error.kind is ErrorKind.BAD_SEGMENT
    assert catch(lambda: load_audio(streamed, max_duration_s=2)).kind is ErrorKind.TOO_LONG
    assert len(load_audio(streamed, max_duration_s=3).waveform) == 48000


def aiff_rate(rate: int) -> bytes:
    return struct.pack(">HQ", 16383 + 63, rate)


def absurd_files() -> dict[str, bytes]:
    sound = make_sound(1)
    wav, flac, aiff = (encode(sound, container=container) for container in ("WAV", "FLAC", "AIFF"))
    au, rf64 = encode(sound, container="AU"), encode(sound, container="RF64")
    comm, ds64 = aiff.index(b"COMM") + 8, rf64.index(b"ds64") + 8
    mp3 = encode(sound, container="MP3", codec="MPEG_LAYER_III")
    xing = mp3.index(b"Xing") + 8
    return {
        "flac of 2^31 frames": flac_with(flac, frames=2**31),
        "flac of 2^36 - 1 frames": flac_with(flac, frames=2**36 - 1),
        "flac of 1 Hz": flac_with(flac, rate=1),
        "flac of 1048575 Hz": flac_with(flac, rate=2**20 - 1),
        "rf64 of 2^31 frames": rf64[: ds64 + 8] + struct.pack("<Q", 2**32) + rf64[ds64 + 16 :],
        "rf64 of 2^61 frames": rf64[: ds64 + 8] + struct.pack("<Q", 2**62) + rf64[ds64 + 16 :],
        "mp3 of 2^32 - 1 frames": mp3[:xing] + b"\xff" * 4 + mp3[xing + 4 :],
        "wav of 0 Hz": wav[:24] + struct.pack("<I", 0) + wav[28:],
        "wav of 2 MHz": wav[:24] + struct.pack("<I", 2_000_000) + wav[28:],
        "wav of 2^32 - 1 Hz": wav[:24] + struct.pack("<I", 2**32 - 1) + wav[28:],
        "wav of no channel": wav[:22] + struct.pack("<H", 0) + wav[24:],
        "wav of 1000 channels": wav[:22] + struct.pack("<H", 1000) + wav[24:],
        "wav of 10000 channels": wav[:22] + struct.pack("<H", 10_000) + wav[24:],
        "aiff of 2 MHz": aiff[: comm + 8] + aiff_rate(2_000_000) + aiff[comm + 18 :],
        "aiff of 10000 channels": aiff[:comm] + struct.pack(">H", 10_000) + aiff[comm + 2 :],
        "au of 0 Hz": au[:16] + struct.pack(">I", 0) + au[20:],
        "au of 10000 channels": au[:20] + struct.pack(">I", 10_000) + au[24:],
    }


@pytest.mark.parametrize("name", absurd_files())
def test_absurd_headers(name):
    data = absurd_files()[name]
    tracemalloc.start()
    started = time.perf_counter()
    error = catch(lambda: decode_audio(data))
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert error.kind is ErrorKind.ABSURD_HEADER
    assert seconds < 0.5
    assert peak < 1 << 20


def test_header_that_declares_too_little():
    data = flac_with(encode(make_sound(1), container="FLAC"), frames=8000)
    assert len(decode_audio(data)) == 8000  # as in libsndfile: the header of a flac is trusted


def mpeg_frames(data: bytes) -> list[int]:
    """Return the offsets of the frames of a mono mp3 at 16 kHz, from its bit rates."""
    offsets, at = [], 0
    while at + 4 <= len(data):
        assert data[at : at + 2] == b"\xff\xf3"
        offsets.append(at)
        kbps = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)[(data[at + 2] >> 4) - 1]
        at += 72 * kbps * 1000 // 16000 + (data[at + 2] >> 1 & 1)
    return offsets


def test_mp3_without_a_tag():
    """Written to a pipe: libsndfile guesses the length from the first frame, far too short for a variable rate."""
    rng = np.random.default_rng(0)
    sound = 0.3 * rng.standard_normal(320_000) * np.repeat(np.arange(40) % 3 == 0, 8000)  # noise and silence
    id3 = b"ID3\x03\0\0\0\0\x10\0" + bytes(2048)
    for mode in ("VARIABLE", "CONSTANT"):
        tagged = encode(sound, container="MP3", codec="MPEG_LAYER_III", bitrate_mode=mode, compression_level=0.2)
        offsets = mpeg_frames(tagged)
        bare = tagged[offsets[1] :]
        samples = 576 * (len(offsets) - 1)
        bare_by_libsndfile = soundfile.read(io.BytesIO(bare), dtype="float32")[0]
        assert (len(bare_by_libsndfile) < samples / 2) == (mode == "VARIABLE")
        for data in (bare, id3 + bare):
            loaded = load_audio(data)
            assert abs(loaded.info.frames - samples) <= 529
            assert len(loaded.waveform) == loaded.info.frames
            delay = 1105 - (samples - loaded.info.frames)  # LAME's, which the tag would have told the decoder to drop
            np.testing.assert_allclose(
                loaded.waveform[delay : delay + 300_000], decode_audio(tagged)[:300_000], atol=1e-6
            )
            segment = decode_audio(data, offset_s=15, duration_s=1)
            np.testing.assert_allclose(segment, loaded.waveform[240_000:256_000], atol=1e-6)
        if mode == "CONSTANT":
            np.testing.assert_array_equal(decode_audio(bare), bare_by_libsndfile)


def wav_of_mp3(mp3: bytes) -> bytes:
    layout = struct.pack("<IHHIIHHHHIHHH", 30, 0x55, 1, 16000, 4000, 1, 0, 12, 1, 2, 576, 1, 1393)
    body = b"WAVEfmt " + layout + b"data" + struct.pack("<I", len(mp3)) + mp3
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("mode", ["VARIABLE", "CONSTANT"])
def test_mp3_in_a_wav(mode):
    sound = make_sound(30) * (np.arange(30 * 16000) < 160_000)  # the first frames are long, those of silence short
    tagged = encode(sound, container="MP3", codec="MPEG_LAYER_III", bitrate_mode=mode, compression_level=0.2)
    bare = tagged[mpeg_frames(tagged)[1] :]
    note = b"LIST" + struct.pack("<I", 4) + b"INFO"
    np.testing.assert_array_equal(decode_audio(wav_of_mp3(tagged)), decode_audio(tagged))
    whole = decode_audio(wav_of_mp3(bare))
    assert 0 <= len(whole) - 480_000 <= 3 * 576
    assert np.corrcoef(whole[576:160_000], decode_audio(tagged)[: 160_000 - 576])[0, 1] > 0.999
    np.testing.assert_array_equal(decode_audio(wav_of_mp3(bare) + note), whole)
    segment = decode_audio(wav_of_mp3(bare), offset_s=8, duration_s=3)
    np.testing.assert_allclose(segment, whole[128_000:176_000], atol=1e-6)
    cut = wav_of_mp3(bare)[: len(bare) // 2]
    assert catch(lambda: decode_audio(cut)).kind is ErrorKind.TRUNCATED
    np.testing.assert_allclose(decode_audio(cut, duration_s=2), whole[:32_000], atol=1e-6)


def test_mp3_joined_end_to_end():
    first, second = (encode(make_sound(s, seed=s), container="MP3", codec="MPEG_LAYER_III") for s in (5, 3))
    assert len(soundfile.read(io.BytesIO(first + second))[0]) == 5 * 16000  # the tag of the first hides the second
    joined = decode_audio(first + second)
    assert 8 * 16000 <= len(joined) <= 8 * 16000 + 4 * 1152
    reference = decode_audio(second)[:40_000]
    tail = joined[5 * 16000 - 2000 :]
    shift = int(np.argmax(np.correlate(tail, reference, "valid")))
    np.testing.assert_allclose(tail[shift : shift + 40_000], reference, atol=1e-5)
    assert len(decode_audio(first + b"TAG" + bytes(125))) == 5 * 16000  # an ID3v1 tag is not a second file


def test_mp3_with_a_tag_that_was_never_filled_in():
    data = encode(make_sound(5), container="MP3", codec="MPEG_LAYER_III")
    at = data.index(b"Xing") + 8
    whole = decode_audio(data)
    loaded = load_audio(data[:at] + bytes(8) + data[at + 8 :])  # neither frames nor bytes
    assert abs(len(loaded.waveform) - len(whole)) <= 3 * 576
    likeness = [np.corrcoef(loaded.waveform[lag : lag + 60_000], whole[:60_000])[0, 1] for lag in (576, 1105)]
    assert max(likeness) > 0.999


def ogg_pages(data: bytes) -> list[int]:
    offsets, at = [], 0
    while at < len(data):
        assert data[at : at + 4] == b"OggS"
        offsets.append(at)
        segments = data[at + 26]
        at += 27 + segments + sum(data[at + 27 : at + 27 + segments])
    return offsets


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_ogg_pages(codec):
    data = encode(make_sound(6), container="OGG", codec=codec)
    pages = ogg_pages(data)
    assert len(pages) > 5
    for page, what in ((pages[-1], "checksum"), (pages[-2], "early")):
        damaged = bytearray(data)
        damaged[page + 100] ^= 1
        error = catch(lambda d=bytes(damaged): decode_audio(d))
        assert error.kind is ErrorKind.TRUNCATED
        assert what in error.message
    for size in (pages[-1] + 1, pages[-1] + 26, pages[-1] + 28, len(data) - 1):
        assert catch(lambda s=size: decode_audio(data[:s])).kind is ErrorKind.TRUNCATED
    filled = data + bytes(200_000)  # by a download that should have been longer
    assert "no Ogg page" in catch(lambda: decode_audio(filled)).message
    np.testing.assert_array_equal(decode_audio(filled, duration_s=2), decode_audio(data, duration_s=2))
    recorded = decode_audio(data[: pages[-1]])  # whole pages without a last one: a live recording that was stopped
    np.testing.assert_array_equal(recorded, decode_audio(data)[: len(recorded)])
    joined = data[: pages[2]] + data[pages[4] :]  # and one from which pages in the middle are missing
    assert 0 < len(decode_audio(joined)) < 6 * 16000


@pytest.mark.parametrize(("codec", "bad"), [("FLOAT", np.nan), ("FLOAT", -np.inf), ("DOUBLE", np.inf), ("FLOAT", 1e25)])
@pytest.mark.parametrize("rate", [16000, 22050])
def test_values_that_are_not_finite(codec, bad, rate):
    sound = make_sound(2, rate, channels=2)
    sound[rate, 1] = bad
    data = encode(sound, rate, codec=codec)
    for channel in ("mix", 1):
        error = catch(lambda c=channel: decode_audio(data, channel=c))
        assert error.kind is ErrorKind.NON_FINITE
    assert np.isfinite(decode_audio(data, channel="first")).all()
    assert np.isfinite(decode_audio(data, duration_s=0.9)).all()


@pytest.mark.parametrize("rate", [16000, 22050])
def test_integers_that_are_kept_as_floats(rate):
    data = encode(make_sound(1, rate) * np.float32(2**31), rate, codec="FLOAT")
    np.testing.assert_allclose(
        decode_audio(data) / 2**31, decode_audio(encode(make_sound(1, rate), rate, codec="FLOAT"))
    )


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", ErrorKind.EMPTY_FILE),
        (encode(np.zeros(0, np.float32)), ErrorKind.EMPTY_FILE),
        (encode(make_sound(1))[:44], ErrorKind.EMPTY_FILE),
        (encode(np.zeros(0, np.float32), container="OGG", codec="VORBIS"), ErrorKind.EMPTY_FILE),
        (b"a", ErrorKind.NOT_AUDIO),
        (b"just a text, saved as .wav\n" * 50, ErrorKind.NOT_AUDIO),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ErrorKind.NOT_AUDIO),
        (bytes(10_000), ErrorKind.NOT_AUDIO),
        (b"RIFF\x24\0\0\0AVI LIST" + bytes(100), ErrorKind.NOT_AUDIO),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), ErrorKind.NOT_AUDIO),
        ("UTF-16 text".encode("utf-16"), ErrorKind.NOT_AUDIO),
        (b"#EXTM3U\nfile:///etc/passwd\n", ErrorKind.NOT_AUDIO),
    ],
)
def test_no_sound(data, kind):
    assert catch(lambda: decode_audio(data)).kind is kind


def test_the_message_says_what_starts_the_file():
    assert "<?xml" in catch(lambda: decode_audio(b'<?xml version="1.0"?><Error/>')).message


SEEDS = [encode(make_sound(0.4), container=container, codec=codec) for container, codec in list_formats()]
SEEDS += [encode(make_sound(0.4, 44100, 2), 44100, container, codec) for container, codec in COMMON[:4]]
EXTREMES = [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4), b"\0\0\0\x80", b"\x80\0\0\0"]


@st.composite
def damaged_files(draw) -> bytes:
    """A real file with a few bytes changed, lost or added, mostly in its header; or random bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=2000))
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(data), draw(st.sampled_from([16, 64, 300, 100_000]))) or 0))
        action = draw(st.integers(0, 4))
        if action == 0:
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif action == 1:
            data[at : at + 4] = draw(st.sampled_from(EXTREMES))
        elif action == 2:
            del data[at:]
        elif action == 3:
            del data[at : at + draw(st.integers(1, 8))]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
    return bytes(data)


@settings(max_examples=300, deadline=10_000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    damaged_files(),
    st.sampled_from([{}, {"offset_s": 0.1, "duration_s": 0.2}, {"offset_s": 0.2}, {"channel": "first"}]),
)
def test_junk_gives_a_waveform_or_an_input_error(data, options):
    tracemalloc.start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    waveform = np.zeros(0, np.float32)
    with contextlib.suppress(InputError):
        waveform = load_audio(data, **options).waveform
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert waveform.ndim == 1
    assert waveform.dtype == np.float32
    assert np.isfinite(waveform).all()
    assert peak < 3 * waveform.nbytes + (8 << 20)  # memory of numpy and Python
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB: the decoders' own
