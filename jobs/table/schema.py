"""The transcript table: its columns, the metadata of a part, its counts. Knows nothing of Ray or storage."""

import json
import unicodedata
from dataclasses import dataclass

import jiwer
import pyarrow as pa

from parakeet_core.words import Word

SCHEMA_VERSION = 1
METADATA_PREFIX = "parakeet."  # of the keys in each part's metadata

WORD_TYPE = pa.struct(
    [
        pa.field("word", pa.string()),
        pa.field("start_s", pa.float64()),  # from the item's start
        pa.field("end_s", pa.float64()),
        pa.field("confidence", pa.float32()),
    ]
)
TRANSCRIPT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("member", pa.string()),
        pa.field("offset_s", pa.float64()),
        pa.field("duration_s", pa.float64()),  # as decoded; for an error, what the input says, or null
        pa.field("channel", pa.int32()),
        pa.field("sample_rate_hz", pa.int32()),  # of the source
        pa.field("status", pa.string(), nullable=False),  # "ok", "empty" (nothing was said) or "error"
        pa.field("text", pa.string()),  # null for an error, "" for an empty item
        pa.field("confidence", pa.float32()),
        pa.field("words", pa.list_(WORD_TYPE)),
        pa.field("chars_per_s", pa.float32()),
        pa.field("blank_ratio", pa.float32()),
        pa.field("rms_dbfs", pa.float32()),
        pa.field("clipped_ratio", pa.float32()),
        pa.field("reference", pa.string()),
        pa.field("wer", pa.float32()),
        pa.field("error_kind", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("extra", pa.string()),  # JSON
    ]
)


@dataclass(frozen=True)
class PartFacts:
    """Counts of a part, kept in its metadata so that a later run need not read its rows.

    Attributes:
        audio_s: seconds transcribed (rows `ok` and `empty`).
        lost_s: seconds of error rows, as far as the input gives them.
        word_errors, reference_words: over rows with a reference, from which the total WER is computed.
        errors_by_kind: error_kind -> rows.
    """

    rows: int
    ok: int
    empty: int
    errors: int
    audio_s: float
    lost_s: float
    word_errors: float
    reference_words: int
    errors_by_kind: dict[str, int]


def normalise_words(text: str) -> str:
    """In lower case, with only letters, their marks, digits and straight apostrophes, composed (NFC).

    This is what the `wer` column compares. The word characters of a regular expression do not include marks: it would
    cut words at the vowel signs of Hindi, and at the accents of decomposed texts, which some corpora contain.
    """
    composed = unicodedata.normalize("NFC", text.lower().replace("\u2019", "'"))
    return " ".join("".join(character if _in_word(character) else " " for character in composed).split())


def _in_word(character: str) -> bool:
    return character.isalnum() or character in "_'" or unicodedata.category(character).startswith("M")


def word_error_rate(reference: str, text: str) -> float | None:
    """Word errors over reference words after `normalise_words`; None if the reference has no words."""
    reference, text = normalise_words(reference), normalise_words(text)
    return jiwer.wer(reference, text) if reference else None


def round_words(words: list[Word]) -> list[dict]:
    """Words as the table holds them: times to the millisecond, confidences to four digits."""
    return [
        {
            "word": word.word,
            "start_s": round(word.start_s, 3),
            "end_s": round(word.end_s, 3),
            "confidence": round(word.confidence, 4),
        }
        for word in words
    ]


def part_facts(table: pa.Table) -> PartFacts:
    """Counts of the rows of `TRANSCRIPT_SCHEMA`."""
    kinds: dict[str, int] = {}
    counts = {"ok": 0, "empty": 0, "error": 0}
    audio_s = lost_s = word_errors = 0.0
    reference_words = 0
    columns = ("status", "duration_s", "error_kind", "reference", "wer")
    for row in table.select(columns).to_pylist():
        counts[row["status"]] += 1
        if row["status"] == "error":
            kinds[row["error_kind"]] = kinds.get(row["error_kind"], 0) + 1
            lost_s += row["duration_s"] or 0.0
            continue
        audio_s += row["duration_s"] or 0.0
        if row["wer"] is not None:
            words = len(normalise_words(row["reference"]).split())
            reference_words += words
            word_errors += row["wer"] * words
    return PartFacts(
        rows=table.num_rows,
        ok=counts["ok"],
        empty=counts["empty"],
        errors=counts["error"],
        audio_s=round(audio_s, 3),
        lost_s=round(lost_s, 3),
        word_errors=round(word_errors),
        reference_words=reference_words,
        errors_by_kind=dict(sorted(kinds.items())),
    )


def file_metadata(provenance: dict[str, str], facts: PartFacts, held: dict[str, str]) -> dict[bytes, bytes]:
    """Key-value metadata of a file of the table: the same for the same rows.

    Args:
        held: which shards, as {"shard": name} or {"shards": packed names}.
    """
    counts = json.dumps(vars(facts), sort_keys=True)
    values = {"schema_version": str(SCHEMA_VERSION), **provenance, **held, "facts": counts}
    return {f"{METADATA_PREFIX}{key}".encode(): value.encode() for key, value in values.items()}


def facts_of_metadata(metadata: dict[bytes, bytes]) -> PartFacts:
    """The counts that `file_metadata` stored. Raises KeyError or ValueError for another program's part."""
    return PartFacts(**json.loads(metadata[f"{METADATA_PREFIX}facts".encode()]))
