"""Builds a new tokenizer from texts, and converts any SentencePiece tokenizer to the form that transformers reads."""

import io
import re
from collections.abc import Iterable

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from parakeet_core.errors import ConfigError
from parakeet_core.tokenizer import WORD_START, SentencePieceTokenizer

MAX_TEXT_BYTES = 1 << 30  # no limit: by default the library skips texts over 4192 bytes, which long recordings have
UNKNOWN, BLANK = "<unk>", "<pad>"  # names of the pieces in Parakeet's tokenizer files; the blank is not a piece of text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """A unigram tokenizer of `vocab_size` pieces, including the unknown piece but not the blank.

    Every character of the texts becomes a piece, so that none of them is unknown. The same texts in the same order give
    the same tokenizer.

    Raises:
        ConfigError: the texts contain fewer distinct pieces, or more distinct characters, than `vocab_size`.
    """
    sink = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=sink,
            vocab_size=vocab_size,
            model_type="unigram",
            character_coverage=1.0,
            max_sentence_length=MAX_TEXT_BYTES,
            normalization_rule_name="identity",
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:  # the library has no finer exceptions
        reason = str(error).strip().splitlines()[-1]
        raise ConfigError(f"no tokenizer of {vocab_size} pieces can be made of these texts ({reason})") from error
    return SentencePieceTokenizer(sink.getvalue())


def as_tokenizer_json(content: bytes) -> str:
    """`tokenizer.json` of a SentencePiece model: the same pieces with the same ids, followed by the blank.

    Characters are normalised by NFKC instead of the model's own rule, which differs for few letters.

    Args:
        content: the bytes of `tokenizer.model`.
    """
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    ids = range(processor.GetPieceSize())
    pieces = [processor.IdToPiece(i) for i in ids]
    scores = [processor.GetScore(i) for i in ids]
    bytes_known = any(processor.IsByte(i) for i in ids)
    if _is_bpe(scores):
        model = models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            _merges(pieces),
            unk_token=pieces[processor.unk_id()],
            fuse_unk=True,
            byte_fallback=bytes_known,
        )
    else:
        model = models.Unigram(list(zip(pieces, scores, strict=True)), processor.unk_id(), bytes_known)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(WORD_START, "always")
    spaces = decoders.Metaspace(WORD_START, "always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), spaces]) if bytes_known else spaces
    tokenizer.add_special_tokens([pieces[processor.unk_id()], BLANK])
    return tokenizer.to_str()


def _is_bpe(scores: list[float]) -> bool:
    """SentencePiece scores the pieces of a BPE model by their rank: 0, -1, -2; those of a unigram model by log odds."""
    return all(score == round(score) for score in scores)


def _merges(pieces: list[str]) -> list[tuple[str, str]]:
    """The merges of a BPE model whose pieces are in order of rank."""
    known = {piece: rank for rank, piece in enumerate(pieces) if not re.fullmatch(r"<.+>", piece)}
    merges = []
    for piece in known:
        parts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        found = [(left, right) for left, right in parts if left in known and right in known]
        merges += sorted(found, key=lambda pair: (known[pair[0]], known[pair[1]]))
    return merges
