"""What earlier runs have done of an output: which shards are committed, and their counts. Knows nothing of Ray.

The receipt names the shards that its sums hold, and is written every minute. So of the committed parts none is opened
again but those that came after the last receipt: their counts are in their footers.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass

from jobs.parts import committed_shards, read_part_facts
from jobs.progress import Tally
from jobs.report import RECEIPT_FILE
from jobs.storage import Storage
from parakeet_core.errors import RETRYABLE_KINDS


@dataclass
class Earlier:
    """What earlier runs have done.

    Attributes:
        shards: committed, and not to be done again.
        tally: sums over their parts.
        closed: the receipt on storage says the same already.
    """

    shards: set[str]
    tally: Tally
    closed: bool


def account_earlier(output: Storage, fingerprint: str, planned: set[str], retry_errors: bool) -> Earlier:
    """Find the committed shards and sum up their parts.

    Args:
        fingerprint: of the job.
        retry_errors: leave out the shards with errors that may pass.

    Raises:
        ConfigError: the table's folder holds files of another origin.
    """
    committed = committed_shards(output, fingerprint, planned)
    shards, tally, complete = _read_receipt(output, fingerprint)
    if not shards <= committed or (retry_errors and not RETRYABLE_KINDS.isdisjoint(tally.errors_by_kind)):
        shards, tally = set(), Tally()
    unaccounted = committed - shards
    for shard, facts in read_part_facts(output, unaccounted, fingerprint).items():
        if not (retry_errors and not RETRYABLE_KINDS.isdisjoint(facts.errors_by_kind)):
            tally.add(facts)
            shards.add(shard)
    return Earlier(shards, tally, complete and not unaccounted)


def _read_receipt(output: Storage, fingerprint: str) -> tuple[set[str], Tally, bool]:
    """(shards it accounts for, its sums, whether it is of a complete job); nothing where there is no such receipt."""
    nothing = set(), Tally(), False
    if not output.exists(RECEIPT_FILE):
        return nothing
    try:
        found = json.loads(output.read_bytes(RECEIPT_FILE))
        shards = unpack_shards(found["accounted"])
        tally = Tally(
            shards=len(shards),
            rows=found["ok"] + found["empty"] + found["errors"],
            ok=found["ok"],
            empty=found["empty"],
            errors=found["errors"],
            audio_s=found["hours_done"] * 3600,
            lost_s=found["hours_lost"] * 3600,
            word_errors=(found["wer"] or 0.0) * found["reference_words"],
            reference_words=found["reference_words"],
            errors_by_kind=dict(found["errors_by_kind"]),
        )
        # A run that was stopped between the two counts leaves them apart.
        holds = found["fingerprint"] == fingerprint and found["shards_done"] == len(shards)
        return (shards, tally, bool(found["complete"])) if holds else nothing
    except (ValueError, KeyError, TypeError, AttributeError):
        return nothing  # the counts are in the parts, too


def pack_shards(shards: Iterable[str]) -> dict[str, str]:
    """Shard names in few bytes: generation and plan -> ranges of numbers, as in "0-99,102"."""
    numbers: dict[str, list[int]] = {}
    for shard in sorted(shards):
        generation, number, plan = shard.split("-")
        numbers.setdefault(f"{generation}-{plan}", []).append(int(number))
    return {key: _ranges(values) for key, values in numbers.items()}


def _ranges(numbers: list[int]) -> str:
    edges = [index for index in range(1, len(numbers)) if numbers[index] != numbers[index - 1] + 1]
    spans = zip([0, *edges], [*edges, len(numbers)], strict=True)
    return ",".join(f"{numbers[first]}-{numbers[end - 1]}" for first, end in spans)


def unpack_shards(packed: dict[str, str]) -> set[str]:
    """The shard names that `pack_shards` was given."""
    shards = set()
    for key, ranges in packed.items():
        generation, plan = key.split("-")
        for span in ranges.split(","):
            first, last = span.split("-")
            shards.update(f"{generation}-{number:06d}-{plan}" for number in range(int(first), int(last) + 1))
    return shards
