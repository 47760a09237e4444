"""The four stored checkpoints (two models, each as a directory and as a NeMo archive) against stored expectations."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from parakeet_core import Transcriber, load_checkpoint
from parakeet_core.config import FrontendConfig
from parakeet_core.decoding import FrameScores, collapse_ctc, decode_greedy
from parakeet_core.engine import Engine
from parakeet_core.features import mel_filter_bank

FEATURES_MAX, FEATURES_MEAN = 1e-4, 2e-6
LOGITS = 1e-4  # absolute, computed from the reference's features; logits are of magnitude 10
FROM_AUDIO = 1e-4  # absolute, computed from our features
LOSS = 1e-5  # relative

CHECKPOINTS = {"ckpt_a": "a", "tiny_a.nemo": "a", "ckpt_b": "b", "tiny_b.nemo": "b"}
CLIPS = {
    "a": ["speech_3s", "chirp_2p5s", "noise_1s", "tone_odd", "dc_clip_0p7s", "f8_1280", "f9_1440", "f2_320"],
    "b": ["speech_3s", "tone_odd", "f2_479"],
}
# Clips whose features are stored. Silence is compared only from stored features: our own would be mere rounding.
WITH_FEATURES = {"a": [*CLIPS["a"], "silence_1s"], "b": ["f2_479"]}
FEATURE_CLIPS = {80: [*CLIPS["a"], "f2_479"], 128: ["noise_1s", "f2_479"]}


@pytest.fixture(scope="module")
def audio(golden):
    with np.load(golden / "audio.npz") as stored:
        return {name: stored[name].astype(np.float32) / 32768 for name in stored.files}


@pytest.fixture(scope="module")
def expected(golden):
    return json.loads((golden / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def case(request, golden, expected):
    """A checkpoint, its letter, its stored tensors and its stored texts."""
    letter = CHECKPOINTS[request.param]
    tensors = load_file(golden / f"expected_{letter}.safetensors")
    return load_checkpoint(golden / request.param), letter, tensors, expected[letter]


def reference_features(golden, mels: int, clip: str) -> torch.Tensor:
    """Stored features [1, T, M] of the valid frames."""
    stored = load_file(golden / f"features_{mels}.safetensors")
    return stored[f"{clip}.features"][:, : int(stored[f"{clip}.mask"].sum())]


@pytest.mark.parametrize(("mels", "clip"), [(mels, clip) for mels, clips in FEATURE_CLIPS.items() for clip in clips])
def test_features(golden, audio, mels, clip):
    checkpoint = load_checkpoint(golden / {80: "ckpt_a", 128: "ckpt_b"}[mels])
    features, lens = checkpoint.frontend([audio[clip]])
    theirs = reference_features(golden, mels, clip)
    assert lens.tolist() == [theirs.shape[1]] == [len(audio[clip]) // 160]
    difference = (features - theirs).abs()
    assert float(difference.max()) <= FEATURES_MAX
    assert float(difference.mean()) <= FEATURES_MEAN


def test_mel_bank(golden):
    stored = load_file(golden / "mel_filters_80.safetensors")["mel_filters"]
    np.testing.assert_allclose(mel_filter_bank(FrontendConfig()).T, stored, rtol=0, atol=2e-8)


@torch.no_grad()
def test_states_and_logits_from_the_references_features(golden, case):
    checkpoint, letter, tensors, _ = case
    fused = checkpoint.model.prepare_inference()
    for clip in WITH_FEATURES[letter]:
        features = reference_features(golden, checkpoint.config.frontend.n_mels, clip)
        lens = torch.tensor([features.shape[1]])
        if letter == "a":
            states, out_lens = checkpoint.model.encoder(features, lens)
            stored = tensors[f"{clip}.last_hidden_state"][:, : int(out_lens)]
            torch.testing.assert_close(states, stored, rtol=0, atol=LOGITS)
        for model in (checkpoint.model, fused):
            logits, out_lens = model(features, lens)
            assert int(out_lens) == int(tensors[f"{clip}.encoder_mask"].sum())
            torch.testing.assert_close(logits, tensors[f"{clip}.logits"][:, : int(out_lens)], rtol=0, atol=LOGITS)


@torch.no_grad()
def test_ids_and_text_from_audio(audio, case):
    checkpoint, letter, tensors, texts = case
    fused = checkpoint.model.prepare_inference()
    for clip in CLIPS[letter]:
        features, lens = checkpoint.frontend([audio[clip]])
        for model in (checkpoint.model, fused):
            logits, out_lens = model(features, lens)
            torch.testing.assert_close(logits, tensors[f"{clip}.logits"][:, : int(out_lens)], rtol=0, atol=FROM_AUDIO)
            (tokens,) = decode_greedy(logits, out_lens, checkpoint.config.blank_id)
            assert tokens.ids.tolist() == _stored_ids(texts[clip], checkpoint.config.blank_id)
            assert checkpoint.tokenizer.decode(tokens.ids.tolist()) == texts[clip]["text"]


def _stored_ids(stored: dict, blank: int) -> list[int]:
    """Token ids of the valid frames only: the stored list also contains blanks from padding."""
    ids = stored["ids"][: stored["frames_encoder"]]
    return [token for i, token in enumerate(ids) if token != blank and (i == 0 or token != ids[i - 1])]


@torch.no_grad()
def test_padded_batch(audio, case):
    checkpoint, _, tensors, texts = case
    names = texts["batch"]["names"]
    waveforms = [audio[name] for name in names]
    features, lens = checkpoint.frontend(waveforms)
    assert lens.tolist() == tensors["batch.attention_mask"].sum(-1).tolist()
    for model in (checkpoint.model, checkpoint.model.prepare_inference()):
        logits, out_lens = model(features, lens)
        assert out_lens.tolist() == tensors["batch.encoder_mask"].sum(-1).tolist()
        for row, length in enumerate(out_lens.tolist()):
            torch.testing.assert_close(
                logits[row, :length], tensors["batch.logits"][row, :length], rtol=0, atol=FROM_AUDIO
            )
        tokens = decode_greedy(logits, out_lens, checkpoint.config.blank_id)
        assert [checkpoint.tokenizer.decode(item.ids.tolist()) for item in tokens] == texts["batch"]["texts"]
    tokens = Engine(checkpoint).recognise([row[:length] for row, length in zip(features, lens, strict=True)])
    assert [checkpoint.tokenizer.decode(item.ids.tolist()) for item in tokens] == texts["batch"]["texts"]
    transcripts = Transcriber(checkpoint).transcribe(waveforms)
    assert [transcript.text for transcript in transcripts] == texts["batch"]["texts"]


def test_clips_of_one_frame_and_of_none(audio, case):
    """The reference gives NaN for both; ours transcribes one frame like any other, and none as an empty transcript."""
    checkpoint, _, _, _ = case
    clips = ["f1_160", "f1_319", "f0_159", "f0_1", "f2_320"]
    transcripts = Transcriber(checkpoint).transcribe([audio[clip] for clip in clips])
    assert [transcript.error for transcript in transcripts] == [None] * 5
    assert transcripts[0].token_ids == transcripts[1].token_ids  # both are one frame of zeros
    assert [transcript.text for transcript in transcripts[2:4]] == ["", ""]
    assert [transcript.confidence for transcript in transcripts[2:4]] == [None, None]


@torch.no_grad()
def test_loss(golden, audio, case):
    checkpoint, _, tensors, texts = case
    stored = texts["loss"]
    features, lens = checkpoint.frontend([audio[name] for name in texts["batch"]["names"]])
    targets = tensors["loss.labels"].long()
    target_lens = torch.tensor(stored["label_lengths"])
    encoded = [checkpoint.tokenizer.encode(text) for text in stored["texts"]]
    assert [row[:length].tolist() for row, length in zip(targets, target_lens, strict=True)] == encoded
    for reduction in ("mean", "sum"):
        loss = checkpoint.model.loss(features, lens, targets, target_lens, reduction)
        assert float(loss) == pytest.approx(stored[reduction], rel=LOSS)
    each = checkpoint.model.loss(features, lens, targets, target_lens, "none", zero_infinity=True)
    assert each.tolist() == pytest.approx(stored["per_utterance_nll"], rel=LOSS)


def test_tokenizer(golden, case):
    checkpoint, _, _, texts = case
    stored = texts["tokenizer"]
    from_nemo = checkpoint.path.suffix == ".nemo"
    for text, ids in stored["spm_encode" if from_nemo else "encode"].items():
        assert checkpoint.tokenizer.encode(text) == ids
    blank = checkpoint.config.blank_id
    compared = 0
    for decoded in stored["decode_skip_special"]:
        frames = torch.tensor([decoded["ids"]])
        batch = collapse_ctc(FrameScores(frames, torch.ones(frames.shape), torch.tensor([frames.shape[1]])), blank)
        ids = batch.ids[0].tolist()
        if from_nemo and 0 in ids:  # SentencePiece shows the unknown piece, the reference omits it
            continue
        assert checkpoint.tokenizer.decode(ids) == decoded["text"]
        compared += 1
    assert compared >= 8


def test_archive_and_directory_hold_the_same_model(golden):
    for directory, archive in (("ckpt_a", "tiny_a.nemo"), ("ckpt_b", "tiny_b.nemo")):
        theirs, ours = load_checkpoint(golden / directory), load_checkpoint(golden / archive)
        assert ours.config.frontend == theirs.config.frontend
        assert ours.config.encoder.attention_bias == theirs.config.encoder.attention_bias
        found, stored = ours.model.state_dict(), theirs.model.state_dict()
        assert found.keys() == stored.keys()
        for name, tensor in stored.items():
            if not name.endswith("num_batches_tracked"):
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
