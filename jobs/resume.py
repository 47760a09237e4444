"""What earlier runs have done for an output: which shards are committed, and their counts. Knows nothing of Ray.

The receipt names the shards that its sums include, and is written every minute. So the only committed parts that are
opened again are those that came after the last receipt: their counts are in their footers.
"""

import json
from dataclasses import dataclass

from jobs.report.progress import Tally
from jobs.report.receipt import RECEIPT_FILE
from jobs.storage.files import Storage
from jobs.table.parts import Committed, find_committed, read_facts
from jobs.table.shard_names import unpack_shards
from parakeet_core.errors import RETRYABLE_KINDS, ConfigError


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
        ConfigError: the table's folder holds files of another origin, or shards are in two of them.
    """
    committed = find_undoubled(output, fingerprint, planned)
    shards, tally, complete = _read_receipt(output, fingerprint)
    known = shards <= committed.shards and all(held <= shards or not held & shards for held in committed.files.values())
    if not known or (retry_errors and not RETRYABLE_KINDS.isdisjoint(tally.errors_by_kind)):
        shards, tally = set(), Tally()
    unaccounted = {name: held for name, held in committed.files.items() if not held <= shards}
    for name, facts in read_facts(output, unaccounted).items():
        if not (retry_errors and not RETRYABLE_KINDS.isdisjoint(facts.errors_by_kind)):
            tally.add(facts, len(unaccounted[name]))
            shards |= unaccounted[name]
    return Earlier(shards, tally, complete and not unaccounted)


def find_undoubled(output: Storage, fingerprint: str, planned: set[str]) -> Committed:
    """The files of the table. Raises ConfigError as `find_committed`, and if shards are in two of them."""
    committed = find_committed(output, fingerprint, planned)
    if committed.doubled:
        raise ConfigError(
            f"{output.url}: merging of the table's parts was stopped, or came between the runs of two jobs, and "
            f"{len(committed.doubled)} shards stand in two files; finish it with `python -m jobs.compact --replace` on "
            "this output"
        )
    return committed


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
        # A run that was stopped between updating the two leaves different counts.
        holds = found["fingerprint"] == fingerprint and found["shards_done"] == len(shards)
        return (shards, tally, bool(found["complete"])) if holds else nothing
    except (ValueError, KeyError, TypeError, AttributeError):
        return nothing  # the parts hold the counts, too
