"""Decoding in another process: the same results, and sources that really crash it, hang it or exhaust its memory."""

import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_samples import catch, encode, make_sound

from parakeet_core.audio import load_audio, probe_audio
from parakeet_core.audio_isolated import IsolatedDecoder
from parakeet_core.errors import ErrorKind, WorkerError

POISON = Path(__file__).resolve().parents[1] / "poison"  # its sitecustomize.py does what a poisoned file asks for


def poisoned(deed: str) -> bytes:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", 16000, 1, "PCM_16", format="WAV") as file:
        file.title = f"poison: {deed}"
        file.write(make_sound(1))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def decoder():
    with IsolatedDecoder() as decoder:
        yield decoder


@pytest.fixture
def poisonable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(POISON))
    monkeypatch.syspath_prepend(POISON)
    with IsolatedDecoder(memory_bytes=1 << 30, time_limit_s=3) as decoder:
        yield decoder


@pytest.mark.parametrize(("container", "codec"), [("WAV", "PCM_16"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS")])
@pytest.mark.parametrize("options", [{}, {"offset_s": 1.0, "duration_s": 2.0, "channel": 1}, {"sample_rate_hz": 8000}])
def test_results_are_those_of_this_process(decoder, container, codec, options):
    data = encode(make_sound(40, 44100, 2), 44100, container, codec)
    expected = load_audio(data, **options)
    for source in (data, bytearray(data), io.BytesIO(data)):
        found = decoder.load(source, **options)
        np.testing.assert_array_equal(found.waveform, expected.waveform)
        assert (found.info, found.duration_s) == (expected.info, expected.duration_s)
        assert decoder.probe(source) == probe_audio(data)


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (b"", {}),
        (b"no audio at all", {}),
        (encode(make_sound(1))[:10_000], {}),
        (encode(make_sound(1)), {"channel": 3}),
        (encode(make_sound(1)), {"offset_s": float("nan")}),
    ],
)
def test_errors_are_those_of_this_process(decoder, data, options):
    expected = catch(lambda: load_audio(data, **options))
    found = catch(lambda: decoder.load(data, **options))
    assert (found.kind, found.message) == (expected.kind, expected.message)


def test_an_error_of_the_storage_is_raised_as_it_is(decoder):
    class Broken(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 1000:
                raise PermissionError("the credentials have expired")
            return super().read(min(size, 500))  # and storage may return less than was requested

    data = encode(make_sound(30))
    with pytest.raises(PermissionError, match="expired"):
        decoder.load(Broken(data))
    np.testing.assert_array_equal(decoder.load(data).waveform, load_audio(data).waveform)


def test_an_interrupted_call_leaves_no_answer_behind(decoder):
    class Interrupted(io.BytesIO):
        def read(self, size=-1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder.load(Interrupted(encode(make_sound(2))))
    data = encode(make_sound(1))
    np.testing.assert_array_equal(decoder.load(data).waveform, load_audio(data).waveform)


@pytest.mark.parametrize(
    ("deed", "message"),
    [
        ("crash", "crashed with signal SIGSEGV"),
        ("crash at open", "crashed with signal SIGSEGV"),
        ("hang", "ran longer than 3 s"),
        ("eat", "needed more than 1 GiB of memory"),
    ],
)
def test_poison_costs_one_source(poisonable, deed, message):
    good = encode(make_sound(3))
    expected = load_audio(good).waveform
    for _ in range(1 if deed == "hang" else 2):
        started = time.monotonic()
        error = catch(lambda: poisonable.load(poisoned(deed)))
        assert error.kind is ErrorKind.DECODER_CRASH
        assert message in error.message
        assert time.monotonic() - started < 30  # at most twice the limit, and two starts on a busy machine
        np.testing.assert_array_equal(poisonable.load(good).waveform, expected)
    if deed == "crash at open":
        assert catch(lambda: poisonable.probe(io.BytesIO(poisoned(deed)))).kind is ErrorKind.DECODER_CRASH


def test_a_source_is_not_blamed_for_what_an_earlier_one_broke(poisonable):
    data = poisoned("crash used")
    expected = load_audio(data).waveform
    for _ in range(3):
        np.testing.assert_array_equal(poisonable.load(data).waveform, expected)


def test_a_storage_may_be_slower_than_the_limit(poisonable):
    class Slow(io.BytesIO):
        def read(self, size=-1):
            time.sleep(0.7)
            return super().read(size)

    data = encode(make_sound(60))  # nearly 2 MB: 8 pieces
    started = time.monotonic()
    np.testing.assert_array_equal(poisonable.load(Slow(data)).waveform, load_audio(data).waveform)
    assert time.monotonic() - started > poisonable.time_limit_s


def test_a_process_that_cannot_start_is_no_fault_of_a_source(monkeypatch, tmp_path):
    (tmp_path / "soxr.py").write_text("raise SystemExit(9)", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(WorkerError, match="exited with status 9"), IsolatedDecoder() as decoder:
        decoder.load(encode(make_sound(1)))


def test_the_process_holds_no_credentials_and_goes_with_its_owner(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    decoder = IsolatedDecoder()
    decoder.wait_until_ready()
    process = decoder._process.pid
    assert b"canary" not in Path(f"/proc/{process}/environ").read_bytes()
    decoder._connection.close()  # what the process sees when its parent is killed
    assert os.waitpid(process, 0)[1] == 0
