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
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from components import digest
from components.config import SplitConfig
from components.data.near_duplicates import clusters
from components.data.rows import Cleaned
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

    @property
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

    Raises DataError when a part would lack a class.
    """
    from datasets import concatenate_datasets

    rows = cleaned.table
    known = set(rows["row"])
    ghosts = frozen.filter(lambda row: row not in known, input_columns="row") if frozen is not None else None
    earlier = set(frozen["row"]) if frozen is not None else set()
    haunting = [ghosts] if ghosts is not None else []
    cluster = clusters(chain.from_iterable(map(_texts, [rows, *haunting])), config.near_duplicate_jaccard)
    is_frozen = np.ones(len(cluster), dtype=bool)
    is_frozen[: len(rows)] = [row in earlier for row in rows["row"]]
    part = assign(rows["row"], np.asarray(rows["label"]), cluster, is_frozen, config)
    train, validation, test = (rows.select(np.flatnonzero(part == code)) for code in range(3))
    _require_every_class({"train": train, "validation": validation, "test": test}, cleaned.labels)
    held_out = test.remove_columns("label")
    return Split(
        train=train,
        validation=validation,
        test=test,
        frozen=concatenate_datasets([held_out, ghosts]) if ghosts is not None and len(ghosts) else held_out,
        labels=cleaned.labels,
        near_duplicates=len(rows) - len(np.unique(cluster[: len(rows)])),
    )


def assign(
    row_ids: Sequence[str],
    labels: npt.NDArray[np.int64],
    cluster: npt.NDArray[np.int64],
    is_frozen: npt.NDArray[np.bool_],
    config: SplitConfig,
) -> npt.NDArray[np.int64]:
    """Part (0 train, 1 validation, 2 test) of each row.

    row_ids, labels: (rows,).  cluster, is_frozen: (rows + ghosts,), ghosts being frozen rows that are not in the data.
    """
    part = np.full(len(row_ids), TRAIN, dtype=np.int64)
    held_out = set(cluster[is_frozen].tolist())
    members: dict[int, list[int]] = {}
    for row, number in enumerate(cluster[: len(row_ids)].tolist()):
        members.setdefault(number, []).append(row)
    strata: dict[int, list[list[int]]] = {}
    for rows in members.values():
        strata.setdefault(int(labels[rows[0]]), []).append(rows)

    for groups in strata.values():
        total = sum(len(rows) for rows in groups)
        wanted = {TEST: round(config.test * total), VALIDATION: round(config.validation * total)}
        for rows in groups:
            if int(cluster[rows[0]]) in held_out:
                part[rows] = TEST
                wanted[TEST] -= len(rows)
        free = (rows for rows in groups if int(cluster[rows[0]]) not in held_out)
        for rows in sorted(free, key=lambda rows: _order(row_ids[rows[0]], config.seed)):
            for code in (TEST, VALIDATION):
                if len(rows) <= wanted[code]:
                    part[rows] = code
                    wanted[code] -= len(rows)
                    break
    return part


def _order(row: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}:{row}".encode()).digest()


def _texts(table: Dataset) -> Iterator[str]:
    """Each row's text, with its pair, batch by batch."""
    for batch in table.iter(batch_size=10_000):
        yield from map(" ".join, zip(batch["text"], batch.get("text_pair", [""] * len(batch["text"])), strict=True))


def _require_every_class(parts: dict[str, Dataset], labels: Sequence[str]) -> None:
    lacking = [
        f"{name} lacks {', '.join(labels[code] for code in missing)}"
        for name, table in parts.items()
        if (missing := sorted(set(range(len(labels))) - set(table["label"])))
    ]
    if lacking:
        raise DataError("every class in every part of the split", "; ".join(lacking), "add rows of those classes")
