"""Tables that lie on disk while they are worked on: written batch by batch, then mapped into memory.

What is mapped costs address space, not memory: the kernel reads its pages as they are wanted and drops them when others
want the room. The file has no name any more once it is mapped, so its space is free again when the table is gone,
however the process ends. It lies where `tempfile` puts files: where /tmp is memory, TMPDIR must name a disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa
    from datasets import Dataset

ROWS = 10_000  # that a step works on at once


def spooled(tables: Iterable[pa.Table], schema: pa.Schema) -> Dataset:
    """The tables below each other, columns as in the schema. Raises OSError when the disk is full."""
    import pyarrow as pa
    from datasets import Dataset

    schema = schema.remove_metadata()
    with tempfile.NamedTemporaryFile(prefix="adapterline-", suffix=".arrow") as file:
        with pa.ipc.new_file(file.name, schema) as writer:
            for table in tables:
                writer.write_table(table.select(schema.names).cast(schema))
        return Dataset(pa.ipc.open_file(pa.memory_map(file.name)).read_all())


def batches(table: Dataset, columns: Iterable[str] | None = None) -> Iterator[pa.Table]:
    """All rows of a data set, some at a time, as Arrow tables."""
    wanted = table if columns is None else table.select_columns(list(columns))
    yield from wanted.with_format("arrow").iter(batch_size=ROWS)


def chosen(table: Dataset, mask: npt.NDArray[np.bool_], schema: pa.Schema) -> Dataset:
    """The rows where the mask is true, in their order. mask: (rows,)."""
    starts = range(0, len(mask), ROWS)
    parts = (part.filter(mask[start : start + ROWS]) for start, part in zip(starts, batches(table), strict=True))
    return spooled(parts, schema)
