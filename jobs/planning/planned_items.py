"""What the generations of a plan already hold, by digests: 16 bytes per item in memory. Knows nothing of storage."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

BLOCK_ROWS = 1 << 20  # rows handled at once where temporary arrays would be several times the input
NO_DIGESTS = np.empty((0, 2), np.uint64)


def _no_places(_digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return NO_DIGESTS, np.empty(0, np.uint64)


@dataclass
class PlannedItems:
    """The items of all committed generations.

    Args:
        plain: uint64 [P, 2], digests of the ids that are as the input gave them.
        given, names: uint64 [Q, 2], of the other items: what the input gave, and the id made from it.
        places: given digests -> (digest of the given id, `digest_places`) of every item planned under one of them.
    """

    plain: np.ndarray = field(default_factory=lambda: NO_DIGESTS)
    given: np.ndarray = field(default_factory=lambda: NO_DIGESTS)
    names: np.ndarray = field(default_factory=lambda: NO_DIGESTS)
    places: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]] = _no_places

    def __post_init__(self):
        self.plain, self._given, self._names = (
            sort_digests(self.plain),
            sort_digests(self.given),
            sort_digests(self.names),
        )

    def __len__(self) -> int:
        return len(self.plain) + len(self.given)

    def holds(self, digest: np.ndarray) -> np.ndarray:
        """For each id of an input whether an item was planned under it. bool [N]."""
        return contains(self.plain, digest) | contains(self._given, digest)

    def repeats(self, digest: np.ndarray) -> np.ndarray:
        """For each id of an input whether several items were planned under it. bool [N]."""
        return contains(self._given, digest)

    def named(self, digest: np.ndarray) -> np.ndarray:
        """For each id whether an item of the plan has it. bool [N]."""
        return contains(self.plain, digest) | contains(self._names, digest)


def sort_digests(digests: np.ndarray) -> np.ndarray:
    """Sorted as `contains` expects them. uint64 [N, 2]."""
    return digests[np.lexsort((digests[:, 1], digests[:, 0]))]


def contains(known: np.ndarray, digest: np.ndarray) -> np.ndarray:
    """For each digest [N, 2] whether it is among `known` [P, 2], which is sorted. bool [N]."""
    found = np.zeros(len(digest), bool)
    for start in range(0, len(digest) if len(known) else 0, BLOCK_ROWS):
        found[start : start + BLOCK_ROWS] = _contains(known, digest[start : start + BLOCK_ROWS])
    return found


def _contains(known: np.ndarray, digest: np.ndarray) -> np.ndarray:
    position = np.searchsorted(known[:, 0], digest[:, 0])
    found = np.zeros(len(digest), bool)
    candidates = np.arange(len(digest))
    while len(candidates):  # a second round only where two ids have equal first halves
        candidates = candidates[position[candidates] < len(known)]
        at = position[candidates]
        half = known[at, 0] == digest[candidates, 0]
        full = half & (known[at, 1] == digest[candidates, 1])
        found[candidates[full]] = True
        candidates = candidates[half & ~full]
        position[candidates] += 1
    return found
