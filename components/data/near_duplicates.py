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
MANY = 16  # pairs a row under one key, above which rare words must be shared too
AT_ONCE = 1 << 20  # pairs


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

    rows, bucket, pairs = _apart(cluster, rows, bucket)
    size, crossing = np.bincount(bucket), np.bincount(bucket, pairs)
    crowded = (crossing > MANY * size)[bucket]
    for some, key in (
        (rows[~crowded], bucket[~crowded]),
        _with_rare_words(rows[crowded], bucket[crowded], sets, jaccard),
    ):
        for one, other in _pairs(*_apart(cluster, some, key)):
            cluster = _compared(cluster, one, other, sets, jaccard)
    return cluster


def _compared(cluster: Rows, one: Rows, other: Rows, sets: WordSets, jaccard: float) -> Rows:
    """The clusters when pairs of rows that are near duplicates are joined. one, other: (pairs,)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    for at in range(0, len(one), AT_ONCE):
        ends = np.stack([one[at : at + AT_ONCE], other[at : at + AT_ONCE]])
        ends = ends[:, cluster[ends[0]] != cluster[ends[1]]]
        ends = np.stack(np.divmod(np.unique(ends.min(axis=0) * len(cluster) + ends.max(axis=0)), len(cluster)))
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


def _apart(cluster: Rows, rows: Rows, bucket: Rows) -> tuple[Rows, Rows, Rows]:
    """Rows and buckets in the order of buckets and of clusters in them, and how many rows that come later in its bucket
    are of another cluster than each. Buckets of one cluster are left out. (rows,) each.
    """
    order = np.lexsort((cluster[rows], bucket))
    rows, bucket = rows[order], bucket[order]
    bucket, begins = np.cumsum(_begins(bucket)) - 1, _begins(bucket)
    pairs = _ends(begins) - _ends(_begins(bucket, cluster[rows]))
    kept = (np.bincount(bucket, pairs) > 0)[bucket]
    return rows[kept], bucket[kept], pairs[kept]


def _begins(*values: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Where a run of equal values begins, (rows,). values: (rows,) each."""
    begins = np.ones(len(values[0]), dtype=bool)
    begins[1:] = np.any([each[1:] != each[:-1] for each in values], axis=0)
    return begins


def _ends(begins: npt.NDArray[np.bool_]) -> Rows:
    """Where the run that each belongs to ends, (rows,). begins: of `_begins`."""
    starts = np.flatnonzero(begins)
    ends = np.append(starts[1:], len(begins))[: len(starts)]
    return np.repeat(ends, ends - starts)


def _pairs(rows: Rows, bucket: Rows, pairs: Rows) -> Iterator[tuple[Rows, Rows]]:
    """All pairs of rows of one bucket and different clusters, some at a time. Arguments: of `_apart`."""
    done = np.cumsum(pairs)
    ends = _ends(_begins(bucket))
    for start in range(0, int(done[-1]) if len(done) else 0, AT_ONCE):
        number = np.arange(start, min(start + AT_ONCE, int(done[-1])))
        one = np.searchsorted(done, number, "right")
        yield rows[one], rows[ends[one] - (done[one] - number)]


def _with_rare_words(rows: Rows, bucket: Rows, sets: WordSets, jaccard: float) -> tuple[Rows, Rows]:
    """Each row once for each of its rare words, and a bucket for each word in each of the given ones."""
    found = []
    for at in range(0, len(rows), AT_ONCE // 16):
        words, place = sets.rare(rows[at : at + AT_ONCE // 16], jaccard)
        found.append((words, place + at))
    words = np.concatenate([words for words, _ in found] or [np.zeros(0, np.uint64)])
    place = np.concatenate([place for _, place in found] or [np.zeros(0, np.int64)])
    order = np.lexsort((words, bucket[place]))
    words, place = words[order], place[order]
    return rows[place], np.cumsum(_begins(words, bucket[place]))
