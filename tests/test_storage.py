"""Storage on local paths: the same words as for S3, and the same one-line errors."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from components import storage
from components.errors import StorageError


@pytest.mark.parametrize(
    ("root", "joined"),
    [("s3://bucket", "s3://bucket/a/b"), ("s3://bucket/", "s3://bucket/a/b"), ("/folder/", "/folder/a/b")],
)
def test_join(root: str, joined: str) -> None:
    assert storage.join(root, "a", "b") == joined


def test_what_is_written_is_read(tmp_path: Path) -> None:
    uri = str(tmp_path / "not" / "yet" / "there")
    assert not storage.exists(uri)
    assert storage.write(uri, b"one")
    assert storage.exists(uri)
    assert storage.write(uri, b"two")
    assert storage.read(uri) == b"two"


def test_write_if_absent_leaves_what_is_there(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    assert storage.write(uri, b"first", if_absent=True)
    assert not storage.write(uri, b"second", if_absent=True)
    assert storage.read(uri) == b"first"


def test_racing_writers_have_one_winner(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    start, won = threading.Barrier(8), []

    def write(content: bytes) -> None:
        start.wait()
        if storage.write(uri, content, if_absent=True):
            won.append(content)

    writers = [threading.Thread(target=write, args=(f"writer {number}".encode(),)) for number in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert won == [storage.read(uri)]


def test_names_are_relative_deep_and_sorted(tmp_path: Path) -> None:
    for name in ("b/two", "b/deep/one", "a"):
        storage.write(str(tmp_path / name), b"")
    assert storage.names(str(tmp_path)) == ["a", "b/deep/one", "b/two"]
    assert storage.names(str(tmp_path / "b")) == ["deep/one", "two"]


def test_names_are_those_of_whole_files_while_others_write(tmp_path: Path) -> None:
    uri = storage.join(str(tmp_path), "folder")
    assert storage.write(f"{uri}/first", b"")
    ended = threading.Event()

    def write() -> None:
        for _ in range(1000):
            storage.write(f"{uri}/second", b"")
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not ended.is_set():
        assert storage.names(uri) in (["first"], ["first", "second"])
    writer.join()


def test_nothing_has_no_names(tmp_path: Path) -> None:
    assert storage.names(str(tmp_path / "absent")) == []


def test_local_download_copies_nothing(tmp_path: Path) -> None:
    storage.write(str(tmp_path / "folder" / "file"), b"x")
    assert storage.download(str(tmp_path / "folder" / "file"), tmp_path / "target") == tmp_path / "folder" / "file"
    assert storage.download_folder(str(tmp_path / "folder"), tmp_path / "target") == tmp_path / "folder"
    assert not (tmp_path / "target").exists()


def test_uploaded_folder_is_whole(tmp_path: Path) -> None:
    contents = {"a.json": b"last", "deep/b.bin": b"\x00\x01", "c": b""}
    for name, content in contents.items():
        storage.write(str(tmp_path / "from" / name), content)
    storage.upload_folder(tmp_path / "from", str(tmp_path / "to"), last="a.json")
    assert {name: storage.read(str(tmp_path / "to" / name)) for name in storage.names(str(tmp_path / "to"))} == contents


def test_an_uploaded_file_is_a_copy(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    storage.upload(tmp_path / "file", str(tmp_path / "deep" / "copy"))
    assert storage.read(str(tmp_path / "deep" / "copy")) == storage.read(str(tmp_path / "file"))


def test_what_is_removed_is_gone_and_may_be_removed_again(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    storage.write(uri, b"")
    storage.remove(uri)
    storage.remove(uri)
    assert not storage.exists(uri)


def test_last_file_is_not_there_when_an_upload_breaks_off(tmp_path: Path) -> None:
    """Although its name sorts first."""
    for name in ("a.json", "b.bin", "c.bin"):
        storage.write(str(tmp_path / "from" / name), b"x")
    (tmp_path / "to" / "c.bin").mkdir(parents=True)  # so this one cannot be written
    with pytest.raises(StorageError):
        storage.upload_folder(tmp_path / "from", str(tmp_path / "to"), last="a.json")
    assert storage.names(str(tmp_path / "to")) == ["b.bin"]


def test_required_folder_is_made(tmp_path: Path) -> None:
    storage.require(str(tmp_path / "deep" / "store"))
    assert (tmp_path / "deep" / "store").is_dir()


FAILURES = {
    "read": lambda root: storage.read(f"{root}/absent"),
    "read folder": lambda root: storage.read(root),
    "download": lambda root: storage.download(f"{root}/absent", Path(root, "target")),
    "download a folder as file": lambda root: storage.download(root, Path(root, "target")),
    "download folder": lambda root: storage.download_folder(f"{root}/absent", Path(root, "target")),
    "download a file as folder": lambda root: storage.download_folder(f"{root}/file", Path(root, "target")),
    "write over a folder": lambda root: storage.write(root, b""),
    "write below a file": lambda root: storage.write(f"{root}/file/name", b""),
    "write below a file if absent": lambda root: storage.write(f"{root}/file/name", b"", if_absent=True),
    "write over a folder if absent": lambda root: storage.write(root, b"", if_absent=True),
    "remove a folder": lambda root: storage.remove(root),
    "require a file": lambda root: storage.require(f"{root}/file"),
    "require below a file": lambda root: storage.require(f"{root}/file/store"),
    "no bucket": lambda root: storage.read("s3:///key"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failure_is_one_line_that_names_the_place(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        FAILURES[name](str(tmp_path))
    assert "\n" not in str(caught.value)
    assert ("s3:///key" if name == "no bucket" else str(tmp_path)) in str(caught.value)
    assert not caught.value.retry_can_help
