"""The file of answers: written as they come, and there only when all are."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import storage
from components.errors import StorageError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

# Of a Parquet row group: many small ones would have the file's list of them grow.
GROUP_ROWS, GROUP_BYTES = 1 << 16, 1 << 24


class Answers:
    """Takes tables of one schema, one after the other."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: Any = None
        self._held: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        self._held.append(table)
        if sum(map(len, self._held)) >= GROUP_ROWS or sum(each.nbytes for each in self._held) >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        if self._held:
            self._flush()
        if self._writer is not None:
            self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.csv
        import pyarrow.parquet

        table = pa.concat_tables(self._held)
        if self._writer is None:
            kind = pyarrow.csv.CSVWriter if self._path.suffix == ".csv" else pyarrow.parquet.ParquetWriter
            self._writer = kind(self._path, table.schema)
        self._writer.write_table(table)
        self._held.clear()


@contextmanager
def writing(out: str) -> Iterator[Answers]:
    """What is written in the block is at `out` after it, if nothing went wrong in it; before, nothing is.

    Raises StorageError when nothing can be written there, at once.
    """
    home = None if storage.is_s3(out) else Path(out).resolve().parent
    try:
        if home is None:
            storage.require(out)
        else:
            home.mkdir(parents=True, exist_ok=True)
        aside = tempfile.TemporaryDirectory(dir=home, prefix=storage.UNFINISHED)
    except OSError as error:
        raise StorageError(f"a place to write at {out}", error.strerror or "none", "check path and rights") from error
    with aside as folder:
        fresh = Path(folder) / out.rsplit("/", 1)[-1]
        answers = Answers(fresh)
        yield answers
        answers.close()
        if home is None:
            storage.upload(fresh, out)
        else:
            fresh.replace(out)


def columns(
    found: Mapping[str, npt.NDArray[np.float32]], labels: Mapping[str, tuple[str, ...]], missing: npt.NDArray[np.bool_]
) -> dict[str, pa.Array]:
    """Columns `label` and `probability_LABEL`; of several models, after their names and an underscore.

    found: (rows, classes) by model.  missing: (rows,), which have no text, and so no answer.
    """
    import numpy as np
    import pyarrow as pa

    made: dict[str, pa.Array] = {}
    for model, probabilities in found.items():
        prefix = f"{model}_" if len(found) > 1 else ""
        codes = pa.array(probabilities.argmax(axis=1).astype(np.int32), mask=missing)
        made[f"{prefix}label"] = pa.array(list(labels[model])).take(codes)
        for code, label in enumerate(labels[model]):
            made[f"{prefix}probability_{label}"] = pa.array(probabilities[:, code], mask=missing)
    return made


def names(labels: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Of the columns of models with these labels."""
    import numpy as np

    of_no_rows = {model: np.zeros((0, len(each)), np.float32) for model, each in labels.items()}
    return list(columns(of_no_rows, labels, np.zeros(0, bool)))
