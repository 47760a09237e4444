"""Texts -> token ids that the CTC loss can be computed for; items that cannot be used are counted by reason.

Knows nothing of audio or of storage.
"""

import re
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
import pyarrow as pa

from jobs.table.schema import normalise_words
from parakeet_core.config import ModelConfig
from parakeet_core.tokenizer import Tokenizer

TextForm = Literal["auto", "plain", "raw"]


class Rejection(StrEnum):
    """Why an item is not used."""

    NO_TEXT = "no_text"  # null, blank, or nothing but punctuation
    LOW_CONFIDENCE = "low_confidence"  # a transcript below --min-confidence
    UNREADABLE = "unreadable"  # audio that does not decode
    TOO_LONG = "too_long"  # over --max-audio-s
    TOO_SHORT = "too_short"  # under --min-audio-s; in validation, without a single frame
    UNKNOWN_CHARACTERS = "unknown_characters"  # the tokenizer has no piece for them
    MORE_TOKENS_THAN_FRAMES = "more_tokens_than_frames"  # no CTC path is short enough for the audio


@dataclass(frozen=True)
class Utterances:
    """Items that can be used, in columns of the same length N.

    Attributes:
        ids, texts: of each item.
        files, rows: where each item's audio is.
        frames: [N] int64, feature frames at the original speed.
        token_ids: of each text.
    """

    ids: list[str]
    texts: list[str]
    files: list[str]
    rows: list[int]
    frames: np.ndarray
    token_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def total_frames(self) -> int:
        return int(self.frames.sum())


@dataclass(frozen=True)
class LabelReport:
    """How many items of a split are used, and why the others are not.

    Attributes:
        rejected: reason -> number of items.
        examples: (id, reason, what was found) of the first items for each reason.
    """

    items: int
    used: int
    rejected: dict[str, int]
    examples: list[tuple[str, str, str]]


EXAMPLES_PER_REASON = 5


def plain_text(texts: TextForm, tokenizer: Tokenizer) -> bool:
    """Whether texts are reduced to lower-case words; see `--text-form`."""
    if texts != "auto":
        return texts == "plain"
    return not any(piece != piece.lower() for piece in tokenizer.pieces if not re.fullmatch(r"<.+>", piece))


def label_utterances(
    index: pa.Table,
    tokenizer: Tokenizer,
    config: ModelConfig,
    plain: bool,
    min_audio_s: float = 0.0,
    fastest: float | None = None,
) -> tuple[Utterances, LabelReport]:
    """Check every item of an index (`data.INDEX_SCHEMA`) and encode its text.

    Args:
        plain: reduce texts to lower-case words first.
        fastest: the highest speed at which training plays the audio. None for validation, where a text may be one that
            the model cannot produce.
    """
    hop, rate = config.frontend.hop_length, config.frontend.sample_rate_hz
    columns: dict[str, list] = {name: [] for name in ("ids", "texts", "files", "rows", "frames", "token_ids")}
    found: list[tuple[str, str, str]] = []
    for row in index.to_pylist():
        if row["rejection"]:
            found.append((row["id"], row["rejection"], row["message"] or f"{row['samples'] / rate:.1f} s"))
            continue
        text = normalise_words(row["text"]) if plain else " ".join(row["text"].split())
        ids = tokenizer.encode(text)
        reason = _reason(text, ids, row["samples"], tokenizer, config, min_audio_s, fastest)
        if reason is not None:
            found.append((row["id"], reason, f"{row['text']!r:.200} in {row['samples'] / rate:.2f} s"))
            continue
        values = (row["id"], text, row["file"], row["row"], row["samples"] // hop, ids)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    columns["frames"] = np.array(columns["frames"], dtype=np.int64)
    return Utterances(**columns), _report(index.num_rows, found)


def _reason(
    text: str,
    ids: list[int],
    samples: int,
    tokenizer: Tokenizer,
    config: ModelConfig,
    min_audio_s: float,
    fastest: float | None,
) -> Rejection | None:
    if not normalise_words(text) or not ids:
        return Rejection.NO_TEXT
    if fastest is None:
        return None if config.frontend.frames(samples) else Rejection.TOO_SHORT
    if samples < min_audio_s * config.frontend.sample_rate_hz:
        return Rejection.TOO_SHORT
    if lacks_pieces(text, ids, tokenizer):
        return Rejection.UNKNOWN_CHARACTERS
    if ctc_frames(ids) > config.encoder.subsample(config.frontend.frames(int(samples / fastest))):
        return Rejection.MORE_TOKENS_THAN_FRAMES
    return None


def lacks_pieces(text: str, ids: list[int], tokenizer: Tokenizer) -> bool:
    """Whether `text` has characters that its token ids do not spell."""
    if tokenizer.unknown_id is not None:
        return tokenizer.unknown_id in ids
    return normalise_words(tokenizer.decode(ids)) != normalise_words(text)


def ctc_frames(ids: list[int]) -> int:
    """Encoder frames of the shortest CTC path for these tokens: one for each, and a blank between equal neighbours."""
    return len(ids) + sum(a == b for a, b in zip(ids, ids[1:], strict=False))


def _report(items: int, found: list[tuple[str, str, str]]) -> LabelReport:
    counts = Counter(str(reason) for _, reason, _ in found)
    seen: Counter = Counter()
    examples = []
    for item_id, reason, what in found:
        seen[reason] += 1
        if seen[reason] <= EXAMPLES_PER_REASON:
            examples.append((item_id, str(reason), what))
    return LabelReport(items, items - len(found), dict(sorted(counts.items())), examples)
