"""Recorded speech through the trained checkpoint: texts equal those of the reference's `generate`, clip by clip."""

import pytest
from reference import load_reference, reference_texts

from parakeet_core import Transcriber, decode_audio


def assert_same_texts(model_path, clips):
    """Ours in the batches that Transcriber forms, the reference's one clip at a time, without padding."""
    model, processor = load_reference(model_path)
    transcripts = Transcriber.load(model_path).transcribe([clip.path for clip in clips])
    differing = []
    for clip, transcript in zip(clips, transcripts, strict=True):
        (expected,) = reference_texts(model, processor, [decode_audio(clip.path)])
        if transcript.error is not None or transcript.text != expected:
            differing.append((clip.path.name, transcript.text, expected, transcript.error))
    assert differing == []
    assert sum(len(transcript.text) for transcript in transcripts) > 10 * len(clips)  # it heard something


def stratified(clips: list, count: int) -> list:
    """`count` clips, evenly spaced in order of length, with the shortest and the longest."""
    by_length = sorted(clips, key=lambda clip: clip.duration_s)
    return [by_length[round(i * (len(by_length) - 1) / (count - 1))] for i in range(count)]


def test_carried_prompts(tiny_en, prompts):
    assert_same_texts(tiny_en, prompts)


@pytest.fixture(scope="module")
def shared_model(librispeech):
    path = librispeech[0].path.parents[2] / "models" / "tiny-en"
    if not path.exists():
        pytest.skip("needs shared/models/tiny-en beside the checkout")
    return path


def test_librispeech(shared_model, librispeech):
    assert_same_texts(shared_model, stratified(librispeech, 100))


def test_resampled_ljspeech(shared_model, ljspeech):
    assert_same_texts(shared_model, ljspeech)


@pytest.mark.slow
def test_every_clip_of_librispeech(shared_model, librispeech):
    assert_same_texts(shared_model, librispeech)


def test_padded_batches_of_the_reference(tiny_en, prompts):
    """The reference with its own padding and mask gives the same texts as ours without padding."""
    model, processor = load_reference(tiny_en)
    clips = stratified(prompts, 8)
    expected = reference_texts(model, processor, [decode_audio(clip.path) for clip in clips])
    transcripts = Transcriber.load(tiny_en).transcribe([clip.path for clip in clips], batch_audio_s=0)
    assert [transcript.text for transcript in transcripts] == expected
