"""Which rows of an input are new, and a unique id for each of them: by 128-bit digests, in bounded memory.

Ids decide what is new; among rows that share one, the place of the audio does. Ids of earlier generations stay as they
are, whatever precedes them in the input now. Knows nothing of shards.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.inputs.plan_rows import digest_places, digest_strings
from jobs.planning.facts import RowFacts, read_spill
from jobs.planning.planned_items import NO_DIGESTS, PlannedItems, contains, sort_digests


@dataclass
class Renamed:
    """Rows whose id had occurred before, and their new ids.

    Attributes:
        rows: their numbers, ascending, int64 [R].
        ids: the new ones.
        given: uint64 [R, 2], digests of what the input calls them.
    """

    rows: np.ndarray
    ids: pa.Array
    given: np.ndarray

    def mask(self, first: int, length: int) -> pa.Array:
        """Which of the rows from `first` on have a new id."""
        start, stop = np.searchsorted(self.rows, [first, first + length])
        mask = np.zeros(length, bool)
        mask[self.rows[start:stop] - first] = True
        return pa.array(mask)

    def apply(self, first: int, ids: pa.Array) -> pa.Array:
        """The ids of the rows from `first` on, with those replaced that have a new one."""
        start, stop = np.searchsorted(self.rows, [first, first + len(ids)])
        if start == stop:
            return ids
        return pc.replace_with_mask(ids, self.mask(first, len(ids)), self.ids.slice(start, stop - start))


def find_new(facts: RowFacts, folder: str, planned: PlannedItems) -> np.ndarray:
    """Which rows no earlier generation holds. bool [N].

    A row whose id is unique, in the input and in the plan, is known by it. Where either has the id several times, a row
    is known if the plan holds an item of that id at the same place (source, segment, channel); each such item accounts
    for one row.
    """
    if not len(planned):
        return np.ones(len(facts), bool)
    new = ~planned.holds(facts.digest)
    repeats, _ = repeated_rows(facts.digest)
    shared = contains(sort_digests(facts.digest[repeats]), facts.digest) | planned.repeats(facts.digest)
    rows = np.flatnonzero(shared & ~new)
    if len(rows):
        new[rows] = _unmatched(facts.digest[rows], _places_of(rows, folder), planned)
    return new


def leave_out_rewritten(facts: RowFacts, new: np.ndarray) -> int:
    """Remove from `new` the row groups of Parquet files of which other row groups are known; returns their number.

    A file is planned whole. If the plan knows only some of its row groups, it has been written again in different ones,
    whose items are those of the planned groups, under the same ids or others.
    """
    known = np.unique(facts.source[facts.container & ~new])
    rewritten = facts.container & new & np.isin(facts.source, known)
    new &= ~rewritten
    return int(rewritten.sum())


def leave_out_broken(facts: RowFacts, new: np.ndarray, folder: str, planned: PlannedItems) -> None:
    """Remove from `new` the Parquet files that cannot be used now, but were planned when they could be.

    Their items are in the plan; the one error row of an unusable file would come in addition to them.
    """
    rows = np.flatnonzero(facts.rejected & facts.container & new) if len(planned) else ()
    for first, batch, chosen in _spilled(rows, folder) if len(rows) else ():
        first_items = pc.binary_join_element_wise(batch["id"].take(chosen), "0", "#")  # as `parquet_rows` names them
        new[first + chosen.to_numpy()] = ~planned.holds(digest_strings(first_items))


def _unmatched(digest: np.ndarray, places: np.ndarray, planned: PlannedItems) -> np.ndarray:
    """Rows, in input order, for which the plan has no item of this id and place left. bool [R]."""
    held = Counter(_keys(*planned.places(sort_digests(digest))))
    unmatched = np.zeros(len(digest), bool)
    for row, key in enumerate(_keys(digest, places)):
        unmatched[row] = not held[key]
        held[key] -= bool(held[key])
    return unmatched


def _keys(digest: np.ndarray, places: np.ndarray) -> Iterator[tuple[int, int, int]]:
    return zip(digest[:, 0].tolist(), digest[:, 1].tolist(), places.tolist(), strict=True)


def make_unique(facts: RowFacts, new: np.ndarray, folder: str, planned: PlannedItems) -> Renamed:
    """Give every new row an id that no other row and no planned item has. Updates `facts.digest`.

    The 2nd, 3rd, ... row with the same id gets the suffix `~2`, `~3`, ...: planned items count first, then new rows in
    input order. If that id is taken as well, the rule is applied again (`a~2~2`).

    Args:
        new: bool [N], from `find_new`.
    """
    renamed = Renamed(np.empty(0, np.int64), pa.array([], pa.string()), NO_DIGESTS)
    everything = bool(new.all())
    numbers = None if everything else np.flatnonzero(new)
    earlier = np.concatenate([planned.plain, planned.given]) if len(planned.given) else planned.plain
    names_count = not len(planned.given)  # whether `earlier` holds the ids that the plan has made
    while True:
        digest = facts.digest if everything else facts.digest[numbers]
        taken = earlier[contains(sort_digests(digest), earlier)] if len(earlier) else earlier
        rows, occurrence = repeated_rows(np.concatenate([taken, digest]) if len(taken) else digest)
        rows, occurrence = rows[rows >= len(taken)] - len(taken), occurrence[rows >= len(taken)]
        if not len(rows) and names_count:
            return renamed
        if len(rows):
            rows = rows if everything else numbers[rows]
            ids = pc.binary_join_element_wise(
                _ids_of(rows, renamed, folder), pc.cast(pa.array(occurrence), pa.string()), "~"
            )
            renamed = _merge(renamed, Renamed(rows, ids, facts.digest[rows]))
            facts.digest[rows] = digest_strings(ids)
        if not names_count:  # the first round compares with given ids of planned items, later ones with their final ids
            earlier, names_count = np.concatenate([planned.plain, planned.names]), True


def _merge(before: Renamed, now: Renamed) -> Renamed:
    """Both, joined. Rows in both keep the newer id and the older `given`: the newer one is of an id made here."""
    _, again, where = np.intersect1d(now.rows, before.rows, return_indices=True)
    now.given[again] = before.given[where]
    kept = ~np.isin(before.rows, now.rows)
    rows = np.concatenate([before.rows[kept], now.rows])
    order = np.argsort(rows)
    ids = pa.concat_arrays([before.ids.filter(pa.array(kept)), now.ids])
    return Renamed(rows[order], ids.take(pa.array(order)), np.concatenate([before.given[kept], now.given])[order])


def repeated_rows(digest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows, ascending, whose digest occurred in an earlier row, and which occurrence each is (2, 3, ...)."""
    halves = np.sort(digest[:, 0])
    suspects = np.flatnonzero(np.isin(digest[:, 0], halves[1:][halves[1:] == halves[:-1]]))
    del halves
    order = suspects[
        np.lexsort((digest[suspects, 1], digest[suspects, 0]))
    ]  # stable: equal digests stay in input order
    same = np.zeros(len(order), bool)
    same[1:] = (digest[order[1:]] == digest[order[:-1]]).all(axis=1)
    positions = np.flatnonzero(same)
    if not len(positions):
        return positions, positions
    first = np.flatnonzero(~same)
    run_start = first[np.searchsorted(first, positions, side="right") - 1]
    rows = order[positions]
    by_row = np.argsort(rows)
    return rows[by_row], (positions - run_start + 1)[by_row]


def _ids_of(rows: np.ndarray, renamed: Renamed, folder: str) -> pa.Array:
    found = [renamed.apply(first, batch["id"]).take(chosen) for first, batch, chosen in _spilled(rows, folder)]
    return pa.concat_arrays(found)


def _places_of(rows: np.ndarray, folder: str) -> np.ndarray:
    return np.concatenate([digest_places(batch.take(chosen)) for _, batch, chosen in _spilled(rows, folder)])


def _spilled(rows: np.ndarray, folder: str) -> Iterator[tuple[int, pa.RecordBatch, pa.Array]]:
    """(number of its first row, batch, which of its rows) of the spilled batches that hold some of `rows`."""
    for first, batch in read_spill(folder):
        start, stop = np.searchsorted(rows, [first, first + len(batch)])
        if start < stop:
            yield first, batch, pa.array(rows[start:stop] - first)
