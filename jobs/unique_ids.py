"""Every row its own id, and which ids were planned before: by 128-bit digests, in bounded memory.

Knows nothing of shards. Strings are read again from the spill only for the rows that get a new id.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.plan_facts import RowFacts, read_spill
from jobs.plan_rows import digest_strings

BLOCK_ROWS = 1 << 20  # rows handled at once where temporary arrays would be several times the input


@dataclass
class Renamed:
    """Rows whose id was not the first of its name: row numbers, ascending int64 [R], and their new ids."""

    rows: np.ndarray
    ids: pa.Array

    def apply(self, first: int, ids: pa.Array) -> pa.Array:
        """The ids of the rows from `first` on, with those replaced that have a new one."""
        start, stop = np.searchsorted(self.rows, [first, first + len(ids)])
        if start == stop:
            return ids
        mask = np.zeros(len(ids), bool)
        mask[self.rows[start:stop] - first] = True
        return pc.replace_with_mask(ids, pa.array(mask), self.ids.slice(start, stop - start))


def make_unique(facts: RowFacts, folder: str) -> Renamed:
    """Give every row its own id: the 2nd, 3rd, ... row of one id, in input order, get `~2`, `~3`, ... behind it.

    Should the new id be taken as well, the rule is applied again (`a~2~2`). Updates `facts.digest`.
    """
    renamed = Renamed(np.empty(0, np.int64), pa.array([], pa.string()))
    while True:
        rows, occurrence = repeated_rows(facts.digest)
        if not len(rows):
            return renamed
        ids = pc.binary_join_element_wise(
            _ids_of(rows, renamed, folder), pc.cast(pa.array(occurrence), pa.string()), "~"
        )
        facts.digest[rows] = digest_strings(ids)
        kept = ~np.isin(renamed.rows, rows)
        merged = np.concatenate([renamed.rows[kept], rows])
        order = np.argsort(merged)
        joined = pa.concat_arrays([renamed.ids.filter(pa.array(kept)), ids])
        renamed = Renamed(merged[order], joined.take(pa.array(order)))


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
    found = []
    for first, batch in read_spill(folder):
        start, stop = np.searchsorted(rows, [first, first + len(batch)])
        if start < stop:
            found.append(renamed.apply(first, batch["id"]).take(pa.array(rows[start:stop] - first)))
    return pa.concat_arrays(found)


def contains(known: np.ndarray, digest: np.ndarray) -> np.ndarray:
    """For each digest [N, 2] whether it is among `known` [P, 2]. bool [N]."""
    known = known[np.lexsort((known[:, 1], known[:, 0]))]
    found = np.zeros(len(digest), bool)
    for start in range(0, len(digest), BLOCK_ROWS):
        found[start : start + BLOCK_ROWS] = _contains_sorted(known, digest[start : start + BLOCK_ROWS])
    return found


def _contains_sorted(known: np.ndarray, digest: np.ndarray) -> np.ndarray:
    position = np.searchsorted(known[:, 0], digest[:, 0])
    found = np.zeros(len(digest), bool)
    candidates = np.arange(len(digest))
    while len(candidates):  # a second round only for two known ids with equal first halves
        candidates = candidates[position[candidates] < len(known)]
        at = position[candidates]
        half = known[at, 0] == digest[candidates, 0]
        full = half & (known[at, 1] == digest[candidates, 1])
        found[candidates[full]] = True
        candidates = candidates[half & ~full]
        position[candidates] += 1
    return found
