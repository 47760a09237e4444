"""Token ids <-> text, for the two tokenizer formats that checkpoints use. Knows nothing of CTC or of checkpoints."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from parakeet_core.errors import CheckpointError

WORD_START = "▁"  # U+2581, SentencePiece's mark for the space before a word


class Tokenizer(Protocol):
    """What the rest of the code needs from a tokenizer."""

    pieces: list[str]  # by id, spaces as word marks
    unknown_id: int | None  # id of the piece for unknown characters; None: such characters are left out

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`."""

    def decode(self, ids: list[int]) -> str:
        """Text of collapsed token ids without blanks: pieces joined, word marks as spaces, the first space stripped."""

    def content(self) -> str | bytes:
        """What the tokenizer was built from: the text of a tokenizer.json, or the bytes of a tokenizer.model."""


class TokenizerJson:
    """`tokenizer.json` of a Hugging Face checkpoint.

    Args:
        content: the file's text.
        name: what to call it in messages.

    Raises:
        CheckpointError: it does not describe a tokenizer.
    """

    def __init__(self, content: str, name: str = "tokenizer.json"):
        self._name = name
        with self._library_errors():
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
            self._tokenizer.no_truncation()  # both settings of a file are meant for batches of text
            self._tokenizer.no_padding()
            size = self._tokenizer.get_vocab_size()
            self.pieces = [self._tokenizer.id_to_token(i) or "" for i in range(size)]
            self._tokenizer.decode(list(range(size)))  # only this reveals a damaged decoder
            record = json.loads(content)
            if (record.get("decoder") or {}).get("type") == "ByteLevel":  # letters stand for bytes
                texts = (self._tokenizer.decoder.decode([piece]) for piece in self.pieces)
                self.pieces = [text.replace(" ", WORD_START) for text in texts]
            model, unknown = record["model"], record["model"].get("unk_token")
            self.unknown_id = model.get("unk_id") if unknown is None else self._tokenizer.token_to_id(unknown)

    @contextmanager
    def _library_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - the library raises bare Exception, and panics that are not Exceptions
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise CheckpointError(f"{self._name}: not a tokenizer that the library can use ({error})") from error

    def encode(self, text: str) -> list[int]:
        with self._library_errors():
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        with self._library_errors():
            return self._tokenizer.decode(ids)

    def content(self) -> str:
        return self._tokenizer.to_str()


class SentencePieceTokenizer:
    """`tokenizer.model` of a NeMo checkpoint.

    Args:
        content: the file's bytes.
        name: what to call it in messages.

    Raises:
        CheckpointError: it is not a SentencePiece model.
    """

    def __init__(self, content: bytes, name: str = "tokenizer.model"):
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
            self.pieces = [self._processor.IdToPiece(i) for i in range(self._processor.GetPieceSize())]
            self.unknown_id = self._processor.unk_id()
        except (RuntimeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{name}: not a SentencePiece model ({error})") from error

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: list[int]) -> str:
        return self._processor.DecodeIds(list(map(int, ids)))

    def content(self) -> bytes:
        return self._processor.serialized_model_proto()


def load_tokenizer(path: Path) -> Tokenizer:
    """Tokenizer from a `tokenizer.json` or `tokenizer.model` file, by the file's suffix. Raises CheckpointError."""
    try:
        content = path.read_text(encoding="utf-8") if path.suffix == ".json" else path.read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable tokenizer file ({error})") from error
    if isinstance(content, str):
        return TokenizerJson(content, path.name)
    return SentencePieceTokenizer(content, path.name)


def check_pieces(tokenizer: Tokenizer, vocab_size: int, name: str, blank_id: int | None = None) -> None:
    """Refuse a tokenizer that lacks pieces for ids the model emits; the blank needs none if it is the last id.

    Args:
        blank_id: by default the last id.

    Raises:
        CheckpointError: tokenizer and model do not belong together.
    """
    enough = [vocab_size - 1, vocab_size] if blank_id in (None, vocab_size - 1) else [vocab_size]
    if len(tokenizer.pieces) not in enough:
        raise CheckpointError(
            f"{name}: the tokenizer has {len(tokenizer.pieces)} pieces, the model {vocab_size} outputs with blank; "
            f"expected {' or '.join(map(str, enough))} pieces"
        )
