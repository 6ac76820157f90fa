"""The embedded default: labels are signs of mean ratings, and the archive is the pinned one or none."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from components import digest, pypi
from components.config import Columns, DataConfig
from components.data import sources, vader
from components.errors import DataError, StorageError, StorageUnavailable
from tests.data.refusal import refusal
from tests.toy_index import serve

RATED = [
    (0.5, "just neutral"),
    (-0.5, "just neutral as well"),
    (0.0, "quite neutral"),
    (0.55, 'just "positive"'),
    (-0.55, "just negative, with a comma"),
    (3.9, "“very” positive"),
    (-4, 'one " quote'),
]


def archive_of(rated: list[tuple[float, str]], domain: str) -> bytes:
    """An archive laid out like the real one."""
    lines = "".join(f"{number}\t{rating}\t{text}\n" for number, (rating, text) in enumerate(rated)).encode()
    inner, outer = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        about = tarfile.TarInfo(f"hutto_ICWSM_2014/{vader.DOMAINS[domain]}_GroundTruth.txt")
        about.size = len(lines)
        tar.addfile(about, io.BytesIO(lines))
    with zipfile.ZipFile(outer, "w") as file:
        file.writestr(vader.INNER, inner.getvalue())
    return outer.getvalue()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("ADAPTERLINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "pypi").mkdir(parents=True)
    return tmp_path / "cache" / "pypi"


@pytest.fixture(scope="module")
def real_archive() -> Path:
    try:
        return pypi.fetch(vader.ARCHIVE)
    except StorageUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("domain", vader.DOMAINS)
def test_label_is_the_sign_of_a_rating_that_is_not_neutral(
    cache: Path, monkeypatch: pytest.MonkeyPatch, domain: str
) -> None:
    content = archive_of(RATED, domain)
    monkeypatch.setattr(vader, "ARCHIVE", pypi.Archive("toy", "toy.zip", digest.of_bytes(content)))
    (cache / "toy.zip").write_bytes(content)
    rows = vader.read(domain).to_pydict()
    assert rows == {
        "text": [text for _, text in RATED[3:]],
        "label": ["positive", "negative", "positive", "negative"],
    }


@pytest.mark.parametrize("domain", vader.DOMAINS)
def test_real_domain_is_read_in_full(real_archive: Path, domain: str) -> None:
    """Against a second reading of the same file, without Arrow."""
    with zipfile.ZipFile(real_archive) as outer, tarfile.open(fileobj=io.BytesIO(outer.read(vader.INNER))) as inner:
        member = inner.extractfile(f"hutto_ICWSM_2014/{vader.DOMAINS[domain]}_GroundTruth.txt")
        assert member is not None
        lines = [line.split("\t", 2) for line in member.read().decode().splitlines()]
    expected = [
        {"text": text, "label": "positive" if float(rating) > 0 else "negative"}
        for _, rating, text in lines
        if abs(float(rating)) > 0.5
    ]
    assert vader.read(domain).to_pylist() == expected
    assert {row["label"] for row in expected} == {"positive", "negative"}


def test_columns_of_the_configuration_are_other_sources(real_archive: Path) -> None:
    columns = Columns(text="claim", label="verdict", id="key")
    assert sources.read(DataConfig(source="vader:news", columns=columns)).table.column_names == ["text", "label"]


def test_damaged_cached_archive_is_fetched_again(cache: Path, real_archive: Path) -> None:
    (cache / vader.ARCHIVE.filename).write_bytes(real_archive.read_bytes()[:1000])
    assert vader.read("news").num_rows > 2000


def test_archive_with_another_sha256_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forged = archive_of(RATED, "news")
    with serve(tmp_path / "index", vader.ARCHIVE.project, {vader.ARCHIVE.filename: forged}) as url:
        monkeypatch.setenv("PIP_INDEX_URL", url)
        error = refusal(lambda: vader.read("news"), StorageError)
    assert vader.ARCHIVE.sha256 in error.expected


def test_unknown_domain_is_refused(cache: Path) -> None:
    error = refusal(lambda: sources.read(DataConfig(source="vader:books")), DataError)
    assert "tweets, movies, news, amazon" in error.expected
    assert error.found == "'books'"
