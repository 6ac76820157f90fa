"""Train, validation and test parts without leaks.

Rows that are near duplicates of each other are one cluster, and a cluster is never parted. Clusters are dealt out per
class, in the order of a hash of their content, so the same rows give the same split on any machine and in any order.
The test part is frozen: a row that an earlier data set held out for testing, or a near duplicate of one, is never
trained on later. That is what makes comparing a candidate with an older champion honest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from components import digest
from components.config import SplitConfig
from components.data.ids import ids_of
from components.data.near_duplicates import clusters
from components.data.rows import Cleaned
from components.data.spool import ROWS, batches, chosen
from components.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

PARTS = ("train", "validation", "test")
TRAIN, VALIDATION, TEST = range(3)


@dataclass(frozen=True)
class Split:
    """Three tables with the columns of `Cleaned.table`, and what the frozen test part of the future holds.

    frozen: `row`, `text`, [`text_pair`] of every row that any data set so far held out for testing.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    frozen: Dataset
    labels: tuple[str, ...]
    near_duplicates: int

    @property
    def parts(self) -> dict[str, Dataset]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @cached_property
    def digest(self) -> str:
        """Digest of which rows are in which part, with their texts and labels."""
        return split_digest(self.parts, self.labels)


def split_digest(parts: dict[str, Dataset], labels: Sequence[str]) -> str:
    return digest.of_json([list(labels), {name: table_digest(table) for name, table in parts.items()}])


def table_digest(table: Dataset) -> str:
    """Digest of all values of a table, in its order."""
    content = hashlib.sha256()
    names = sorted(table.column_names)
    for batch in table.select_columns(names).iter(batch_size=10_000):
        content.update(json.dumps([batch[name] for name in names]).encode())
    return content.hexdigest()


def split(cleaned: Cleaned, config: SplitConfig, frozen: Dataset | None = None) -> Split:
    """Part the rows. frozen: `row`, `text`, [`text_pair`] of all rows that earlier data sets held out for testing.

    Raises DataError when a part would lack a class, or the frozen rows have other columns.
    """
    from datasets import concatenate_datasets

    rows = cleaned.table
    ids = ids_of(rows)
    earlier = np.sort(ids_of(frozen)) if frozen is not None else np.zeros(0, dtype=np.uint64)
    held_out = rows.data.schema.remove(rows.column_names.index("label"))
    if frozen is not None:
        _require_same_columns(held_out.names, frozen.column_names)
    ghosts = chosen(frozen, ~np.isin(ids_of(frozen), ids), held_out) if frozen is not None else None
    haunting = [ghosts] if ghosts is not None else []
    cluster = clusters(chain.from_iterable(map(_texts, [rows, *haunting])), config.near_duplicate_jaccard)
    is_frozen = np.ones(len(cluster), dtype=bool)
    is_frozen[: len(rows)] = np.isin(ids, earlier)
    part = assign(ids, label_codes(rows), cluster, is_frozen, config)
    train, validation, test = (chosen(rows, part == code, rows.data.schema) for code in range(3))
    _require_every_class({"train": train, "validation": validation, "test": test}, cleaned.labels)
    frozen = test.remove_columns("label")
    return Split(
        train=train,
        validation=validation,
        test=test,
        frozen=concatenate_datasets([frozen, ghosts]) if ghosts is not None and len(ghosts) else frozen,
        labels=cleaned.labels,
        near_duplicates=len(rows) - len(np.unique(cluster[: len(rows)])),
    )


def assign(
    row_ids: npt.NDArray[np.uint64],
    labels: npt.NDArray[np.int64],
    cluster: npt.NDArray[np.int64],
    is_frozen: npt.NDArray[np.bool_],
    config: SplitConfig,
) -> npt.NDArray[np.int8]:
    """Part (0 train, 1 validation, 2 test) of each row.

    row_ids, labels: (rows,).  cluster, is_frozen: (rows + ghosts,), ghosts being frozen rows that are not in the data.
    A cluster bears the number of its first row, whose label and id stand for it.
    """
    size = np.bincount(cluster[: len(row_ids)], minlength=len(cluster))
    is_held_out = np.zeros(len(cluster), dtype=bool)
    is_held_out[cluster[is_frozen]] = True
    part = np.full(len(cluster), TRAIN, dtype=np.int8)  # of each cluster
    heads = np.flatnonzero(size)
    for label in np.unique(labels[heads]):
        mine = heads[labels[heads] == label]
        total = int(size[mine].sum())
        wanted = {TEST: round(config.test * total), VALIDATION: round(config.validation * total)}
        part[mine[is_held_out[mine]]] = TEST
        wanted[TEST] -= int(size[mine[is_held_out[mine]]].sum())
        free = mine[~is_held_out[mine]]
        free = free[np.argsort(_order(row_ids[free], config.seed), kind="stable")]
        for start in range(0, len(free), ROWS):
            heads_now = free[start : start + ROWS]
            for head, rows in zip(heads_now.tolist(), size[heads_now].tolist(), strict=True):
                for code in (TEST, VALIDATION):
                    if rows <= wanted[code]:
                        part[head] = code
                        wanted[code] -= rows
                        break
            if max(wanted.values()) <= 0:
                break
    return part[cluster[: len(row_ids)]]


def _order(row_ids: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """By which clusters are dealt out, (rows,): the first 8 bytes of a hash."""
    order = np.empty(len(row_ids), dtype=np.uint64)
    for start in range(0, len(order), ROWS):
        names = (f"{seed}:{row:016x}" for row in row_ids[start : start + ROWS].tolist())
        hashes = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in names)
        order[start : start + ROWS] = np.frombuffer(hashes, ">u8")
    return order


def label_codes(table: Dataset) -> npt.NDArray[np.int64]:
    """The column `label` of a table on disk, (rows,)."""
    labels: npt.NDArray[np.int64] = table.data.column("label").to_numpy()
    return labels


def _texts(table: Dataset) -> Iterator[str]:
    """Each row's text, with its pair, batch by batch."""
    names = [name for name in ("text", "text_pair") if name in table.column_names]
    for batch in batches(table, names):
        texts = (batch[name].to_pylist() for name in names)
        yield from map(" ".join, zip(*texts, strict=True))


def _require_same_columns(found: Sequence[str], earlier: Sequence[str]) -> None:
    """Else nobody could tell whether a row was held out before."""
    if set(found) != set(earlier):
        wanted, have = (" and ".join(sorted({*names} - {"row"})) for names in (earlier, found))
        raise DataError(f"rows with {wanted}, as this model's earlier data had", have, "give them to a new model name")


def _require_every_class(parts: dict[str, Dataset], labels: Sequence[str]) -> None:
    lacking = [
        f"{name} lacks {', '.join(labels[code] for code in missing)}"
        for name, table in parts.items()
        if (missing := sorted(set(range(len(labels))) - set(np.unique(label_codes(table)).tolist())))
    ]
    if lacking:
        raise DataError("every class in every part of the split", "; ".join(lacking), "add rows of those classes")
