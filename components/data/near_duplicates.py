"""Near duplicates: rows whose word sets have a Jaccard similarity of at least a threshold.

Candidates come from MinHash with locality-sensitive hashing (Broder 1997; Indyk & Motwani 1998), and every candidate
is then compared exactly, so nothing is joined by chance.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from components.data.rows import fold

# At threshold 0.8 these are 42 bands of 6: a pair just there becomes a candidate with probability
# 1 - (1 - 0.8^6)^42 = 0.999997, a pair at 0.2, where most unrelated short texts are, with 0.003.
HASHES = 252
MISSED = 1e-4


def clusters(texts: Iterable[str], jaccard: float) -> npt.NDArray[np.int64]:
    """Number of the cluster of each text; texts in one cluster are linked by a chain of near duplicates.

    texts: (rows,).  Returns (rows,) ints; each cluster bears the number of its first row.
    """
    from datasketch import MinHash, MinHashLSH

    words = [frozenset(fold(text).split()) for text in texts]
    first_with: dict[frozenset[str], int] = {}
    parent = [first_with.setdefault(each, row) for row, each in enumerate(words)]
    distinct = list(first_with.values())
    index = MinHashLSH(num_perm=HASHES, params=_bands(jaccard))
    encoded = ([word.encode() for word in sorted(words[row])] for row in distinct)
    for row, sketch in zip(distinct, MinHash.generator(encoded, num_perm=HASHES), strict=True):
        for other in index.query(sketch):
            if _root(parent, row) != _root(parent, other) and _jaccard(words[row], words[other]) >= jaccard:
                _join(parent, row, other)
        index.insert(row, sketch, check_duplication=False)
    return np.array([_root(parent, row) for row in range(len(words))], dtype=np.int64)


def _bands(jaccard: float) -> tuple[int, int]:
    """Bands and hashes a band: the most selective ones that miss fewer than MISSED of the pairs at the threshold."""
    for hashes in (6, 4, 3, 2):
        bands = HASHES // hashes
        if (1 - jaccard**hashes) ** bands < MISSED:
            return bands, hashes
    return HASHES, 1


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if one or other else 1.0


def _root(parent: list[int], row: int) -> int:
    while parent[row] != row:
        parent[row] = parent[parent[row]]
        row = parent[row]
    return row


def _join(parent: list[int], one: int, other: int) -> None:
    low, high = sorted((_root(parent, one), _root(parent, other)))
    parent[high] = low
