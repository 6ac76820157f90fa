"""MinHash with locality-sensitive hashing (Broder 1997; Indyk & Motwani 1998) of many sets at once.

A hash of words takes its least value on the same word in two sets with a probability that is their Jaccard similarity.
Sets whose least values agree in all hashes of a band have the same key there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# At threshold 0.8 these are 42 bands of 6: a pair just there shares a key with probability
# 1 - (1 - 0.8^6)^42 = 0.999997, a pair at 0.2, where most unrelated short texts are, with 0.003.
HASHES = 252
MISSED = 1e-4
BLOCK = 512  # sets at once: what is worked on stays in the processor's cache
MIX = np.uint64(0x9E3779B97F4A7C15)
# h(x) = a x + b modulo 2^32, a odd: multiply-shift hashing. Raw numbers of the generator are the same for ever.
RAW = np.random.PCG64(20_261_124).random_raw(HASHES)
FACTOR = (RAW | np.uint64(1)).astype(np.uint32)[:, None]
SHIFT = (RAW >> np.uint64(32)).astype(np.uint32)[:, None]


def bands(jaccard: float) -> tuple[int, int]:
    """Bands and hashes a band: the most selective ones that miss fewer than MISSED of the pairs at the threshold."""
    for hashes in (6, 4, 3, 2):
        count = HASHES // hashes
        if (1 - jaccard**hashes) ** count < MISSED:
            return count, hashes
    return HASHES, 1


def keys(words: npt.NDArray[np.uint64], sizes: npt.NDArray[np.int64], shape: tuple[int, int]) -> npt.NDArray[np.uint64]:
    """Keys of each set in each band, (bands, sets).

    words: hashes of the words of all sets, one set after another.  sizes: (sets,), none 0.  shape: of `bands`.
    """
    count, hashes = shape
    found = np.empty((count, len(sizes)), dtype=np.uint64)
    short = words.astype(np.uint32)
    starts = np.cumsum(sizes) - sizes
    order = np.argsort(-sizes, kind="stable")  # so that sets of a block run out of words from its end
    for at in range(0, len(order), BLOCK):
        block = order[at : at + BLOCK]
        least = _least(short, starts[block], sizes[block], count * hashes).reshape(count, hashes, -1)
        key = np.zeros((count, len(block)), dtype=np.uint64)
        for number in range(hashes):
            key = (key ^ least[:, number]) * MIX
            key ^= key >> np.uint64(29)
        found[:, block] = key
    return found


def _least(
    words: npt.NDArray[np.uint32], starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], hashes: int
) -> npt.NDArray[np.uint32]:
    """Least value of each hash over each set, (hashes, sets). sizes: descending."""
    least = np.full((hashes, len(sizes)), np.iinfo(np.uint32).max, dtype=np.uint32)
    value = np.empty_like(least)
    left = np.searchsorted(-sizes, -np.arange(sizes[0]))  # sets that have so many words and one more
    for position, sets in enumerate(left):
        word = words[starts[:sets] + position]
        np.multiply(FACTOR[:hashes], word, out=value[:, :sets])
        value[:, :sets] += SHIFT[:hashes]
        np.minimum(least[:, :sets], value[:, :sets], out=least[:, :sets])
    return least
