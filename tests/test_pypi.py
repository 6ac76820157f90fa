"""Files from the package index: only the pinned bytes are ever handed out, and they are fetched once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from components import digest, pypi
from components.errors import StorageError, StorageUnavailable
from tests.toy_index import serve

CONTENT = b"what the pin promises"
ARCHIVE = pypi.Archive("Toy", "toy-1.0.zip", digest.of_bytes(CONTENT))
NOWHERE = "http://127.0.0.1:9/simple"  # the discard port: nothing answers


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ADAPTERLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pypi"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An index that serves the pinned file."""
    with serve(tmp_path / "index", "toy", {"toy-1.0.zip": CONTENT, "toy-0.9.zip": b"older"}) as url:
        monkeypatch.setenv("PIP_INDEX_URL", url)
        yield


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_file_is_the_pinned_one(index: None, cache: Path) -> None:
    assert pypi.fetch(ARCHIVE).read_bytes() == CONTENT
    assert left_in(cache) == ["toy-1.0.zip"]


def test_cached_file_needs_no_index(index: None, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pypi.fetch(ARCHIVE)
    monkeypatch.setenv("PIP_INDEX_URL", NOWHERE)
    assert pypi.fetch(ARCHIVE) == first


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], b"quite another file"], ids=["empty", "cut", "other"])
def test_damaged_cached_file_is_fetched_again(index: None, cache: Path, damage: bytes) -> None:
    cache.mkdir(parents=True)
    (cache / ARCHIVE.filename).write_bytes(damage)
    assert pypi.fetch(ARCHIVE).read_bytes() == CONTENT


def test_other_bytes_from_the_index_are_refused_and_not_kept(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path / "index", "toy", {ARCHIVE.filename: b"forged"}) as url:
        monkeypatch.setenv("PIP_INDEX_URL", url)
        with pytest.raises(StorageError) as caught:
            pypi.fetch(ARCHIVE)
    assert ARCHIVE.sha256 in caught.value.expected
    assert digest.of_bytes(b"forged") in caught.value.found
    assert not caught.value.retry_can_help
    assert left_in(cache) == []


def test_release_that_the_index_does_not_have(index: None) -> None:
    with pytest.raises(StorageError, match=r"toy-2\.0\.zip.*2 other files of Toy.*by hand"):
        pypi.fetch(pypi.Archive("Toy", "toy-2.0.zip", ARCHIVE.sha256))


def test_project_that_the_index_does_not_have(index: None) -> None:
    with pytest.raises(StorageError, match="no such project"):
        pypi.fetch(pypi.Archive("other", "other-1.0.zip", ARCHIVE.sha256))


def test_index_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", NOWHERE)
    with pytest.raises(StorageUnavailable) as caught:
        pypi.fetch(ARCHIVE)
    assert "\n" not in str(caught.value)
    assert str(cache) in caught.value.todo  # where to put the file by hand
