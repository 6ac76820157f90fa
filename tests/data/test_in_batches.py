"""Work in batches: what comes out is what a few plain lines make of all rows at once, and no batch border shows."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from datasets import Dataset

from components.config import DataConfig, SplitConfig
from components.data import files, ids, rows, sources
from components.data.split import assign, split
from components.data.spool import ROWS, batches, chosen, spooled
from components.errors import DataError, StorageError
from tests.data.refusal import SECRET, refusal

LABELS = ("bad", "good", "odd")
ROOT = Path(__file__).parent.parent.parent


def drawn(count: int, seed: int, pairs: bool = False) -> Dataset:
    """Few words in any case, so that many texts are the same and many contradict each other."""
    rng = random.Random(seed)  # noqa: S311  # not for secrets
    words = [f"w{number}" for number in range(60)] + ["Ärger", "ärger", "straße", "STRASSE", "", " "]

    def text() -> str:
        return " ".join(rng.choice((str.upper, str.lower))(word) for word in rng.choices(words, k=rng.randint(0, 3)))

    columns: dict[str, list[str]] = {"text": [text() for _ in range(count)]}
    if pairs:
        columns["text_pair"] = [rng.choice(("yes", "No", "no ")) for _ in range(count)]
    columns["label"] = rng.choices(LABELS, (1, 1000, 1), k=count)
    return Dataset.from_dict(columns)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("bucket", [rows.BUCKET_ROWS, 900])
def test_cleaned_as_by_a_dictionary(monkeypatch: pytest.MonkeyPatch, pairs: bool, bucket: int) -> None:
    monkeypatch.setattr(rows, "BUCKET_ROWS", bucket)
    table = drawn(2 * ROWS + 500, seed=1, pairs=pairs)
    kin: dict[str, list[tuple[str, ...]]] = {}
    for row in table:
        texts = [row[name] for name in ("text", "text_pair") if name in row]
        kin.setdefault(rows.row_id(*texts), []).append((*texts, row["label"]))
    alike = {row: found for row, found in sorted(kin.items()) if len({each[-1] for each in found}) == 1}
    result = rows.clean(table, LABELS)
    kept = {row: (*texts, LABELS.index(label)) for row, (*texts, label) in ((r, min(f)) for r, f in alike.items())}
    assert {row["row"]: tuple(list(row.values())[1:]) for row in result.table} == kept
    assert list(result.table["row"]) == list(kept)
    assert result.contradicting == tuple(sorted(kin.keys() - alike.keys()))
    assert result.contradicting
    assert result.contradicting_rows == sum(len(kin[row]) for row in result.contradicting)
    assert result.exact_duplicates == sum(len(found) - 1 for found in alike.values())


def test_a_label_that_is_none_of_those_is_refused() -> None:
    refusal(lambda: rows.clean(Dataset.from_dict({"text": ["a", SECRET], "label": ["bad", SECRET]}), LABELS))


@pytest.mark.parametrize("pairs", [False, True])
def test_digest_is_that_of_sorted_hashes_as_ever(pairs: bool) -> None:
    """Ledgers hold it: another recipe would have everything split and trained again."""
    table = drawn(ROWS + 700, seed=2, pairs=pairs)
    names = [name for name in ("text", "text_pair", "label") if name in table.column_names]
    hashes = [hashlib.sha256("\x1f".join(row[name] for name in names).encode()).hexdigest() for row in table]
    canonical = json.dumps([names, sorted(hashes)], separators=(",", ":"))
    assert rows.data_digest(table) == hashlib.sha256(canonical.encode()).hexdigest()


def dealt(
    row_ids: list[str], labels: list[int], cluster: list[int], frozen: list[bool], config: SplitConfig
) -> list[int]:
    """Cluster by cluster: held-out ones first, then in the order of a hash, each to the part that has room for it."""
    part = [0] * len(row_ids)
    held_out = {number for number, kept in zip(cluster, frozen, strict=True) if kept}
    groups: dict[int, list[int]] = {}
    for row in range(len(row_ids)):
        groups.setdefault(cluster[row], []).append(row)
    for label in set(labels):
        mine = [group for group in groups.values() if labels[group[0]] == label]
        total = sum(map(len, mine))
        room = {2: round(config.test * total), 1: round(config.validation * total)}
        first = [group for group in mine if cluster[group[0]] in held_out]
        room[2] -= sum(map(len, first))
        queue = [group for group in mine if cluster[group[0]] not in held_out]
        queue.sort(key=lambda group: hashlib.sha256(f"{config.seed}:{row_ids[group[0]]}".encode()).digest())
        taken = [(group, 2) for group in first]
        for group in queue:
            code = next((code for code in (2, 1) if len(group) <= room[code]), 0)
            room[code] = room.get(code, 0) - len(group)
            taken.append((group, code))
        for group, code in taken:
            for row in group:
                part[row] = code
    return part


@pytest.mark.parametrize("seed", range(4))
def test_parted_as_cluster_by_cluster(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count, ghosts = 3000, 200
    numbers: npt.NDArray[np.uint64] = np.sort(rng.integers(0, 2**64, count, dtype=np.uint64))
    labels = rng.integers(0, 3, count)
    cluster = np.arange(count + ghosts)
    for row in np.flatnonzero(rng.random(count + ghosts) < 0.4)[1:]:
        cluster[row] = cluster[rng.integers(max(0, row - 30), row)]
    frozen = np.append(rng.random(count) < 0.03, np.ones(ghosts, dtype=bool))
    config = SplitConfig(seed=seed)
    expected = dealt([f"{row:016x}" for row in numbers], labels.tolist(), cluster.tolist(), frozen.tolist(), config)
    assert assign(numbers, labels, cluster, frozen, config).tolist() == expected
    assert set(expected) == {0, 1, 2}


def test_stored_splits_with_wide_strings_freeze_as_well() -> None:
    """Tables that were made of pandas frames, as earlier ones were, have the type `large_string`."""
    given = [(f"some words number{number}", LABELS[number % 2]) for number in range(300)]
    table = Dataset.from_dict(dict(zip(("text", "label"), map(list, zip(*given, strict=True)), strict=True)))
    first = split(rows.clean(table, LABELS[:2]), SplitConfig(near_duplicate_jaccard=1))
    wide = pa.table({name: pa.array(first.frozen[name], pa.large_string()) for name in first.frozen.column_names})
    fewer = rows.clean(table.select(range(250)), LABELS[:2])
    one, other = (
        split(fewer, SplitConfig(near_duplicate_jaccard=1), frozen) for frozen in (first.frozen, Dataset(wide))
    )
    assert one.digest == other.digest
    assert set(one.frozen["row"]) == set(other.frozen["row"]) > set(one.test["row"])


def test_ids_are_written_as_ever() -> None:
    texts = ["Hello  there", "", "x"]
    numbers = rows.row_ids(pa.table({"text": texts}))
    assert ids.hexed(numbers).to_pylist() == [rows.row_id(text) for text in texts]
    assert ids.numbers(ids.hexed(numbers).to_pylist()).tolist() == numbers.tolist()


def test_a_set_of_ids_is_a_set() -> None:
    known = ids.Ids(np.array([5, 2**64 - 1, 5], dtype=np.uint64))
    assert len(known) == 2
    assert known == {"0000000000000005", "f" * 16}
    assert {"f" * 16, "0" * 16} & known == {"f" * 16}
    assert "0000000000000006" not in known


LINES = [
    ([1, 2.0, 3], ["1", "2", "3"]),
    ([None, "a", "b"], ["", "a", "b"]),
    (["2024-01-31", "2024-02-01", "soon"], ["2024-01-31", "2024-02-01", "soon"]),
    (["2024-01-31T10:00:00", "2024-01-31", "x"], ["2024-01-31T10:00:00", "2024-01-31", "x"]),
    ([True, False, True], ["true", "false", "true"]),
]


def json_rows(path: Path, texts: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "label": "cat", "x": len(str(text))}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize(("texts", "expected"), LINES)
@pytest.mark.parametrize("block", [8, 60, 1 << 24])
def test_json_columns_have_one_type_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[Any], expected: list[str], block: int
) -> None:
    monkeypatch.setattr(files, "BLOCK", block)
    table = sources.read(DataConfig(source=str(json_rows(tmp_path / "rows.jsonl", texts)))).table
    assert list(table["text"]) == expected


@pytest.mark.parametrize("block", [8, 1 << 24])
@pytest.mark.parametrize("texts", [[1, "a"], [True, 2], ["a", {"b": 1}]], ids=str)
def test_json_column_that_changes_its_type_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[Any], block: int
) -> None:
    monkeypatch.setattr(files, "BLOCK", block)
    path = json_rows(tmp_path / "rows.jsonl", texts)
    error = refusal(lambda: sources.read(DataConfig(source=str(path))), DataError)
    assert "one type a column" in error.expected


def test_rows_without_label_are_counted_over_a_whole_file(tmp_path: Path) -> None:
    """Several blocks of CSV: 1 MiB each."""
    lines = [f"{'word ' * 20}{number},{'' if number in (3, 40_000) else 'cat'}\n" for number in range(41_000)]
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(lines))
    error = refusal(lambda: sources.read(DataConfig(source=str(path))))
    assert error.found == "2 rows without one, the first at row 4"


def test_chosen_rows_keep_their_order() -> None:
    table = Dataset.from_dict({"number": list(range(2 * ROWS + 5))})
    mask = np.random.default_rng(0).random(len(table)) < 0.3
    found = chosen(table, mask, table.data.schema)
    assert list(found["number"]) == np.flatnonzero(mask).tolist()
    assert [len(batch) for batch in batches(table)] == [ROWS, ROWS, 5]


def test_a_full_disk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full takes nothing, as a full disk does."""

    class Full:
        name = "/dev/full"

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr("tempfile.NamedTemporaryFile", lambda **_: Full())
    table = pa.table({"text": ["words " * 100] * 1000})
    refusal(lambda: spooled([table] * 100, table.schema), StorageError)


GROWTH = """
import sys, tracemalloc
from pathlib import Path
from components.config import DataConfig, SplitConfig, ValidationConfig
from components.data import expectations, ledger, rows, sources
from components.data.split import split
import pandas, scipy.sparse.csgraph, datasets, great_expectations  # not what the rows cost

store, path = sys.argv[1:]
tracemalloc.start()
read = sources.read(DataConfig(source=path))
rows.data_digest(read.table)
expectations.validate(read.table, ("bad", "good"), ValidationConfig())
parts = split(rows.clean(read.table, ("bad", "good")), SplitConfig())
record = ledger.accept(store, "model", parts, "data", "settings", 1)
ledger.load_parts(record.split_uri, record.split_digest, Path(store))
ledger.learned_rows(record.split_uri)
print(tracemalloc.get_traced_memory()[1])
"""


def test_no_step_holds_the_rows_as_objects(tmp_path: Path) -> None:
    """Each further row costs less at the peak than its text alone would as a string (some 400 bytes)."""
    peaks = []
    for count in (2 * ROWS, 4 * ROWS):
        rng = random.Random(count)  # noqa: S311  # not for secrets
        path = tmp_path / f"{count}.csv"
        with path.open("w") as file:
            file.write("text,label\n")
            for number in range(count):
                words = rng.choices(range(3000), k=rng.randint(40, 80))
                file.write(f"{' '.join(f'word{word}' for word in words)},{('bad', 'good')[number % 2]}\n")
        command = [sys.executable, "-c", GROWTH, str(tmp_path / str(count)), str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append((count, int(done.stdout.splitlines()[-1])))
    (few, low), (many, high) = peaks
    assert (high - low) / (many - few) < 250, peaks
