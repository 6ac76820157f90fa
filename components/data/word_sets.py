"""The sets of words of texts, on disk: 64-bit hashes of words (SipHash), one set after another.

Two of ten million different words share a hash with a probability of 3e-6; ids of rows are as long.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from components.data.rows import fold
from components.data.spool import ROWS

Words = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
COUNTERS = 1 << 22
# Sets are compared so many words, or pairs, at a time: 14 bits number a pair, the other 50 are of the word's hash.
WORDS, PAIR_BITS = 1 << 20, 14
ROUNDING = 1e-9


def hashed(texts: Iterable[str]) -> Iterator[tuple[Words, Rows]]:
    """Batch by batch: the words of all sets, one set after another, and the size of each. (words,), (rows,).

    A text without words is a set of one, the empty word, which no other text has: similar to its likes alone.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.compute as pc

    each = iter(texts)
    while batch := [fold(text) for text in islice(each, ROWS)]:
        lists = pc.split_pattern(pa.array(batch), " ")
        words = lists.flatten().dictionary_encode()
        names = words.dictionary.to_numpy(zero_copy_only=False)
        row = np.repeat(np.arange(len(batch)), pc.list_value_length(lists).to_numpy())
        places = np.sort(row * len(names) + words.indices.to_numpy())
        row, code = np.divmod(places[np.diff(places, prepend=-1) > 0], len(names))
        yield pd.util.hash_array(names, categorize=False)[code], np.bincount(row, minlength=len(batch))


class WordSets:
    """Sets in a file, to be read at random. `add` all, then `close`, then ask.

    sizes: (rows,) words of each set.  parity: (rows,) 64 bits of each, of which every word turns one over.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._sizes: list[npt.NDArray[np.int32]] = []
        self._parity: list[Words] = []
        self._counts = np.zeros(COUNTERS, dtype=np.int64)

    def add(self, words: Words, sizes: Rows) -> None:
        self._file.write(words.tobytes())
        self._sizes.append(sizes.astype(np.int32))
        self._parity.append(np.bitwise_xor.reduceat(np.uint64(1) << (words & np.uint64(63)), np.cumsum(sizes) - sizes))
        np.add.at(self._counts, self._counter(words), 1)

    def close(self) -> None:
        self._file.close()
        self.sizes = np.concatenate([*self._sizes, np.zeros(0, dtype=np.int32)])
        self.parity = np.concatenate([*self._parity, np.zeros(0, dtype=np.uint64)])
        self._starts = np.cumsum(self.sizes, dtype=np.int64) - self.sizes
        self._words = (
            np.memmap(self._file.name, dtype=np.uint64, mode="r") if len(self.sizes) else np.zeros(0, np.uint64)
        )

    def of(self, rows: Rows) -> tuple[Words, Rows]:
        """The words of some sets, and for each the place in `rows` of the one that it belongs to. (words,) both."""
        sizes = self.sizes[rows]
        place = np.repeat(np.arange(len(rows)), sizes)
        first = np.cumsum(sizes) - sizes
        return self._words[np.arange(len(place)) + (self._starts[rows] - first)[place]], place

    def rare(self, rows: Rows, jaccard: float) -> tuple[Words, Rows, npt.NDArray[np.bool_]]:
        """The rarest words of some sets, the place in `rows` of each one's set, and whether it is among the very rarest.

        Of two sets at `jaccard` or above, one of the very rarest words of the smaller is among the rarest of the other,
        and among the very rarest where they are equally large: they share a certain number of words at least, and so
        the rarest of those is not far up in either (prefix filter: Bayardo et al. 2007; Xiao et al. 2008). How rare a
        word is, is counted in a table of hashes: some only seem more frequent, but to all sets alike.
        """
        words, place = self.of(rows)
        order = np.lexsort((words, self._counts[self._counter(words)], place))
        sizes = self.sizes[rows]
        shared = np.ceil(jaccard * sizes - ROUNDING).astype(np.int64)  # with a smaller set
        shared_up = np.ceil(2 * jaccard / (1 + jaccard) * sizes - ROUNDING).astype(np.int64)  # with one not smaller
        rank = np.arange(len(place)) - (np.cumsum(sizes) - sizes)[place]
        chosen = rank <= (sizes - shared)[place]
        return words[order][chosen], place[chosen], (rank <= (sizes - shared_up)[place])[chosen]

    def similar(self, one: Rows, other: Rows, jaccard: float) -> npt.NDArray[np.bool_]:
        """Which pairs of sets have at least this Jaccard similarity, (pairs,)."""
        words = self.sizes[one] + self.sizes[other]
        # Each word that only one of them has turns over one bit: sets differ in as many words at least (bitmap filter).
        different = np.bitwise_count(self.parity[one] ^ self.parity[other])
        found = different <= (1 - jaccard) / (1 + jaccard) * words + ROUNDING
        near = np.flatnonzero(found)
        ends, done = np.cumsum(words[near], dtype=np.int64), 0
        while done < len(near):
            limit = int(np.searchsorted(ends, (ends[done - 1] if done else 0) + WORDS, "right"))
            part = near[done : max(done + 1, min(limit, done + (1 << PAIR_BITS)))]
            found[part] = self._compared(one[part], other[part], jaccard, exact=False)
            sure = part[found[part]]  # a part of a hash may only make sets more alike than they are
            found[sure] = self._compared(one[sure], other[sure], jaccard, exact=True)
            done += len(part)
        return found

    def _compared(self, one: Rows, other: Rows, jaccard: float, exact: bool) -> npt.NDArray[np.bool_]:
        words, pair = self.of(np.concatenate([one, other]))
        pair %= max(1, len(one))
        if exact:
            order = np.lexsort((words, pair))
            twice = (words[order][1:] == words[order][:-1]) & (pair[order][1:] == pair[order][:-1])
            at = pair[order][1:][twice]
        else:
            keys = pair.astype(np.uint64) << np.uint64(64 - PAIR_BITS) | words >> np.uint64(PAIR_BITS)
            keys.sort()
            at = (keys[1:][keys[1:] == keys[:-1]] >> np.uint64(64 - PAIR_BITS)).astype(np.int64)
        shared = np.bincount(at, minlength=len(one))
        similarity: npt.NDArray[np.float64] = shared / (self.sizes[one] + self.sizes[other] - shared)
        return similarity >= jaccard

    @staticmethod
    def _counter(words: Words) -> Rows:
        return (words >> np.uint64(64 - COUNTERS.bit_length() + 1)).astype(np.int64)
