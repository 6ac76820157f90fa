"""Near duplicates: rows whose word sets have a Jaccard similarity of at least a threshold.

Candidates are rows that share a key of MinHash, and every candidate is then compared exactly, so nothing is joined by
chance. Word sets and keys lie on disk; 8-byte numbers a row are what is held in memory.

Rows of a template ("your order 17 has been shipped") share keys by the thousand without being near duplicates, and to
compare all of them would cost the square of their number. So under each key, neighbours are compared first, and of what
is then still in different clusters only rows that also share a rare word: of two near duplicates, one of the rarest
words of each is the same, always. Only rows in different clusters are ever compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from components.data import minhash
from components.data.word_sets import WordSets, hashed

Rows = npt.NDArray[np.int64]
Pairs = tuple[Rows, Rows]
MANY = 16  # pairs a row under one key, above which rare words must be shared too
AT_ONCE, SOME = 1 << 20, 1 << 16  # pairs, rows


def clusters(texts: Iterable[str], jaccard: float) -> Rows:
    """Number of the cluster of each text; texts in one cluster are linked by a chain of near duplicates.

    texts: (rows,).  Returns (rows,) ints; each cluster bears the number of its first row.
    """
    with tempfile.TemporaryDirectory(prefix="adapterline-") as name:
        folder = Path(name)
        sets, bands = _sketched(texts, jaccard, folder)
        cluster = np.arange(len(sets.sizes))
        # Equal sets first: of those, one is compared with the others.
        cluster = _linked(cluster, cluster, np.fromfile(folder / "same", np.uint64), sets, jaccard)
        distinct = np.flatnonzero(cluster == np.arange(len(cluster)))
        for band in range(bands):
            cluster = _linked(cluster, distinct, np.fromfile(folder / str(band), np.uint64)[distinct], sets, jaccard)
        return cluster


def _sketched(texts: Iterable[str], jaccard: float, folder: Path) -> tuple[WordSets, int]:
    """The word sets, and the number of bands. The folder gets a file of keys for each, and one of hashes of whole sets."""
    shape = minhash.bands(jaccard)
    sets = WordSets(folder / "words")
    with ExitStack() as stack:
        files = [stack.enter_context((folder / str(band)).open("wb")) for band in range(shape[0])]
        same = stack.enter_context((folder / "same").open("wb"))
        for words, sizes in hashed(texts):
            sets.add(words, sizes)
            same.write(np.add.reduceat(words, np.cumsum(sizes) - sizes).tobytes())
            for file, keys in zip(files, minhash.keys(words, sizes, shape), strict=True):
                file.write(keys.tobytes())
    sets.close()
    return sets, shape[0]


def _linked(cluster: Rows, rows: Rows, keys: npt.NDArray[np.uint64], sets: WordSets, jaccard: float) -> Rows:
    """The clusters when near duplicates among the rows that share a key are joined. rows, keys: (some rows,)."""
    order = np.argsort(keys, kind="stable")
    begins = _begins(keys[order])
    shared = ~begins
    shared[:-1] |= ~begins[1:]
    rows, bucket = rows[order[shared]], np.cumsum(begins)[shared]
    chained = ~_begins(bucket)[1:]
    cluster = _compared(cluster, rows[:-1][chained], rows[1:][chained], sets, jaccard)

    crowded = _crowded(cluster, rows, bucket)
    for pair in _pairs(cluster, (rows[~crowded], bucket[~crowded])):
        cluster = _compared(cluster, *pair, sets, jaccard)
    rarest, rare = _with_rare_words(rows[crowded], bucket[crowded], sets, jaccard)
    for pair in _pairs(cluster, rarest):
        cluster = _compared(cluster, *pair, sets, jaccard)
    for one, other in _pairs(cluster, rarest, rare):
        larger = sets.sizes[one] < sets.sizes[other]
        cluster = _compared(cluster, one[larger], other[larger], sets, jaccard)
    return cluster


def _compared(cluster: Rows, one: Rows, other: Rows, sets: WordSets, jaccard: float) -> Rows:
    """The clusters when pairs of rows that are near duplicates are joined. one, other: (pairs,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    for at in range(0, len(one), AT_ONCE):
        ends = np.stack([one[at : at + AT_ONCE], other[at : at + AT_ONCE]])
        ends = ends[:, cluster[ends[0]] != cluster[ends[1]]]
        ends = cluster[ends[:, sets.similar(ends[0], ends[1], jaccard)]]
        if not ends.size:
            continue
        nodes, place = np.unique(ends, return_inverse=True)
        place = place.reshape(2, -1)
        graph = coo_array((np.ones(place.shape[1], dtype=np.int8), (place[0], place[1])), shape=(len(nodes),) * 2)
        group = connected_components(graph, directed=False)[1]
        lowest = nodes[np.unique(group, return_index=True)[1]]
        moved = np.arange(len(cluster))
        moved[nodes] = lowest[group]
        cluster = moved[cluster]
    return cluster


def _crowded(cluster: Rows, rows: Rows, bucket: Rows) -> npt.NDArray[np.bool_]:
    """Which rows lie in a bucket with too many pairs of rows in different clusters to compare them all, (rows,)."""
    code = np.sort(bucket * len(cluster) + cluster[rows])
    size, together = np.bincount(bucket), np.flatnonzero(_begins(code))
    alike = np.diff(together, append=len(code))
    same = np.bincount(code[together] // len(cluster), alike**2, minlength=len(size))
    return ((size**2 - same) / 2 > MANY * size)[bucket]


def _pairs(cluster: Rows, some: tuple[Rows, Rows], others: tuple[Rows, Rows] | None = None) -> Iterator[Pairs]:
    """All pairs of one of some rows and one of the others, or another of the same, that are in one bucket and were in
    different clusters at first; so many at a time. some, others: rows and buckets.
    """
    rows, bucket = some
    code = bucket * len(cluster) + cluster[rows]
    among, their = others if others is not None else some
    their_code = their * len(cluster) + cluster[among]
    order = np.argsort(their_code)
    among, their_code = among[order], their_code[order]
    after = np.searchsorted(their_code, code, "right"), np.searchsorted(their_code, (bucket + 1) * len(cluster))
    before = np.searchsorted(their_code, bucket * len(cluster)), np.searchsorted(their_code, code)
    for start, end in (after,) if others is None else (after, before):
        done = np.cumsum(end - start)
        total = int(done[-1]) if len(done) else 0
        for at in range(0, total, AT_ONCE):
            number = np.arange(at, min(at + AT_ONCE, total))
            one = np.searchsorted(done, number, "right")
            yield rows[one], among[end[one] - (done[one] - number)]


def _begins(*values: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Where a run of equal values begins, (rows,). values: (rows,) each."""
    begins = np.ones(len(values[0]), dtype=bool)
    begins[1:] = np.any([each[1:] != each[:-1] for each in values], axis=0)
    return begins


def _with_rare_words(
    rows: Rows, bucket: Rows, sets: WordSets, jaccard: float
) -> tuple[tuple[Rows, Rows], tuple[Rows, Rows]]:
    """Each row once for each of its rare words, with a bucket for each word in each of the given ones: first those with
    their very rarest words, then those with the others.
    """
    found = [
        (words, place + at, rarest)
        for at in range(0, len(rows), SOME)
        for words, place, rarest in [sets.rare(rows[at : at + SOME], jaccard)]
    ]
    if not found:
        return (rows, bucket), (rows, bucket)
    words, place, rarest = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.lexsort((words, bucket[place]))
    words, place, rarest = words[order], place[order], rarest[order]
    rows, bucket = rows[place], np.cumsum(_begins(words, bucket[place]))
    return (rows[rarest], bucket[rarest]), (rows[~rarest], bucket[~rarest])
