"""What training exports, read by transformers: the same tokens, features, logits and texts as with our own loader."""

from pathlib import Path

import pytest
import torch
from reference import extract, load_reference, mask_of
from small_models import TINY_EN, random_features, relative_error, small_model, write_hf

from parakeet_core import Transcriber, decode_audio, load_checkpoint
from parakeet_core.config import ModelConfig
from parakeet_core.ctc import ParakeetCTC
from parakeet_core.export import checkpoint_files, weights_file
from parakeet_core.tokenizer import Tokenizer
from parakeet_core.tokenizer_training import train_tokenizer

LOGIT_TOLERANCE = 1e-4  # relative to the largest


def export(folder: Path, model: ParakeetCTC, config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> Path:
    folder.mkdir()
    name, content = weights_file(model, dtype)
    for file, data in (checkpoint_files(config, tokenizer) | {name: content}).items():
        (folder / file).write_bytes(data)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_carried_model_exported_again(tmp_path, prompts, dtype):
    """The export of a loaded checkpoint is the same checkpoint, for transformers and for us."""
    original = load_checkpoint(TINY_EN)
    folder = export(tmp_path / "out", original.model, original.config, original.tokenizer, dtype)
    ours = load_checkpoint(folder)
    assert ours.config == original.config
    theirs, processor = load_reference(folder)
    waveforms = [decode_audio(clip.path) for clip in prompts[:4]]
    features, mask = extract(processor.feature_extractor, waveforms)
    with torch.no_grad():
        expected = theirs(input_features=features, attention_mask=mask).logits
        logits, lens = ours.model(*ours.frontend(waveforms))
        before, _ = original.model(*original.frontend(waveforms))
    for row, length in enumerate(lens.tolist()):
        assert relative_error(logits[row, :length], expected[row, :length]) < LOGIT_TOLERANCE
        assert relative_error(logits[row, :length], before[row, :length]) < (1e-6 if dtype == "float32" else 1e-2)
    with torch.no_grad():
        ids = theirs.generate(input_features=features, attention_mask=mask)
    texts = processor.batch_decode(ids, skip_special_tokens=True)
    assert texts == [transcript.text for transcript in Transcriber(ours).transcribe(waveforms)]


@pytest.mark.parametrize("switches", [{}, {"attention_bias": False, "convolution_bias": False, "scale_input": False}])
def test_new_vocabulary(tmp_path, prompts, switches):
    """A model with a new tokenizer, made from a SentencePiece model alone."""
    texts = [clip.text for clip in prompts]
    tokenizer = train_tokenizer(texts, 70)
    config = ModelConfig(small_model(**switches).config.encoder, vocab_size=71, blank_id=70)
    torch.manual_seed(0)
    model = ParakeetCTC(config).eval()
    folder = export(tmp_path / "out", model, config, tokenizer, "float32")
    theirs, processor = load_reference(folder)
    features, lens = random_features([100, 64])
    with torch.no_grad():
        expected = theirs(input_features=features, attention_mask=mask_of(lens, 100)).logits
        logits, out_lens = load_checkpoint(folder).model(features, lens)
    for row, length in enumerate(out_lens.tolist()):
        assert relative_error(logits[row, :length], expected[row, :length]) < LOGIT_TOLERANCE
    for text in texts[:5]:
        assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
        assert processor.tokenizer.decode(tokenizer.encode(text), group_tokens=False) == text
    assert processor.tokenizer.pad_token_id == 70


@pytest.mark.parametrize(
    "renamed", [{}, {"<pad>": "[PAD]", "<unk>": "[UNK]"}, {'"unk_token": "<unk>"': '"unk_token": null'}]
)
def test_special_pieces_by_any_name(tmp_path, renamed):
    """transformers finds the blank by its name, and leaves it out when it decodes."""
    path = write_hf(tmp_path / "in", small_model())
    content = (path / "tokenizer.json").read_text(encoding="utf-8")
    for name, other in renamed.items():
        content = content.replace(name, other)
    (path / "tokenizer.json").write_text(content, encoding="utf-8")
    original = load_checkpoint(path)
    folder = export(tmp_path / "out", original.model, original.config, original.tokenizer, "float32")
    _, processor = load_reference(folder)
    assert (processor.tokenizer.pad_token_id, len(processor.tokenizer)) == (128, 129)
    ids = original.tokenizer.encode("please hold")
    path_of_ctc = [128, *(step for i in ids for step in (i, i, 128))]
    assert processor.tokenizer.decode(path_of_ctc) == "please hold"


def test_a_checkpoint_of_ours_keeps_its_dropout(tmp_path):
    """Settings that only training uses are written too, so that training can continue from the export."""
    path = write_hf(tmp_path / "in", small_model())
    original = load_checkpoint(path)
    folder = export(tmp_path / "out", original.model, original.config, original.tokenizer, "float32")
    theirs, _ = load_reference(folder)
    encoder = original.config.encoder
    for name in ("dropout", "activation_dropout", "attention_dropout", "layerdrop"):
        assert getattr(theirs.config.encoder_config, name) == getattr(encoder, name)
