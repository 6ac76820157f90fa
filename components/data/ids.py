"""Ids of rows as numbers: 16 hexadecimal digits where they are stored, eight bytes where they are worked on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from components.data.spool import ROWS, batches

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

# 64 bits of sha256: among five million rows the chance of any two sharing an id is below one in a million.
ID_HEX = 16


class Ids(Set[str]):
    """A set of ids, eight bytes each. `some & ids` is an ordinary set."""

    def __init__(self, ids: npt.NDArray[np.uint64]) -> None:
        self._ids = np.unique(ids)

    def __contains__(self, row: object) -> bool:
        number = np.uint64(int(str(row), 16))
        place = int(np.searchsorted(self._ids, number))
        return place < len(self._ids) and bool(self._ids[place] == number)

    def __iter__(self) -> Iterator[str]:
        return (f"{number:016x}" for number in self._ids.tolist())

    def __len__(self) -> int:
        return len(self._ids)

    @classmethod
    def _from_iterable(cls, each: Iterable[str]) -> set[str]:  # type: ignore[override]
        return set(each)


def hexed(ids: npt.NDArray[np.uint64]) -> pa.Array:
    """Ids as strings of 16 hexadecimal digits, (rows,)."""
    import pyarrow as pa

    digits = pa.py_buffer(ids.astype(">u8").tobytes().hex().encode())
    starts = np.arange(len(ids) + 1, dtype=np.int32) * ID_HEX
    return pa.StringArray.from_buffers(len(ids), pa.py_buffer(starts), digits)


def ids_of(table: Dataset) -> npt.NDArray[np.uint64]:
    """The column `row` as numbers, (rows,): eight bytes a row."""
    found = np.empty(len(table), dtype=np.uint64)
    for number, batch in enumerate(batches(table, ["row"])):
        found[number * ROWS :][: len(batch)] = numbers(batch["row"].to_pylist())
    return found


def numbers(digits: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Ids as numbers, (rows,)."""
    return np.frombuffer(bytes.fromhex("".join(digits)), ">u8").astype(np.uint64)
