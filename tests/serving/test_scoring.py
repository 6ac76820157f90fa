"""Batch scoring: every row is answered, in order, some at a time; and nothing is left of what went wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from components.data import files
from components.errors import AdapterlineError, BundleError, ConfigError, DataError, StorageError
from components.serving import classifier, models, scoring, settings
from components.serving.models import Models
from components.serving.scoring import Progress, score, windows
from tests.conftest import toy_rows, write_csv
from tests.serving.conftest import Bundle

TEXTS = [" ".join(text.split()[: 1 + number % 10]) for number, (text, _) in enumerate(toy_rows(300, seed=4))]
ROWS = {"key": [f"k{row}" for row in range(len(TEXTS))], "text": TEXTS}


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "WINDOW_ROWS", 64)


@pytest.fixture(scope="module")
def one(bundle_of: Bundle) -> Models:
    return models.loaded([str(bundle_of())])


@pytest.fixture(scope="module")
def expected(bundle_of: Bundle) -> np.ndarray:
    return classifier.load(bundle_of()).probabilities(TEXTS)


def silent(progress: Progress) -> None:
    """A report that tells nobody."""


def scored(chosen: Models, source: Path, out: Path, **more: str) -> pa.Table:
    score(settings.parsed(models=("unused",), source=str(source), out=str(out), **more), chosen, silent)
    return pq.read_table(out) if out.suffix == ".parquet" else pyarrow.csv.read_csv(out)


def written(folder: Path, form: str, table: pa.Table | None = None) -> Path:
    """The rows in a file of this ending; without one, in a folder of two."""
    table, path = table if table is not None else pa.table(ROWS), folder / f"rows.{form}"
    if form == "folder":
        path.mkdir()
        for number, part in enumerate((table.slice(0, 100), table.slice(100))):
            pq.write_table(part, path / f"{number}.parquet")
    elif form == "parquet":
        pq.write_table(table, path)
    elif form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        options = pyarrow.csv.WriteOptions(delimiter="\t" if form == "tsv" else ",")
        with gzip.open(path, "wb") if form.endswith("gz") else path.open("wb") as file:
            pyarrow.csv.write_csv(table, file, options)
    return path


@pytest.mark.parametrize("form", ["csv", "csv.gz", "tsv", "jsonl", "parquet", "folder"])
def test_rows_are_answered_in_their_order(form: str, one: Models, expected: np.ndarray, tmp_path: Path) -> None:
    found = scored(one, written(tmp_path, form), tmp_path / "out.parquet", id="key")
    assert found.column_names == ["row", "key", "label", "probability_bad", "probability_good"]
    assert found["row"].to_pylist() == list(range(len(TEXTS)))
    assert found["key"].to_pylist() == ROWS["key"]
    assert found["probability_good"].to_numpy() == pytest.approx(expected[:, 1], abs=1e-6)
    assert found["label"].to_pylist() == [("bad", "good")[code] for code in expected.argmax(axis=1)]


def test_answers_as_csv(one: Models, expected: np.ndarray, tmp_path: Path) -> None:
    found = scored(one, written(tmp_path, "csv"), tmp_path / "out.csv")
    assert found["probability_bad"].to_numpy() == pytest.approx(expected[:, 0], abs=1e-6)


def test_several_models_have_columns_each_and_share_what_they_can(bundle_of: Bundle, tmp_path: Path) -> None:
    folders = [bundle_of("houlsby"), bundle_of("lora"), bundle_of(labels=4), bundle_of(seed=2)]
    chosen = models.loaded([str(folder) for folder in folders])
    assert [list(fleet.manifests) for fleet in chosen.fleets] == [["houlsby-1-2", "pfeiffer-1-4", "pfeiffer-2-2"]]
    found = scored(chosen, written(tmp_path, "csv"), tmp_path / "out.parquet")
    assert [name for name in found.column_names if name.endswith("_label")] == [
        f"{each.name}_label" for each in folders
    ]
    for folder in folders:
        alone = classifier.load(folder)
        answers = [found[f"{folder.name}_probability_{label}"].to_numpy() for label in alone.labels]
        assert np.stack(answers, axis=1) == pytest.approx(alone.probabilities(TEXTS), abs=1e-5)


def test_models_that_cannot_share_a_batch_answer_as_they_do_alone(bundle_of: Bundle) -> None:
    """Adapters that train layer norms, and adapters behind those norms."""
    folders = [bundle_of("houlsby"), bundle_of("adapter-plus"), bundle_of(), bundle_of("adapter-plus", seed=2)]
    chosen = models.loaded([str(folder) for folder in folders])
    together = [list(fleet.manifests) for fleet in chosen.fleets]
    assert together == [["houlsby-1-2", "pfeiffer-1-2"], ["adapter-plus-1-2", "adapter-plus-2-2"]]
    found = chosen.answers(classifier.table(TEXTS))
    assert list(found) == [folder.name for folder in folders]
    for folder in folders:
        alone = classifier.load(folder).probabilities(TEXTS)
        assert found[folder.name] == pytest.approx(alone, abs=1e-5), folder.name


@pytest.mark.parametrize(("others", "together"), [(["houlsby"], 0), (["pfeiffer"], 1)])
def test_one_that_stands_behind_norms_is_alone_only_where_they_are_trained(
    bundle_of: Bundle, others: list[str], together: int
) -> None:
    chosen = models.loaded([str(bundle_of(method)) for method in ["adapter-plus", *others]])
    assert len(chosen.fleets) == together


def test_pairs(one: Models, bundle_of: Bundle, tmp_path: Path) -> None:
    seconds = TEXTS[::-1]
    pq.write_table(pa.table({"first": TEXTS, "second": seconds}), tmp_path / "rows.parquet")
    found = scored(one, tmp_path / "rows.parquet", tmp_path / "out.parquet", text="first", text_pair="second")
    expected = classifier.load(bundle_of()).probabilities(TEXTS, seconds)
    assert found["probability_good"].to_numpy() == pytest.approx(expected[:, 1], abs=1e-6)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_a_row_without_text_has_no_answer_and_is_counted(
    form: str, one: Models, expected: np.ndarray, tmp_path: Path
) -> None:
    texts = [None, *TEXTS[1:98], " \n", ""]
    source = written(tmp_path, form, pa.table({"key": range(100), "text": texts}))
    config = settings.parsed(models=("m",), source=str(source), out=str(tmp_path / "out.parquet"))
    assert score(config, one, silent).without_text == 3
    found = pq.read_table(tmp_path / "out.parquet")
    assert [row for row, label in enumerate(found["label"].to_pylist()) if label is None] == [0, 98, 99]
    assert found["probability_good"].to_numpy()[1:98] == pytest.approx(expected[1:98, 1], abs=1e-6)


def test_texts_may_be_encoded_as_categories(one: Models, expected: np.ndarray, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(TEXTS).dictionary_encode()}), tmp_path / "rows.parquet")
    found = scored(one, tmp_path / "rows.parquet", tmp_path / "out.parquet")
    assert found["probability_good"].to_numpy() == pytest.approx(expected[:, 1], abs=1e-6)


def parts(folder: Path, *tables: dict[str, object]) -> Path:
    """A folder of Parquet files, read in this order."""
    for number, each in enumerate(tables):
        pq.write_table(pa.table(each), folder / f"{number}.parquet")
    return folder


STRINGS = (
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
)


def test_each_file_may_lay_out_strings_in_its_way(
    one: Models, expected: np.ndarray, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cut = [slice(start, start + 60) for start in range(0, len(TEXTS), 60)]  # windows are of 64
    columns = [{"text": pa.array(TEXTS[rows]).cast(kind)} for rows, kind in zip(cut, STRINGS, strict=True)]
    source = parts(tmp_path_factory.mktemp("rows"), *({**each, "key": each["text"]} for each in columns))
    for out in (tmp_path / "out.parquet", tmp_path / "out.csv"):
        found = scored(one, source, out, id="key")
        assert found["key"].to_pylist() == TEXTS
        assert found["probability_good"].to_numpy() == pytest.approx(expected[:, 1], abs=1e-6)


@pytest.mark.parametrize("kind", [*STRINGS, pa.int32()], ids=str)
def test_ids_of_one_file_keep_their_type(kind: pa.DataType, one: Models, tmp_path: Path) -> None:
    keys = pa.array([str(row % 99) for row in range(len(TEXTS))]).cast(kind)
    pq.write_table(pa.table({"text": TEXTS, "key": keys}), tmp_path / "rows.parquet")
    before = pq.read_table(tmp_path / "rows.parquet")["key"]
    assert scored(one, tmp_path / "rows.parquet", tmp_path / "out.parquet", id="key")["key"].equals(before)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_one_of_several_files_may_have_nothing_in_a_column(
    empty: int, one: Models, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [{"text": TEXTS[:70], "second": TEXTS[:70], "key": list(range(70))} for _ in range(3)]
    rows[empty] = {name: [None] * 70 for name in rows[empty]}
    source = parts(tmp_path_factory.mktemp("rows"), *rows)
    found = scored(one, source, tmp_path / "out.parquet", text_pair="second", id="key")
    assert found["key"].to_pylist() == [key for each in rows for key in each["key"]]
    assert [row for row, label in enumerate(found["label"].to_pylist()) if label is None] == [
        *range(70 * empty, 70 * empty + 70)
    ]


def test_whole_numbers_as_ids_have_the_type_of_the_first_file(one: Models, tmp_path: Path) -> None:
    source = parts(
        tmp_path, *({"text": ["a"], "key": pa.array([7], kind)} for kind in (pa.int32(), pa.int64(), pa.int8()))
    )
    found = scored(one, source, tmp_path / "out.csv", id="key")
    assert found["key"].to_pylist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ([1], ["k2"], "found string in 1.parquet, int64 before it"),
        (["k1"], [2], "found int64 in 1.parquet, string before it"),
        ([1], [0.5], "found double in 1.parquet, int64 before it"),
        (pa.array([1], pa.int8()), [300], "found int64 in 1.parquet, int8 before it"),
    ],
)
def test_ids_of_several_types_are_refused(
    first: object, second: object, words: str, one: Models, tmp_path: Path
) -> None:
    source = parts(tmp_path, {"text": ["a"], "key": first}, {"text": ["b"], "key": second})
    with pytest.raises(DataError, match=f"one type of column key in all files; {words}; write it alike"):
        scored(one, source, tmp_path / "out.csv", id="key")
    assert not (tmp_path / "out.csv").exists()


def test_rows_are_read_only_as_they_are_answered(one: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, ahead = 0, []

    def endless(*_: object) -> Iterator[tuple[str, pa.Table]]:
        nonlocal read
        for _ in range(100):
            read += 10
            yield "rows", pa.table({"text": TEXTS[:10]})

    monkeypatch.setattr(files, "read", endless)
    source = written(tmp_path, "csv")
    config = settings.parsed(models=("m",), source=str(source), out=str(tmp_path / "out.parquet"))
    score(config, one, lambda progress: ahead.append(read - progress.rows))
    assert read == 1_000
    assert max(ahead) <= 64 + 10


def test_windows_are_bounded_in_rows_and_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "WINDOW_BYTES", 10_000)
    tables = [pa.table({"text": ["x" * size] * rows}) for size, rows in ((3, 500), (1_000, 200), (50_000, 2), (1, 1))]
    cut = list(windows(iter(tables)))
    assert pa.concat_tables(cut).equals(pa.concat_tables(tables))
    assert max(map(len, cut)) <= 64
    assert all(len(window) == 1 or window.nbytes < 40_000 for window in cut)


def test_progress_tells_how_much_is_left(one: Models, tmp_path: Path) -> None:
    told: list[Progress] = []
    config = settings.parsed(models=("m",), source=str(written(tmp_path, "parquet")), out=str(tmp_path / "out.parquet"))
    score(config, one, told.append)
    assert [(each.rows, each.total) for each in told][:: len(told) - 1] == [(64, 300), (300, 300)]
    assert told[-1].eta_s == 0


def test_what_breaks_off_leaves_the_answers_of_before(one: Models, tmp_path: Path) -> None:
    out = tmp_path / "answers" / "out.parquet"
    good = write_csv(tmp_path / "good.csv", toy_rows(10))
    before = scored(one, good, out)
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\n" + "word1 lovely,good\n" * 100_000 + "secret,one,too,many\n")
    with pytest.raises(DataError, match="malformed") as raised:
        scored(one, bad, out)
    assert "secret" not in str(raised.value)
    assert pq.read_table(out).equals(before)
    assert [path.name for path in out.parent.iterdir()] == ["out.parquet"]


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        ({"text": ["a"]}, DataError, "columns body in rows.parquet; found"),
        ({"body": [3]}, DataError, "texts in column body; found int64 in rows.parquet"),
        ({"body": pa.array([], pa.string())}, DataError, "rows; found none"),
    ],
)
def test_rows_that_are_no_texts_are_refused(
    content: dict[str, object], kind: type[AdapterlineError], words: str, one: Models, tmp_path: Path
) -> None:
    pq.write_table(pa.table(content), tmp_path / "rows.parquet")
    with pytest.raises(kind, match=words):
        scored(one, tmp_path / "rows.parquet", tmp_path / "out.parquet", text="body")
    assert not (tmp_path / "out.parquet").exists()


@pytest.mark.parametrize("name", ["row", "label", "probability_good"])
def test_an_id_that_would_take_the_place_of_another_column_is_refused_before_a_row_is_read(
    name: str, one: Models, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"columns of the answers have; found {name}; rename"):
        scored(one, tmp_path / "no such source.csv", tmp_path / "out.parquet", id=name)


def test_a_place_where_nothing_can_be_written_is_refused_before_a_row_is_read(one: Models, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a place to write"):
        scored(one, tmp_path / "no such source.csv", tmp_path / "file" / "out.parquet")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"out": "scored.xlsx"}, "out must end in .parquet or .csv"),
        ({"out": "rows.csv"}, "out must not be the source"),
        ({"id": "text"}, "must be different columns"),
        ({"models": ()}, "models"),
        ({"modles": ("m",)}, "modles"),
    ],
)
def test_parameters_that_do_not_fit_are_told_in_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        settings.parsed(**{"models": ("m",), "source": "rows.csv", "out": "scored.csv", **changes})
    assert "\n" not in str(raised.value)


def test_models_that_are_not_there_or_named_twice_are_refused(bundle_of: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="a complete bundle at"):
        models.loaded([str(tmp_path)])
    with pytest.raises(ConfigError, match="different models"):
        models.loaded([str(bundle_of()), str(bundle_of())])


def test_a_version_may_be_named_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    registered = ["models:/topic@production", "models:/topic/3", "topic@production", "topic/3"]
    assert all(map(models.is_registered, registered))
    assert not any(map(models.is_registered, ["topic", "out/topic", "out/topic/3", "./3", "../3", "/3"]))
    Path("topic/3").mkdir(parents=True)
    assert not models.is_registered("topic/3")
